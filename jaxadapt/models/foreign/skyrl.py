"""SkyRL-tx 0.3: several adapters in each array, chosen token by token, with a rank and a scale for each.

Its modules have Hugging Face's names (the keymap "llama"). Later versions fuse q, k and v, and gate and up,
which would need another keymap.
"""

from jaxadapt.models.foreign import Dialect, Pair

DIALECT = Dialect(
    "SkyRL-tx",
    (
        Pair("{module}.embed_tokens.lora_A", "{module}.embed_tokens.lora_B", "{module}.embed_tokens.embedding"),
        Pair(
            "{module}.experts.{name}.lora_A",
            "{module}.experts.{name}.lora_B",
            "{module}.experts.{name}.weight",
            (("batch in r", "batch r out"),),
        ),
        Pair("{module}.lora_A", "{module}.lora_B", "{module}.kernel"),
    ),
    slots=("lora_ranks", "lora_scaling"),
)
