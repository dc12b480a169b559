"""The weights of Flax's own layer classes, NNX's and Linen's: the roles of their axes, and one call as a `Use`.

The calls of these classes need no trace. All other layers are traced.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
from flax import nnx

from jaxadapt.arrays.axes import LETTERS, Axes, Use
from jaxadapt.core.errors import AttachError
from jaxadapt.keymaps.weight import Kind

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


# ---------------------------------------------------------------- the classes


@dataclasses.dataclass(frozen=True)
class Kernel:
    """The kernel of a layer class, as functions of a layer.

    Attributes:
        axes: `axes(layer, equation)` returns the roles of the kernel's axes.
        use: `use(layer, x, equation, axes)` returns a call with the input `x` as a `Use`.

    The equation is the one that a call of an einsum layer passes, None for the layer's own.
    """

    axes: Callable[[Any, str | None], Axes]
    use: Callable[[Any, Any, str | None, Axes], Use]


@dataclasses.dataclass(frozen=True)
class Roles:
    """The roles of a weight's axes, and the kind and groups of its keymap entry."""

    axes: Axes
    kind: Kind = "linear"
    groups: int = 1


def _tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, Sequence) else (value,)


def _nnx_einsum_use(m: Any, x: Any, equation: str | None, axes: Axes) -> Use:
    """Return a call of `nnx.Einsum`, whose adapter has the roles of the layer's own equation."""
    if equation and equation != m.einsum_str:
        called, adapted = einsum_axes(equation), einsum_axes(m.einsum_str)
        if set(called.in_axes) != set(adapted.in_axes) or set(called.batch_axes) != set(adapted.batch_axes):
            raise AttachError(
                f"an Einsum was adapted with the equation {m.einsum_str!r} and is called with {equation!r},"
                " whose input or batch axes differ. Exclude it with exclude_modules"
            )
    return einsum_use(equation or m.einsum_str, x.ndim, axes)


_DENSE = Kernel(lambda m, _: DENSE, lambda m, x, _, axes: dense_use(x.ndim, axes))
KERNELS: dict[Any, Kernel] = {
    nnx.Linear.__call__: _DENSE,
    nn.Dense.__call__: _DENSE,
    nnx.LinearGeneral.__call__: Kernel(
        lambda m, _: general_axes(len(m.in_features), len(m.out_features), len(m.batch_axis)),
        lambda m, x, _, axes: general_use(x.ndim, axes.rank, m.axis, tuple(m.batch_axis), axes),
    ),
    nn.DenseGeneral.__call__: Kernel(
        lambda m, _: general_axes(len(_tuple(m.axis)), len(_tuple(m.features)), len(_tuple(m.batch_dims))),
        lambda m, x, _, axes: general_use(x.ndim, axes.rank, _tuple(m.axis), _tuple(m.batch_dims), axes),
    ),
    nnx.Einsum.__call__: Kernel(lambda m, _: einsum_axes(m.einsum_str), _nnx_einsum_use),
    nn.Einsum.__call__: Kernel(
        lambda m, equation: einsum_axes(equation or m.einsum_str),
        lambda m, x, equation, axes: einsum_use(equation or m.einsum_str, x.ndim, axes),
    ),
}
"""The kernels of Flax's own layer classes, by their calls."""


def kernel_of(method: Callable[..., Any]) -> Kernel | None:
    """Return how a method of a layer class uses the layer's kernel if it is one of Flax's own calls, else None."""
    return KERNELS.get(method)


def roles_of(layer: Any, method: Callable[..., Any], leaf: str, equation: str | None = None) -> Roles | None:
    """Return the roles of a layer's weight if its class fixes them in this method, else None.

    Raises `AttachError` for an einsum equation that no adapter can follow.
    """
    if leaf == "embedding" and method in (nnx.Embed.__call__, nn.Embed.__call__, nn.Embed.attend):
        return Roles(EMBEDDING, "embedding")
    if leaf != "kernel":
        return None
    # Linen's ConvLocal has the call of Conv, and another kernel.
    is_conv = method in (nnx.Conv.__call__, nn.Conv.__call__) and isinstance(layer, nnx.Conv | nn.Conv)
    if is_conv and layer.mask is None:
        return Roles(conv_axes(len(_tuple(layer.kernel_size)) + 2), "conv", layer.feature_group_count)
    kernel = kernel_of(method)
    return None if kernel is None else Roles(kernel.axes(layer, equation))
