"""The names of this package, for type checkers."""

from jaxadapt.keymaps.keymap import KeyMap as KeyMap
from jaxadapt.keymaps.weight import Weight as Weight
