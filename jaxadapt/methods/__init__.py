"""The adaptation methods. A new method is a file in this package and a line of `jaxadapt.configs.table`."""

from jaxadapt.core.lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "configs.matching": "MethodInfo describe_methods",
        "methods.applied": "AppliedMethod",
        "methods.base": "Change Drop Effects METHODS Method Start Target get_method register",
        "methods.matrix": "MatrixMethod",
    },
)
