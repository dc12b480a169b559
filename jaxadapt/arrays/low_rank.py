"""Low-rank factors A and B, applied to one use of a weight or added to the weight: shared by all variants of LoRA.

`lora_A` is (batch..., r, groups, in...) and `lora_B` is (batch..., out..., r). Only grouped convolutions have the axis
of groups: A takes all input channels, and B gives the output channels of its group.
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
    """Return s·B·A·x in the common dtype of x and the factors, with the sharding of `y`.

    Args:
        use: the product, or the operation, that uses the weight.
        scale: s, one number or an array (batch...).
        groups: the number of groups of a convolution; 1 otherwise.
        a, b: the factors.
        x, y: the input and the output of the use.
    """
    if isinstance(use, Use):
        is_number = isinstance(scale, float)
        return _use_delta(use, scale if is_number else 1.0, None if is_number else scale, a, b, x, y)
    if not isinstance(scale, float):
        a, scale = scale_factor(scale, a), 1.0
    if use.axes.batch_axes:
        factors = _batched_as_weight(use.axes, a, use.axes.out_axes), _batched_as_weight(use.axes, b, use.axes.in_axes)
        first, last = factors[::-1] if use.transposed else factors
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
def _use_delta(use: Use, scale: float, scales: Array | None, a: Array, b: Array, x: Array, y: Array) -> Array:
    """Return s·B·A·x for a product, with s a number `scale` or an array `scales` (batch...).

    Jitted, so that a model of many equal layers traces and linearizes it once. Inlined, so that the compiled program is
    the same as without jit.
    """
    batch = use.letters("batch")
    factors = (a, batch + RANK + use.letters("in")), (b, batch + use.letters("out") + RANK)
    first, last = factors[::-1] if use.transposed else factors
    free = set(use.w) - set(use.x) - set(batch)
    mid = "".join(c for c in use.y if c not in free)
    mid += "".join(c for c in batch if c not in mid) + RANK
    x = x.astype(first[0].dtype)
    h = einsum(f"{use.x},{first[1]}->{mid}", x, first[0], on=explicit_sharding(mid, (x, use.x), first))
    h = h * scale if scales is None else h * expand_to_letters(scales, batch, mid).astype(h.dtype)
    return einsum(f"{mid},{last[1]}->{use.y}", h, last[0], on=explicit_sharding(use.y, (y, use.y)))


def scale_factor(scale: float | Array, factor: Array) -> Array:
    """Multiply a factor (batch..., …) by the scale, one number or an array (batch...)."""
    return scale * factor if isinstance(scale, float) else expand_leading(scale, factor) * factor


def _as_weight(axes: Axes, groups: int, a: Array) -> Array:
    """Transpose A to the weight's axis order, with r in place of the output axes."""
    if groups > 1:
        a = a.reshape(a.shape[0], groups * a.shape[2], *a.shape[3:])
    return a.transpose([0 if i in axes.out_axes else 1 + axes.in_axes.index(i) for i in range(axes.rank)])


def _batched_as_weight(axes: Axes, factor: Array, replaced: tuple[int, ...]) -> Array:
    """Transpose A or B of experts to the weight's axis order, with r in place of the axes `replaced`."""
    order = axes.batch_axes + (replaced + axes.in_axes if replaced == axes.out_axes else axes.out_axes + replaced)
    return factor.transpose([order.index(i) for i in range(axes.rank)])


def multiply_factors(axes: Axes, a: Array, b: Array) -> Array:
    """Compute B·A in the weight's axis order."""
    batch, inputs, out = map(_letters, (axes.batch_axes, axes.in_axes, axes.out_axes))
    return einsum(f"{batch}{RANK}{inputs},{batch}{out}{RANK}->{LETTERS[: axes.rank]}", a, b)


