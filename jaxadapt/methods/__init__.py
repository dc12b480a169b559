"""The methods. A new one is a file beside these and a line in `METHODS`."""

from __future__ import annotations

from jaxadapt.arrays.per_entry import LAYER, PerEntry
from jaxadapt.configs import Config
from jaxadapt.core.errors import ConfigError
from jaxadapt.methods.base import (
    AppliedMethod,
    AppliedMethods,
    Method,
    as_computable,
    at_least_float32,
    check_biases,
    refuse_rivals,
)
from jaxadapt.methods.ia3 import IA3
from jaxadapt.methods.lora.method import Lora, lora_scale
from jaxadapt.methods.per_entry import needs_layer

METHODS: dict[str, Method] = {m.peft_type: m for m in (Lora(), IA3())}

COLLECTIONS = tuple(name.lower() for name in METHODS)
"""Where adapters are kept, by method: Linen's collection, and the attribute of an NNX layer."""


def get_method(config: Config) -> Method:
    """The method of a configuration, checked; `ConfigError` if there is none or it would ignore a field."""
    method = METHODS.get(config.peft_type)
    if method is None:
        raise ConfigError(
            f"peft_type {config.peft_type!r} can be read and written, but not applied yet;"
            f" applied are {', '.join(sorted(METHODS))}"
        )
    method.check(config)
    return method


__all__ = [
    "COLLECTIONS",
    "LAYER",
    "METHODS",
    "AppliedMethod",
    "AppliedMethods",
    "Method",
    "PerEntry",
    "as_computable",
    "at_least_float32",
    "check_biases",
    "get_method",
    "lora_scale",
    "needs_layer",
    "refuse_rivals",
]  # fmt: skip
