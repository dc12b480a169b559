"""FourierFT (Gao et al. 2024, arXiv:2405.03003) with PEFT's conventions: W + s·Re(ifft2(S)).

S (out, in) is zero except at n random positions, the same in every module of one shape, whose values are trained. The
positions are PyTorch's random numbers, which follow from the seed and are in no file. A use of the weight needs two
one-dimensional transforms and no change (out, in): y + s·Re(ifft(S·ifft(x))). The arithmetic follows PEFT's
`tuners/fourierft/layer.py`, in float32; PEFT too starts with a random change by default.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from jaxadapt.arrays.products import transform
from jaxadapt.arrays.random_draws import Draw
from jaxadapt.configs.fixed_bases import FourierFTConfig
from jaxadapt.keymaps.weight import MethodTensor
from jaxadapt.methods.base import Array, Params, Start, Target, at_least_float32, tensor_roles
from jaxadapt.methods.common import count_of, positions, spectrum, used_values
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
    roles = tensor_roles(vector="fourierft_spectrum")
    examples = (
        {"n_frequency": 12, "scaling": 20.0},
        {"n_frequency": 9, "random_loc_seed": 5, "init_weights": True, "n_frequency_pattern": {".*q(_proj)?": 14}},
    )

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


METHOD = FourierFt()