def add_product(axes: Axes, w: Array, scale: float | Array, a: Array, b: Array) -> Array:
    """Compute W + scale·B·A for a weight that is computed once and kept.

    Up to rank `_MAX_TERMS`, the rank-one terms are added in one expression. Under jit that is one pass over the weight,
    without another array of its size. For larger ranks a product is faster; it is stored in float32 before it is added.
    A sum over an axis r is not used: XLA on CPU gives it to YNNPACK, which in jaxlib 0.10.2 reads the wrong rows of a
    factor for many shapes, such as 256 × 256 in PyTorch's layout. benchmarks/README.md lists the other alternatives.
    """
    rank_axis = len(axes.batch_axes)
    if not isinstance(scale, float):
        a, scale = scale_factor(scale, a), 1.0
    if a.shape[rank_axis] > _MAX_TERMS:
        return w + scale * multiply_factors(axes, a, b)
    # r precedes the other axes, so that each term is contiguous. The barrier keeps this transpose out of the sum.
    a, b = jax.lax.optimization_barrier((scale * a, jnp.moveaxis(b, -1, rank_axis)))
    over, batch = LETTERS[: axes.rank], _letters(axes.batch_axes)
    terms = [
        expand_to_letters(jax.lax.index_in_dim(a, k, rank_axis, keepdims=False), batch + _letters(axes.in_axes), over)
        * expand_to_letters(
            jax.lax.index_in_dim(b, k, rank_axis, keepdims=False), batch + _letters(axes.out_axes), over
        )
        for k in range(a.shape[rank_axis])
    ]
    return w + functools.reduce(jnp.add, terms)


_MAX_TERMS = 16  # the largest rank for which the terms are faster than a product


def _letters(axes: Sequence[int]) -> str:
    return "".join(LETTERS[i] for i in axes)


def run_use(use: Use | Operation, x: Array, w: Array) -> Array:
    """Compute a use with another weight of the same shape."""
    if isinstance(use, Operation):
        return use.run(x, w)
    return einsum(f"{use.x},{use.w}->{use.y}", x, w)


def expand_to_letters(vector: Array, letters: str, over: str) -> Array:
    """Reshape `vector`, whose axes are `letters`, to broadcast with an array whose axes are `over`."""
    order = sorted(range(len(letters)), key=lambda i: over.index(letters[i]))
    sizes = dict(zip(letters, vector.shape, strict=True))
    return vector.transpose(order).reshape([sizes.get(c, 1) for c in over])


def expand_over_outputs(use: Use | Operation, vector: Array, y_ndim: int) -> Array:
    """Reshape `vector` (batch..., out...) to broadcast with the result of a use."""
    if isinstance(use, Use):
        return expand_to_letters(vector, use.letters("batch") + use.letters("out"), use.y)
    return vector.reshape([-1 if i == use.out else 1 for i in range(y_ndim)])


def expand_over_weight(axes: Axes, vector: Array) -> Array:
    """Reshape `vector` (batch..., out...) to broadcast with the weight."""
    return expand_to_letters(vector, "".join(LETTERS[i] for i in axes.batch_axes + axes.out_axes), LETTERS[: axes.rank])


def einsum(subscripts: str, *operands: Array, on: NamedSharding | None = None) -> Array:
    """Compute `jax.numpy.einsum`, with the result under the sharding `on` if there is one."""
    return jax.numpy.einsum(subscripts, *operands, out_sharding=on)


def explicit_sharding(letters: str, *operands: tuple[Array, str]) -> NamedSharding | None:
    """Return the sharding of a product whose axes are `letters`, each sharded as in the first operand that has it.

    Meshes with explicit axes require it for a sum over axes that are sharded in both operands. On other meshes the
    compiler chooses the sharding, and the result is None.
    """
    mesh = jax.typeof(operands[0][0]).sharding.mesh
    if mesh.empty or not mesh.are_all_axes_explicit:
        return None
    specs: dict[str, Any] = {}
    for array, axes in reversed(operands):
        specs |= dict(zip(axes, jax.typeof(array).sharding.spec, strict=True))
    return NamedSharding(mesh, PartitionSpec(*(specs.get(letter) for letter in letters)))
