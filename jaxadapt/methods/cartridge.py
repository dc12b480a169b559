"""CARTRIDGE (arXiv:2506.06266; PEFT's `tuners/cartridge/model.py`): a prefix whose first tokens are not trained.

The stored form is that of PREFIX_TUNING. The trained form has the fixed and the trained tokens as two tensors.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxadapt.methods.prompt import EMBEDDINGS, Array, Draw, Examples, Params, PromptMethod, Strings, tensor_roles

_FROZEN, _TRAINED = "frozen_embedding", "trainable_embedding"


class Cartridge(PromptMethod, peft_type="CARTRIDGE"):
    """Keys and values before those of every attention layer; the first tokens are fixed."""

    adds = "keys"
    roles: Strings = tensor_roles(frozen=_FROZEN)
    examples: Examples = ({"num_virtual_tokens": 3, "num_frozen_tokens": 2},)

    def shapes(self, config: Any, *, stored: bool) -> dict[str, tuple[int, ...]]:
        self.require_sizes(config)
        width = config.num_layers * 2 * config.token_dim
        if stored:
            return {EMBEDDINGS: (config.num_virtual_tokens, width)}
        return {
            name: (size, width)
            for name, size in (
                (_FROZEN, config.num_frozen_tokens),
                (_TRAINED, config.num_virtual_tokens - config.num_frozen_tokens),
            )
            if size
        }

    def draw(self, config: Any, name: str) -> Draw:
        return Draw("normal", 1.0)

    def stored(self, config: Any, shared: Params) -> dict[str, Array]:
        whole = shared.get(EMBEDDINGS)
        frozen = shared.get(_FROZEN) if whole is None else whole[: config.num_frozen_tokens]
        trained = shared.get(_TRAINED) if whole is None else whole[config.num_frozen_tokens :]
        parts = [None if frozen is None else jax.lax.stop_gradient(frozen), trained]
        return {EMBEDDINGS: jnp.concatenate([part for part in parts if part is not None])}
