"""Adapters in, weights or other adapters out: merge, combine, resize, and plain LoRA as matrices."""

from jaxadapt.core.lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "merging.combination": "resize_rank to_lora",
        "merging.pairs": "convert_variant plain_lora",
    },
)
