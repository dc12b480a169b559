"""The roles of a weight's axes, and one contraction of that weight, as plain values.

`Axes` says which axes of a base weight are inputs, outputs or batch; `Use` says, letter by letter,
how one `y = x · w` contracts it. Methods compute with these two alone, so the same few lines serve
`nnx.Linear`, `nn.DenseGeneral`, an einsum or a `dot_general` found inside somebody's own module.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXY"
RANK = "Z"  # the letter of an axis that only the adapter has; never one of LETTERS


@dataclasses.dataclass(frozen=True)
class Axes:
    """Which axes of one weight, as its own module sees it, play which role.

    `in` and `out_axes` are in PyTorch's flattening order. `batch_axes` axes index independent matrices (fused
    parts, experts); each batch entry has its own adapter matrices. `parts`, if not None, lists the
    entries of the first batch axis that are adapted at all (k and v fused, only v targeted: `(1,)`).

    >>> Axes(in_axes=(0,), out_axes=(1, 2)).sizes("in", (16, 4, 8))
    (16,)
    """

    in_axes: tuple[int, ...]
    out_axes: tuple[int, ...]
    batch_axes: tuple[int, ...] = ()
    parts: tuple[int, ...] | None = None

    @property
    def rank(self) -> int:
        return len(self.in_axes) + len(self.out_axes) + len(self.batch_axes)

    def sizes(self, role: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The sizes of the axes of `role` ("in", "out" or "batch") in a weight of `shape`."""
        sizes = tuple(shape[i] for i in getattr(self, f"{role}_axes"))
        if role == "batch" and self.parts is not None:
            return (len(self.parts), *sizes[1:])
        return sizes


@dataclasses.dataclass(frozen=True)
class Use:
    """One contraction `y = einsum("x,w->y", x, w)`: a letter for each axis of `x`, `w` and `y`.

    `x` and `y` here are split so that each of their axes meets at most one axis of `w`. In a plain
    layer the letters of `axes.in` are the contracted ones; a tied weight may be used the other way
    round (`transposed`).

    >>> use = Use("bd", "dnh", "bnh", Axes((0,), (1, 2)))
    >>> use.letters("in"), use.letters("out"), use.transposed
    ('d', 'nh', False)
    """

    x: str
    w: str
    y: str
    axes: Axes

    def letters(self, role: str) -> str:
        """The letters of the weight axes of `role` ("in", "out" or "batch")."""
        return "".join(self.w[i] for i in getattr(self.axes, f"{role}_axes"))

    @property
    def transposed(self) -> bool:
        """Whether the contraction runs over the output axes (as a tied embedding's `attend` does)."""
        return not set(self.letters("in")) <= set(self.x)


@dataclasses.dataclass(frozen=True, eq=False)
class Operation:
    """One use of a weight in a convolution, a lookup or a ragged product, as a function of the weight.

    `run(x, w)` computes it with any weight of the same axes, whatever the size of its output axis (in a grouped
    convolution also of the input channels, in a ragged product of the inputs); `out_axes` is where the output axis is
    in
    the result. A ragged product may run over the output axis instead (`transposed`).
    """

    run: Callable[[Any, Any], Any]
    out: int
    axes: Axes
    transposed: bool = False


def find_contradiction(table: Axes, own: Axes) -> str:
    """What is wrong where a table takes a layer's outputs for its inputs."""
    return (
        f"the table {table} contradicts the layer's own {own}; keymap='generic' goes by the layers, and a KeyMap of"
        " your own gives them other names. (For a PyTorch parameter stored (in, out), as a Conv1D's is, give the line"
        " fan_in_fan_out=True)"
    )


class Product(Protocol):
    """Which axes of a weight a product sums over, leaves, and has in common with what it meets."""

    @property
    def in_axes(self) -> tuple[int, ...]: ...
    @property
    def out_axes(self) -> tuple[int, ...]: ...
    @property
    def batch_axes(self) -> tuple[int, ...]: ...


def transposed_axes(axes: Axes, products: Sequence[Product], shape: Sequence[int]) -> Axes | None:
    """What a weight's products say of its axes, where none of them runs over the inputs; else None.

    Axes of size 1 count for nothing. Of a square matrix shapes do not tell, and its change would be saved transposed.

    >>> straight, back = Axes(in_axes=(0,), out_axes=(1,)), Axes(in_axes=(1,), out_axes=(0,))
    >>> transposed_axes(straight, [back], (4, 4))
    Axes(in_axes=(1,), out_axes=(0,), batch_axes=(), parts=None)
    >>> transposed_axes(straight, [straight, back], (4, 4))
    """
    long = {axis for axis, size in enumerate(shape) if size != 1}
    if not products or any(set(use.in_axes) & long == set(axes.in_axes) & long for use in products):
        return None
    return Axes(products[0].in_axes, products[0].out_axes, products[0].batch_axes)
