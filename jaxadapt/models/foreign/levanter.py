"""Levanter 1.1: `LoraLinear(wrapped, lora)`. Both weights of `lora` have PyTorch's layout, output axes first."""

from jaxadapt.models.foreign import Dialect, Pair

DIALECT = Dialect(
    "levanter",
    (
        Pair(
            "{module}.lora.lora_A.weight",
            "{module}.lora.lora_B.weight",
            "{module}.weight",
            (("r in", "out r"),),
        ),
    ),
    scale="the alpha of its LoraConfig",
    moved=(("{module}.wrapped.{leaf}", "{module}.{leaf}"),),
)
