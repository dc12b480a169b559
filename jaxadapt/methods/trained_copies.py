"""Copies of the targets' parameters, or of some of their rows, which are trained: LN_TUNING and TRAINABLE_TOKENS.

LN_TUNING (Zhao et al. 2023, arXiv:2312.11420) with PEFT's conventions: full copies of the targets, mostly norms.

The file has the copies as `<module>.ln_tuning_layers.weight` and `.bias`, for any kind of module. The copies of the
active adapter replace the parameters, and only one such adapter can be active (`tuners/ln_tuning/layer.py`). A merge
keeps the copies; unmerging is refused, because they replaced the originals. PEFT keeps both and swaps them.

TRAINABLE_TOKENS: full training of single rows of a token embedding, as LoRA's `trainable_token_indices`.

The rows are those of `methods/copies.py`. PEFT writes them once more under the name of a head that is tied to the
embedding; so does `save` if it sees the base, and a reader does not insist on it.
"""

from __future__ import annotations

from types import MappingProxyType

from jaxadapt.configs.full_rank import LNTuningConfig, TrainableTokensConfig
from jaxadapt.core.errors import ConfigError
from jaxadapt.methods.base import Method
from jaxadapt.methods.copies import ROWS, CopyingMethod, FullCopy, RowCopy

# ---------------------------------------------------------------- ln_tuning


class LnTuning(CopyingMethod):
    """Full training of norms."""

    peft_type = "LN_TUNING"
    examples = ({"target_modules": ["input_layernorm", "norm"]}, {"target_modules": r".*(layernorm|v_proj)"})

    def copy_of(self, config: LNTuningConfig, parameter: str) -> Method:
        return FullCopy("target_modules", ".ln_tuning_layers")


# ---------------------------------------------------------------- trainable_tokens


class TrainableTokens(CopyingMethod):
    """Training of single rows of the targets."""

    peft_type = "TRAINABLE_TOKENS"
    as_head = MappingProxyType({ROWS: ROWS})
    ties_heads = True
    examples = ({"target_modules": ["embed_tokens"], "token_indices": [3, 1, 20]},)

    def check(self, config: TrainableTokensConfig) -> None:
        if not config.token_indices:
            raise ConfigError("token_indices: expected the tokens to train, found none")

    def copy_of(self, config: TrainableTokensConfig, parameter: str) -> Method | None:
        if parameter != "weight":
            return None
        return RowCopy(tuple(config.token_indices), "token_indices", "", not config.init_weights)
