"""The random numbers that fresh adapters begin with, drawn in chunks of one size for all arrays.

XLA takes 0.3 s to compile JAX's generator of these bits, in every new process, and NumPy 0.02 s to compute them for
a model of 30 layers: so where there are few, and the key is of JAX's usual kind and not traced, NumPy does it. The
values are the same, bit for bit, also inside jit: what is done to the bits is exact but for one multiplication.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import ShapedArray, Tracer
from jax.extend.core import Primitive
from jax.interpreters import mlir

from jaxadapt.core.errors import ConfigError

Array = Any

_CHUNK = 4096
_FEW = 4096  # chunks: from here on compiling is the shorter way
_USUAL = "threefry2x32"
_ZERO = np.zeros(1, np.uint32)


@dataclasses.dataclass(frozen=True)
class Draw:
    """How a fresh array begins: all `scale` ("constant"), uniform in ±scale, or normal with deviation `scale`."""

    kind: Literal["constant", "uniform", "normal"]
    scale: float


def missing(shape: Sequence[int], dtype: Any, why: str) -> Array:
    """An array inside jit of which only the shape is known. Compiling what needs its values raises `ConfigError(why)`.

    A trace cannot tell whether its values will be computed: `jax.eval_shape` and `jax.jit` even share one trace.
    """
    return jnp.full(tuple(shape), _MISSING.bind(why=why), dtype)


_MISSING = Primitive("missing")
_MISSING.def_abstract_eval(lambda *, why: ShapedArray((), np.dtype("float32")))


def _refuse(_: Any, *, why: str) -> NoReturn:
    raise ConfigError(why)


mlir.register_lowering(_MISSING, _refuse)


def draw_arrays(key: Any, wanted: Mapping[str, tuple[Draw, Sequence[int]]], dtype: Any) -> dict[str, Array]:
    """`{path: array}` for `{path: (how, shape)}`, each a function of the key and its own path and shape alone.

    Float32 values, then rounded to `dtype`; numpy arrays, or traced ones inside jit.
    """
    sizes = {path: math.prod(shape) for path, (draw, shape) in wanted.items() if draw.kind != "constant"}
    counts = {path: -(-size // _CHUNK) for path, size in sizes.items()}
    words = [(zlib.crc32(path.encode()), i) for path, count in counts.items() for i in range(count)]
    used = [min(_CHUNK, size - at) for size in sizes.values() for at in range(0, size, _CHUNK)]
    bits = _chunks(key, np.array(words, np.uint32), used) if words else np.zeros((0, _CHUNK), np.uint32)
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
        # (What is compiled has whole chunks, so that there are few shapes.)
        mine = mine.reshape(-1)[: sizes[path]] if draw.kind == "uniform" else xp.asarray(_normal(mine)).reshape(-1)
        values = _unit(mine) if draw.kind == "uniform" else mine[: sizes[path]]
        out[path] = (values * np.float32(draw.scale)).reshape(shape).astype(dtype, copy=False)
    return out


def fold_in(key: Any, data: int) -> Any:
    """`jax.random.fold_in`, the very key; where NumPy can take it, nothing is compiled."""
    halves = _halves(key)
    if halves is None:
        return jax.random.fold_in(key, data)
    folded = _threefry(halves, _ZERO, np.array([data], np.uint32))
    return jax.random.wrap_key_data(jax.device_put(np.concatenate(folded)), impl=_USUAL)


def _halves(key: Any) -> tuple[np.uint32, np.uint32] | None:
    """The two numbers that a key consists of, where NumPy can go on from them."""
    if isinstance(key, Tracer):
        return None
    typed = key if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else jax.random.wrap_key_data(key)
    by_position: bool = jax.config.jax_threefry_partitionable  # pyright: ignore[reportAttributeAccessIssue]
    if str(jax.random.key_impl(typed)) != _USUAL or not by_position:
        return None
    data = jax.random.key_data(typed)
    if isinstance(data, Tracer):  # inside jit or eval_shape, of a key made outside
        return None
    first, second = np.asarray(data)
    return first, second


def _chunks(key: Any, words: np.ndarray, used: Sequence[int]) -> Array:
    """(n, chunk) random bits from n pairs of words; on the host, or traced. Of each row only `used` need be there."""
    halves = None if len(words) > _FEW else _halves(key)
    if halves is None:
        return _bits(key, words)
    places = np.arange(_CHUNK, dtype=np.uint32)
    keys = _threefry(_threefry(halves, _ZERO, words[:, 0]), _ZERO, words[:, 1])
    out = np.zeros((len(words), _CHUNK), np.uint32)
    for width in set(used):
        alike = np.flatnonzero(np.equal(used, width))
        step = -(-8 * _CHUNK // width)  # what is worked on stays in the processor's cache
        for rows in (alike[start : start + step] for start in range(0, len(alike), step)):
            halves = _threefry((keys[0][rows, None], keys[1][rows, None]), _ZERO, places[:width])
            out[rows, :width] = np.bitwise_xor(*halves)
    return out


def _threefry(key: tuple[Any, Any], high: np.ndarray, low: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Threefry-2x32 with 20 rounds, as `jax.random` has it (Salmon et al., SC 2011)."""
    keys = (*key, key[0] ^ key[1] ^ np.uint32(0x1BD11BDA))
    x, y = high + keys[0], low + keys[1]
    x = np.broadcast_to(x, y.shape).copy()
    turned = np.empty_like(y)
    for step in range(5):
        for turn in ((13, 15, 26, 6), (17, 29, 16, 24))[step % 2]:
            x += y
            np.right_shift(y, np.uint32(32 - turn), out=turned)
            y <<= np.uint32(turn)
            y |= turned
            y ^= x
        x += keys[(step + 1) % 3]
        y += keys[(step + 2) % 3] + np.uint32(step + 1)
    return x, y


@jax.jit
def _bits(key: Any, words: Array) -> Array:
    """(n, chunk) random bits from n pairs of words."""

    def chunk(word: Array) -> Array:
        return jax.random.bits(jax.random.fold_in(jax.random.fold_in(key, word[0]), word[1]), (_CHUNK,), jnp.uint32)

    return jax.lax.map(chunk, words)


def _unit(bits: Array) -> Array:
    """Uniform in [-1, 1), multiples of 2⁻²³: every step is exact."""
    return (bits >> np.uint32(8)).astype(np.float32) * np.float32(2**-23) - np.float32(1)


@jax.jit
def _normal(bits: Array) -> Array:
    """Standard normal, by the inverse of its distribution at the middles of 2²⁴ intervals (so never at ±1)."""
    return np.float32(math.sqrt(2)) * jax.lax.erf_inv(_unit(bits) + np.float32(2**-24))
