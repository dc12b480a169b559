"""Checkpoints of a training run: asynchronous, rotated, resumed bit for bit."""
