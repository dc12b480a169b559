"""Errors, tree paths, progress reports and suggestions: values that know no adapter. Imports no JAX."""
