"""The names of this package, for type checkers."""

from jaxadapt.training.checkpoint.manager import CheckpointManager as CheckpointManager
