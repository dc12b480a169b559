"""LoRA and its variants."""

from jaxadapt.methods.lora.method import Lora

METHOD = Lora()
