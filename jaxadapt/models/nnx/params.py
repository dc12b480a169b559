"""What an NNX model's parameters are: an adapter's, or the base's; filters for either."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

from flax import nnx

from jaxadapt import methods
from jaxadapt.core.errors import AttachError


class AdapterParam(nnx.LoRAParam[Any]):
    """A trained adapter parameter: the filter for gradients, optimizers and persistence.

    >>> from flax import nnx
    >>> issubclass(AdapterParam, nnx.LoRAParam)
    True
    """

    @classmethod
    def named(cls, model: Any, *names: str) -> nnx.All:
        """The filter for these adapters of a model alone: for the optimizer, and for `nnx.DiffState`.

        An optimizer of all `AdapterParam`s changes inactive adapters too: weight decay, and momentum from when they
        were active, ask for no gradient. (PEFT's optimizers pass over them.)

        Args:
            model: the adapted model, or its state; a filter itself could not tell that it matches nothing.
            names: one or several.

        Raises `AttachError` for a name that the model does not carry.

        >>> import jaxadapt
        >>> model, config = nnx.Dict(q=nnx.Linear(4, 6, rngs=nnx.Rngs(0))), jaxadapt.LoraConfig(target_modules=["q"])
        >>> for name in ("fr", "de"):
        ...     model = jaxadapt.adapt(model, config, name=name, rngs=nnx.Rngs(1))
        >>> [path[2] for path, _ in nnx.to_flat_state(nnx.state(model, AdapterParam.named(model, "fr")))]
        ['fr', 'fr']
        """
        if not isinstance(model, nnx.Module | nnx.State):
            raise AttachError(f"expected a model, named(model, 'fr'), found {type(model).__name__}")
        held = nnx.to_flat_state(model if isinstance(model, nnx.State) else nnx.state(model, cls))
        present = sorted({name for path, var in held if isinstance(var, cls) for name in _names(path)})
        unknown = [name for name in names if name not in present]
        if unknown or not names:
            what = f"no adapter is called {', '.join(map(repr, unknown))}" if unknown else "name at least one adapter"
            raise AttachError(f"{what}; this model has {present}")
        return nnx.All(cls, _Named(frozenset(names)))


def _names(path: tuple[Any, ...]) -> list[Any]:
    """What an adapter may be called whose parameter lies here: what follows "lora" (or "ia3")."""
    return [b for a, b in itertools.pairwise(path) if a in methods.COLLECTIONS]


@dataclasses.dataclass(frozen=True)
class _Named:
    names: frozenset[str]

    def __call__(self, path: tuple[Any, ...], _: Any) -> bool:
        return not self.names.isdisjoint(_names(path))


BaseParam = nnx.All(nnx.Param, nnx.Not(AdapterParam))
"""The filter for the frozen rest. (`nnx.Param` alone catches adapters too, and would train the base.)"""


class LayerNumber(nnx.Variable[Any]):
    """The number of each layer in a stack whose adapters differ from layer to layer, beside their parameters.

    No parameter, so nothing trains it. The scan that runs the layers must cut it on axis 0, whatever the axis of the
    parameters is: `nnx.StateAxes({nnx.Param: 1, ...: 0})` does. A layer whose number is not cut raises
    `AttachError` in its call.

    >>> from flax import nnx
    >>> issubclass(LayerNumber, nnx.Param)
    False
    """


class TokenMask(nnx.Param[Any]):
    """Which tokens an aLoRA adapts in one call, beside its A and B; a Param, so that scans cut it as they cut those."""
