"""Checks of stored adapters: a tolerant reader, one file for each kind of finding, and certain repairs."""
