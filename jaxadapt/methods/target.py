"""One target of a configuration as a method sees it, before its tensors are known."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxadapt.arrays.axes import PerEntry
from jaxadapt.arrays.layout import split_sizes
from jaxadapt.core.errors import ConfigError, MismatchError, warn
from jaxadapt.keymaps.keymap import Match
from jaxadapt.keymaps.weight import MethodTensor, Modules
from jaxadapt.methods.per_entry import per_entry

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Target:
    """A leaf that a configuration selects: its PyTorch modules, its sizes, and the shapes of existing tensors.

    Attributes:
        match: the leaf, with its entry in the keymap.
        modules: the PyTorch modules of the leaf's entries (stacked layers, fused parts).
        sizes: the sizes of the leaf's axes by name; empty if only the adapter is known and not its base.
        found: `{tensor name: shape of one entry}` of an existing adapter; empty for a new one. A file's tensor has the
            name of its key's end, with dots as underscores and without ".weight". The shape has the file's axes, or the
            model's if the adapter is already in a model; use it for axes of the method's own.
        has_bias: whether the base has a bias beside the leaf; None if only the adapter is known and not its base.
    """

    match: Match
    modules: Modules = dataclasses.field(default_factory=Modules)
    sizes: Mapping[str, int] = dataclasses.field(default_factory=dict[str, int])
    found: Mapping[str, Shape] = dataclasses.field(default_factory=dict[str, Shape])
    has_bias: bool | None = None

    @property
    def leaf(self) -> str:
        """The path of the leaf."""
        return self.match.leaf

    @property
    def kind(self) -> str:
        """The kind of the weight: "linear", "embedding", "conv", …"""
        return self.match.weight.kind

    @property
    def in_size(self) -> int:
        """The number of inputs of one module in PyTorch, without a convolution's window."""
        return self._size("channels" if self.kind == "conv" else "in")

    @property
    def out_size(self) -> int:
        """The number of outputs of one module in PyTorch."""
        return self._size("out")

    @property
    def window(self) -> Shape:
        """The sizes of a convolution's window, 0 where the base is not known; empty for other weights."""
        if self.kind != "conv":
            return ()
        parts = self._parts()
        return tuple(math.prod(parts.get(name, 0) for name in group) for group in self.match.weight.right[2:])

    @property
    def is_known(self) -> bool:
        """True if the numbers of inputs and outputs are known."""
        roles = self.match.weight.torch_roles
        return {*roles["in"], *roles["out"]} <= self._parts().keys()

    def _parts(self) -> dict[str, int]:
        return split_sizes(self.sizes.items(), dict(self.match.weight.sizes))

    def _size(self, role: str) -> int:
        names, sizes = self.match.weight.torch_roles[role], self._parts()
        if not all(name in sizes for name in names):
            raise LookupError(f"{self.leaf}: the sizes of the base weight are not known here; use found")
        return math.prod(sizes[name] for name in names)

    def own_size(self, tensor: str, axis: int, new: Callable[[], int]) -> int:
        """Return the size of an axis of the method's own: that of the existing tensor, or `new()` for a new adapter.

        Raises `MismatchError` if the existing tensor has no such axis.
        """
        shape = self.found.get(tensor)
        if shape is None:
            return new()
        if axis >= len(shape):
            module = next(iter(self.modules), self.leaf)
            raise MismatchError(f"{module}: {tensor}: expected at least {axis + 1} axes, found the shape {list(shape)}")
        return shape[axis]

    def value(self, field: Callable[[str], float]) -> float | PerEntry:
        """Return `field(module)`: one number if all modules agree, else a number for each."""
        values = {field(module) for module in self.modules}
        if len(values) == 1:
            return values.pop()
        return per_entry(self.modules, field, min(values))

    def rank(self, field: Callable[[str], int]) -> int:
        """Return the largest `field(module)`, the size of the axis "r" in the model."""
        return max(field(module) for module in self.modules)

    def with_ranks(self, tensors: Sequence[MethodTensor], field: Callable[[str], int]) -> tuple[MethodTensor, ...]:
        """Return the tensors with the size of the axis "r" in each module's file tensor, where modules differ."""
        ranks = self.modules.each(field, 0)
        if len(set(ranks)) == 1:
            return tuple(tensors)

        def used_sizes(tensor: MethodTensor) -> tuple[int, ...]:
            own = dict(tensor.own).get("r")  # less than the rank for a convolution with groups
            return tuple(min(rank, 1) if own is None else rank * own // max(ranks) for rank in ranks)

        return tuple(dataclasses.replace(tensor, used_sizes=used_sizes(tensor)) for tensor in tensors)

    def cap_rank(self, peft_type: str, rank: int, limit: int) -> int:
        """Return the rank of a new adapter, at most `limit`, with a warning where PEFT is silent."""
        if rank > limit:
            warn(f"{self.leaf}: {peft_type} with r={limit}, the most for the sizes of this weight, and not r={rank}")
        return min(rank, limit)

    def refuse(self, problem: str) -> ConfigError:
        """Return the error for a configuration that does not fit this target, to raise."""
        return ConfigError(f"{self.leaf}: {problem}")


def shared_value(field: str, values: Mapping[str, Any]) -> Any:
    """Return the one value that all modules of a leaf share; raise `ConfigError` if they differ."""
    distinct = sorted({repr(v) for v in values.values()})
    if len(distinct) > 1:
        listed = ", ".join(f"{m}: {v}" for m, v in list(values.items())[:4])
        raise ConfigError(
            f"{field} differs between the modules of one stacked or fused leaf ({listed}, …), but they share one"
            " computation. Use an unrolled model, or the same value for these modules"
        )
    return next(iter(values.values()))
