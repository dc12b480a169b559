"""Helpers for training loops: optax optimizers for adapters, and checkpoints."""

from typing import TYPE_CHECKING

from jaxadapt.core.lazy import lazy_names

if TYPE_CHECKING:
    from jaxadapt.training.checkpoint.manager import CheckpointManager as CheckpointManager
else:
    __getattr__, __dir__, __all__ = lazy_names(__name__)
