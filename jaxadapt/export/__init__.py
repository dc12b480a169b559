"""Export of whole models and adapters to files of other programs, and their import."""

from jaxadapt.core.lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "export.adapter_files": "export_adapter",
        "export.base_files": "export_base import_base",
    },
)
