"""PROMPT_TUNING (arXiv:2104.08691; PEFT's `tuners/prompt_tuning/model.py`): trained embeddings before the tokens'.

The one tensor of both forms is `prompt_embeddings` (n · submodules, token_dim).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxadapt.arrays.random_draws import Draw
from jaxadapt.configs import Config
from jaxadapt.core.errors import AttachError, ConfigError
from jaxadapt.methods.base import Array, Params
from jaxadapt.methods.prompt import EMBEDDINGS, BaseSizes, PromptMethod, StartData, fill_in


class PromptTuning(PromptMethod):
    """Trained embeddings before those of the tokens."""

    peft_type = "PROMPT_TUNING"
    adds = "embeddings"
    from_base = True

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
                f" with jaxadapt.initializers.start(base, config{needed})"
            )
        return Draw("normal", 1.0)  # torch's nn.Embedding

    def start_setting(self, config: Any) -> tuple[str, tuple[str, ...]]:
        kind = config.get("prompt_tuning_init")
        if kind is None:
            return super().start_setting(config)
        needs = {"RANDOM": ("key",), "SAMPLE_VOCAB": ("key",), "TEXT": ("tokens",)}.get(kind, ("source",))
        return f'prompt_tuning_init="{kind}"', needs

    def start_values(self, config: Any, shapes: Mapping[str, tuple[int, ...]], data: StartData) -> dict[str, Array]:
        kind = config.get("prompt_tuning_init")
        if kind not in ("SAMPLE_VOCAB", "TEXT"):
            return {}
        rows = shapes[EMBEDDINGS][0]
        if kind == "SAMPLE_VOCAB":
            return {EMBEDDINGS: data.embed("", jax.random.randint(data.key, (rows,), 0, data.table().shape[0]))}
        assert data.tokens is not None
        text = config.prompt_tuning_init_text or ""
        ids = np.asarray(data.tokens(text) if callable(data.tokens) else data.tokens)
        if ids.ndim != 1 or not ids.size or not np.issubdtype(ids.dtype, np.integer):
            raise AttachError(f"tokens: expected a list of token ids, found {ids.dtype} of shape {list(ids.shape)}")
        return {EMBEDDINGS: data.embed("tokens", ids)[np.resize(np.arange(len(ids)), rows)]}  # as in PEFT

    def stored(self, config: Any, shared: Params) -> dict[str, Array]:
        return {EMBEDDINGS: shared[EMBEDDINGS]}

    def examples(self) -> Sequence[Mapping[str, Any]]:
        return ({"num_virtual_tokens": 3}, {"num_virtual_tokens": 3, "prompt_tuning_init": "SAMPLE_VOCAB"})


METHOD = PromptTuning()
