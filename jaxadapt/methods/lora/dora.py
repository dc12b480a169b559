"""DoRA (Liu et al. 2024, arXiv:2402.09353) with PEFT's conventions: m/‖W + s·B·A‖ · (W + s·B·A), bias untouched.

The magnitude m and the norm are per output; the norm is a constant to the gradient, and no constant to
training. The arithmetic follows PEFT's `tuners/lora/dora.py`; in training with dropout the base is computed
anew on the dropped input.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxadapt.arrays import low_rank
from jaxadapt.arrays.axes import Axes, Operation, Use
from jaxadapt.arrays.per_entry import PerEntry, only_adapted
from jaxadapt.keymaps.keymap import Match
from jaxadapt.keymaps.tensor_spec import MethodTensor
from jaxadapt.methods.base import Array, Params, at_least_float32

MAGNITUDE = "lora_magnitude_vector"


def tensor(site: Match) -> MethodTensor:
    """The magnitude's tensor: (out), or of a convolution (1, out, 1...)."""
    torch = (("out",),)
    if site.weight.kind == "conv":
        torch = ((), ("out",), *((),) * (len(site.weight.right) - 2))
    return MethodTensor(MAGNITUDE, f".{MAGNITUDE}", ("batch", "out"), torch, from_base=True, scale_power=1)


def norm(axes: Axes, w: Array) -> Array:
    """The length of each output's weights, (batch..., out...), in w's dtype; in 16 bits their squares would vanish."""
    kept = axes.batch_axes + axes.out_axes
    lengths = jnp.sqrt(jnp.sum(jnp.square(at_least_float32(w)), axis=axes.in_axes)).astype(w.dtype)
    left = [i for i in range(axes.rank) if i not in axes.in_axes]
    return lengths.transpose([left.index(i) for i in kept])


def factor(axes: Axes, params: Params, used: PerEntry | None, changed: Array) -> Array:
    """m/‖W + s·B·A‖, (batch..., out...); 1 in entries that are not adapted."""
    length = only_adapted(used, params, jax.lax.stop_gradient(norm(axes, changed)), 1.0)
    return only_adapted(used, params, params[MAGNITUDE] / length, 1.0)


def weight(axes: Axes, along: Array, changed: Array) -> Array:
    """The effective weight; `along` is `factor`."""
    return low_rank.expand_over_weight(axes, along) * changed


def output(
    use: Use | Operation, along: Array, w: Array, changed: Array, delta: Array, x: Array, y: Array, dropped: bool
) -> Array:
    """The layer's output without its bias; `along` is `factor`, and `delta` s·B·A of `x`, of which something may have
    been `dropped`."""
    if isinstance(use, Use) and use.transposed:
        return low_rank.run_use(use, x, weight(use.axes, along, changed))
    scale = low_rank.expand_over_outputs(use, along, y.ndim)
    base = low_rank.run_use(use, x.astype(w.dtype), w) if dropped else y
    return y + (scale - 1) * base + scale * delta
