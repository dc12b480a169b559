"""A subspace of the weight is replaced or kept: DEFT and OSF.

DEFT with PEFT's conventions: W + L·(s·R − Gᵀ·W), which replaces a subspace of the outputs.

L and G (out, r) follow from P (out, r): L = P and G = relu(P), or L = G = Q of the decomposition P = Q·U. The signs of
Q's columns are those of Householder's method, as in PyTorch. s = α / r with the rank that the module has (at most its
number of outputs), or 1 without α. With `para`, there is no R. The arithmetic follows PEFT's `tuners/deft/layer.py`.
Two low-rank products change each use of the weight, one of the output without its bias and without dropout, and one of
the input. Several active adapters each project the output of the base weight.

OSF (Nayak et al. 2025, arXiv:2504.07097) with PEFT's conventions: the low part of the decomposition of W is trained.

W = U_high·diag(S_high)·V_high + U_low·diag(S_low)·V_low, with the `effective_rank` largest singular values in the first
term. It stays; the file has the second term, `osf_svd_params.U_low` (out, k), `S_low` (k) and `V_low` (k, in). The
first term is U_high·U_highᵀ·W, which does not depend on the signs of singular vectors, so a use of the weight costs a
projection of its output and a product of rank k. No file has U_high and V_high. The gradients of U_low and V_low are
projected off U_high and V_high. The arithmetic follows PEFT's `tuners/osf/layer.py`, with its faults:

- PEFT applies only the first of several active adapters; here each changes what the one before it gives.
- PEFT's `unmerge` warns and does nothing; here it is an error.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.nn import relu

from jaxadapt.configs.full_rank import OSFConfig
from jaxadapt.configs.low_rank import DeftConfig
from jaxadapt.configs.validation import compile_pattern
from jaxadapt.methods.matrix import (
    Array,
    Draw,
    Effects,
    MatrixMethod,
    MethodTensor,
    OwnHparams,
    Params,
    Start,
    Target,
    at_least_float32,
    axes_tensor,
    shared_value,
    tensor_roles,
)

# ---------------------------------------------------------------- deft


@dataclasses.dataclass(frozen=True)
class DeftHparams:
    """The hyperparameters of a site: the factor s, the decomposition "relu" or "qr", the dropout rate."""

    scale: float
    decomposition: str
    dropout: float


class Deft(MatrixMethod):
    """The removal of a subspace, and a trained matrix in its place."""

    peft_type = "DEFT"
    row_numbers = frozenset({"scale"})
    roles = tensor_roles(B="deft_P", A="deft_R")
    examples = (
        {"r": 2},
        {"r": 3, "decomposition_method": "qr", "alpha": 5},
        {"r": 2, "para": True},
        {"r": 2, "para": True, "decomposition_method": "qr"},
        {"r": 2, "init_weights": False},
    )

    def tensors(self, config: DeftConfig, target: Target) -> tuple[MethodTensor, ...]:
        r = (("r", _rank(config, target)),)
        p, r_in = axes_tensor("deft_P", "out r", r), axes_tensor("deft_R", "r in", r, from_base=config.init_weights)
        return (p,) if config.para else (p, r_in)

    def starts_unchanged(self, config: DeftConfig) -> bool:
        return config.init_weights and not config.para

    def own(self, config: DeftConfig, target: Target) -> DeftHparams:
        scale = config.alpha / _rank(config, target) if config.alpha else 1.0
        return DeftHparams(scale, config.decomposition_method, config.deft_dropout)

    def effect(self, own: DeftHparams) -> Effects:
        return Effects("adds", form="use", reads=True, sees="product")

    def init(self, config: DeftConfig, tensor: MethodTensor, start: Start) -> Draw | Array:
        if tensor.name == "deft_P":
            return Draw("normal", 0.02)
        if not config.init_weights:
            return Draw("normal", 0.02 * config.init_scale)
        _, right = _sides(start.hparams, start.params)
        return right.T @ at_least_float32(start.w) / start.hparams.scale

    def delta(self, own: DeftHparams, params: Params, w: Array) -> Array:
        left, right = _sides(own, params)
        removed = right.T @ w
        return left @ (own.scale * params["deft_R"] - removed if "deft_R" in params else -removed)

    def after(self, own: DeftHparams, params: Params, x: Array, y: Array) -> Array:
        left, right = _sides(own, params)
        h = -jnp.einsum("...o,or->...r", y.astype(right.dtype), right)
        if "deft_R" in params:
            h = h + own.scale * jnp.einsum("...i,ri->...r", x.astype(right.dtype), params["deft_R"])
        return y + jnp.einsum("...r,or->...o", h, left)


def _rank(config: DeftConfig, target: Target) -> int:
    return target.own_size("deft_P", -1, lambda: target.cap_rank("DEFT", config.r, target.out_size))


def _sides(own: DeftHparams, params: Params) -> tuple[Array, Array]:
    """Return L and G (out, r) in float32."""
    p = at_least_float32(params["deft_P"])
    if own.decomposition == "relu":
        return p, relu(p)
    q = jnp.linalg.qr(p)[0]
    return q, q


# ---------------------------------------------------------------- osf


_P = "osf_svd_params_"


class Osf(MatrixMethod):
    """Training of the small singular directions."""

    peft_type = "OSF"
    roles = tensor_roles(A=f"{_P}V_low", B=f"{_P}U_low", vector=f"{_P}S_low", frozen="osf_U_high osf_V_high")
    examples = ({}, {"effective_rank": 3, "init_weights": False})

    def tensors(self, config: OSFConfig, target: Target) -> tuple[MethodTensor, ...]:
        def kept(module: str) -> int:
            return min(smaller, _kept_rank(config, module, smaller))

        smaller = min(_sizes(target))
        high = int(shared_value("effective_rank", {module: kept(module) for module in target.modules}))
        if not 0 < high < smaller:
            raise target.refuse(
                f"OSF needs an effective_rank from 1 to {smaller - 1}, less than the smaller size of the weight, so"
                f" that directions remain to train; found {high}"
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

    def effect(self, own: OwnHparams) -> Effects:
        return Effects("changes", form="use", reads=True, sees="product")

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
        kept = (y.astype(high.dtype) @ high) @ high.T
        return kept + ((x.astype(u.dtype) @ v.T) * s) @ u.T

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
    value = config.effective_rank
    for pattern, rank in (config.rank_pattern or {}).items():
        if compile_pattern("target_modules", pattern).search(module):  # PEFT searches; it does not match the end
            value = rank
            break
    if value is None:
        return smaller // 2
    return int(smaller * value) if isinstance(value, float) and value <= 1 else int(value)


def _sizes(target: Target) -> tuple[int, int]:
    """Return the numbers of outputs and inputs, from the tensors if the base is not known."""
    u, v = target.found.get(f"{_P}U_low"), target.found.get(f"{_P}V_low")
    if u is None or v is None:
        return target.out_size, target.in_size
    return math.prod(u[:-1]), math.prod(v[1:])
