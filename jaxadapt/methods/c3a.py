"""C3A (Chen et al. 2024, arXiv:2407.19342) with PEFT's conventions: W + D / inputs, with a D of circulant blocks.

The kernel K is (outputs/b, inputs/b, b); the block m, n of D has the entry K[m, n, (q − p) mod b] in row p, column q.
The product with D is a circular correlation, computed by FFT in float32. The arithmetic follows PEFT's
`tuners/c3a/layer.py`, but several active adapters add their changes, as PEFT's merge does. PEFT's layer instead gives
the output of the first adapter to the second one as its input.

The gradient is that of the product. PEFT's gradient of the input is another one for b > 2: it correlates where it
should convolve. So the gradients before an adapted layer differ from PEFT's; those of its own kernel are equal.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np

from jaxadapt.arrays.products import transform
from jaxadapt.configs.fixed_bases import C3AConfig
from jaxadapt.configs.frozen import find_value_after_dot
from jaxadapt.methods.matrix import (
    Array,
    Draw,
    Examples,
    MatrixMethod,
    MethodTensor,
    OwnHparams,
    Params,
    Start,
    Strings,
    Target,
    at_least_float32,
    own_tensor,
    shared_value,
    tensor_roles,
)


class C3a(MatrixMethod, peft_type="C3A"):
    """A matrix of circulant blocks."""

    scaled: frozenset[str] = frozenset({"c3a_kernel"})
    roles: Strings = tensor_roles(vector="c3a_kernel")
    examples: Examples = (
        {"block_size": 2},
        {"block_size": 1, "block_size_pattern": {"q": 2, "q_proj": 2}, "init_weights": True},
    )

    def tensors(self, config: C3AConfig, target: Target) -> tuple[MethodTensor, ...]:
        shape = target.found.get("c3a_kernel")
        if shape is None:
            size = shared_value(
                "block_size",
                {m: find_value_after_dot(config.block_size_pattern, m, config.block_size) for m in target.modules},
            )
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
