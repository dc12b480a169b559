"""The parameters that a configuration would adapt in a model, as a value, before anything is attached."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from jaxadapt.configs import Config
from jaxadapt.core.paths import bullets
from jaxadapt.keymaps.keymap import KeyMap
from jaxadapt.methods.registry import get_method
from jaxadapt.models import planning
from jaxadapt.models.carriers import carrier


@dataclasses.dataclass(frozen=True)
class Target:
    """One base leaf that a configuration selects.

    Attributes:
        leaf: the path of the base weight in the model.
        shape: its shape, stacked layers included.
        modules: the PyTorch modules (or parameters) in the leaf that are adapted.
        tensors: {name: shape} of the tensors that the method keeps for the leaf.

    >>> Target("q_proj.kernel", (4, 6), ("q_proj",), {"lora_A": (2, 4), "lora_B": (6, 2)}).parameters
    20
    """

    leaf: str
    shape: tuple[int, ...]
    modules: tuple[str, ...]
    tensors: Mapping[str, tuple[int, ...]]

    @property
    def parameters(self) -> int:
        """The number of parameters in the tensors."""
        return sum(math.prod(shape) for shape in self.tensors.values())

    def __str__(self) -> str:
        tensors = ", ".join(f"{name} {shape}" for name, shape in self.tensors.items())
        first, more = self.modules[0], len(self.modules) - 1
        return f"{first}{f' and {more} more' if more else ''}: {self.leaf} {self.shape}; {tensors}"


@dataclasses.dataclass(frozen=True)
class Selection:
    """The weights of a model that a configuration selects; `str(selection)` lists them.

    Attributes:
        config: the configuration as it would be attached: "all-linear" and null targets resolved.
        keymap: the keymap that names the weights.
        targets: one value a base leaf, in the model's order.

    >>> import jax, jaxadapt
    >>> base = {"q_proj": {"kernel": jax.ShapeDtypeStruct((4, 6), "float32")}}
    >>> select(base, jaxadapt.IA3Config(target_modules=["q_proj"], feedforward_modules=[])).leaves
    ('q_proj.kernel',)
    """

    config: Config
    keymap: KeyMap
    targets: tuple[Target, ...]

    @property
    def leaves(self) -> tuple[str, ...]:
        """The paths of the selected base weights."""
        return tuple(target.leaf for target in self.targets)

    @property
    def modules(self) -> tuple[str, ...]:
        """The PyTorch modules (or parameters) that are adapted."""
        return tuple(module for target in self.targets for module in target.modules)

    @property
    def parameters(self) -> int:
        """The number of parameters that the adapter would have."""
        return sum(target.parameters for target in self.targets)

    def __str__(self) -> str:
        head = f"{self.config.peft_type} on {len(self.modules)} modules in {len(self.targets)} weights, "
        head += f"{self.parameters:,} parameters (keymap {self.keymap.name!r})"
        return head + ":\n" + bullets([str(target) for target in self.targets], 40)


def select(
    model: Any,
    config: Config,
    *,
    keymap: KeyMap | str | None = None,
    stack_axes: Sequence[int] | None = None,
    example: Sequence[Any] | None = None,
) -> Selection:
    """Return what a configuration would adapt in a model, without attaching anything.

    Args:
        model: an NNX model, Linen variables or base parameters, or the shapes of any of them.
        config: for example a `LoraConfig`.
        keymap, stack_axes, example: as in `jaxadapt.adapt`.

    Raises `TargetError` if the configuration selects nothing adaptable, and `ConfigError`, `KeyMapError` or
    `AttachError` for what `jaxadapt.adapt` would refuse.

    >>> import jax, jaxadapt
    >>> base = {"q_proj": {"kernel": jax.ShapeDtypeStruct((4, 6), "float32")}}
    >>> found = select(base, jaxadapt.LoraConfig(r=2, target_modules="all-linear"))
    >>> found.modules, found.parameters
    (('q_proj',), 20)
    >>> print(found)
    LORA on 1 modules in 1 weights, 20 parameters (keymap 'generic'):
      q_proj: q_proj.kernel (4, 6); lora_A (2, 4), lora_B (6, 2)
    """
    get_method(config)
    base = carrier(model).base()
    recipe, sites = planning.plan_adapter(base, config, keymap, stack_axes, example)
    shapes = base.shapes
    return Selection(
        recipe.config,
        recipe.keymap,
        tuple(Target(site.leaf, shapes[site.leaf], site.modules, site.shapes) for site in sites),
    )
