"""The names of this package, for type checkers."""

from jaxadapt.export.adapter_files import export_adapter as export_adapter
from jaxadapt.export.base_files import export_base as export_base
from jaxadapt.export.base_files import import_base as import_base
