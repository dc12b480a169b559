"""The random numbers that fresh adapters begin with: hundreds of arrays from one compiled program.

XLA takes a tenth of a second to compile one program of JAX's generators, so bits are drawn in chunks of one size for
all arrays, and scaled on the host. Inside jit the same steps are traced, with the same values: what is done to the
bits is exact but for one multiplication.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

Array = Any

_CHUNK = 4096


@dataclasses.dataclass(frozen=True)
class Draw:
    """How a fresh array begins: all `scale` ("constant"), uniform in ±scale, or normal with deviation `scale`."""

    kind: Literal["constant", "uniform", "normal"]
    scale: float


def drawn(key: Any, wanted: Mapping[str, tuple[Draw, Sequence[int]]], dtype: Any) -> dict[str, Array]:
    """`{path: array}` for `{path: (how, shape)}`, each a function of the key and its own path and shape alone.

    Float32 values, then rounded to `dtype`; numpy arrays, or traced ones inside jit.
    """
    counts = {p: -(-math.prod(shape) // _CHUNK) for p, (draw, shape) in wanted.items() if draw.kind != "constant"}
    words = [(zlib.crc32(path.encode()), i) for path, count in counts.items() for i in range(count)]
    bits = _bits(key, np.array(words, np.uint32)) if words else np.zeros((0, _CHUNK), np.uint32)
    xp: Any = jnp if isinstance(bits, Tracer) else np
    rows = xp.asarray(bits)
    out: dict[str, Array] = {}
    at = 0
    for path, (draw, shape) in wanted.items():
        if draw.kind == "constant":
            out[path] = xp.full(shape, draw.scale, dtype)
            continue
        mine = rows[at : at + counts[path]]
        at += counts[path]
        values = _unit(xp, mine) if draw.kind == "uniform" else xp.asarray(_normal(mine))
        flat = values.reshape(-1)[: math.prod(shape)] * np.float32(draw.scale)
        out[path] = flat.reshape(shape).astype(dtype)
    return out


@jax.jit
def _bits(key: Any, words: Array) -> Array:
    """(n, chunk) random bits from n pairs of words."""

    def chunk(word: Array) -> Array:
        return jax.random.bits(jax.random.fold_in(jax.random.fold_in(key, word[0]), word[1]), (_CHUNK,), jnp.uint32)

    return jax.lax.map(chunk, words)


def _unit(xp: Any, bits: Array) -> Array:
    """Uniform in [-1, 1), multiples of 2⁻²³: every step is exact."""
    return (bits >> np.uint32(8)).astype(np.float32) * np.float32(2**-23) - np.float32(1)


@jax.jit
def _normal(bits: Array) -> Array:
    """Standard normal, by the inverse of its distribution at the middles of 2²⁴ intervals (so never at ±1)."""
    return np.float32(math.sqrt(2)) * jax.lax.erf_inv(_unit(jnp, bits) + np.float32(2**-24))
