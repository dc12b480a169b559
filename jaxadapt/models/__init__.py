"""Adapters on NNX modules, Linen modules and the trees of other libraries. Only this package and `demo` import Flax."""

from jaxadapt.core.lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "models.foreign.tree": "LoraTree",
        "models.graph": "BaseParam FrozenParam LayerNumber SharedParam",
        "models.attention_calls": "RelativeBias TakesEmbeddings TakesKeys attention",
        "models.prompts": "extend_labels",
        "models.pytree": "AdaptedTree Function adapter_filter",
        "models.attachment": "dequantize from_qwix invoke quantize rescale",
        "models.summary_table": "Selection Target",
    },
)
