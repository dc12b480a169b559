"""BEFT with PEFT's conventions: a trained vector is added to the layer's output, as a bias.

It changes no weight. A merge adds it to the layer's bias and needs one, as in PEFT (`tuners/beft/layer.py`).
"""

from __future__ import annotations

import jax.numpy as jnp

from jaxadapt.configs.full_rank import BeftConfig
from jaxadapt.methods.matrix import (
    Array,
    Draw,
    Effects,
    MatrixMethod,
    MethodTensor,
    OwnHparams,
    Params,
    Start,
    Strings,
    Target,
    axes_tensor,
    tensor_roles,
)


class Beft(MatrixMethod, peft_type="BEFT"):
    """A trained bias."""

    scaled: frozenset[str] = frozenset({"beft_bias"})
    roles: Strings = tensor_roles(bias="beft_bias")
    changes: Effects | None = Effects("adds", form="use", bias="adds")

    def tensors(self, config: BeftConfig, target: Target) -> tuple[MethodTensor, ...]:
        return (axes_tensor("beft_bias", "1 out"),)

    def init(self, config: BeftConfig, tensor: MethodTensor, start: Start) -> Draw:
        return Draw("constant", 0.0) if config.init_weights else Draw("normal", 1.0)

    def delta(self, own: OwnHparams, params: Params, w: Array) -> Array:
        return jnp.zeros_like(w)

    def after(self, own: OwnHparams, params: Params, x: Array, y: Array) -> Array:
        return y + params["beft_bias"][0]

    def shift(self, own: OwnHparams, params: Params, bias: Array, undo: bool) -> Array:
        change = params["beft_bias"][0]
        return bias - change if undo else bias + change

    def describe_change(self, config: BeftConfig) -> None:
        return None
