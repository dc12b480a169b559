"""MiSS (Kang & Yin 2024, arXiv:2409.15371) with PEFT's conventions: every block of r inputs gets the change Dᵀ.

D is `miss_block` (r, out): W + (Dᵀ, Dᵀ, …), where the last block is cut at the last input. With "mini" D is (r, mini_r)
and repeated over the outputs. With "bat" `miss_block` is (out/r, r, r), and each block V of r outputs and r inputs
becomes V + V·D + D. The arithmetic follows PEFT's `tuners/miss/layer.py`, with its fault:

- "bat" ignores `miss_dropout`. Here such a file loads, and a new adapter is refused.

A sum over the blocks of the input replaces the effective weight, except with "bat".
"""

from __future__ import annotations

import jax.numpy as jnp

from jaxadapt.configs.low_rank import MissConfig
from jaxadapt.core.errors import ConfigError, met
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
    axes_tensor,
    own_tensor,
    tensor_roles,
)


class Miss(MatrixMethod, peft_type="MISS"):
    """One matrix for all blocks of inputs."""

    roles: Strings = tensor_roles(B="miss_block")
    examples: Examples = ({"r": 3}, {"r": 4, "init_weights": "bat"}, {"r": 2, "mini_r": 4, "init_weights": "mini"})

    def tensors(self, config: MissConfig, target: Target) -> tuple[MethodTensor, ...]:
        variant, r = self.own(config, target).variant, config.r
        if not target.found:
            _check_sizes(config, target)
        if variant == "bat":
            return (own_tensor("miss_block", (target.own_size("miss_block", 0, lambda: target.out_size // r), r, r)),)
        if variant == "mini":
            return (own_tensor("miss_block", (r, config.mini_r)),)
        return (axes_tensor("miss_block", "r out", (("r", r),)),)

    def own(self, config: MissConfig, target: Target) -> OwnHparams:
        variant = config.init_weights if isinstance(config.init_weights, str) else ""
        return OwnHparams(dropout=0.0 if variant == "bat" else config.miss_dropout, variant=variant)

    def effect(self, own: OwnHparams) -> Effects:
        return Effects("changes", form="weight", reads=True) if own.variant == "bat" else Effects("adds", form="use")

    def init(self, config: MissConfig, tensor: MethodTensor, start: Start) -> Draw:
        if config.init_weights == "bat" and config.miss_dropout:
            raise ConfigError(
                'cannot train MISS with init_weights="bat" and miss_dropout: PEFT ignores the dropout of this variant;'
                " set it to 0.0"
            )
        return Draw("constant", 0.0) if config.init_weights else Draw.kaiming(start.shape[-1])

    def delta(self, own: OwnHparams, params: Params, w: Array) -> Array:
        d = _over_outputs(params["miss_block"], w.shape[0])
        return jnp.tile(d.T, (1, -(-w.shape[1] // len(d))))[:, : w.shape[1]]

    def after(self, own: OwnHparams, params: Params, x: Array, y: Array) -> Array:
        d = _over_outputs(params["miss_block"], y.shape[-1])
        x = jnp.pad(x.astype(d.dtype), [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % len(d))])
        return y + x.reshape(*x.shape[:-1], -1, len(d)).sum(-2) @ d

    def matrix(self, own: OwnHparams, params: Params, w: Array) -> Array:
        if own.variant != "bat":
            return w + self.delta(own, params, w)
        d = params["miss_block"]
        v = _blocks(w, d)
        return (v + jnp.einsum("apcq,aqs->apcs", v, d) + d[:, :, None]).reshape(w.shape)

    def unmatrix(self, own: OwnHparams, params: Params, w: Array) -> Array:
        if own.variant != "bat":
            return w - self.delta(own, params, w)
        d = params["miss_block"]
        inverse = jnp.linalg.inv(jnp.eye(d.shape[-1], dtype=d.dtype) + d)
        return jnp.einsum("apcq,aqs->apcs", _blocks(w, d) - d[:, :, None], inverse).reshape(w.shape)


def _over_outputs(d: Array, outputs: int) -> Array:
    """Return D for all outputs, (r, out)."""
    return jnp.tile(d, (1, outputs // d.shape[1]))


def _blocks(w: Array, d: Array) -> Array:
    """Return the weight as (blocks of outputs, r, blocks of inputs, r)."""
    r = d.shape[-1]
    return w.reshape(w.shape[0] // r, r, w.shape[1] // r, r)


def _check_sizes(config: MissConfig, target: Target) -> None:
    r, inputs, outputs = config.r, target.in_size, target.out_size
    problems = {
        f"MISS needs blocks of at most {inputs} inputs, the size of the module; found r={r}": r > inputs,
        f'MISS with init_weights="bat" needs an r that divides {inputs} inputs and {outputs} outputs; found {r}': (
            config.init_weights == "bat" and (inputs % r or outputs % r)
        ),
        f"MISS needs a mini_r that divides the {outputs} outputs; found {config.mini_r}": (
            config.init_weights == "mini" and outputs % config.mini_r
        ),
    }
    for problem in met(problems):
        raise target.refuse(problem)
