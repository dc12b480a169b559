"""GraLoRA (Jung et al. 2025, arXiv:2505.20355) with PEFT's conventions: W + s·D, s = α / (r + hybrid_r).

D is a grid of k·k blocks. With A (k, in/k, r), B (k, r, out/k) and s' = r/k, the block of the outputs j and the inputs
n is the transpose of A[n][:, j·s':(j+1)·s']·B[j][n·s':(n+1)·s']. `hybrid_r` adds a LoRA of the whole weight to D.
The layer adds the product of its input with these factors to its output. The arithmetic follows PEFT's
`tuners/gralora/layer.py`, but both parts see the same dropped inputs, for which PEFT draws twice.
"""

from __future__ import annotations

import jax.numpy as jnp

from jaxadapt.configs.low_rank import GraloraConfig
from jaxadapt.core.errors import MismatchError
from jaxadapt.methods.matrix import (
    Array,
    Examples,
    MatrixMethod,
    MethodTensor,
    OwnHparams,
    Params,
    Strings,
    Target,
    axes_tensor,
    own_tensor,
    tensor_roles,
)


class Gralora(MatrixMethod, peft_type="GRALORA"):
    """A low-rank change of each block of the weight."""

    row_numbers: frozenset[str] = frozenset({"scale"})
    scaled: frozenset[str] = frozenset({"gralora_B", "gralora_B_general"})
    roles: Strings = tensor_roles(A="gralora_A gralora_A_general", B="gralora_B gralora_B_general")
    examples: Examples = ({"r": 4, "alpha": 3}, {"r": 4, "gralora_k": 4, "hybrid_r": 2})

    def tensors(self, config: GraloraConfig, target: Target) -> tuple[MethodTensor, ...]:
        k = config.gralora_k
        inputs = k * target.own_size("gralora_A", 1, lambda: _block(target, "inputs", target.in_size, k))
        outputs = k * target.own_size("gralora_B", 2, lambda: _block(target, "outputs", target.out_size, k))
        if target.is_known and (outputs, inputs) != (target.out_size, target.in_size):
            raise MismatchError(
                f"{target.leaf}: the adapter's {k} rows and columns of blocks make a matrix of shape"
                f" {(outputs, inputs)}, but the weight has {(target.out_size, target.in_size)}; load the adapter into"
                " the model that it was trained on, with its gralora_k"
            )
        made = (
            own_tensor("gralora_A", (k, inputs // k, config.r)),
            own_tensor("gralora_B", (k, config.r, outputs // k)),
        )
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

    def delta(self, own: OwnHparams, params: Params, w: Array) -> Array:
        a, b = params["gralora_A"], params["gralora_B"]
        k = len(a)
        blocks = jnp.einsum("nijs,jnso->joni", a.reshape(*a.shape[:2], k, -1), b.reshape(k, k, -1, b.shape[2]))
        change = blocks.reshape(w.shape)
        if "gralora_A_general" in params:
            change = change + params["gralora_B_general"] @ params["gralora_A_general"]
        return own.scale * change

    def after(self, own: OwnHparams, params: Params, x: Array, y: Array) -> Array:
        a = params["gralora_A"]
        x = x.astype(a.dtype)
        h = jnp.einsum("...ni,nir->...nr", x.reshape(*x.shape[:-1], len(a), -1), a)
        h = h.reshape(*h.shape[:-1], len(a), -1).swapaxes(-3, -2).reshape(h.shape)
        change = jnp.einsum("...jr,jro->...jo", h, params["gralora_B"]).reshape(y.shape)
        if "gralora_A_general" in params:
            h = jnp.einsum("...i,hi->...h", x, params["gralora_A_general"])
            change = change + jnp.einsum("...h,oh->...o", h, params["gralora_B_general"])
        return y + own.scale * change


def _block(target: Target, name: str, size: int, k: int) -> int:
    """Return the size of a block of a new adapter."""
    if size % k:
        raise target.refuse(f"gralora_k = {k} does not divide its {size} {name}; choose a divisor")
    return size // k
