"""Specifications of the tensors that a method stores for one base weight: names and axes, no values."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True)
class MethodTensor:
    """One tensor of a method at one site: its name, its PEFT key suffix and its two layouts.

    Attributes:
        name: the tensor's name in the model.
        suffix: the end of its PEFT key, after the module's name. For a copy, the text between the names of the module
            and the parameter.
        axes: its axes in the model. Each is a role of the base weight's axes ("batch", "in", "out", or "channels" for a
            convolution's inputs without the window), or an axis of the method itself.
        torch: its axes in the file, each a group of such names. An empty group is an axis of size 1. "in" of a
            convolution is one PyTorch axis for the channels and one for each axis of the window.
        own: `(name, size)` of the method's own axes.
        is_copy: True if the tensor is a copy of the base weight, with its layouts in the model and in the file.
        from_base: True if the initial value is computed from the base weight.
        trained: False for a tensor that training must not change.
        in_file: False for a tensor that no file has: it is computed from the configuration and the base when an adapter
            is created or loaded.
        optional: True if a file may lack the tensor; it is then computed as for a new adapter.
        repeated: True if a file has a tensor of the whole adapter once more under the name of each module; a reader
            accepts files without these copies.
        numbered: True if a file has one tensor for each index of the first axis, with the index at the end of the key;
            only for a tensor of the whole adapter.
        dtype: the dtype of a tensor of integers; None for a tensor of floats.
        scale_power: if the JAX weight is f times the PyTorch weight (as MaxText's queries are), this tensor is
            multiplied by f to this power. None if the effect is not defined; converting the tensor then raises.
        used_sizes: for a leaf whose entries (stacked layers, fused parts) differ, the size of the axis "r" in each
            entry's file tensor, in the order of `Match.braced`, or 1 for a tensor without that axis. Where it is
            smaller than the axis of the leaf, the leaf ends in zeros. 0 for an entry that is not adapted: it has no
            file tensor.
    """

    name: str
    suffix: str
    axes: tuple[str, ...]
    torch: tuple[tuple[str, ...], ...]
    own: tuple[tuple[str, int], ...] = ()
    is_copy: bool = False
    from_base: bool = False
    trained: bool = True
    in_file: bool = True
    optional: bool = False
    repeated: bool = False
    numbered: bool = False
    dtype: str | None = None
    scale_power: int | None = None
    used_sizes: tuple[int, ...] | None = None


def own_tensor(name: str, shape: Sequence[int], suffix: str = "", **options: Any) -> MethodTensor:
    """Return the specification of a tensor whose axes are all the method's own, in this order.

    Args:
        suffix: the end of its key; by default a dot and the name.
        options: other fields of `MethodTensor`.

    >>> own_tensor("oft_R", (4, 6), ".oft_R.weight").torch
    (('d0',), ('d1',))
    """
    names = tuple(f"d{i}" for i in range(len(shape)))
    return MethodTensor(
        name,
        suffix or f".{name}",
        ("batch", *names),
        tuple((n,) for n in names),
        tuple(zip(names, shape, strict=True)),
        scale_power=0,
        **options,
    )


@dataclasses.dataclass(frozen=True)
class Modules:
    """The PyTorch modules of a leaf's entries: one for each stacked layer, expert and fused part.

    Attributes:
        names: the modules in the order of `Match.braced`; None for an entry that is not adapted.
        sizes: the sizes of the braced axes that are not stacked, in the same order.
        order: the positions of these axes in the order of the role "batch", as a method sees them; -1 for an axis that
            PyTorch has as well.

    >>> list(Modules(("0.q", None, "2.q")))
    ['0.q', '2.q']
    """

    names: tuple[str | None, ...] = ("",)
    sizes: tuple[int, ...] = ()
    order: tuple[int, ...] = ()

    def __iter__(self) -> Iterator[str]:
        return (name for name in self.names if name is not None)

    @property
    def all(self) -> bool:
        """True if every entry is adapted."""
        return None not in self.names

    @property
    def per_layer(self) -> int:
        """The number of entries of one layer."""
        return math.prod(self.sizes)

    def each(self, value: Callable[[str], _T], none: _T) -> tuple[_T, ...]:
        """Return `value` of each adapted entry's module, and `none` for the entries that are not adapted."""
        return tuple(none if name is None else value(name) for name in self.names)
