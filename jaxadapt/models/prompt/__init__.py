"""Prompt methods on models: attention whose calls an adapter finds, and calls with virtual tokens."""
