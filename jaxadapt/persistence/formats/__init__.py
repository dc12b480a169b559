"""Formats of adapter files, one file each."""
