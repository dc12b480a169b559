"""Many adapters on one base: a bank of adapters on the devices, a route for the rows of a batch, and a pool of folders."""

from typing import TYPE_CHECKING

from jaxadapt.core.lazy import lazy_names

if TYPE_CHECKING:
    from jaxadapt.models.row_sites import Rows as Rows
    from jaxadapt.serving.bank import Bank as Bank
    from jaxadapt.serving.bank import create as create
    from jaxadapt.serving.bank import put as put
    from jaxadapt.serving.routing import attach as attach
    from jaxadapt.serving.routing import detach as detach
    from jaxadapt.serving.routing import route as route
else:
    __getattr__, __dir__, __all__ = lazy_names(__name__)
