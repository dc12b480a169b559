"""aLoRA (arXiv:2504.12397) with PEFT's conventions: a LoRA that adapts only the tokens from its invocation sequence on.

As in PEFT's `tuners/lora/variants.py`, the last occurrence of the sequence counts, and a row without the sequence is
not adapted. The mask of the adapted tokens is data of a call: `jaxadapt.models.invoke` stores it beside A and B under
`MASK`, so one compiled program serves all masks.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp

from jaxadapt.configs import LoraConfig
from jaxadapt.core.errors import AttachError
from jaxadapt.keymaps.keymap import Match
from jaxadapt.methods.base import Array, Params

MASK = "tokens"


def invocation_mask(sequence: Sequence[int], ids: Array) -> Array:
    """Return the mask (batch, time) of the adapted tokens: from the last occurrence of the sequence to the end.

    >>> invocation_mask([7, 8], jnp.array([[1, 7, 8, 2], [7, 8, 7, 8], [1, 2, 3, 7]])).astype(int).tolist()
    [[0, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 0]]
    """
    length, size = ids.shape[1], len(sequence)
    starts = length - size + 1
    if starts < 1:
        return jnp.zeros(ids.shape, bool)
    hits = jnp.stack([ids[:, i : i + starts] == token for i, token in enumerate(sequence)]).all(0)
    last = jnp.where(hits.any(1), starts - 1 - jnp.argmax(hits[:, ::-1], 1), length)
    return jnp.arange(length)[None] >= last[:, None]


def mask_delta(params: Params, delta: Array, y: Array) -> Array:
    """Return the adapter's output for the adapted tokens, and 0 for the others; raise `AttachError` without a mask."""
    mask = params.get(MASK)
    if mask is None:
        raise AttachError(
            "aLoRA adapts only the tokens from its invocation sequence on, but a layer does not see the tokens. Call"
            " the model within jaxadapt.models.invoke(model, ids)"
        )
    if y.shape[: mask.ndim] != mask.shape:
        raise AttachError(
            f"cannot apply aLoRA: the token ids have shape {list(mask.shape)} (batch, time), but a layer's output has"
            f" shape {list(y.shape)}; its leading axes must be the same"
        )
    return jnp.where(mask.reshape(mask.shape + (1,) * (y.ndim - mask.ndim)), delta, 0)


def list_problems(config: LoraConfig, match: Match) -> list[str]:
    """Return the settings and layers that PEFT does not combine with aLoRA."""
    unsupported = [name for name in ("use_dora", "kasa_config") if config.get(name) not in (None, False)]
    if str(config.init_lora_weights).lower() == "mica":
        unsupported.append("init_lora_weights='mica'")
    if not config.alora_invocation_tokens:
        unsupported.append("an empty list of tokens")
    if match.weight.kind != "linear":
        unsupported.append("a layer that is not linear")
    return unsupported
