"""The names of this package, for type checkers."""

from jaxadapt.analysis.changes import diff as diff
from jaxadapt.analysis.changes import measure_norms as measure_norms
from jaxadapt.analysis.heat_maps import norms_png as norms_png
from jaxadapt.analysis.logprobs import compare_logprobs as compare_logprobs
