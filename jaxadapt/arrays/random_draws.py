"""Random numbers as JAX and as PyTorch draw them.

JAX draws all arrays in blocks of one size, so that one compiled program draws every adapter of a process. The values
are the same, bit for bit, inside and outside jit: all operations on the bits are exact except one multiplication.

`TorchRandom` draws as PyTorch does on the CPU after `torch.Generator().manual_seed(seed)`.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import mlir

from jaxadapt.arrays import regions
from jaxadapt.core.errors import ConfigError

# ---------------------------------------------------------------- random draws


Array = Any

_CHUNK = 4096
_BLOCK = 16  # chunks of one call; small, since the last block is filled up


@dataclasses.dataclass(frozen=True)
class Draw:
    """The initial values of an array: all `scale` ("constant"), uniform in ±scale, or normal with deviation `scale`."""

    kind: Literal["constant", "uniform", "normal"]
    scale: float

    @staticmethod
    def kaiming(fan_in: int) -> Draw:
        """Return PyTorch's Kaiming-uniform with a = √5, as for the layers of `torch.nn`: U(−1/√fan_in, 1/√fan_in)."""
        return Draw("uniform", 1 / math.sqrt(fan_in))


@dataclasses.dataclass(frozen=True, eq=False)
class Drop:
    """The dropout of one call of a layer.

    Attributes:
        rate: the probability of each entry of an input to become 0; the other entries are divided by 1 - rate.
        make_key: returns a random key.
    """

    rate: float
    make_key: Callable[[], Array]

    def __call__(self, x: Array) -> Array:
        kept = jax.random.bernoulli(self.make_key(), 1 - self.rate, x.shape)
        return jnp.where(kept, x / (1 - self.rate), 0).astype(x.dtype)


def missing_array(shape: Sequence[int], dtype: Any, why: str) -> Array:
    """Return a traced array without values; compiling a program that uses it raises `ConfigError(why)`.

    A trace cannot know if its values will be computed, since `jax.eval_shape` and `jax.jit` share one trace.
    """
    return jnp.full(tuple(shape), _MISSING.bind(why=why), dtype)


_MISSING = Primitive("missing")
_MISSING.def_abstract_eval(lambda *, why: ShapedArray((), np.dtype("float32")))


def _refuse(_: Any, *, why: str) -> NoReturn:
    raise ConfigError(why)


mlir.register_lowering(_MISSING, _refuse)


