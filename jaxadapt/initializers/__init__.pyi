"""The names of this package, for type checkers."""

from jaxadapt.initializers.start_adapter import Batches as Batches
from jaxadapt.initializers.start_adapter import for_original_base as for_original_base
from jaxadapt.initializers.start_adapter import start as start
