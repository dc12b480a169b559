"""The token embeddings of a base, from which a prompt may start."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxadapt.arrays import quantized
from jaxadapt.core.errors import AttachError
from jaxadapt.keymaps.keymap import KeyMap
from jaxadapt.models.prompt.rewriting import input_embedding

Array = Any


def token_table(keymap: KeyMap, leaves: Mapping[str, Array], peft_type: str) -> Array:
    """Return the embeddings of all tokens (vocabulary, token_dim); raise `AttachError` if their leaf is unclear."""
    leaf = input_embedding(keymap, leaves)
    x = None if leaf is None else leaves[leaf]
    if x is None or isinstance(x, jax.ShapeDtypeStruct) or len(x.shape) != 2:
        raise AttachError(
            f"{peft_type}: the start needs the values of the token embeddings (vocabulary, width), and"
            f" {'several or no parameters may hold them' if leaf is None else f'{leaf} has none of this shape'}."
            ' Use prompt_tuning_init="RANDOM", and write your own values with jaxadapt.inject'
        )
    return jnp.asarray(quantized.to_dense(x))
