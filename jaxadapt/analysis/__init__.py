"""How much an adapter changes its base, as numbers and as a plot."""
