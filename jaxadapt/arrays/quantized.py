"""Base weights in 4 or 8 bits, and back: an array's place taken by codes and scales, dequantised where it is used.

`Quantized` is our own; Qwix' `QArray` is taken as well, wherever a base weight may stand.
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
_BLOCK = 64  # numbers that share a scale in nf4, as in bitsandbytes


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["codes", "absmax"],
    meta_fields=["kind", "inner", "order", "dtype", "place"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class Quantized:
    """One weight as codes and scales; a pytree, sliced along its first axes like the arrays inside.

    Attributes:
        codes: nf4: uint8 (stack..., blocks, block/2), two codes a byte, the first in the upper half; int8: int8
            (stack..., blocks, block).
        absmax: float32 (stack..., blocks), the largest magnitude of each block.
        kind: "nf4" or "int8".
        inner: the weight's shape without its stacked axes.
        order: of these axes, in which its numbers fall into blocks: (batch..., out..., in...) is PyTorch's.
        dtype: of the dense weight.
        place: the dense weight's sharding, without its stacked axes; None where it had none. Codes and scales lie on
            the same devices, spread along their blocks.
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
        """The dense weight's."""
        return (*self.codes.shape[:-2], *self.inner)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """What codes and scales take."""
        return self.codes.nbytes + self.absmax.nbytes

    def dense(self) -> Array:
        """The weight as an array of its dtype: level x absmax, rounded once."""
        if self.kind == "nf4":
            pair = jnp.stack([self.codes >> 4, self.codes & 15], -1)
            levels = jnp.take(jnp.asarray(NF4, jnp.float32), pair.reshape(*self.codes.shape[:-1], -1), axis=0)
        else:
            levels = self.codes.astype(jnp.float32) * jnp.float32(1 / 127)
        stack = self.codes.shape[:-2]
        flat = (levels * self.absmax[..., None]).reshape(*stack, -1)[..., : math.prod(self.inner)]
        turned = flat.reshape(*stack, *(self.inner[i] for i in self.order))
        back = (*range(len(stack)), *(len(stack) + self.order.index(i) for i in range(len(self.inner))))
        w = turned.transpose(back).astype(self.dtype)
        return w if self.place is None else jax.lax.with_sharding_constraint(w, self._whole_place())

    def _whole_place(self) -> NamedSharding:
        assert self.place is not None
        known = self.codes.sharding if not isinstance(self.codes, Tracer) else None
        stack = len(self.codes.shape) - 2
        spec = tuple(known.spec) if isinstance(known, NamedSharding) else ()
        first = (*spec, *(None,) * stack)[:stack] if known is not None else (PartitionSpec.UNCONSTRAINED,) * stack
        return NamedSharding(self.place.mesh, PartitionSpec(*first, *self.place.spec))

    @property
    def sharding(self) -> NamedSharding | None:
        """The dense weight's, where it has one that says what it does axis by axis; inside jit nobody knows."""
        return None if self.place is None or isinstance(self.codes, Tracer) else self._whole_place()


def quantize_weight(
    w: Array, kind: str, order: Sequence[int] | None = None, stack: int = 0, block: int | None = None
) -> Any:
    """A weight in blocks with one scale each, as bitsandbytes does it.

    nf4: x/absmax to the nearest of 16 levels; int8: round(127 · x/absmax).

    Args:
        w: floating point; its first `stack` axes stay axes.
        order: of the others, in which they are flattened; as they are by default.
        block: how many numbers share a scale: 64 in nf4; in int8 all of the last axis in `order` by default.

    Raises `AttachError` for an unknown kind, or a block that is not even in nf4.

    >>> import numpy as np
    >>> w = np.linspace(-1, 1, 128, dtype="float32").reshape(2, 64)
    >>> q = quantize_weight(w, "nf4")
    >>> q.shape, q.codes.shape, q.nbytes, bool(abs(q.dense() - w).max() < 0.16)
    ((2, 64), (2, 32), 72, True)
    """
    if kind not in KINDS:
        raise AttachError(f"quantised weights are of {' or '.join(KINDS)}, not {kind!r}")
    inner = tuple(w.shape[stack:])
    order = tuple(range(len(inner))) if order is None else tuple(order)
    size = block if block is not None else _BLOCK if kind == "nf4" else inner[order[-1]]
    if size < 1 or (kind == "nf4" and size % 2):
        raise AttachError(f"block={size}: expected a positive number{', an even one' if kind == 'nf4' else ''}")
    at = w.sharding if isinstance(w, jax.Array) and not isinstance(w, Tracer) else None
    return _quantize_weight(w, kind, order, stack, size, at if isinstance(at, NamedSharding) else None)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4, 5))
