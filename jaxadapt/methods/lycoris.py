"""The parts that the methods of LyCORIS share: the dropout of rows of the change, and the factors of a size."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxadapt.configs.frozen import find_pattern_value
from jaxadapt.methods.matrix import CALL_KEY, Array, MatrixMethod, Params, Target


@dataclasses.dataclass(frozen=True)
class DroppedHparams:
    """The hyperparameters of a site.

    Attributes:
        scale: the scale s, a number or a `PerEntry`.
        rank_dropout: the probability of a row of the change to be 0.
        module_dropout: the probability of the whole change to be 0.
        unscaled_dropout: True if the rows that are kept are not divided by their share.
    """

    scale: Any
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    unscaled_dropout: bool = False

    @property
    def dropout(self) -> float:
        """The larger rate, 0 if nothing is dropped."""
        return max(self.rank_dropout, self.module_dropout)


def kept_rows(own: DroppedHparams, params: Params, rows: int) -> Array | float:
    """Return the factor of each row of the change in this call (rows); 1 without dropout."""
    if CALL_KEY not in params:
        return 1.0
    row_key, module_key = jax.random.split(params[CALL_KEY])
    kept = jax.random.bernoulli(row_key, 1 - own.rank_dropout, (rows,)).astype("float32")
    kept = kept if own.unscaled_dropout else kept / jnp.maximum(kept.mean(), 1 / rows)
    return kept * jax.random.bernoulli(module_key, 1 - own.module_dropout)


class Lycoris(MatrixMethod):
    """A method whose training drops rows of the change, or the whole change of a module."""

    drops = "change"
    kinds = frozenset({"linear", "conv"})

    def own(self, config: Any, target: Target) -> DroppedHparams:
        def scale(module: str) -> float:
            return find_pattern_value(config.alpha_pattern, module, config.alpha) / config.rank_of(module)

        is_unscaled = not config.get("rank_dropout_scale", True)
        return DroppedHparams(target.value(scale), config.rank_dropout, config.module_dropout, is_unscaled)


def split_size(size: int, factor: int = -1) -> tuple[int, int]:
    """Return PEFT's two factors of a size, the smaller one first unless `factor` divides the size.

    >>> split_size(4096), split_size(4096, 16), split_size(576, 7), split_size(6, 3)
    ((64, 64), (16, 256), (6, 96), (3, 2))
    """
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    limit = min(math.isqrt(size), size if factor == -1 else factor)
    first = max([m for m in range(2, limit + 1) if size % m == 0], default=1)
    return first, size // first
