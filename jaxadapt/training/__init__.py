"""Helpers for training loops: optax optimizers for adapters, and checkpoints."""
