"""Base weights in 4 or 8 bits: codes and scales that replace an array and are dequantized at each use.

`Quantized` is the format of this library. Qwix's `QArray` is accepted wherever a base weight is.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

from jaxadapt.core.errors import AttachError

Array = Any

# The 16 levels of NormalFloat: quantiles of N(0, 1), scaled to [-1, 1], with an exact 0 (Dettmers et al. 2023,
# arXiv:2305.14314, appendix E).
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
KINDS = ("nf4", "int8")
_BLOCK = 64  # the number of values that share a scale in nf4, as in bitsandbytes


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["codes", "absmax"],
    meta_fields=["kind", "inner", "order", "dtype", "place"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class Quantized:
    """One weight as codes and scales: a pytree, which can be sliced along its first axes like its arrays.

    Attributes:
        codes: for nf4 uint8 (stack..., blocks, block/2), two codes per byte, the first in the upper half; for int8 int8
            (stack..., blocks, block).
        absmax: float32 (stack..., blocks), the largest magnitude of each block.
        kind: "nf4" or "int8".
        inner: the shape of the weight without its stacked axes.
        order: the order in which these axes are flattened into blocks. PyTorch's is (batch..., out..., in...).
        dtype: the dtype of the dense weight.
        place: the sharding of the dense weight without its stacked axes, or None. Codes and scales are on the same
            devices, sharded along their blocks.
    """

    codes: Array
    absmax: Array
    kind: str
    inner: tuple[int, ...]
    order: tuple[int, ...]
    dtype: Any
    place: NamedSharding | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the dense weight."""
        return (*self.codes.shape[:-2], *self.inner)

    @property
    def ndim(self) -> int:
        """The number of axes of the dense weight."""
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """The bytes of codes and scales."""
        return self.codes.nbytes + self.absmax.nbytes

    def dense(self) -> Array:
        """Return the weight as an array of its dtype: level · absmax, rounded once."""
        if self.kind == "nf4":
            pair = jnp.stack([self.codes >> 4, self.codes & 15], -1)
            levels = jnp.take(jnp.asarray(NF4, jnp.float32), pair.reshape(*self.codes.shape[:-1], -1), axis=0)
        else:
            levels = self.codes.astype(jnp.float32) * jnp.float32(1 / 127)
        stack = self.codes.shape[:-2]
        flat = (levels * self.absmax[..., None]).reshape(*stack, -1)[..., : math.prod(self.inner)]
        ordered = flat.reshape(*stack, *(self.inner[i] for i in self.order))
        inverse = (*range(len(stack)), *(len(stack) + self.order.index(i) for i in range(len(self.inner))))
        w = ordered.transpose(inverse).astype(self.dtype)
        return w if self.place is None else jax.lax.with_sharding_constraint(w, self._full_sharding())

    def _full_sharding(self) -> NamedSharding:
        """Return the sharding of the dense weight with its stacked axes."""
        assert self.place is not None
        sharding = self.codes.sharding if not isinstance(self.codes, Tracer) else None
        stack = len(self.codes.shape) - 2
        spec = tuple(sharding.spec) if isinstance(sharding, NamedSharding) else ()
        first = (*spec, *(None,) * stack)[:stack] if sharding is not None else (PartitionSpec.UNCONSTRAINED,) * stack
        return NamedSharding(self.place.mesh, PartitionSpec(*first, *self.place.spec))

    @property
    def sharding(self) -> NamedSharding | None:
        """The `NamedSharding` of the dense weight; None if it has none, and inside jit, where it is unknown."""
        return None if self.place is None or isinstance(self.codes, Tracer) else self._full_sharding()


def quantize_weight(
    w: Array, kind: str, order: Sequence[int] | None = None, stack: int = 0, block: int | None = None
) -> Any:
    """Quantize a weight in blocks with one scale each, as bitsandbytes does.

    nf4 rounds x/absmax to the nearest of 16 levels; int8 stores round(127 · x/absmax).

    Args:
        w: a floating-point weight.
        kind: "nf4" or "int8".
        order: the order in which the axes after the first `stack` ones are flattened; their own order by default.
        stack: the number of leading axes that stay axes of the codes.
        block: the number of values that share a scale; by default 64 for nf4, and for int8 the size of the last axis in
            `order`.

    Raises:
        AttachError: the kind is unknown, or the block is not positive, or not even for nf4.

    >>> import numpy as np
    >>> w = np.linspace(-1, 1, 128, dtype="float32").reshape(2, 64)
    >>> q = quantize_weight(w, "nf4")
    >>> q.shape, q.codes.shape, q.nbytes, bool(abs(q.dense() - w).max() < 0.16)
    ((2, 64), (2, 32), 72, True)
    """
    if kind not in KINDS:
        raise AttachError(f"cannot quantize to {kind!r}; expected {' or '.join(map(repr, KINDS))}")
    inner = tuple(w.shape[stack:])
    order = tuple(range(len(inner))) if order is None else tuple(order)
    size = block if block is not None else _BLOCK if kind == "nf4" else inner[order[-1]]
    if size < 1 or (kind == "nf4" and size % 2):
        raise AttachError(f"block={size}: expected a positive{' even' if kind == 'nf4' else ''} number of values")
    sharding = w.sharding if isinstance(w, jax.Array) and not isinstance(w, Tracer) else None
    return _quantize_weight(w, kind, order, stack, size, sharding if isinstance(sharding, NamedSharding) else None)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4, 5))
