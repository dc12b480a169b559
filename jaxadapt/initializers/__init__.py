"""Initial values that read the base weights or activations: PiSSA, OLoRA, EVA, CorDA, LoRA-GA, LoftQ."""

from jaxadapt.core.lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "initializers.start_adapter": "Batches for_original_base start",
    },
)
