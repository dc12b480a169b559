"""A pair of low-rank factors beside one use of a weight, and in the weight: what all kinds of LoRA share.

`lora_A` is (batch..., r, groups, in...), `lora_B` (batch..., out..., r); an axis of groups is there in grouped
convolutions only, whose A sees all channels and whose B those of its group.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jaxadapt.arrays.axes import LETTERS, RANK, Axes, Operation, Use
from jaxadapt.arrays.per_entry import expand_leading

Array = Any


def low_rank_delta(
    use: Use | Operation, scale: float | Array, groups: int, a: Array, b: Array, x: Array, y: Array
) -> Array:
    """s·B·A·x, in the dtype that follows from x and the factors; laid out over devices as `y` is.

    `scale` is one number, or an array (batch...).
    """
    if isinstance(use, Use):
        one = isinstance(scale, float)
        return _product_of(use, scale if one else 1.0, None if one else scale, a, b, x, y)
    if not isinstance(scale, float):
        a, scale = scaled(scale, a), 1.0
    if use.axes.batch_axes:
        pair = _inside(use.axes, a, use.axes.out_axes), _inside(use.axes, b, use.axes.in_axes)
        first, last = pair[::-1] if use.transposed else pair
        return use.run(use.run(x.astype(first.dtype), first) * scale, last)
    h = use.run(x.astype(a.dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, _as_weight(use.axes, groups, a))
    h = jnp.moveaxis(h * scale, use.out, -1)
    if groups > 1:
        h = h.reshape(*h.shape[:-1], groups, -1)
        b = b.reshape(groups, -1, b.shape[-1])
        h = einsum("...gr,gor->...go", h, b).reshape(*h.shape[:-2], -1)
    else:
        h = h @ b.T
    return jnp.moveaxis(h, -1, use.out)


@functools.partial(jax.jit, static_argnums=(0, 1), inline=True)
def _product_of(use: Use, scale: float, by: Array | None, a: Array, b: Array, x: Array, y: Array) -> Array:
    """Jitted so that a model of many equal layers traces (and linearises) it once; inlined, so that what is
    compiled is the same as without."""
    batch = use.letters("batch")
    pair = (a, batch + RANK + use.letters("in")), (b, batch + use.letters("out") + RANK)
    first, last = pair[::-1] if use.transposed else pair
    free = set(use.w) - set(use.x) - set(batch)
    mid = "".join(c for c in use.y if c not in free)
    mid += "".join(c for c in batch if c not in mid) + RANK
    x = x.astype(first[0].dtype)
    h = einsum(f"{use.x},{first[1]}->{mid}", x, first[0], on=explicit(mid, (x, use.x), first))
    h = h * scale if by is None else h * expand_to_letters(by, batch, mid).astype(h.dtype)
    return einsum(f"{mid},{last[1]}->{use.y}", h, last[0], on=explicit(use.y, (y, use.y)))


def scaled(scale: float | Array, factor: Array) -> Array:
    """A factor (batch..., …) times the scale, one number or (batch...)."""
    return scale * factor if isinstance(scale, float) else expand_leading(scale, factor) * factor


def _as_weight(axes: Axes, groups: int, a: Array) -> Array:
    """A with its axes where the weight has them, and r in place of the outputs."""
    if groups > 1:
        a = a.reshape(a.shape[0], groups * a.shape[2], *a.shape[3:])
    return a.transpose([0 if i in axes.out_axes else 1 + axes.in_axes.index(i) for i in range(axes.rank)])


def _inside(axes: Axes, factor: Array, rank: tuple[int, ...]) -> Array:
    """A or B of experts with its axes where the weight has them, and r in place of the other side's."""
    own = axes.batch_axes + (rank + axes.in_axes if rank == axes.out_axes else axes.out_axes + rank)
    return factor.transpose([own.index(i) for i in range(axes.rank)])


def product(axes: Axes, a: Array, b: Array) -> Array:
    """B·A in the weight's own axis order."""
    batch, inputs, out = map(_letters, (axes.batch_axes, axes.in_axes, axes.out_axes))
    return einsum(f"{batch}{RANK}{inputs},{batch}{out}{RANK}->{LETTERS[: axes.rank]}", a, b)


