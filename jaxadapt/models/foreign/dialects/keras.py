"""keras 3.15 (and so keras-hub 0.32): `lora_kernel_a` and `lora_kernel_b` beside a layer's kernel.

B has the kernel's last axis, and A all others: of an attention's queries, keys and values each head has an A of its
own, and all of them one B. A leaf is a variable's `path`, with dots for its slashes.
"""

from jaxadapt.models.foreign.dialect import Dialect, Pair

KERAS = Dialect(
    "keras",
    (
        Pair("{module}.lora_kernel_a", "{module}.lora_kernel_b", "{module}.kernel"),
        Pair("{module}.lora_embeddings_a", "{module}.lora_embeddings_b", "{module}.embeddings"),
    ),
    scale="the lora_alpha of enable_lora (the rank, if it was told none)",
    per_head=True,
)
