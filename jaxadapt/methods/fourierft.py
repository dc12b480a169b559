"""FourierFT (Gao et al. 2024, arXiv:2405.03003) with PEFT's conventions: W + s·Re(ifft2(S)).

S (out, in) is zero except at n random positions, the same in every module of one shape, whose values are trained. The
positions are PyTorch's random numbers, which follow from the seed and are in no file. A use of the weight needs two
one-dimensional transforms and no change (out, in): y + s·Re(ifft(S·ifft(x))). The arithmetic follows PEFT's
`tuners/fourierft/layer.py`, in float32; PEFT too starts with a random change by default.
"""

from __future__ import annotations

import jax.numpy as jnp

from jaxadapt.arrays.products import transform
from jaxadapt.configs.fixed_bases import FourierFTConfig
from jaxadapt.configs.frozen import find_value_after_dot
from jaxadapt.methods.matrix import (
    Array,
    Examples,
    Params,
    Spectrum,
    SpectrumHparams,
    Strings,
    Target,
    at_least_float32,
    positions,
    tensor_roles,
    used_values,
)


class FourierFt(Spectrum, peft_type="FOURIERFT"):
    """A change with a sparse spectrum."""

    scaled: frozenset[str] = frozenset({"fourierft_spectrum"})
    roles: Strings = tensor_roles(vector="fourierft_spectrum")
    examples: Examples = (
        {"n_frequency": 12, "scaling": 20.0},
        {"n_frequency": 9, "random_loc_seed": 5, "init_weights": True, "n_frequency_pattern": {"q": 14, "q_proj": 14}},
    )

    def count(self, config: FourierFTConfig, target: Target, module: str) -> int:
        return find_value_after_dot(config.n_frequency_pattern, module, config.n_frequency)

    def delta(self, own: SpectrumHparams, params: Params, w: Array) -> Array:
        values = used_values(params["fourierft_spectrum"], own.count)
        rows, columns = positions(own.seed, *w.shape, len(values))
        dense = jnp.zeros(w.shape, values.dtype).at[rows, columns].set(values)
        return own.scaling * transform(jnp.fft.ifft2, dense).real

    def after(self, own: SpectrumHparams, params: Params, x: Array, y: Array) -> Array:
        values = used_values(params["fourierft_spectrum"], own.count)
        rows, columns = positions(own.seed, y.shape[-1], x.shape[-1], len(values))
        h = transform(jnp.fft.ifft, at_least_float32(x))[..., columns] * values
        dense = jnp.zeros((*h.shape[:-1], y.shape[-1]), h.dtype).at[..., rows].add(h)
        return y + own.scaling * transform(jnp.fft.ifft, dense).real
