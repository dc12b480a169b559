"""DoRA (Liu et al. 2024, arXiv:2402.09353) with PEFT's conventions: m/‖W + s·B·A‖ · (W + s·B·A), bias untouched.

The magnitude m and the norm are per output; the norm is a constant to the gradient, and no constant to
training. The arithmetic follows PEFT's `tuners/lora/dora.py`; in training with dropout the base is computed
anew on the dropped input.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxadapt.axes import Axes, Operation, Use
from jaxadapt.keymap import Site
from jaxadapt.methods import lowrank
from jaxadapt.methods.base import Array, wide
from jaxadapt.tensor import Tensor

MAGNITUDE = "lora_magnitude_vector"


def tensor(site: Site) -> Tensor:
    """The magnitude's tensor: (out), or of a convolution (1, out, 1...)."""
    torch = (("out",),)
    if site.weight.kind == "conv":
        torch = ((), ("out",), *((),) * (len(site.weight.right) - 2))
    return Tensor(MAGNITUDE, f".{MAGNITUDE}", ("batch", "out"), torch, from_base=True, degree=1)


def norm(axes: Axes, w: Array) -> Array:
    """The length of each output's weights, (batch..., out...), in w's dtype; in 16 bits their squares would vanish."""
    kept = axes.batch + axes.out
    lengths = jnp.sqrt(jnp.sum(jnp.square(wide(w)), axis=axes.inn)).astype(w.dtype)
    left = [i for i in range(axes.rank) if i not in axes.inn]
    return lengths.transpose([left.index(i) for i in kept])


def factor(axes: Axes, magnitude: Array, changed: Array) -> Array:
    """m/‖W + s·B·A‖, (batch..., out...)."""
    return magnitude / jax.lax.stop_gradient(norm(axes, changed))


def weight(axes: Axes, magnitude: Array, changed: Array) -> Array:
    return lowrank.over_weight(axes, factor(axes, magnitude, changed)) * changed


def output(
    use: Use | Operation, magnitude: Array, w: Array, changed: Array, delta: Array, x: Array, y: Array, dropped: bool
) -> Array:
    """The layer's output without its bias; `delta` is s·B·A of `x`, of which something may have been `dropped`."""
    if isinstance(use, Use) and use.transposed:
        return lowrank.run(use, x, weight(use.axes, magnitude, changed))
    scale = lowrank.over_outputs(use, factor(use.axes, magnitude, changed), y.ndim)
    base = lowrank.run(use, x.astype(w.dtype), w) if dropped else y
    return y + (scale - 1) * base + scale * delta
