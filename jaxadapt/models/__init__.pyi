"""The names of this package, for type checkers."""

from jaxadapt.models.attachment import dequantize as dequantize
from jaxadapt.models.attachment import from_qwix as from_qwix
from jaxadapt.models.attachment import invoke as invoke
from jaxadapt.models.attachment import quantize as quantize
from jaxadapt.models.attachment import rescale as rescale
from jaxadapt.models.attention_calls import RelativeBias as RelativeBias
from jaxadapt.models.attention_calls import TakesEmbeddings as TakesEmbeddings
from jaxadapt.models.attention_calls import TakesKeys as TakesKeys
from jaxadapt.models.attention_calls import attention as attention
from jaxadapt.models.foreign.tree import LoraTree as LoraTree
from jaxadapt.models.graph import BaseParam as BaseParam
from jaxadapt.models.graph import FrozenParam as FrozenParam
from jaxadapt.models.graph import LayerNumber as LayerNumber
from jaxadapt.models.graph import SharedParam as SharedParam
from jaxadapt.models.prompts import extend_labels as extend_labels
from jaxadapt.models.pytree import AdaptedTree as AdaptedTree
from jaxadapt.models.pytree import Function as Function
from jaxadapt.models.pytree import adapter_filter as adapter_filter
from jaxadapt.models.summary_table import Selection as Selection
from jaxadapt.models.summary_table import Target as Target
