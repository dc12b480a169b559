"""Analysis and rewriting of a function's use of its weights, by its jaxpr."""
