"""HRA (Yuan et al. 2024, arXiv:2405.17484) with PEFT's conventions: W·H₁·…·Hᵣ with the reflections Hₖ = I − 2·uₖ·uₖᵀ.

The columns of `hra_u` (in, r) are the vectors uₖ before they get the length 1. With `apply_GS` the uₖ also become
orthogonal. A convolution's kernel is one matrix (out, channels·window). The product of reflections is I − U·T·Uᵀ, where
the inverse of T is the strict upper triangle of UᵀU plus I/2 (Joffrain et al. 2006), so a use of the weight costs two
products with U. The arithmetic follows PEFT's `tuners/hra/layer.py`, with its faults:

- An odd r starts with random reflections, so a new adapter changes the output.
- With `apply_GS` and an even r, a new adapter has pairs of equal vectors, whose orthogonal parts are rounding errors. A
  new adapter with these values is refused here; files load.
- PEFT gives `hra_u` of a convolution the square of the window's first size, so only square windows are accepted.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from jaxadapt.configs.full_rank import HRAConfig
from jaxadapt.core.errors import ConfigError
from jaxadapt.methods.matrix import (
    Array,
    Draw,
    Examples,
    Floats,
    MethodTensor,
    OwnHparams,
    Params,
    Rotation,
    Start,
    Strings,
    Target,
    at_least_float32,
    axes_tensor,
    check_window,
    own_tensor,
    tensor_roles,
)


class Hra(Rotation, peft_type="HRA"):
    """A chain of reflections of the inputs."""

    roles: Strings = tensor_roles(A="hra_u")
    row_neutral: Floats = Floats({"hra_u": 1.0})  # a vector of length 0 has no direction
    examples: Examples = ({"r": 4}, {"r": 3}, {"r": 2, "apply_GS": True, "init_weights": False})

    def tensors(self, config: HRAConfig, target: Target) -> tuple[MethodTensor, ...]:
        window = target.window
        check_window(target, "HRA")
        inputs = target.own_size("hra_u", 0, lambda: target.in_size * math.prod(window))
        if config.apply_GS and config.r > inputs:
            raise target.refuse(f"HRA with apply_GS needs an r of at most the number of inputs; found r={config.r}")
        r = (("r", config.r),)
        return (own_tensor("hra_u", (inputs, config.r)),) if window else (axes_tensor("hra_u", "in r", r),)

    def starts_unchanged(self, config: HRAConfig) -> bool:
        return config.init_weights and config.r % 2 == 0

    def own(self, config: HRAConfig, target: Target) -> OwnHparams:
        return OwnHparams(variant="orthogonal" if config.apply_GS else "")

    def init(self, config: HRAConfig, tensor: MethodTensor, start: Start) -> Draw | Array:
        if not self.starts_unchanged(config):
            return Draw.kaiming(config.r)
        if config.apply_GS:
            raise ConfigError(
                "cannot start HRA with apply_GS, init_weights and an even r: it starts with pairs of equal vectors,"
                " which Gram-Schmidt cannot make orthogonal; set init_weights=False"
            )
        bound = 1 / math.sqrt(config.r / 2)
        half = jax.random.uniform(start.key, (start.shape[0], config.r // 2), minval=-bound, maxval=bound)
        return jnp.repeat(half, 2, axis=1)

    def before(self, own: OwnHparams, params: Params, x: Array) -> Array:
        u, ut = _reflections(own, params["hra_u"])
        x = x.astype(u.dtype)
        return x - (x @ u) @ ut.T

    def turned(self, own: OwnHparams, params: Params, flat: Array, undo: bool) -> Array:
        u, ut = _reflections(own, params["hra_u"])
        return flat - (flat @ u) @ ut.T if undo else flat - (flat @ ut) @ u.T


def _reflections(own: OwnHparams, u: Array) -> tuple[Array, Array]:
    """Return U and U·T, both (in, r)."""
    u = at_least_float32(u)
    if own.variant == "orthogonal":
        q, _ = jnp.linalg.qr(u)
        return q, 2 * q
    u = u / jnp.linalg.norm(u, axis=0)
    inverse = jnp.triu(u.T @ u, 1) + 0.5 * jnp.eye(u.shape[1], dtype=u.dtype)
    return u, jax.scipy.linalg.solve_triangular(inverse.T, u.T, lower=True).T
