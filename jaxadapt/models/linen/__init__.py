"""Adapters on Linen modules, by a wrapper."""
