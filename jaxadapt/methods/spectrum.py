"""Changes with trained values at few random positions of a spectrum."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxadapt.configs.frozen import find_pattern_value
from jaxadapt.methods.matrix import (
    Array,
    MatrixMethod,
    MethodTensor,
    Target,
    TorchRandom,
    at_least_float32,
    axes_tensor,
)


@dataclasses.dataclass(frozen=True)
class SpectrumHparams:
    """The hyperparameters of a site.

    Attributes:
        count: the number of values, a number or a `PerEntry`.
        scaling: the factor of the change.
        seed: the seed of the positions.
        order: half the length of the wavelet's filters; 0 for no wavelet.
    """

    count: Any
    scaling: float
    seed: int
    order: int = 0


class Spectrum(MatrixMethod):
    """A change with trained values at few random positions of its spectrum; `scaled` is the tensor of the values."""

    row_numbers = frozenset({"count", "scaling"})
    row_padded = frozenset({"r"})

    def count(self, config: Any, target: Target, module: str) -> int:
        """Return the number of values of a module."""
        return find_pattern_value(config.n_frequency_pattern, module, config.n_frequency)

    def tensors(self, config: Any, target: Target) -> tuple[MethodTensor, ...]:
        count = functools.partial(self.count, config, target)
        size = target.rank(count)
        if target.is_known and size > target.in_size * target.out_size:
            raise target.refuse(
                f"expected an n_frequency of at most {target.in_size * target.out_size}, the number of entries of the"
                f" weight, found {size}"
            )
        return target.with_ranks([axes_tensor(name, "r", (("r", size),)) for name in self.scaled], count)

    def own(self, config: Any, target: Target) -> SpectrumHparams:
        count = target.value(functools.partial(self.count, config, target))
        return SpectrumHparams(count, config.scaling, config.random_loc_seed)


@functools.lru_cache(maxsize=64)
def positions(seed: int, outputs: int, inputs: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows and columns of the first `count` entries of PyTorch's permutation of a weight's entries."""
    return np.divmod(TorchRandom(seed).permutation(outputs * inputs, count), inputs)


def used_values(values: Array, count: Any) -> Array:
    """Return the values of one module in float32; those beyond its own number are zero and get no gradient."""
    return jnp.where(np.arange(len(values)) < count, at_least_float32(values), 0)
