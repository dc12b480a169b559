"""Many adapters on one base: a bank on the devices, a route for a batch's rows, a pool of folders, and generation."""

from jaxadapt.core.lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "models.call": "Rows",
        "serving.bank": "Bank attach create detach get prepare put route",
        "serving.generation": "Decoder KVCache Sampling linen_forward nnx_forward",
        "serving.pool": "AdapterPool Lease",
    },
)
