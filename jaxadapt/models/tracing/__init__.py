"""How a function uses its weights, found in its jaxpr."""
