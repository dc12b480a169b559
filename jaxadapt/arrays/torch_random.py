"""PyTorch's random numbers on the CPU, drawn with NumPy: the generator of `torch.Generator().manual_seed(seed)`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxadapt.core.errors import ConfigError

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
        low_, high_ = np.float32(low), np.float32(high)
        unit = self._unit(int(np.prod(shape))).astype(np.float64)
        values = unit * np.float64(high_ - low_) + np.float64(low_)  # PyTorch multiplies and adds with one rounding
        return values.astype(np.float32).reshape(shape)

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
        pairs = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
        return pairs.ravel()[:size].astype(np.float32)

    def _unit(self, count: int) -> np.ndarray:
        return (self._words(count) & np.uint32(2**24 - 1)).astype(np.float32) * np.float32(2**-24)


def _normal_block(unit: np.ndarray) -> np.ndarray:
    """Return 16 normal values for 16 uniform ones, by the method of Box and Muller."""
    radius, angle = np.sqrt(-2 * np.log(1 - unit[:8])), np.float32(2 * np.pi) * unit[8:]
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])
