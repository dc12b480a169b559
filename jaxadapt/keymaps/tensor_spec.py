"""What a method stores for one base weight, as a description without values."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import TypeVar

_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True)
class MethodTensor:
    """What a method stores for one site: its name, its PEFT key suffix and its two layouts.

    `axes` (in the model) and `torch` (in the file) name roles of the base weight's axes, "batch", "in",
    "out", "channels" (of a convolution's inputs), or axes of the method's own with their sizes in `own`. An empty
    torch group is a size-1 axis; "in" of a convolution is one PyTorch axis for the channels and one for each of the
    window's.

    `whole`: the tensor is a copy of the base weight itself, in both its layouts; `suffix` then goes between the
    module's name and the parameter's. `from_base`: its initial value follows from the base weight's.

    `scale_power` says what becomes of the tensor where one model holds f times the weight of the other (MaxText's
    queries): 1, it is multiplied by f as well; 0, it stays what it is; None, the method has no tensors for such
    a weight, or nobody has thought about it, and it is refused.

    `used` is for a leaf whose entries (stacked layers, fused parts) differ: for each of them, in the order of
    `Site.braced`, the size that the axis "r" has in its tensor of the file, where a larger axis of the leaf ends in
    zeros; 0 of an entry that is not adapted and has no tensor in the file. A tensor without that axis has 1 instead.
    """

    name: str
    suffix: str
    axes: tuple[str, ...]
    torch: tuple[tuple[str, ...], ...]
    own: tuple[tuple[str, int], ...] = ()
    is_copy: bool = False
    from_base: bool = False
    scale_power: int | None = None
    used: tuple[int, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Modules:
    """The PyTorch modules of a leaf's entries: of each stacked layer, and in it of each expert and fused part.

    Attributes:
        names: in the order of `Site.braced`; None where an entry is not adapted.
        sizes: of the braced axes that are not stacked, in that order.
        order: these axes in the order of the roles "batch", as a method sees them; -1 for one that PyTorch has as well.

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
        """Whether every entry is adapted."""
        return None not in self.names

    @property
    def per_layer(self) -> int:
        """How many entries a layer has."""
        return math.prod(self.sizes)

    def each(self, value: Callable[[str], _T], none: _T) -> tuple[_T, ...]:
        """A value of each entry; `none` of those that are not adapted."""
        return tuple(none if name is None else value(name) for name in self.names)
