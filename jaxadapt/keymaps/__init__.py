"""Keymaps from base parameters to PyTorch's names and layouts, and their application to shapes."""
