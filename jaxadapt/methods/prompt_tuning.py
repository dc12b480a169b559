"""PROMPT_TUNING (arXiv:2104.08691; PEFT's `tuners/prompt_tuning/model.py`): trained embeddings before the tokens'.

The one tensor of both forms is `prompt_embeddings` (n · submodules, token_dim).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jaxadapt.arrays.random_draws import Draw
from jaxadapt.configs import Config
from jaxadapt.core.errors import ConfigError
from jaxadapt.methods.base import Array, Params
from jaxadapt.methods.prompt import EMBEDDINGS, BaseSizes, PromptMethod, fill_in


class PromptTuning(PromptMethod):
    """Trained embeddings before those of the tokens."""

    peft_type = "PROMPT_TUNING"
    adds = "embeddings"

    def complete(self, config: Any, sizes: BaseSizes) -> Config:
        known = {
            "num_layers": sizes.num_layers,
            "token_dim": sizes.token_dim,
            "num_attention_heads": sizes.num_attention_heads,
            "num_transformer_submodules": config.submodules,
        }
        config = fill_in(config, known)
        return fill_in(config, self.own_sizes(config))

    def own_sizes(self, config: Any) -> dict[str, int | None]:
        """Return the fields of this method that follow from the others."""
        return {}

    def shapes(self, config: Any, *, stored: bool) -> dict[str, tuple[int, ...]]:
        self.require_sizes(config)
        return {EMBEDDINGS: (config.num_virtual_tokens * config.submodules, config.token_dim)}

    def draw(self, config: Any, name: str) -> Draw:
        kind = config.get("prompt_tuning_init", "RANDOM")
        if kind != "RANDOM":
            needed = {"SAMPLE_VOCAB": "", "TEXT": ", tokens=ids"}.get(kind, ", source=adapter")
            raise ConfigError(
                f'{self.peft_type}: prompt_tuning_init="{kind}" needs data beyond the configuration; create the adapter'
                f" with jaxadapt.initializers.start(config, base{needed})"
            )
        return Draw("normal", 1.0)  # torch's nn.Embedding

    def stored(self, config: Any, shared: Params) -> dict[str, Array]:
        return {EMBEDDINGS: shared[EMBEDDINGS]}

    def examples(self) -> Sequence[Mapping[str, Any]]:
        return ({"num_virtual_tokens": 3}, {"num_virtual_tokens": 3, "prompt_tuning_init": "SAMPLE_VOCAB"})


METHOD = PromptTuning()
