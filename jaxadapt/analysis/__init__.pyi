"""The names of this package, for type checkers."""

from jaxadapt.analysis.differences import diff as diff
from jaxadapt.analysis.norms import measure_norms as measure_norms
from jaxadapt.analysis.norms import norms_png as norms_png
