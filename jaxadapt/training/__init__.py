"""Helpers for training loops: optax optimizers for adapters, and checkpoints."""

from jaxadapt.core.lazy import lazy_names

_NAMES = {
    "training.checkpoint.manager": "CheckpointManager",
}
__getattr__, __dir__, __all__ = lazy_names(__name__, _NAMES)
