"""Keymaps from base parameters to PyTorch's names and layouts, and their application to shapes."""

from typing import TYPE_CHECKING

from jaxadapt.core.lazy import lazy_names

if TYPE_CHECKING:
    from jaxadapt.keymaps.keymap import KeyMap as KeyMap
    from jaxadapt.keymaps.weight import Weight as Weight
else:
    __getattr__, __dir__, __all__ = lazy_names(__name__)
