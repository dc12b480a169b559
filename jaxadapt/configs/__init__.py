"""PEFT-compatible configuration classes, read from and written to `adapter_config.json`. Imports no JAX."""
