"""How the layer classes Flax itself ships use their kernel: roles of its axes, and one call as a `Use`.

Plain values in and out (numbers, strings), so that Linen and NNX share every line.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxadapt.arrays.axes import LETTERS, Axes, Use
from jaxadapt.core.errors import AttachError

DENSE = Axes(in_axes=(0,), out_axes=(1,))


def dense_use(x_ndim: int, axes: Axes) -> Use:
    """`y[..., o] = x[..., i] w[i, o]`.

    >>> dense_use(3, DENSE)
    Use(x='abc', w='cd', y='abd', axes=Axes(in_axes=(0,), out_axes=(1,), batch_axes=(), parts=None))
    """
    lead = LETTERS[: x_ndim - 1]
    i, o = LETTERS[x_ndim - 1], LETTERS[x_ndim]
    return Use(lead + i, i + o, lead + o, axes)


def general_axes(inputs: int, outputs: int, batch: int = 0) -> Axes:
    """Roles in a (batch..., in..., out...) kernel, as DenseGeneral and LinearGeneral keep it."""
    first = batch + inputs
    return Axes(tuple(range(batch, first)), tuple(range(first, first + outputs)), tuple(range(batch)))


EMBEDDING = Axes(in_axes=(0,), out_axes=(1,))


def conv_axes(ndim: int) -> Axes:
    """Roles in a (window..., in, out) kernel; the channels come first among the inputs, as in PyTorch.

    >>> conv_axes(4)
    Axes(in_axes=(2, 0, 1), out_axes=(3,), batch_axes=(), parts=None)
    """
    return Axes((ndim - 2, *range(ndim - 2)), (ndim - 1,))


def general_use(x_ndim: int, w_ndim: int, axis: Sequence[int], batch: Sequence[int], axes: Axes) -> Use:
    """The contraction of DenseGeneral: x's axes `axis` with the kernel's inputs, `batch` with its batch axes.

    Flax takes either in the order in which x has them, whatever the order they are given in.

    >>> general_use(4, 3, (-1, -2), (), general_axes(2, 1))
    Use(x='abcd', w='cde', y='abe', axes=Axes(in_axes=(0, 1), out_axes=(2,), batch_axes=(), parts=None))
    """
    x = LETTERS[:x_ndim]
    contracted, lead = ([x[i] for i in sorted(a % x_ndim for a in given)] for given in (axis, batch))
    outs = LETTERS[x_ndim : x_ndim + w_ndim - len(contracted) - len(lead)]
    rest = [c for c in x if c not in contracted and c not in lead]
    return Use(x, "".join(lead) + "".join(contracted) + outs, "".join(lead + rest) + outs, axes)


def _einsum_letters(einsum_str: str, x_ndim: int) -> tuple[str, str, str]:
    text = einsum_str.replace(" ", "")
    operands, arrow, y = text.partition("->")
    x, comma, w = operands.partition(",")
    if not arrow or not comma or "," in w or "..." in w:
        raise AttachError(f"the einsum {einsum_str!r} is not of the form 'x,w->y' with every axis of w named")
    dots = x_ndim - len(x.replace("...", ""))
    names = "".join(dict.fromkeys(c for c in x + w + y if c != "."))
    fresh = dict(zip(names, LETTERS, strict=False))
    spare = LETTERS[len(names) : len(names) + dots] if "..." in x else ""

    def letters(part: str) -> str:
        return "".join(fresh.get(c, c) for c in part).replace("...", spare)

    return letters(x), letters(w), letters(y)


def einsum_axes(einsum_str: str) -> Axes:
    """Roles of an einsum's second operand: contracted axes are inputs, axes in both x and y batch.

    >>> einsum_axes("BTNH,NHD->BTD")
    Axes(in_axes=(0, 1), out_axes=(2,), batch_axes=(), parts=None)
    """
    x, w, y = _einsum_letters(einsum_str, len(einsum_str))
    lonely = [c for c in w if c not in x and c not in y]
    if lonely:
        raise AttachError(f"the einsum {einsum_str!r} sums an axis of its weight alone; no adapter of W·x covers that")
    role = {i: "batch" if c in x and c in y else "in" if c in x else "out" for i, c in enumerate(w)}
    ins, out, batch = (tuple(i for i, r in role.items() if r == which) for which in ("in", "out", "batch"))
    return Axes(ins, out, batch)


def einsum_use(einsum_str: str, x_ndim: int, axes: Axes) -> Use:
    """One call of an einsum layer whose second operand is the weight.

    >>> einsum_use("...F,NFH->...NH", 3, Axes((1,), (2,), (0,))).y
    'debc'
    """
    return Use(*_einsum_letters(einsum_str, x_ndim), axes)
