"""Adapters on NNX modules, Linen modules and the trees of other libraries. Only this package and `demo` import Flax."""

from jaxadapt.core.lazy import lazy_names

_NAMES = {
    "models.activation": "rescale",
    "models.foreign.tree": "LoraTree",
    "models.invocation": "invoke",
    "models.nnx.graph": "BaseParam FrozenParam LayerNumber SharedParam",
    "models.prompt.attention": "RelativeBias attention",
    "models.prompt.calling": "extend_labels",
    "models.prompt.rewriting": "TakesEmbeddings TakesKeys",
    "models.quantization": "dequantize from_qwix quantize",
    "models.attachment": "Selection Target",
}
__getattr__, __dir__, __all__ = lazy_names(__name__, _NAMES)
