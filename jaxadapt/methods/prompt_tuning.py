"""PROMPT_TUNING (arXiv:2104.08691; PEFT's `tuners/prompt_tuning/model.py`): trained embeddings before the tokens'.

The one tensor of both forms is `prompt_embeddings` (n · submodules, token_dim).
"""

from __future__ import annotations

from jaxadapt.methods.prompt import EmbeddingPrompt, Examples


class PromptTuning(EmbeddingPrompt, peft_type="PROMPT_TUNING"):
    """Trained embeddings before those of the tokens."""

    examples: Examples = ({"num_virtual_tokens": 3}, {"num_virtual_tokens": 3, "prompt_tuning_init": "SAMPLE_VOCAB"})
