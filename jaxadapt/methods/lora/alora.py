"""aLoRA (arXiv:2504.12397) with PEFT's conventions: a LoRA for the tokens from its invocation sequence on, no others.

As in PEFT's `tuners/lora/variants.py`: where the sequence occurs several times its last place counts, and in a row
without it nothing is adapted. Which tokens those are is data of a call, laid beside A and B under `MASK`
(`jaxadapt.models.invoke` does), so one compiled program serves them all.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp

from jaxadapt.configs import LoraConfig
from jaxadapt.core.errors import AttachError
from jaxadapt.keymaps.keymap import Match
from jaxadapt.methods.base import Array, Params

MASK = "tokens"


def invoked(sequence: Sequence[int], ids: Array) -> Array:
    """Whether each token (batch, time) is adapted: from the last place of the sequence to the end.

    >>> invoked([7, 8], jnp.array([[1, 7, 8, 2], [7, 8, 7, 8], [1, 2, 3, 7]])).astype(int).tolist()
    [[0, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 0]]
    """
    length, size = ids.shape[1], len(sequence)
    starts = length - size + 1
    if starts < 1:
        return jnp.zeros(ids.shape, bool)
    hits = jnp.stack([ids[:, i : i + starts] == token for i, token in enumerate(sequence)]).all(0)
    last = jnp.where(hits.any(1), starts - 1 - jnp.argmax(hits[:, ::-1], 1), length)
    return jnp.arange(length)[None] >= last[:, None]


def stacked(mask: Array, stack: Sequence[int], shape: Sequence[int]) -> Array:
    """The same mask for each layer that an array of this shape stacks on these axes."""
    for axis in stack:
        mask = jnp.repeat(jnp.expand_dims(mask, axis), shape[axis], axis)
    return mask


def only(params: Params, delta: Array, y: Array) -> Array:
    """What of the adapter's output counts. Raises `AttachError` where nobody said which tokens do."""
    mask = params.get(MASK)
    if mask is None:
        raise AttachError(
            "an aLoRA adapts only the tokens from its invocation sequence on, and a layer does not see tokens: call the"
            " model within jaxadapt.models.invoke(model, ids)"
        )
    if y.shape[: mask.ndim] != mask.shape:
        found = list(y.shape)
        raise AttachError(f"an aLoRA's tokens are {list(mask.shape)} here (batch, time), and a layer gives {found}")
    return jnp.where(mask.reshape(mask.shape + (1,) * (y.ndim - mask.ndim)), delta, 0)


def problems(config: LoraConfig, site: Match) -> list[str]:
    """What PEFT has no aLoRA for."""
    found = [name for name in ("use_dora", "kasa_config") if config.get(name)]
    if str(config.init_lora_weights).lower() == "mica":
        found.append("init_lora_weights='mica'")
    if not config.alora_invocation_tokens:
        found.append("no tokens at all")
    if site.weight.kind != "linear":
        found.append("a layer that is no linear one")
    return found
