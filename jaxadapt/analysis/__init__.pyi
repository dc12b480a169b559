"""The names of this package, for type checkers."""

from jaxadapt.analysis.differences import diff as diff
