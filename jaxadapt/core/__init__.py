"""Errors, tree paths, progress reports and name suggestions. Imports no JAX and knows no adapter."""
