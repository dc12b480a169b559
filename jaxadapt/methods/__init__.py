"""The adaptation methods. A new method is a file in this package and a line of `jaxadapt.configs.table`."""

from __future__ import annotations

from jaxadapt.arrays.per_entry import LAYER, PerEntry
from jaxadapt.configs.listing import MethodInfo, describe_methods, passing_types
from jaxadapt.methods.applied import AppliedMethod, AppliedMethods, check_biases, refuse_rivals, weight_order
from jaxadapt.methods.base import (
    Change,
    Drop,
    Effects,
    Method,
    Start,
    Target,
    as_computable,
    at_least_float32,
    needs_layer_number,
    require_weights,
)
from jaxadapt.methods.matrix import MatrixMethod
from jaxadapt.methods.registry import COLLECTIONS, METHODS, file_sizes, get_method, register
from jaxadapt.methods.rows import AppliedRows, Implementation, apply_rows, split_rows

__all__ = [
    "COLLECTIONS",
    "LAYER",
    "METHODS",
    "AppliedMethod",
    "AppliedMethods",
    "AppliedRows",
    "Change",
    "Drop",
    "Effects",
    "Implementation",
    "MatrixMethod",
    "Method",
    "MethodInfo",
    "PerEntry",
    "Start",
    "Target",
    "apply_rows",
    "as_computable",
    "at_least_float32",
    "check_biases",
    "describe_methods",
    "file_sizes",
    "get_method",
    "needs_layer_number",
    "passing_types",
    "refuse_rivals",
    "register",
    "require_weights",
    "split_rows",
    "weight_order",
]  # fmt: skip
