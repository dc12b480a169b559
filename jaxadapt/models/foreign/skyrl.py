"""SkyRL-tx 0.3: several adapters in each array, chosen token by token, with a rank and a scale for each.

Its modules have Hugging Face's names (the keymap "llama"). Later versions fuse q, k and v, and gate and up,
which would need another keymap.
"""

from jaxadapt.models.foreign import Dialect, Pair

DIALECT = Dialect(
    "SkyRL-tx",
    tuple(
        Pair(
            f"{module}.lora_A",
            f"{module}.lora_B",
            f"{module}.{weight}",
            (layout,),
            scale_leaf=f"{module}.lora_scaling",
            rank_leaf=f"{module}.lora_ranks",
        )
        for module, weight, layout in (
            ("{module}.embed_tokens", "embedding", ("in r", "r out")),
            ("{module}.experts.{name}", "weight", ("batch in r", "batch r out")),
            ("{module}", "kernel", ("in r", "r out")),
        )
    ),
)
