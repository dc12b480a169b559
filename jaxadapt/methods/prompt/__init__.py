"""The prompt methods: virtual tokens before those of the input, as embeddings or as keys and values. One file each."""

from jaxadapt.methods.prompt.base import PromptMethod
from jaxadapt.methods.prompt.prefix import Prefix

PROMPTS: dict[str, PromptMethod] = {m.peft_type: m for m in (Prefix(),)}

__all__ = ["PROMPTS", "PromptMethod"]
