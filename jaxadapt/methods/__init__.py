"""The adaptation methods. A new method is a file in this package and an entry of `METHODS`."""

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
    require_weights,
)
from jaxadapt.methods.ia3 import IA3
from jaxadapt.methods.lora.method import Lora, lora_scale
from jaxadapt.methods.per_entry import needs_layer_number
from jaxadapt.methods.prompt import PROMPTS

METHODS: dict[str, Method] = {m.peft_type: m for m in (Lora(), IA3(), *PROMPTS.values())}

COLLECTIONS = tuple(name.lower() for name in METHODS)
"""The Linen collection, or the attribute of an NNX layer, that holds the adapters of each method."""


def get_method(config: Config) -> Method:
    """Return the method of a configuration; raise `ConfigError` if there is none, or if it would ignore a field."""
    method = METHODS.get(config.peft_type)
    if method is None:
        raise ConfigError(
            f"cannot apply peft_type {config.peft_type!r}: its files can be read and written, but the method is not"
            f" implemented. Implemented methods: {', '.join(sorted(METHODS))}"
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
    "needs_layer_number",
    "refuse_rivals",
    "require_weights",
]  # fmt: skip
