"""TRAINABLE_TOKENS: full training of single rows of a token embedding, as LoRA's `trainable_token_indices`.

The rows are those of `methods/copies.py`. PEFT writes them once more under the name of a head that is tied to the
embedding; so does `save` if it sees the base, and a reader does not insist on it.
"""

from __future__ import annotations

from jaxadapt.configs.full_rank import TrainableTokensConfig
from jaxadapt.core.errors import ConfigError
from jaxadapt.methods.base import Examples, Strings
from jaxadapt.methods.copies import ROWS, CopyingMethod, RowCopy


class TrainableTokens(CopyingMethod, peft_type="TRAINABLE_TOKENS"):
    """Training of single rows of the targets."""

    as_head: Strings = Strings({ROWS: ROWS})
    ties_heads = True
    examples: Examples = ({"target_modules": ["embed_tokens"], "token_indices": [3, 1, 20]},)

    def check(self, config: TrainableTokensConfig) -> None:
        if not config.token_indices:
            raise ConfigError("token_indices: expected the tokens to train, found none")

    def copy_of(self, config: TrainableTokensConfig, parameter: str, lookup: bool) -> RowCopy | None:
        if parameter != "weight":
            return None
        return RowCopy(tuple(config.token_indices), "token_indices", "", not config.init_weights)
