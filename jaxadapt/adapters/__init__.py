"""Adapters as values, and configurations bound to a keymap and shapes: sites, selection, copies, initial values."""
