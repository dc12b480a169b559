"""An adapter as a value, and a configuration bound to a keymap and shapes: sites, selection, copies, initial values."""
