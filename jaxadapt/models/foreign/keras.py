"""keras 3.15 (and so keras-hub 0.32): `lora_kernel_a` and `lora_kernel_b` beside a layer's kernel.

B has the kernel's last axis and A all others. So in the queries, keys and values of an attention layer each head has
its own A, and all heads share one B. A leaf's path is the variable's `path`, with dots instead of slashes.
"""

from jaxadapt.models.foreign import Dialect, Pair

DIALECT = Dialect(
    "keras",
    (
        Pair("{module}.lora_kernel_a", "{module}.lora_kernel_b", "{module}.kernel"),
        Pair("{module}.lora_embeddings_a", "{module}.lora_embeddings_b", "{module}.embeddings"),
    ),
    scale="the lora_alpha of enable_lora (the rank by default)",
    heads="shared",
    trains=("keras",),
)
