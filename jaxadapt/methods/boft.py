"""BOFT (Liu et al. 2024, arXiv:2311.06243) with PEFT's conventions: y = s∘(W·(Qᵀ·x)) + b, with one orthogonal factor.

Q is block-diagonal with the blocks (I − K)·(I + K)⁻¹, where K = ½·(R − Rᵀ) for the blocks R of `boft_R`
(1, blocks, b, b). `boft_s` is (out, 1), or (1, out) for a convolution, whose kernel is one matrix (out,
channels·window). A use of a linear weight rotates its input. The arithmetic follows PEFT's `tuners/boft/layer.py`, with
its faults:

- Without a compiled CUDA extension PEFT uses one factor whatever `boft_n_butterfly_factor` is, so a configuration does
  not tell the number of factors. Here the shape of `boft_R` does, and a new adapter has one, with a warning. Files with
  several factors can be read and written; they are not computed, because PEFT can only compute them with the extension.
- In training, `boft_dropout` replaces this share of the blocks of Q by the identity, rounded down: other blocks in each
  call, the same for all rows of a batch.
- PEFT gives `boft_R` of a convolution the square of the window's first size, so only square windows are accepted.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from jaxadapt.configs.full_rank import BOFTConfig
from jaxadapt.core.errors import warn
from jaxadapt.methods.matrix import (
    CALL_KEY,
    Array,
    Draw,
    Effects,
    Examples,
    MethodTensor,
    OwnHparams,
    Params,
    Rotation,
    Start,
    Strings,
    Target,
    at_least_float32,
    axes_tensor,
    cayley,
    check_window,
    own_tensor,
    tensor_roles,
    turn,
)


class Boft(Rotation, peft_type="BOFT"):
    """A rotation of blocks of the inputs, and a scale of the outputs."""

    drops: ClassVar[Literal["input", "change"]] = "change"
    roles: Strings = tensor_roles(other="boft_R", vector="boft_s")
    examples: Examples = ({"boft_block_size": 4}, {"boft_block_size": 0, "boft_block_num": 4, "init_weights": False})
    changes: Effects | None = Effects("changes", form="use", reads=True, sees="product")

    def tensors(self, config: BOFTConfig, target: Target) -> tuple[MethodTensor, ...]:
        window, found = target.window, target.found.get("boft_R")
        check_window(target, "BOFT")
        if found is not None and found[0] != 1:
            raise target.refuse(
                "BOFT with several butterfly factors is not computed, because PEFT computes it only with a compiled"
                " CUDA extension; its files can be read and written"
            )
        if found is None:
            if config.boft_n_butterfly_factor != 1:
                warn(
                    f"BOFT: a new adapter has one butterfly factor and not {config.boft_n_butterfly_factor}, as in PEFT"
                    " without its CUDA extension; set boft_n_butterfly_factor=1"
                )
            size = target.in_size * math.prod(window)
            given = config.boft_block_size or config.boft_block_num
            if size % given:
                raise target.refuse(f"BOFT needs blocks that divide the size {size} of its inputs; found {given}")
            number, block = (size // given, given) if config.boft_block_size else (given, size // given)
            found = (1, number, block, block)
        return own_tensor("boft_R", found), axes_tensor("boft_s", "1 out" if window else "out 1")

    def init(self, config: BOFTConfig, tensor: MethodTensor, start: Start) -> Draw | Array:
        mean = 1.0 if tensor.name == "boft_s" else 0.0
        return Draw("constant", mean) if config.init_weights else mean + 0.1 * jax.random.normal(start.key, start.shape)

    def before(self, own: OwnHparams, params: Params, x: Array) -> Array:
        return turn(x, _kept_blocks(own, params))

    def after(self, own: OwnHparams, params: Params, x: Array, y: Array) -> Array:
        return y * params["boft_s"].reshape(-1)

    def turned(self, own: OwnHparams, params: Params, flat: Array, undo: bool) -> Array:
        scale, blocks = params["boft_s"].reshape(-1, 1), _kept_blocks(own, params)
        return turn(flat / scale, blocks) if undo else turn(flat, blocks.swapaxes(1, 2)) * scale


def _kept_blocks(own: OwnHparams, params: Params) -> Array:
    """Return the blocks of Q, (blocks, b, b)."""
    r = at_least_float32(params["boft_R"][0])
    blocks = cayley((r - r.swapaxes(1, 2)) / 2)
    if CALL_KEY not in params:
        return blocks
    dropped = jax.random.permutation(params[CALL_KEY], len(r)) < int(own.dropout * len(r))
    return jnp.where(dropped[:, None, None], jnp.eye(r.shape[-1], dtype=blocks.dtype), blocks)
