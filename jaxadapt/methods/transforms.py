"""Changes that are computed by fast transforms: FourierFT, WaveFT and C3A.

FourierFT (Gao et al. 2024, arXiv:2405.03003) with PEFT's conventions: W + s·Re(ifft2(S)).

S (out, in) is zero except at n random positions, the same in every module of one shape, whose values are trained. The
positions are PyTorch's random numbers, which follow from the seed and are in no file. A use of the weight needs two
one-dimensional transforms and no change (out, in): y + s·Re(ifft(S·ifft(x))). The arithmetic follows PEFT's
`tuners/fourierft/layer.py`, in float32; PEFT too starts with a random change by default.

WaveFT (Bilican et al. 2025, arXiv:2505.12532) with PEFT's conventions: W + s·(inverse 2-D wavelet transform of S).

S is zero except at n random positions, the same in every module of one shape, whose values are trained. The positions
are PyTorch's random numbers, which follow from the seed and are in no file. The transform is separable, so a use of the
weight needs one transform of the input, one of the output and no change (out, in). The arithmetic follows PEFT's
`tuners/waveft`, where the quadrants of S are the coefficients A, H, V, D, and H is smooth along the inputs:

- S is larger than the weight by the wavelet's overlap and centered; the odd sizes get one row or column more.
- The filters of db1 to db10 are Daubechies' with the least delay, computed here; sym2 and sym3 are db2 and db3. The
  other wavelets are refused. PEFT accepts db11 and longer ones in a configuration, but has no filters for them.
- `proportional_parameters` takes the numbers of an existing file; for a new adapter, it is refused.

C3A (Chen et al. 2024, arXiv:2407.19342) with PEFT's conventions: W + D / inputs, with a D of circulant blocks.

The kernel K is (outputs/b, inputs/b, b); the block m, n of D has the entry K[m, n, (q − p) mod b] in row p, column q.
The product with D is a circular correlation, computed by FFT in float32. The arithmetic follows PEFT's
`tuners/c3a/layer.py`, but several active adapters add their changes, as PEFT's merge does. PEFT's layer instead gives
the output of the first adapter to the second one as its input.

The gradient is that of the product. PEFT's gradient of the input is another one for b > 2: it correlates where it
should convolve. So the gradients before an adapted layer differ from PEFT's; those of its own kernel are equal.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxadapt.arrays.products import transform
from jaxadapt.configs.fixed_bases import C3AConfig, FourierFTConfig, WaveFTConfig
from jaxadapt.configs.frozen import find_pattern_value
from jaxadapt.core.errors import ConfigError
from jaxadapt.methods.matrix import (
    Array,
    Draw,
    MatrixMethod,
    MethodTensor,
    OwnHparams,
    Params,
    Start,
    Target,
    TorchRandom,
    at_least_float32,
    axes_tensor,
    own_tensor,
    shared_value,
    tensor_roles,
)

# ---------------------------------------------------------------- spectra


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


# ---------------------------------------------------------------- fourierft


class FourierFt(Spectrum):
    """A change with a sparse spectrum."""

    peft_type = "FOURIERFT"
    scaled = frozenset({"fourierft_spectrum"})
    roles = tensor_roles(vector="fourierft_spectrum")
    examples = (
        {"n_frequency": 12, "scaling": 20.0},
        {"n_frequency": 9, "random_loc_seed": 5, "init_weights": True, "n_frequency_pattern": {".*q(_proj)?": 14}},
    )

    def init(self, config: FourierFTConfig, tensor: MethodTensor, start: Start) -> Draw:
        return Draw("constant", 0.0) if config.init_weights else Draw("normal", 1.0)

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


# ---------------------------------------------------------------- waveft


_ORDERS = {**{f"db{n}": n for n in range(1, 11)}, "sym2": 2, "sym3": 3}


class WaveFt(Spectrum):
    """A change with few wavelet coefficients."""

    peft_type = "WAVEFT"
    scaled = frozenset({"waveft_spectrum"})
    roles = tensor_roles(vector="waveft_spectrum")
    examples = (
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
            return super().count(config, target, module)
        if "waveft_spectrum" not in target.found:
            raise target.refuse(
                "cannot create a WAVEFT adapter with proportional_parameters: a module's number of frequencies"
                " depends on all other modules; state the numbers in n_frequency_pattern"
            )
        return target.found["waveft_spectrum"][-1]

    def own(self, config: WaveFTConfig, target: Target) -> SpectrumHparams:
        order = _ORDERS[config.wavelet_family] if config.use_idwt else 0
        return dataclasses.replace(super().own(config, target), order=order)

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


# ---------------------------------------------------------------- c3a


class C3a(MatrixMethod):
    """A matrix of circulant blocks."""

    peft_type = "C3A"
    scaled = frozenset({"c3a_kernel"})
    roles = tensor_roles(vector="c3a_kernel")
    examples = (
        {"block_size": 2},
        {"block_size": 1, "block_size_pattern": {".*q(_proj)?": 2}, "init_weights": True},
    )

    def tensors(self, config: C3AConfig, target: Target) -> tuple[MethodTensor, ...]:
        shape = target.found.get("c3a_kernel")
        if shape is None:
            patterns, default = config.block_size_pattern, config.block_size
            size = shared_value("block_size", {m: find_pattern_value(patterns, m, default) for m in target.modules})
            if target.in_size % size or target.out_size % size:
                raise target.refuse(
                    f"expected a block_size that divides the {target.in_size} inputs and the {target.out_size} outputs,"
                    f" found {size}; set block_size or block_size_pattern to a divisor of both"
                )
            shape = (target.out_size // size, target.in_size // size, size)
        return (own_tensor("c3a_kernel", shape),)

    def starts_unchanged(self, config: C3AConfig) -> bool:
        return config.init_weights is True

    def init(self, config: C3AConfig, tensor: MethodTensor, start: Start) -> Draw:
        rows, columns, size = start.shape
        draws = {
            True: Draw("constant", 0.0),
            "gaussian": Draw("normal", 1.0),
            "kaiming_uniform": Draw("uniform", math.sqrt(1 / (columns * size))),
        }
        return draws.get(config.init_weights, Draw("uniform", math.sqrt(6 / ((rows + columns) * size))))

    def delta(self, own: OwnHparams, params: Params, w: Array) -> Array:
        kernel = params["c3a_kernel"]
        size = kernel.shape[-1]
        row, column = np.indices((size, size))
        return kernel[:, :, (column - row) % size].swapaxes(1, 2).reshape(w.shape) / w.shape[1]

    def after(self, own: OwnHparams, params: Params, x: Array, y: Array) -> Array:
        kernel = at_least_float32(params["c3a_kernel"])
        rows, columns, size = kernel.shape
        blocks = x.reshape(*x.shape[:-1], columns, size).astype(kernel.dtype)
        product = jnp.einsum(
            "...nf,mnf->...mf", transform(jnp.fft.rfft, blocks), jnp.conj(transform(jnp.fft.rfft, kernel))
        )
        change = transform(lambda z: jnp.fft.irfft(z, size), product).reshape(*x.shape[:-1], rows * size)
        return y + change.astype(kernel.dtype) / x.shape[-1]
