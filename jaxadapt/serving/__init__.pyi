"""The names of this package, for type checkers."""

from jaxadapt.models.call import Rows as Rows
from jaxadapt.serving.bank import Bank as Bank
from jaxadapt.serving.bank import attach as attach
from jaxadapt.serving.bank import create as create
from jaxadapt.serving.bank import detach as detach
from jaxadapt.serving.bank import get as get
from jaxadapt.serving.bank import prepare as prepare
from jaxadapt.serving.bank import put as put
from jaxadapt.serving.bank import route as route
from jaxadapt.serving.generation import Decoder as Decoder
from jaxadapt.serving.generation import KVCache as KVCache
from jaxadapt.serving.generation import Sampling as Sampling
from jaxadapt.serving.generation import linen_forward as linen_forward
from jaxadapt.serving.generation import nnx_forward as nnx_forward
from jaxadapt.serving.pool import AdapterPool as AdapterPool
from jaxadapt.serving.pool import Lease as Lease
