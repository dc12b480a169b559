"""DEFT with PEFT's conventions: W + L·(s·R − Gᵀ·W), which replaces a subspace of the outputs.

L and G (out, r) follow from P (out, r): L = P and G = relu(P), or L = G = Q of the decomposition P = Q·U. The signs of
Q's columns are those of Householder's method, as in PyTorch. s = α / r with the rank that the module has (at most its
number of outputs), or 1 without α. With `para`, there is no R. The arithmetic follows PEFT's `tuners/deft/layer.py`.
Two low-rank products change each use of the weight, one of the output without its bias and without dropout, and one of
the input. Several active adapters each project the output of the base weight.
"""

from __future__ import annotations

import jax.nn as functions
import jax.numpy as jnp

from jaxadapt.configs.low_rank import DeftConfig
from jaxadapt.methods.matrix import (
    Array,
    Draw,
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
    tensor_roles,
)


class Deft(MatrixMethod, peft_type="DEFT"):
    """The removal of a subspace, and a trained matrix in its place."""

    row_numbers: frozenset[str] = frozenset({"scale"})
    roles: Strings = tensor_roles(B="deft_P", A="deft_R")
    examples: Examples = (
        {"r": 2},
        {"r": 3, "decomposition_method": "qr", "alpha": 5},
        {"r": 2, "para": True},
        {"r": 2, "para": True, "decomposition_method": "qr"},
        {"r": 2, "init_weights": False},
    )
    changes: Effects | None = Effects("adds", form="use", reads=True, sees="product")

    def tensors(self, config: DeftConfig, target: Target) -> tuple[MethodTensor, ...]:
        r = (("r", _rank(config, target)),)
        removed = axes_tensor("deft_P", "out r", r)
        return (removed,) if config.para else (removed, axes_tensor("deft_R", "r in", r, from_base=config.init_weights))

    def starts_unchanged(self, config: DeftConfig) -> bool:
        return config.init_weights and not config.para

    def own(self, config: DeftConfig, target: Target) -> OwnHparams:
        scale = config.alpha / _rank(config, target) if config.alpha else 1.0
        return OwnHparams(scale, dropout=config.deft_dropout, variant=config.decomposition_method)

    def init(self, config: DeftConfig, tensor: MethodTensor, start: Start) -> Draw | Array:
        if tensor.name == "deft_P":
            return Draw("normal", 0.02)
        if not config.init_weights:
            return Draw("normal", 0.02 * config.init_scale)
        _, right = _sides(start.hparams, start.params)
        return right.T @ at_least_float32(start.w) / start.hparams.scale

    def delta(self, own: OwnHparams, params: Params, w: Array) -> Array:
        left, right = _sides(own, params)
        removed = right.T @ w
        return left @ (own.scale * params["deft_R"] - removed if "deft_R" in params else -removed)

    def after(self, own: OwnHparams, params: Params, x: Array, y: Array) -> Array:
        left, right = _sides(own, params)
        h = -jnp.einsum("...o,or->...r", y.astype(right.dtype), right)
        if "deft_R" in params:
            h = h + own.scale * jnp.einsum("...i,ri->...r", x.astype(right.dtype), params["deft_R"])
        return y + jnp.einsum("...r,or->...o", h, left)


def _rank(config: DeftConfig, target: Target) -> int:
    return target.own_size("deft_P", -1, lambda: target.cap_rank("DEFT", config.r, target.out_size))


def _sides(own: OwnHparams, params: Params) -> tuple[Array, Array]:
    """Return L and G (out, r) in float32."""
    p = at_least_float32(params["deft_P"])
    if own.variant == "relu":
        return p, functions.relu(p)
    q = jnp.linalg.qr(p)[0]
    return q, q
