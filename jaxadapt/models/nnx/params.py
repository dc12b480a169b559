"""Variable types of an adapted NNX model, and filters for its adapter and base parameters."""

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
        """Return a filter that matches only these adapters' parameters, for an optimizer or `nnx.DiffState`.

        An optimizer of all `AdapterParam`s changes inactive adapters too: weight decay and earlier momentum act without
        a gradient. (PEFT's optimizers skip inactive adapters.)

        Args:
            model: the adapted model, or its state. It is used to check the names.
            names: one or more adapter names.

        Raises `AttachError` if no name is given, or if the model has no adapter of a name.

        >>> import jaxadapt
        >>> model, config = nnx.Dict(q=nnx.Linear(4, 6, rngs=nnx.Rngs(0))), jaxadapt.LoraConfig(target_modules=["q"])
        >>> for name in ("fr", "de"):
        ...     model = jaxadapt.adapt(model, config, name=name, rngs=nnx.Rngs(1))
        >>> [path[2] for path, _ in nnx.to_flat_state(nnx.state(model, AdapterParam.named(model, "fr")))]
        ['fr', 'fr']
        """
        if not isinstance(model, nnx.Module | nnx.State):
            raise AttachError(
                f"AdapterParam.named: expected an NNX model or its state as the first argument, found"
                f" {type(model).__name__}. Call named(model, 'fr')"
            )
        variables = nnx.to_flat_state(model if isinstance(model, nnx.State) else nnx.state(model, cls))
        present = sorted({name for path, var in variables if isinstance(var, cls) for name in _adapter_names(path)})
        unknown = [name for name in names if name not in present]
        if unknown or not names:
            problem = (
                f"no adapter is called {', '.join(map(repr, unknown))}" if unknown else "name at least one adapter"
            )
            raise AttachError(f"{problem}; this model has {present}")
        return nnx.All(cls, _Named(frozenset(names)))


def _adapter_names(path: tuple[Any, ...]) -> list[Any]:
    """Return the possible adapter names in a parameter's path: every key after a collection's ("lora", "ia3", ...)."""
    return [name for collection, name in itertools.pairwise(path) if collection in methods.COLLECTIONS]


@dataclasses.dataclass(frozen=True)
class _Named:
    """A filter that matches parameters of adapters with these names."""

    names: frozenset[str]

    def __call__(self, path: tuple[Any, ...], _: Any) -> bool:
        return not self.names.isdisjoint(_adapter_names(path))


class FrozenParam(nnx.Param[Any]):
    """A tensor of an adapter that training does not change, such as an index. It is saved with the trained ones.

    `AdapterParam` does not match it, so it has neither a gradient nor a place in the optimizer's state.

    >>> issubclass(FrozenParam, AdapterParam)
    False
    """


class SharedParam(nnx.Param[Any]):
    """A tensor that belongs to a whole adapter, such as VeRA's projections: one variable that all its layers hold.

    A scan over layers must not slice it: `nnx.StateAxes({jaxadapt.SharedParam: None, nnx.Param: 0, ...: 0})`. A layer
    that gets a slice raises `AttachError` when it is called.

    >>> from flax import nnx
    >>> issubclass(SharedAdapterParam, AdapterParam), issubclass(SharedFrozenParam, AdapterParam)
    (True, False)
    """


class SharedAdapterParam(SharedParam, AdapterParam):
    """A shared tensor that is trained."""


class SharedFrozenParam(SharedParam, FrozenParam):
    """A shared tensor that training does not change."""


BaseParam = nnx.All(nnx.Param, nnx.Not(nnx.Any(AdapterParam, FrozenParam)))
"""The filter for base parameters, which stay frozen. (`nnx.Param` matches adapter and base parameters alike.)"""


class LayerNumber(nnx.Variable[Any]):
    """The layer numbers of stacked layers whose adapter hyperparameters differ between layers.

    It is not a parameter, so no optimizer updates it. The scan over the layers must slice it on axis 0, even where it
    slices the parameters on another axis: `nnx.StateAxes({nnx.Param: 1, ...: 0})`. A layer that gets an unsliced number
    raises `AttachError` when it is called.

    >>> from flax import nnx
    >>> issubclass(LayerNumber, nnx.Param)
    False
    """


class RowParam(FrozenParam):
    """A tensor of the adapters of a batch's rows, beside a weight that they adapt; `jaxadapt.serving.route` sets it.

    A scan slices it as it slices the parameters.
    """


class SharedRowParam(SharedParam, RowParam):
    """A tensor that all rows and all layers have in common, such as VeRA's projections; see `SharedParam`."""


class CallData(nnx.Param[Any]):
    """Data of one call, such as the mask of the tokens that an aLoRA adapts, stored beside a site's tensors.

    It is an `nnx.Param`, so a scan slices it as it slices them.
    """
