"""Size of the change that an adapter makes to each weight: norms, differences of two adapters, and their plots."""

from typing import TYPE_CHECKING

from jaxadapt.core.lazy import lazy_names

if TYPE_CHECKING:
    from jaxadapt.analysis.differences import diff as diff
else:
    __getattr__, __dir__, __all__ = lazy_names(__name__)
