"""The roles of a weight's axes, and the uses of a weight in a computation, as plain values.

`Axes` assigns the roles input, output and batch to the axes of a base weight. `Use` describes one product `y = x · w`
letter by letter. Methods compute from these two values, so one implementation serves `nnx.Linear`, `nn.DenseGeneral`,
an einsum, and a `dot_general` in a custom module.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from jaxadapt.arrays.layout import TorchLayout


# ---------------------------------------------------------------- axes


LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXY"
RANK = "Z"  # the letter of the rank axis, which only the adapter has; not one of LETTERS


@dataclasses.dataclass(frozen=True)
class Axes:
    """The roles of the axes of one weight, in the shape that its module uses.

    Attributes:
        in_axes: the input axes, in PyTorch's flattening order.
        out_axes: the output axes, in PyTorch's flattening order.
        batch_axes: the axes that index independent matrices (fused parts, experts). Each entry has its own A and B.
        parts: the adapted entries of the first batch axis, such as `(1,)` if k and v are fused and only v is a
            target; None if all entries are adapted.
        torch: PyTorch's layout of the weight and of the adapter's tensors, for methods that compute in it.

    >>> Axes(in_axes=(0,), out_axes=(1, 2)).sizes("in", (16, 4, 8))
    (16,)
    """

    in_axes: tuple[int, ...]
    out_axes: tuple[int, ...]
    batch_axes: tuple[int, ...] = ()
    parts: tuple[int, ...] | None = None
    torch: TorchLayout | None = dataclasses.field(default=None, repr=False)

    @property
    def rank(self) -> int:
        """The number of axes."""
        return len(self.in_axes) + len(self.out_axes) + len(self.batch_axes)

    def sizes(self, role: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the sizes of the axes of `role` ("in", "out" or "batch") in a weight of `shape`."""
        sizes = tuple(shape[i] for i in getattr(self, f"{role}_axes"))
        if role == "batch" and self.parts is not None:
            return (len(self.parts), *sizes[1:])
        return sizes


@dataclasses.dataclass(frozen=True)
class Use:
    """One product `y = einsum("x,w->y", x, w)`, with a letter for each axis of `x`, `w` and `y`.

    The axes of `x` and `y` are split so that each corresponds to at most one axis of `w`. A plain layer sums over the
    letters of `axes.in_axes`. A tied weight may be used transposed (`transposed`).

    >>> use = Use("bd", "dnh", "bnh", Axes((0,), (1, 2)))
    >>> use.letters("in"), use.letters("out"), use.transposed
    ('d', 'nh', False)
    """

    x: str
    w: str
    y: str
    axes: Axes

    def letters(self, role: str) -> str:
        """Return the letters of the weight axes of `role` ("in", "out" or "batch")."""
        return "".join(self.w[i] for i in getattr(self.axes, f"{role}_axes"))

    @property
    def transposed(self) -> bool:
        """True if the product sums over the output axes, as a tied embedding's `attend` does."""
        return not set(self.letters("in")) <= set(self.x)


@dataclasses.dataclass(frozen=True, eq=False)
class Operation:
    """One use of a weight in a convolution, a lookup or a ragged product, as a function of the weight.

    Attributes:
        run: `run(x, w)` computes the use with any weight of the same axes. The size of the output axis may differ; in a
            grouped convolution also that of the input channels, in a ragged product that of the inputs.
        out: the position of the output axis in the result.
        axes: the roles of the weight's axes.
        transposed: True if a ragged product sums over the output axis instead of the input axis.
        slide: `slide(x, w)` is a convolution with stride 1 and without padding. Its result is (batch, out,
            positions...), with the positions in the order of the weight's axes. None for other uses and for dilated
            convolutions.
    """

    run: Callable[[Any, Any], Any]
    out: int
    axes: Axes
    transposed: bool = False
    slide: Callable[[Any, Any], Any] | None = None


def contradiction_message(keymap_axes: Axes, layer_axes: Axes) -> str:
    """Return the message for a keymap that swaps the input and output axes of a layer."""
    return (
        f"the keymap's {keymap_axes} contradicts the layer's own {layer_axes}; pass keymap='generic' to take"
        " the axes from the layers, or a KeyMap with the right axes. For a PyTorch parameter stored as (in, out), such"
        " as a Conv1D's, set fan_in_fan_out=True on its entry"
    )


class Product(Protocol):
    """The axes of a weight that a product sums over (in), keeps (out), and shares with the other operand (batch)."""

    @property
    def in_axes(self) -> tuple[int, ...]: ...
    @property
    def out_axes(self) -> tuple[int, ...]: ...
    @property
    def batch_axes(self) -> tuple[int, ...]: ...


def transposed_axes(axes: Axes, products: Sequence[Product], shape: Sequence[int]) -> Axes | None:
    """Return the axes by a weight's products, if no product sums over the input axes of `axes`; else None.

    Axes of size 1 are ignored. The shape of a square matrix does not reveal its input axis, and with the wrong axes its
    update would be saved transposed.

    >>> straight, back = Axes(in_axes=(0,), out_axes=(1,)), Axes(in_axes=(1,), out_axes=(0,))
    >>> transposed_axes(straight, [back], (4, 4))
    Axes(in_axes=(1,), out_axes=(0,), batch_axes=(), parts=None)
    >>> transposed_axes(straight, [straight, back], (4, 4))
    """
    long = {axis for axis, size in enumerate(shape) if size != 1}
    if not products or any(set(use.in_axes) & long == set(axes.in_axes) & long for use in products):
        return None
    return Axes(products[0].in_axes, products[0].out_axes, products[0].batch_axes)
