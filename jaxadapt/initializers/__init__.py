"""Initial values that read the base weights or activations: PiSSA, OLoRA, EVA, CorDA, LoRA-GA, LoftQ."""

from typing import TYPE_CHECKING

from jaxadapt.core.lazy import lazy_names

if TYPE_CHECKING:
    from jaxadapt.initializers.start_adapter import for_original_base as for_original_base
    from jaxadapt.initializers.start_adapter import start as start
else:
    __getattr__, __dir__, __all__ = lazy_names(__name__)
