"""Changes of the blocks of a weight: GraLoRA and MiSS.

GraLoRA (Jung et al. 2025, arXiv:2505.20355) with PEFT's conventions: W + s·D, s = α / (r + hybrid_r).

D is a grid of k·k blocks. With A (k, in/k, r), B (k, r, out/k) and s' = r/k, the block of the outputs j and the inputs
n is the transpose of A[n][:, j·s':(j+1)·s']·B[j][n·s':(n+1)·s']. `hybrid_r` adds a LoRA of the whole weight to D.
The layer adds the product of its input with these factors to its output. The arithmetic follows PEFT's
`tuners/gralora/layer.py`, but both parts see the same dropped inputs, for which PEFT draws twice.

MiSS (Kang & Yin 2024, arXiv:2409.15371) with PEFT's conventions: every block of r inputs gets the change Dᵀ.

D is `miss_block` (r, out): W + (Dᵀ, Dᵀ, …), where the last block is cut at the last input. With "mini" D is (r, mini_r)
and repeated over the outputs. With "bat" `miss_block` is (out/r, r, r), and each block V of r outputs and r inputs
becomes V + V·D + D. The arithmetic follows PEFT's `tuners/miss/layer.py`, with its fault:

- "bat" ignores `miss_dropout`. Here such a file loads, and a new adapter is refused.

A sum over the blocks of the input replaces the effective weight, except with "bat".
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from jaxadapt.configs.low_rank import GraloraConfig, MissConfig
from jaxadapt.core.errors import ConfigError, MismatchError
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
    axes_tensor,
    own_tensor,
    tensor_roles,
)

# ---------------------------------------------------------------- gralora


class Gralora(MatrixMethod):
    """A low-rank change of each block of the weight."""

    peft_type = "GRALORA"
    row_numbers = frozenset({"scale"})
    scaled = frozenset({"gralora_B", "gralora_B_general"})
    roles = tensor_roles(A="gralora_A gralora_A_general", B="gralora_B gralora_B_general")
    examples = ({"r": 4, "alpha": 3}, {"r": 4, "gralora_k": 4, "hybrid_r": 2})

    def tensors(self, config: GraloraConfig, target: Target) -> tuple[MethodTensor, ...]:
        k, r = config.gralora_k, config.r
        inputs = k * target.own_size("gralora_A", 1, lambda: _block(target, "inputs", target.in_size, k))
        outputs = k * target.own_size("gralora_B", 2, lambda: _block(target, "outputs", target.out_size, k))
        if target.is_known and (outputs, inputs) != (target.out_size, target.in_size):
            raise MismatchError(
                f"{target.leaf}: the adapter's {k} rows and columns of blocks make a matrix of shape"
                f" {(outputs, inputs)}, but the weight has {(target.out_size, target.in_size)}; load the adapter into"
                " the model that it was trained on, with its gralora_k"
            )
        made = (own_tensor("gralora_A", (k, inputs // k, r)), own_tensor("gralora_B", (k, r, outputs // k)))
        if not config.hybrid_r:
            return made
        h = (("h", config.hybrid_r),)
        return (
            *made,
            axes_tensor("gralora_A_general", "h in", h, suffix=".gralora_A_general.weight"),
            axes_tensor("gralora_B_general", "out h", h, suffix=".gralora_B_general.weight"),
        )

    def own(self, config: GraloraConfig, target: Target) -> OwnHparams:
        return OwnHparams(config.alpha / (config.r + config.hybrid_r), dropout=config.gralora_dropout)

    def init(self, config: GraloraConfig, tensor: MethodTensor, start: Start) -> Draw:
        if config.init_weights and tensor.name.startswith("gralora_B"):
            return Draw("constant", 0.0)
        return Draw.kaiming(start.shape[1])

    def delta(self, own: OwnHparams, params: Params, w: Array) -> Array:
        a, b = params["gralora_A"], params["gralora_B"]
        k = len(a)
        blocks = jnp.einsum("nijs,jnso->joni", a.reshape(*a.shape[:2], k, -1), b.reshape(k, k, -1, b.shape[2]))
        change = blocks.reshape(w.shape)
        if "gralora_A_general" in params:
            change = change + params["gralora_B_general"] @ params["gralora_A_general"]
        return own.scale * change

    def after(self, own: OwnHparams, params: Params, x: Array, y: Array) -> Array:
        a, b = params["gralora_A"], params["gralora_B"]
        x, k = x.astype(a.dtype), len(a)
        h = jnp.einsum("...ni,nir->...nr", x.reshape(*x.shape[:-1], k, -1), a)
        h = h.reshape(*h.shape[:-1], k, -1).swapaxes(-3, -2).reshape(h.shape)
        change = jnp.einsum("...jr,jro->...jo", h, b).reshape(y.shape)
        if "gralora_A_general" in params:
            h = jnp.einsum("...i,hi->...h", x, params["gralora_A_general"])
            change = change + jnp.einsum("...h,oh->...o", h, params["gralora_B_general"])
        return y + own.scale * change


def _block(target: Target, name: str, size: int, k: int) -> int:
    """Return the size of a block of a new adapter."""
    if size % k:
        raise target.refuse(f"gralora_k = {k} does not divide its {size} {name}; choose a divisor")
    return size // k


# ---------------------------------------------------------------- miss


@dataclasses.dataclass(frozen=True)
class MissHparams:
    """The hyperparameters of a site: the variant ("", "bat" or "mini") and the dropout rate."""

    variant: str
    dropout: float


class Miss(MatrixMethod):
    """One matrix for all blocks of inputs."""

    peft_type = "MISS"
    roles = tensor_roles(B="miss_block")
    examples = ({"r": 3}, {"r": 4, "init_weights": "bat"}, {"r": 2, "mini_r": 4, "init_weights": "mini"})

    def tensors(self, config: MissConfig, target: Target) -> tuple[MethodTensor, ...]:
        variant, r = self.own(config, target).variant, config.r
        if not target.found:
            _check_sizes(config, target)
        if variant == "bat":
            blocks = target.own_size("miss_block", 0, lambda: target.out_size // r)
            return (own_tensor("miss_block", (blocks, r, r)),)
        if variant == "mini":
            return (own_tensor("miss_block", (r, config.mini_r)),)
        return (axes_tensor("miss_block", "r out", (("r", r),)),)

    def own(self, config: MissConfig, target: Target) -> MissHparams:
        variant = config.init_weights if isinstance(config.init_weights, str) else ""
        return MissHparams(variant, 0.0 if variant == "bat" else config.miss_dropout)

    def effect(self, own: MissHparams) -> Effects:
        return Effects("changes", form="weight", reads=True) if own.variant == "bat" else Effects("adds", form="use")

    def init(self, config: MissConfig, tensor: MethodTensor, start: Start) -> Draw:
        if config.init_weights == "bat" and config.miss_dropout:
            raise ConfigError(
                'cannot train MISS with init_weights="bat" and miss_dropout: PEFT ignores the dropout of this variant;'
                " set it to 0.0"
            )
        if config.init_weights:
            return Draw("constant", 0.0)
        return Draw.kaiming(start.shape[-1])

    def delta(self, own: MissHparams, params: Params, w: Array) -> Array:
        d = _over_outputs(params["miss_block"], w.shape[0])
        return jnp.tile(d.T, (1, -(-w.shape[1] // len(d))))[:, : w.shape[1]]

    def after(self, own: MissHparams, params: Params, x: Array, y: Array) -> Array:
        d = _over_outputs(params["miss_block"], y.shape[-1])
        r, rest = len(d), -x.shape[-1] % len(d)
        x = jnp.pad(x.astype(d.dtype), [(0, 0)] * (x.ndim - 1) + [(0, rest)])
        return y + x.reshape(*x.shape[:-1], -1, r).sum(-2) @ d

    def matrix(self, own: MissHparams, params: Params, w: Array) -> Array:
        if own.variant != "bat":
            return w + self.delta(own, params, w)
        d, v = params["miss_block"], _blocks(w, params["miss_block"])
        return (v + jnp.einsum("apcq,aqs->apcs", v, d) + d[:, :, None]).reshape(w.shape)

    def unmatrix(self, own: MissHparams, params: Params, w: Array) -> Array:
        if own.variant != "bat":
            return w - self.delta(own, params, w)
        d, v = params["miss_block"], _blocks(w, params["miss_block"])
        inverse = jnp.linalg.inv(jnp.eye(d.shape[-1], dtype=d.dtype) + d)
        return jnp.einsum("apcq,aqs->apcs", v - d[:, :, None], inverse).reshape(w.shape)


def _over_outputs(d: Array, outputs: int) -> Array:
    """Return D for all outputs, (r, out)."""
    return jnp.tile(d, (1, outputs // d.shape[1]))


def _blocks(w: Array, d: Array) -> Array:
    """Return the weight as (blocks of outputs, r, blocks of inputs, r)."""
    r = d.shape[-1]
    return w.reshape(w.shape[0] // r, r, w.shape[1] // r, r)


def _check_sizes(config: MissConfig, target: Target) -> None:
    r, inputs, outputs = config.r, target.in_size, target.out_size
    if r > inputs:
        raise target.refuse(f"MISS needs blocks of at most {inputs} inputs, the size of the module; found r={r}")
    if config.init_weights == "bat" and (inputs % r or outputs % r):
        raise target.refuse(
            f'MISS with init_weights="bat" needs an r that divides {inputs} inputs and {outputs} outputs; found {r}'
        )
    if config.init_weights == "mini" and outputs % config.mini_r:
        raise target.refuse(f"MISS needs a mini_r that divides the {outputs} outputs; found {config.mini_r}")
