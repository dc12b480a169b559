"""Use of the kernel in Flax's own layer classes: the roles of its axes, and one call as a `Use`.

Takes and returns plain values (numbers, strings), so that Linen and NNX share all of it.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxadapt.arrays.axes import LETTERS, Axes, Use
from jaxadapt.core.errors import AttachError

DENSE = Axes(in_axes=(0,), out_axes=(1,))


def dense_use(x_ndim: int, axes: Axes) -> Use:
    """Return the use `y[..., o] = x[..., i] w[i, o]`.

    >>> dense_use(3, DENSE)
    Use(x='abc', w='cd', y='abd', axes=Axes(in_axes=(0,), out_axes=(1,), batch_axes=(), parts=None))
    """
    lead = LETTERS[: x_ndim - 1]
    i, o = LETTERS[x_ndim - 1], LETTERS[x_ndim]
    return Use(lead + i, i + o, lead + o, axes)


def general_axes(inputs: int, outputs: int, batch: int = 0) -> Axes:
    """Return the roles in a (batch..., in..., out...) kernel, the layout of DenseGeneral and LinearGeneral."""
    first = batch + inputs
    return Axes(tuple(range(batch, first)), tuple(range(first, first + outputs)), tuple(range(batch)))


EMBEDDING = Axes(in_axes=(0,), out_axes=(1,))


def conv_axes(ndim: int) -> Axes:
    """Return the roles in a (window..., in, out) kernel; the channels come first among the inputs, as in PyTorch.

    >>> conv_axes(4)
    Axes(in_axes=(2, 0, 1), out_axes=(3,), batch_axes=(), parts=None)
    """
    return Axes((ndim - 2, *range(ndim - 2)), (ndim - 1,))


def general_use(x_ndim: int, w_ndim: int, axis: Sequence[int], batch: Sequence[int], axes: Axes) -> Use:
    """Return the contraction of DenseGeneral: x's axes `axis` with the kernel's inputs, `batch` with its batch axes.

    Flax sorts both by their position in x, whatever their order in the arguments.

    >>> general_use(4, 3, (-1, -2), (), general_axes(2, 1))
    Use(x='abcd', w='cde', y='abe', axes=Axes(in_axes=(0, 1), out_axes=(2,), batch_axes=(), parts=None))
    """
    x = LETTERS[:x_ndim]
    contracted, lead = ([x[i] for i in sorted(a % x_ndim for a in axes_of_x)] for axes_of_x in (axis, batch))
    outs = LETTERS[x_ndim : x_ndim + w_ndim - len(contracted) - len(lead)]
    rest = [c for c in x if c not in contracted and c not in lead]
    return Use(x, "".join(lead) + "".join(contracted) + outs, "".join(lead + rest) + outs, axes)


def _einsum_letters(einsum_str: str, x_ndim: int) -> tuple[str, str, str]:
    text = einsum_str.replace(" ", "")
    operands, arrow, y = text.partition("->")
    x, comma, w = operands.partition(",")
    if not arrow or not comma or "," in w or "..." in w:
        raise AttachError(
            f"cannot adapt the einsum {einsum_str!r}: expected the form 'x,w->y' with every axis of w named"
        )
    dots = x_ndim - len(x.replace("...", ""))
    names = "".join(dict.fromkeys(c for c in x + w + y if c != "."))
    fresh = dict(zip(names, LETTERS, strict=False))
    spare = LETTERS[len(names) : len(names) + dots] if "..." in x else ""

    def letters(part: str) -> str:
        return "".join(fresh.get(c, c) for c in part).replace("...", spare)

    return letters(x), letters(w), letters(y)


def einsum_axes(einsum_str: str) -> Axes:
    """Return the roles of an einsum's second operand: contracted axes are inputs, axes in x and y are batch axes.

    >>> einsum_axes("BTNH,NHD->BTD")
    Axes(in_axes=(0, 1), out_axes=(2,), batch_axes=(), parts=None)
    """
    x, w, y = _einsum_letters(einsum_str, len(einsum_str))
    only_in_weight = [c for c in w if c not in x and c not in y]
    if only_in_weight:
        raise AttachError(
            f"cannot adapt the einsum {einsum_str!r}: axis {only_in_weight[0]!r} of its weight is summed and not in x"
        )
    role = {i: "batch" if c in x and c in y else "in" if c in x else "out" for i, c in enumerate(w)}
    ins, out, batch = (tuple(i for i, r in role.items() if r == which) for which in ("in", "out", "batch"))
    return Axes(ins, out, batch)


def einsum_use(einsum_str: str, x_ndim: int, axes: Axes) -> Use:
    """Return the use of the second operand in one call of an einsum layer.

    >>> einsum_use("...F,NFH->...NH", 3, Axes((1,), (2,), (0,))).y
    'debc'
    """
    return Use(*_einsum_letters(einsum_str, x_ndim), axes)
