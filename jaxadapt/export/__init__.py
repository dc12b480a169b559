"""Whole models and adapters as files for other programs."""

from typing import TYPE_CHECKING

from jaxadapt.core.lazy import lazy_names

if TYPE_CHECKING:
    from jaxadapt.export.base_weights import export_base as export_base
    from jaxadapt.export.base_weights import import_base as import_base
else:
    __getattr__, __dir__, __all__ = lazy_names(__name__)
