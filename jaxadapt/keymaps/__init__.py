"""Keymaps from base parameters to PyTorch's names and layouts, and their application to shapes."""

from jaxadapt.core.lazy import lazy_names

_NAMES = {
    "keymaps.keymap": "KeyMap",
    "keymaps.weight": "Weight",
}
__getattr__, __dir__, __all__ = lazy_names(__name__, _NAMES)
