"""WaveFT (Bilican et al. 2025, arXiv:2505.12532) with PEFT's conventions: W + s·(inverse 2-D wavelet transform of S).

S is zero except at n random positions, the same in every module of one shape, whose values are trained. The positions
are PyTorch's random numbers, which follow from the seed and are in no file. The transform is separable, so a use of the
weight needs one transform of the input, one of the output and no change (out, in). The arithmetic follows PEFT's
`tuners/waveft`, where the quadrants of S are the coefficients A, H, V, D, and H is smooth along the inputs:

- S is larger than the weight by the wavelet's overlap and centered; the odd sizes get one row or column more.
- The filters of db1 to db10 are Daubechies' with the least delay, computed here; sym2 and sym3 are db2 and db3. The
  other wavelets are refused. PEFT accepts db11 and longer ones in a configuration, but has no filters for them.
- `proportional_parameters` takes the numbers of an existing file; for a new adapter, it is refused.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxadapt.configs.fixed_bases import WaveFTConfig
from jaxadapt.configs.frozen import find_pattern_value
from jaxadapt.core.errors import ConfigError
from jaxadapt.methods.matrix import (
    Array,
    Draw,
    Examples,
    MethodTensor,
    Params,
    Spectrum,
    SpectrumHparams,
    Start,
    Strings,
    Target,
    positions,
    tensor_roles,
    used_values,
)

_ORDERS = {**{f"db{n}": n for n in range(1, 11)}, "sym2": 2, "sym3": 3}


class WaveFt(Spectrum, peft_type="WAVEFT"):
    """A change with few wavelet coefficients."""

    scaled: frozenset[str] = frozenset({"waveft_spectrum"})
    roles: Strings = tensor_roles(vector="waveft_spectrum")
    examples: Examples = (
        {"n_frequency": 20, "scaling": 2.0, "init_weights": False},
        {"n_frequency": 16, "scaling": 3.0, "wavelet_family": "db3", "n_frequency_pattern": {"q|q_proj": 24}},
        {"n_frequency": 12, "scaling": 2.0, "use_idwt": False, "random_loc_seed": 3},
    )

    def check(self, config: WaveFTConfig) -> None:
        if config.use_idwt and config.wavelet_family not in _ORDERS:
            raise ConfigError(
                f"cannot apply WAVEFT with wavelet_family {config.wavelet_family!r}; jaxadapt has {', '.join(_ORDERS)}"
            )

    def count(self, config: WaveFTConfig, target: Target, module: str) -> int:
        if not config.proportional_parameters:
            return find_pattern_value(config.n_frequency_pattern, module, config.n_frequency)
        if "waveft_spectrum" not in target.found:
            raise target.refuse(
                "cannot create a WAVEFT adapter with proportional_parameters: a module's number of frequencies"
                " depends on all other modules; state the numbers in n_frequency_pattern"
            )
        return target.found["waveft_spectrum"][-1]

    def own(self, config: WaveFTConfig, target: Target) -> SpectrumHparams:
        return dataclasses.replace(
            super().own(config, target), order=_ORDERS[config.wavelet_family] if config.use_idwt else 0
        )

    def init(self, config: WaveFTConfig, tensor: MethodTensor, start: Start) -> Draw:
        return Draw("constant", 0.0) if config.init_weights else Draw("normal", 0.01)

    def delta(self, own: SpectrumHparams, params: Params, w: Array) -> Array:
        values = own.scaling * used_values(params["waveft_spectrum"], own.count)
        (rows, columns), shape = _places(own.seed, own.order, *w.shape, len(values))
        dense = jnp.zeros(shape, values.dtype).at[rows, columns].set(values)
        return _synthesis(own.order, w.shape[0], _synthesis(own.order, w.shape[1], dense).T).T

    def after(self, own: SpectrumHparams, params: Params, x: Array, y: Array) -> Array:
        values = own.scaling * used_values(params["waveft_spectrum"], own.count)
        (rows, columns), shape = _places(own.seed, own.order, y.shape[-1], x.shape[-1], len(values))
        wide = jax.ShapeDtypeStruct((*x.shape[:-1], shape[1]), values.dtype)
        (h,) = jax.linear_transpose(functools.partial(_synthesis, own.order, x.shape[-1]), wide)(x.astype(wide.dtype))
        h = jnp.zeros((*x.shape[:-1], shape[0]), h.dtype).at[..., rows].add(h[..., columns] * values)
        return y + _synthesis(own.order, y.shape[-1], h)


@functools.lru_cache(maxsize=64)
def _places(seed: int, order: int, outputs: int, inputs: int, count: int) -> tuple[list[np.ndarray], list[int]]:
    """Return the rows and columns of the values in S, its coefficients H and V exchanged, and the shape of S."""
    places = list(positions(seed, outputs, inputs, count))
    if not order:
        return places, [outputs, inputs]
    padded = [math.ceil((size + 2 * order - 2) / 2) * 2 for size in (outputs, inputs)]
    places = [at + (wide - size) // 2 for at, wide, size in zip(places, padded, (outputs, inputs), strict=True)]
    detail = [at >= wide // 2 for at, wide in zip(places, padded, strict=True)]
    steps = [np.where(detail[1], 1, 0) - detail[0], np.where(detail[0], 1, 0) - detail[1]]
    return [at + step * (wide // 2) for at, step, wide in zip(places, steps, padded, strict=True)], padded


def _synthesis(order: int, size: int, x: Array) -> Array:
    """Return the middle `size` values of the inverse transform along the last axis, half smooth and half detail."""
    if not order:
        return x
    low = _daubechies(order)
    high = low[::-1] * (-1.0) ** np.arange(2 * order)
    half = x.shape[-1] // 2
    widths = [(0, 0)] * (x.ndim - 1) + [(order - 1, order - 1)]
    smooth, detail = jnp.pad(x[..., :half], widths), jnp.pad(x[..., half:], widths)

    def phase(first: int) -> Array:
        terms = [
            float(low[first + 2 * j]) * smooth[..., order - 1 - j : 2 * order - 2 - j + half]
            + float(high[first + 2 * j]) * detail[..., order - 1 - j : 2 * order - 2 - j + half]
            for j in range(order)
        ]
        return functools.reduce(jnp.add, terms)

    whole = jnp.stack([phase(0), phase(1)], -1).reshape(*x.shape[:-1], -1)
    start = (whole.shape[-1] - size) // 2
    return whole[..., start : start + size]


@functools.cache
def _daubechies(order: int) -> np.ndarray:
    """Return the smooth synthesis filter of 2·order values, by factoring Daubechies' polynomial (her section 6.1)."""
    y = np.roots([math.comb(order - 1 + k, k) for k in reversed(range(order))])
    taps = np.ones(1)
    for root in y:
        middle = 1 - 2 * root  # z + 1/z = 2 − 4y
        z = middle + np.array([1, -1]) * np.sqrt(middle * middle - 1 + 0j)
        taps = np.convolve(taps, [1, -z[np.argmin(abs(z))]])
    for _ in range(order):
        taps = np.convolve(taps, [1, 1])
    return taps.real * (math.sqrt(2) / taps.real.sum())