def draw_arrays(key: Any, wanted: Mapping[str, tuple[Draw, Sequence[int]]], dtype: Any) -> dict[str, Array]:
    """Draw `{path: array}` for `{path: (draw, shape)}`. Each array depends only on the key, its path and its shape.

    Values are drawn in float32 and rounded to `dtype`. The results are NumPy arrays; inside jit and vmap traced ones.
    """
    sizes = {path: math.prod(shape) for path, (draw, shape) in wanted.items() if draw.kind != "constant"}
    counts = {path: -(-size // _CHUNK) for path, size in sizes.items()}
    words = [(zlib.crc32(path.encode()), i) for path, count in counts.items() for i in range(count)]
    words += [(0, 0)] * (-len(words) % _BLOCK)
    xp: Any = jnp if regions.is_tracing(key) else np
    step = _BLOCK if xp is np else max(1, len(words))  # inside jit, each call is compiled again
    blocks = (_bits(key, np.array(words[i : i + step], np.uint32)) for i in range(0, len(words), step))
    rows = xp.concatenate([np.zeros((0, _CHUNK), np.uint32), *blocks])
    chunks_of = dict(zip(counts, xp.split(rows, np.cumsum([*counts.values()], dtype=int)), strict=False))
    out: dict[str, Array] = {}
    for path, (draw, shape) in wanted.items():
        if draw.kind == "constant":
            out[path] = xp.full(shape, draw.scale, dtype)
            continue
        chunks = chunks_of[path]
        # `_normal` is compiled, so it gets complete chunks: that keeps the number of shapes small.
        values = xp.asarray(_unit(chunks) if draw.kind == "uniform" else _normal(chunks)).reshape(-1)[: sizes[path]]
        out[path] = (values * np.float32(draw.scale)).reshape(shape).astype(dtype, copy=False)
    return out


@jax.jit
def _bits(key: Any, words: Array) -> Array:
    """Return (n, chunk) random bits from n pairs of words."""

    def chunk(word: Array) -> Array:
        return jax.random.bits(jax.random.fold_in(jax.random.fold_in(key, word[0]), word[1]), (_CHUNK,), jnp.uint32)

    return jax.lax.map(chunk, words)


def _unit(bits: Array) -> Array:
    """Convert bits to uniform values in [-1, 1), multiples of 2⁻²³; every step is exact."""
    return (bits >> np.uint32(8)).astype(np.float32) * np.float32(2**-23) - np.float32(1)


@jax.jit
def _normal(bits: Array) -> Array:
    """Convert bits to standard normal values: the inverse distribution at the midpoints of 2²⁴ intervals (never ±1)."""
    return np.float32(math.sqrt(2)) * jax.lax.erf_inv(_unit(bits) + np.float32(2**-24))


# ---------------------------------------------------------------- torch random


_LARGEST_PERMUTATION = (2**32 - 1) // 20


class TorchRandom:
    """A stream of PyTorch's random numbers; each call continues it.

    >>> TorchRandom(0).uniform((2,), -1.0, 1.0).tolist()  # torch.empty(2).uniform_(-1, 1)
    [-0.007486820220947266, 0.5364435911178589]
    """

    def __init__(self, seed: int) -> None:
        """Start the stream of a seed."""
        self._state = np.random.RandomState(np.uint32(seed % 2**32))

    def _words(self, count: int) -> np.ndarray:
        return self._state.randint(0, 2**32, count, np.uint32)

    def uniform(self, shape: Sequence[int], low: float, high: float) -> np.ndarray:
        """Return float32 values as `torch.empty(shape).uniform_(low, high)` draws them, bit for bit."""
        start = np.float32(low)
        unit = self._unit(int(np.prod(shape))).astype(np.float64)
        # PyTorch multiplies and adds with one rounding.
        return (unit * np.float64(np.float32(high) - start) + np.float64(start)).astype(np.float32).reshape(shape)

    def permutation(self, size: int, count: int) -> np.ndarray:
        """Return the first `count` entries of `torch.randperm(size)`; nothing larger is made.

        Raises `ConfigError` for a size of 214,748,364 or more, which PyTorch shuffles in another way, as a whole.
        """
        if size >= _LARGEST_PERMUTATION:
            raise ConfigError(
                f"cannot draw PyTorch's random positions among {size:,} entries: PyTorch uses another algorithm for"
                f" {_LARGEST_PERMUTATION:,} entries or more. Exclude the module with exclude_modules"
            )
        places = np.arange(count)
        swapped = places + self._words(count) % (size - places)  # draw i swaps the entries at i and at swapped[i]
        earlier = np.full(count, -1)  # the last earlier draw that swapped the same entry
        order = np.argsort(swapped, kind="stable")
        repeated = np.flatnonzero(swapped[order][1:] == swapped[order][:-1])
        earlier[order[repeated + 1]] = order[repeated]
        held = places.copy()  # the entry that draw i moves away from i: i itself, or what an earlier draw put there
        inside = np.flatnonzero((swapped < count) & (swapped != places))
        held[swapped[inside]] = inside  # of several draws the last
        while not np.array_equal(held[held], held):
            held = held[held]
        return np.where(earlier < 0, swapped, held[earlier])

    def normal(self, shape: Sequence[int]) -> np.ndarray:
        """Return float32 values as `torch.randn(shape)` draws them, to within 2.4e-7."""
        size = int(np.prod(shape))
        if size < 16:
            return self._few_normal(size).reshape(shape)
        unit, out = self._unit(size), np.empty(size, np.float32)
        for start in range(0, size - 15, 16):
            out[start : start + 16] = _normal_block(unit[start : start + 16])
        if size % 16:  # PyTorch draws the last 16 values again
            out[-16:] = _normal_block(self._unit(16))
        return out.reshape(shape)

    def _few_normal(self, size: int) -> np.ndarray:
        """Return fewer than 16 values, which PyTorch draws in pairs from float64 numbers."""
        words = self._words(4 * ((size + 1) // 2)).astype(np.uint64)
        unit = ((words[::2] << np.uint64(32) | words[1::2]) & np.uint64(2**53 - 1)).astype(np.float64) * 2.0**-53
        radius, angle = np.sqrt(-2 * np.log1p(-unit[1::2])), 2 * np.pi * unit[::2]
        return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).ravel()[:size].astype(np.float32)

    def _unit(self, count: int) -> np.ndarray:
        return (self._words(count) & np.uint32(2**24 - 1)).astype(np.float32) * np.float32(2**-24)


def _normal_block(unit: np.ndarray) -> np.ndarray:
    """Return 16 normal values for 16 uniform ones, by the method of Box and Muller."""
    radius, angle = np.sqrt(-2 * np.log(1 - unit[:8])), np.float32(2 * np.pi) * unit[8:]
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])