def _quantize_weight(
    w: Array, kind: str, order: tuple[int, ...], stack: int, block: int, at: NamedSharding | None
) -> Quantized:
    inner = w.shape[stack:]
    turned = jnp.asarray(w, jnp.float32).transpose((*range(stack), *(stack + i for i in order)))
    flat = turned.reshape(*w.shape[:stack], -1)
    flat = jnp.pad(flat, [(0, 0)] * stack + [(0, -flat.shape[-1] % block)])
    blocks = flat.reshape(*w.shape[:stack], -1, block)
    absmax = jnp.max(jnp.abs(blocks), axis=-1)
    scaled = blocks * jnp.where(absmax > 0, 1 / absmax, 0)[..., None]
    if kind == "nf4":
        # Between two levels the nearer one: how many of the midpoints lie below.
        middle = [(a + b) / 2 for a, b in itertools.pairwise(NF4)]
        level = jnp.searchsorted(jnp.asarray(middle, jnp.float32), scaled, side="left", method="compare_all")
        code = level.astype(jnp.uint8)
        code = (code[..., ::2] << 4) | code[..., 1::2]
    else:
        code = jnp.round(scaled * 127).astype(jnp.int8)
    if at is None:
        return Quantized(code, absmax, kind, inner, order, jnp.dtype(w.dtype))
    spec = (*at.spec, *(None,) * w.ndim)[: w.ndim]
    # The blocks in their order, cut over every device that a part of the weight is on, where they come out even.
    axes = tuple(name for i in order for name in _names(spec[stack + i]))
    even = code.shape[stack] % math.prod(at.mesh.shape[name] for name in axes) == 0
    spread = NamedSharding(at.mesh, PartitionSpec(*spec[:stack], axes if axes and even else None))
    code, absmax = (jax.lax.with_sharding_constraint(x, spread) for x in (code, absmax))
    place = NamedSharding(at.mesh, PartitionSpec(*spec[stack:]))
    return Quantized(code, absmax, kind, inner, order, jnp.dtype(w.dtype), place)


def _names(axis: Any) -> tuple[str, ...]:
    return axis if isinstance(axis, tuple) else () if axis is None else (axis,)


def is_quantized(x: Any) -> bool:
    """Whether this is a quantised weight: ours, or Qwix' `QArray`, also as Qwix' parameter trees hold it."""
    return isinstance(x, Quantized) or _is_qwix(x, ("QArray", "WithAux"))


def is_qwix_parameter(x: Any) -> bool:
    """Whether this is how Qwix keeps a parameter of a model that it has quantised."""
    return _is_qwix(x, ("WithAux",))


def _is_qwix(x: Any, names: tuple[str, ...]) -> bool:
    return type(x).__name__ in names and type(x).__module__.partition(".")[0] == "qwix"


def to_dense(x: Any) -> Any:
    """The weight as an array; what is not quantised stays as it is."""
    if isinstance(x, Quantized):
        return x.dense()
    return importlib.import_module("qwix").dequantize(_qarray(x)) if is_quantized(x) else x


def storage_array(x: Any) -> Any:
    """What tells where a weight lies: itself, or Qwix' codes, which are laid out as the weight is."""
    return _qarray(x).qvalue if is_quantized(x) and not isinstance(x, Quantized) else x


def _qarray(x: Any) -> Any:
    inside = x.array if is_qwix_parameter(x) else x
    if not _is_qwix(inside, ("QArray",)):
        raise AttachError(f"expected a QArray in Qwix' parameter, found {type(inside).__name__}")
    return inside
