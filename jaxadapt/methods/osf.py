"""OSF (Nayak et al. 2025, arXiv:2504.07097) with PEFT's conventions: the low part of the decomposition of W is trained.

W = U_high·diag(S_high)·V_high + U_low·diag(S_low)·V_low, with the `effective_rank` largest singular values in the first
term. It stays; the file has the second term, `osf_svd_params.U_low` (out, k), `S_low` (k) and `V_low` (k, in). The
first term is U_high·U_highᵀ·W, which does not depend on the signs of singular vectors, so a use of the weight costs a
projection of its output and a product of rank k. No file has U_high and V_high. The gradients of U_low and V_low are
projected off U_high and V_high. The arithmetic follows PEFT's `tuners/osf/layer.py`, with its faults:

- PEFT applies only the first of several active adapters; here each changes what the one before it gives.
- PEFT's `unmerge` warns and does nothing; here it is an error.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxadapt.configs.full_rank import OSFConfig
from jaxadapt.configs.validation import compile_pattern
from jaxadapt.methods.matrix import (
    Array,
    Effects,
    Examples,
    MatrixMethod,
    MethodTensor,
    OwnHparams,
    Params,
    Start,
    Strings,
    Target,
    at_least_float32,
    axes_tensor,
    shared_value,
    tensor_roles,
)

_P = "osf_svd_params_"


class Osf(MatrixMethod, peft_type="OSF"):
    """Training of the small singular directions."""

    roles: Strings = tensor_roles(A=f"{_P}V_low", B=f"{_P}U_low", vector=f"{_P}S_low", frozen="osf_U_high osf_V_high")
    examples: Examples = ({}, {"effective_rank": 3, "init_weights": False})
    changes: Effects | None = Effects("changes", form="use", reads=True, sees="product")

    def tensors(self, config: OSFConfig, target: Target) -> tuple[MethodTensor, ...]:
        smaller = min(_sizes(target))
        kept = {module: min(smaller, _kept_rank(config, module, smaller)) for module in target.modules}
        high = int(shared_value("effective_rank", kept))
        if not 0 < high < smaller:
            raise target.refuse(
                f"OSF needs an effective_rank from 1 to {smaller - 1}, below min(in, out), so that directions"
                f" remain to train; found {high}"
            )
        r, k = (("r", smaller - high),), (("k", high),)
        suffix = ".osf_svd_params."
        frozen: dict[str, Any] = {"from_base": True, "trained": False, "in_file": False}
        return (
            axes_tensor("osf_U_high", "out k", k, **frozen),
            axes_tensor("osf_V_high", "k in", k, **frozen),
            axes_tensor(f"{_P}U_low", "out r", r, suffix=f"{suffix}U_low", from_base=True),
            axes_tensor(f"{_P}S_low", "r", r, suffix=f"{suffix}S_low", from_base=True),
            axes_tensor(f"{_P}V_low", "r in", r, suffix=f"{suffix}V_low", from_base=True),
        )

    def starts_unchanged(self, config: OSFConfig) -> bool:
        return config.init_weights is not False

    def init(self, config: OSFConfig, tensor: MethodTensor, start: Start) -> Array:
        if config.init_weights is False and tensor.trained:
            return jax.random.normal(start.key, start.shape)
        part, level = tensor.name.removeprefix(_P).removeprefix("osf_").split("_")
        u, s, v = jnp.linalg.svd(at_least_float32(jnp.asarray(start.w)), full_matrices=False)
        count = dict(tensor.own)["k" if level == "high" else "r"]
        chosen = slice(None, count) if level == "high" else slice(len(s) - count, None)
        return {"U": u[:, chosen], "S": s[chosen], "V": v[chosen]}[part]

    def after(self, own: OwnHparams, params: Params, x: Array, y: Array) -> Array:
        high = params["osf_U_high"]
        u, s, v = _low(params)
        return (y.astype(high.dtype) @ high) @ high.T + ((x.astype(u.dtype) @ v.T) * s) @ u.T

    def matrix(self, own: OwnHparams, params: Params, w: Array) -> Array:
        high = params["osf_U_high"]
        u, s, v = _low(params)
        return high @ (high.T @ w) + (u * s) @ v


def _low(params: Params) -> tuple[Array, Array, Array]:
    """Return U_low, S_low and V_low, whose gradients have no part in the kept directions."""
    u, s, v = (params[f"{_P}{name}_low"] for name in "USV")
    high_u, high_v = (jax.lax.stop_gradient(params[f"osf_{name}_high"]).astype(u.dtype) for name in "UV")
    return _move_off(u, high_u), s, _move_off(v.T, high_v.T).T


@jax.custom_jvp
def _move_off(x: Array, kept: Array) -> Array:
    """Return x; its change is projected off the orthonormal columns of `kept`, in both modes of differentiation."""
    return x


@_move_off.defjvp
def _(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    x, kept = primals
    return x, tangents[0] - kept @ (kept.T @ tangents[0])


def _kept_rank(config: OSFConfig, module: str, smaller: int) -> int:
    """Return the number of singular directions that PEFT keeps in a module."""
    # PEFT searches; it does not match the end.
    found = (
        rank
        for pattern, rank in (config.rank_pattern or {}).items()
        if compile_pattern("target_modules", pattern).search(module)
    )
    value = next(found, config.effective_rank)
    if value is None:
        return smaller // 2
    return int(smaller * value) if isinstance(value, float) and value <= 1 else int(value)


def _sizes(target: Target) -> tuple[int, int]:
    """Return the numbers of outputs and inputs, from the tensors if the base is not known."""
    u, v = target.found.get(f"{_P}U_low"), target.found.get(f"{_P}V_low")
    return (target.out_size, target.in_size) if u is None or v is None else (math.prod(u[:-1]), math.prod(v[1:]))
