"""The prompt methods: virtual tokens before those of the input, as embeddings or as keys and values. One file each."""

from jaxadapt.methods.prompt.base import PromptMethod
from jaxadapt.methods.prompt.cartridge import Cartridge
from jaxadapt.methods.prompt.encoder import PromptEncoder
from jaxadapt.methods.prompt.multitask import Multitask
from jaxadapt.methods.prompt.prefix import Prefix
from jaxadapt.methods.prompt.soft import SoftPrompt

PROMPTS: dict[str, PromptMethod] = {
    m.peft_type: m for m in (Prefix(), Cartridge(), SoftPrompt(), PromptEncoder(), Multitask())
}

__all__ = ["PROMPTS", "PromptMethod"]
