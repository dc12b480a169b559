"""openpi (`lora.Einsum` and `lora.FeedForward` of its Gemma): in attention each head has its own A and its own B.

`lora.Einsum` replaces one of the last two axes of the weight by the rank and keeps all others, heads included. So a
query head has an A and a B of its own. The heads of the output projection share one hidden vector of size r: their As
map into it together, and the sum of their Bs maps it out. The feed-forward layers do not scale; attention multiplies by
alpha/r. The layers are always stacked on axis 0.
"""

from jaxadapt.models.foreign import Dialect, Pair

_AXES = (("batch in r", "batch r out"),)
_ATTENTION = tuple(f"{name}_einsum{end}" for end in ("", "_1") for name in ("q", "kv", "qkv", "attn_vec"))
_FEED_FORWARD = tuple(f"mlp{end}.{name}" for end in ("", "_1") for name in ("gating_einsum", "linear"))

DIALECT = Dialect(
    "openpi",
    (
        *(
            Pair(f"{{module}}.layers.attn.{name}.lora_a", f"{{module}}.layers.attn.{name}.lora_b",
                 f"{{module}}.layers.attn.{name}.w", _AXES)
            for name in _ATTENTION
        ),
        *(
            Pair(f"{{module}}.layers.{name}_lora_a", f"{{module}}.layers.{name}_lora_b", f"{{module}}.layers.{name}",
                 _AXES, unscaled=True)
            for name in _FEED_FORWARD
        ),
    ),
    scale="the alpha of its LoRAConfig (times √rank with rslora)",
    heads="own",
    named=True,
    trains=("openpi",),
)  # fmt: skip
