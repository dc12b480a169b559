"""Adapters on NNX modules, in place."""