def _quantize_weight(
    w: Array, kind: str, order: tuple[int, ...], stack: int, block: int, sharding: NamedSharding | None
) -> Quantized:
    inner = w.shape[stack:]
    ordered = jnp.asarray(w, jnp.float32).transpose((*range(stack), *(stack + i for i in order)))
    flat = ordered.reshape(*w.shape[:stack], -1)
    flat = jnp.pad(flat, [(0, 0)] * stack + [(0, -flat.shape[-1] % block)])
    blocks = flat.reshape(*w.shape[:stack], -1, block)
    absmax = jnp.max(jnp.abs(blocks), axis=-1)
    scaled = blocks * jnp.where(absmax > 0, 1 / absmax, 0)[..., None]
    if kind == "nf4":
        # The nearest level is the number of midpoints between levels that are below the value.
        middle = [(a + b) / 2 for a, b in itertools.pairwise(NF4)]
        level = jnp.searchsorted(jnp.asarray(middle, jnp.float32), scaled, side="left", method="compare_all")
        code = level.astype(jnp.uint8)
        code = (code[..., ::2] << 4) | code[..., 1::2]
    else:
        code = jnp.round(scaled * 127).astype(jnp.int8)
    if sharding is None:
        return Quantized(code, absmax, kind, inner, order, jnp.dtype(w.dtype))
    spec = (*sharding.spec, *(None,) * w.ndim)[: w.ndim]
    # Shard the blocks over all devices that hold a part of the weight, if their number is divisible.
    axes = tuple(name for i in order for name in _axis_names(spec[stack + i]))
    even = code.shape[stack] % math.prod(sharding.mesh.shape[name] for name in axes) == 0
    by_block = NamedSharding(sharding.mesh, PartitionSpec(*spec[:stack], axes if axes and even else None))
    code, absmax = (jax.lax.with_sharding_constraint(x, by_block) for x in (code, absmax))
    return Quantized(
        code, absmax, kind, inner, order, jnp.dtype(w.dtype), NamedSharding(sharding.mesh, PartitionSpec(*spec[stack:]))
    )


def _axis_names(axis: Any) -> tuple[str, ...]:
    """Return the mesh axes in one entry of a PartitionSpec."""
    return axis if isinstance(axis, tuple) else () if axis is None else (axis,)


def is_quantized(x: Any) -> bool:
    """Return True for a `Quantized`, a Qwix `QArray`, or the `WithAux` that holds it in Qwix's parameter trees."""
    return isinstance(x, Quantized) or _is_qwix(x, ("QArray", "WithAux"))


def is_qwix_parameter(x: Any) -> bool:
    """Return True for a `WithAux`, which holds a quantized parameter in Qwix's parameter trees."""
    return _is_qwix(x, ("WithAux",))


def _is_qwix(x: Any, names: tuple[str, ...]) -> bool:
    return type(x).__name__ in names and type(x).__module__.partition(".")[0] == "qwix"


def to_dense(x: Any) -> Any:
    """Return a quantized weight as a dense array, and any other value unchanged."""
    if isinstance(x, Quantized):
        return x.dense()
    return importlib.import_module("qwix").dequantize(_qarray(x)) if is_quantized(x) else x


def storage_array(x: Any) -> Any:
    """Return the array whose sharding is the weight's: the codes of a Qwix weight, or any other value itself."""
    return _qarray(x).qvalue if is_quantized(x) and not isinstance(x, Quantized) else x


def _qarray(x: Any) -> Any:
    array = x.array if is_qwix_parameter(x) else x
    if not _is_qwix(array, ("QArray",)):
        raise AttachError(f"cannot read a quantized parameter of Qwix: expected a QArray, found {type(array).__name__}")
    return array
