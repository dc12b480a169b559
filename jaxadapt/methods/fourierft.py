"""FourierFT (Gao et al. 2024, arXiv:2405.03003) with PEFT's conventions: W + s·Re(ifft2(S)).

S (out, in) is zero except at n random positions, the same in every module of one shape, whose values are trained. The
positions are PyTorch's random numbers, which follow from the seed and are in no file. A use of the weight needs two
one-dimensional transforms and no change (out, in): y + s·Re(ifft(S·ifft(x))). The arithmetic follows PEFT's
`tuners/fourierft/layer.py`, in float32; PEFT too starts with a random change by default.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxadapt.arrays.fourier import transform
from jaxadapt.arrays.random_draws import Draw, TorchRandom
from jaxadapt.configs.fixed_bases import FourierFTConfig, WaveFTConfig
from jaxadapt.configs.frozen import find_pattern_value
from jaxadapt.keymaps.weight import MethodTensor
from jaxadapt.methods.base import Array, Params, Start, Target, at_least_float32
from jaxadapt.methods.matrix import MatrixMethod


@dataclasses.dataclass(frozen=True)
class FourierHparams:
    """The hyperparameters of a site: the number of frequencies, a number or a `PerEntry`; the factor; the seed."""

    count: Any
    scaling: float
    seed: int


class FourierFt(MatrixMethod):
    """A change with a sparse spectrum."""

    peft_type = "FOURIERFT"
    row_numbers = frozenset({"count", "scaling"})
    row_padded = frozenset({"r"})
    scaled = frozenset({"fourierft_spectrum"})
    roles = MappingProxyType({"fourierft_spectrum": "vector"})

    def tensors(self, config: FourierFTConfig, target: Target) -> tuple[MethodTensor, ...]:
        return spectrum("fourierft_spectrum", target, lambda module: count_of(config, module))

    def own(self, config: FourierFTConfig, target: Target) -> FourierHparams:
        return FourierHparams(
            target.value(lambda module: count_of(config, module)), config.scaling, config.random_loc_seed
        )

    def init(self, config: FourierFTConfig, tensor: MethodTensor, start: Start) -> Draw:
        return Draw("constant", 0.0) if config.init_weights else Draw("normal", 1.0)

    def delta(self, own: FourierHparams, params: Params, w: Array) -> Array:
        values = used_values(params["fourierft_spectrum"], own.count)
        rows, columns = positions(own.seed, *w.shape, len(values))
        dense = jnp.zeros(w.shape, values.dtype).at[rows, columns].set(values)
        return own.scaling * transform(jnp.fft.ifft2, dense).real

    def after(self, own: FourierHparams, params: Params, x: Array, y: Array) -> Array:
        values = used_values(params["fourierft_spectrum"], own.count)
        rows, columns = positions(own.seed, y.shape[-1], x.shape[-1], len(values))
        h = transform(jnp.fft.ifft, at_least_float32(x))[..., columns] * values
        dense = jnp.zeros((*h.shape[:-1], y.shape[-1]), h.dtype).at[..., rows].add(h)
        return y + own.scaling * transform(jnp.fft.ifft, dense).real

    def examples(self) -> Sequence[Mapping[str, Any]]:
        return (
            {"n_frequency": 12, "scaling": 20.0},
            {"n_frequency": 9, "random_loc_seed": 5, "init_weights": True, "n_frequency_pattern": {".*q(_proj)?": 14}},
        )


def count_of(config: FourierFTConfig | WaveFTConfig, module: str) -> int:
    """Return the number of frequencies of a module by its configuration."""
    return find_pattern_value(config.n_frequency_pattern, module, config.n_frequency)


def spectrum(name: str, target: Target, count: Any) -> tuple[MethodTensor, ...]:
    """Return the specification of a vector of `count(module)` trained values at random positions of the weight."""
    size = target.rank(count)
    if target.is_known and size > target.in_size * target.out_size:
        raise target.refuse(
            f"expected an n_frequency of at most {target.in_size * target.out_size}, the number of entries of the"
            f" weight, found {size}"
        )
    tensor = MethodTensor(name, f".{name}", ("batch", "r"), (("r",),), (("r", size),), scale_power=0)
    return target.with_ranks((tensor,), count)


@functools.lru_cache(maxsize=64)
def positions(seed: int, outputs: int, inputs: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows and columns of the first `count` entries of PyTorch's permutation of a weight's entries."""
    return np.divmod(TorchRandom(seed).permutation(outputs * inputs, count), inputs)


def used_values(values: Array, count: Any) -> Array:
    """Return the values of one module in float32; those beyond its own number are zero and get no gradient."""
    return jnp.where(np.arange(len(values)) < count, at_least_float32(values), 0)


METHOD = FourierFt()