def add_product(axes: Axes, w: Array, scale: float | Array, a: Array, b: Array) -> Array:
    """W + scale·B·A, for a weight that is made once and kept.

    Up to `_FEW` terms are added up in one expression with the rest: under jit one pass over the weight, nothing of its
    size aside. Above, the product is faster, and is written out whole, in float32, before it is added. (As a sum over
    an axis r, XLA on CPU gives it to YNNPACK, which in jaxlib 0.10.2 takes the wrong rows of a factor for many shapes:
    256 × 256 in PyTorch's layout, say.) What else was tried is listed in benchmarks/README.md.
    """
    at = len(axes.batch_axes)
    if not isinstance(scale, float):
        a, scale = scaled(scale, a), 1.0
    if a.shape[at] > _FEW:
        return w + scale * product(axes, a, b)
    # Each term is read as it lies, so r goes before what is adapted: laid out so before the sum, not within it.
    a, b = jax.lax.optimization_barrier((scale * a, jnp.moveaxis(b, -1, at)))
    over, batch = LETTERS[: axes.rank], _letters(axes.batch_axes)
    terms = [
        expand_to_letters(jax.lax.index_in_dim(a, k, at, keepdims=False), batch + _letters(axes.in_axes), over)
        * expand_to_letters(jax.lax.index_in_dim(b, k, at, keepdims=False), batch + _letters(axes.out_axes), over)
        for k in range(a.shape[at])
    ]
    return w + functools.reduce(jnp.add, terms)


_FEW = 16  # ranks up to which the terms are faster than a product


def _letters(axes: Sequence[int]) -> str:
    return "".join(LETTERS[i] for i in axes)


def run_use(use: Use | Operation, x: Array, w: Array) -> Array:
    """The use itself, with any weight of the same shape."""
    if isinstance(use, Operation):
        return use.run(x, w)
    return einsum(f"{use.x},{use.w}->{use.y}", x, w)


def expand_to_letters(vector: Array, letters: str, over: str) -> Array:
    """`vector`, whose axes are `letters`, shaped to broadcast against an array with axes `over`."""
    order = sorted(range(len(letters)), key=lambda i: over.index(letters[i]))
    sizes = dict(zip(letters, vector.shape, strict=True))
    return vector.transpose(order).reshape([sizes.get(c, 1) for c in over])


def expand_over_outputs(use: Use | Operation, vector: Array, y_ndim: int) -> Array:
    """`vector` (batch..., out...), shaped to broadcast against the use's result."""
    if isinstance(use, Use):
        return expand_to_letters(vector, use.letters("batch") + use.letters("out"), use.y)
    return vector.reshape([-1 if i == use.out else 1 for i in range(y_ndim)])


def expand_over_weight(axes: Axes, vector: Array) -> Array:
    """`vector` (batch..., out...), shaped to broadcast against the weight."""
    return expand_to_letters(vector, "".join(LETTERS[i] for i in axes.batch_axes + axes.out_axes), LETTERS[: axes.rank])


def einsum(subscripts: str, *operands: Array, on: NamedSharding | None = None) -> Array:
    return jax.numpy.einsum(subscripts, *operands, out_sharding=on)


def explicit(letters: str, *operands: tuple[Array, str]) -> NamedSharding | None:
    """The sharding of a product with these axes, each sharded as in the first operand that has it.

    Only on meshes with explicit axes, where a sum over axes that are sharded on both sides must be told what its
    result is to be; None elsewhere: there the compiler decides.
    """
    mesh = jax.typeof(operands[0][0]).sharding.mesh
    if mesh.empty or not mesh.are_all_axes_explicit:
        return None
    said: dict[str, Any] = {}
    for array, axes in reversed(operands):
        said |= dict(zip(axes, jax.typeof(array).sharding.spec, strict=True))
    return NamedSharding(mesh, PartitionSpec(*(said.get(letter) for letter in letters)))
