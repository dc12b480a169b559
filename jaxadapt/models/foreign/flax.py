"""Flax's own `nnx.LoRA(base_module=)` and `nnx.LoRALinear`; EasyDeL wraps its layers in the former."""

from jaxadapt.models.foreign import Dialect, Pair

DIALECT = Dialect(
    "nnx.LoRA",
    (
        Pair("{module}.lora.lora_a", "{module}.lora.lora_b", "{module}.kernel"),
        Pair("{module}.lora_a", "{module}.lora_b", "{module}.kernel"),
    ),
    unscaled=True,
    moved=(("{module}.base_module.{leaf}", "{module}.{leaf}"),),
)
