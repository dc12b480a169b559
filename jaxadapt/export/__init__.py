"""Export of whole models and adapters to files of other programs, and their import."""

from typing import TYPE_CHECKING

from jaxadapt.core.lazy import lazy_names

if TYPE_CHECKING:
    from jaxadapt.export.adapter_export import export_adapter as export_adapter
    from jaxadapt.export.base_export import export_base as export_base
    from jaxadapt.export.base_import import import_base as import_base
else:
    __getattr__, __dir__, __all__ = lazy_names(__name__)
