"""The names of this package, for type checkers."""

from jaxadapt.models.activation import rescale as rescale
from jaxadapt.models.attachment import Selection as Selection
from jaxadapt.models.attachment import Target as Target
from jaxadapt.models.foreign.tree import LoraTree as LoraTree
from jaxadapt.models.invocation import invoke as invoke
from jaxadapt.models.nnx.graph import BaseParam as BaseParam
from jaxadapt.models.nnx.graph import FrozenParam as FrozenParam
from jaxadapt.models.nnx.graph import LayerNumber as LayerNumber
from jaxadapt.models.nnx.graph import SharedParam as SharedParam
from jaxadapt.models.prompt.attention import RelativeBias as RelativeBias
from jaxadapt.models.prompt.attention import attention as attention
from jaxadapt.models.prompt.calling import extend_labels as extend_labels
from jaxadapt.models.prompt.rewriting import TakesEmbeddings as TakesEmbeddings
from jaxadapt.models.prompt.rewriting import TakesKeys as TakesKeys
from jaxadapt.models.quantization import dequantize as dequantize
from jaxadapt.models.quantization import from_qwix as from_qwix
from jaxadapt.models.quantization import quantize as quantize
