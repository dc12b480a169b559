"""Adapters in, weights or other adapters out: merge, combine, resize, and plain LoRA as matrices."""

from typing import TYPE_CHECKING

from jaxadapt.core.lazy import lazy_names

if TYPE_CHECKING:
    from jaxadapt.merging.base_merge import merge as merge
    from jaxadapt.merging.base_merge import unmerge as unmerge
    from jaxadapt.merging.combination import combine as combine
    from jaxadapt.merging.plain_form import plain_lora as plain_lora
    from jaxadapt.merging.rank_reduction import resize_rank as resize_rank
    from jaxadapt.merging.rank_reduction import to_lora as to_lora
else:
    __getattr__, __dir__, __all__ = lazy_names(__name__)
