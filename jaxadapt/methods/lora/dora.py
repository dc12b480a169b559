"""DoRA (Liu et al. 2024, arXiv:2402.09353) with PEFT's conventions: m/‖W + s·B·A‖ · (W + s·B·A), bias untouched.

The magnitude m and the norm are per output. The norm is recomputed at each step, but the gradient treats it as a
constant. The arithmetic follows PEFT's `tuners/lora/dora.py`; with dropout, the base product is recomputed on the
dropped input.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxadapt.arrays import low_rank
from jaxadapt.arrays.axes import Axes, Operation, PerEntry, Use, mask_unadapted
from jaxadapt.keymaps.keymap import Match
from jaxadapt.keymaps.weight import MethodTensor
from jaxadapt.methods.base import Array, Params, at_least_float32

MAGNITUDE = "lora_magnitude_vector"


def magnitude_tensor(match: Match) -> MethodTensor:
    """Return the magnitude's tensor: (out), or (1, out, 1...) for a convolution."""
    torch = (("out",),)
    if match.weight.kind == "conv":
        torch = ((), ("out",), *((),) * (len(match.weight.right) - 2))
    return MethodTensor(MAGNITUDE, f".{MAGNITUDE}", ("batch", "out"), torch, from_base=True, scale_power=1)


def output_norms(axes: Axes, w: Array) -> Array:
    """Return the norm of each output's weights, (batch..., out...), in w's dtype."""
    kept = axes.batch_axes + axes.out_axes
    # The squares of small weights underflow in 16 bits.
    lengths = jnp.sqrt(jnp.sum(jnp.square(at_least_float32(w)), axis=axes.in_axes)).astype(w.dtype)
    remaining_axes = [i for i in range(axes.rank) if i not in axes.in_axes]
    return lengths.transpose([remaining_axes.index(i) for i in kept])


def magnitude_factor(axes: Axes, params: Params, used: PerEntry | None, changed: Array) -> Array:
    """Return m/‖W + s·B·A‖, (batch..., out...), with 1 in the entries that are not adapted."""
    length = mask_unadapted(used, params, jax.lax.stop_gradient(output_norms(axes, changed)), 1.0)
    return mask_unadapted(used, params, params[MAGNITUDE] / length, 1.0)


def effective_weight(axes: Axes, magnitude: Array, changed: Array) -> Array:
    """Return the effective weight.

    Args:
        magnitude: the result of `magnitude_factor`.
        changed: W + s·B·A.
    """
    return low_rank.expand_over_weight(axes, magnitude) * changed


def output(
    use: Use | Operation, magnitude: Array, w: Array, changed: Array, delta: Array, x: Array, y: Array, dropped: bool
) -> Array:
    """Return the layer's output without its bias.

    Args:
        magnitude: the result of `magnitude_factor`.
        w: the base weight.
        changed: W + s·B·A.
        delta: s·B·A·x.
        x: the input, after dropout.
        y: the base layer's output without dropout.
        dropped: True if dropout changed x.
    """
    if isinstance(use, Use) and use.transposed:
        return low_rank.run_use(use, x, effective_weight(use.axes, magnitude, changed))
    scale = low_rank.expand_over_outputs(use, magnitude, y.ndim)
    base = low_rank.run_use(use, x.astype(w.dtype), w) if dropped else y
    return y + (scale - 1) * base + scale * delta
