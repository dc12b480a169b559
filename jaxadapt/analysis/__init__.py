"""Size of the change that an adapter makes to each weight: norms, differences of two adapters, and their plots; and
whether a server applies an adapter."""

from jaxadapt.core.lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "analysis.changes": "diff measure_norms",
        "analysis.heat_maps": "norms_png",
        "analysis.logprobs": "compare_logprobs",
    },
)
