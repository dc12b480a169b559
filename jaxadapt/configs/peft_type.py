"""Reading of `peft_type`, with errors for files that are not PEFT configurations."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NoReturn, cast

from jaxadapt.core.errors import ConfigError

# Keys of mlx-lm's file of the same name. PEFT has only `num_layers` among them; it is read only without a peft_type.
_MLX = ("lora_parameters", "fine_tune_type", "lora_layers", "adapter_path", "grad_checkpoint", "num_layers")


def read_peft_type(values: object, source: str) -> str:
    """Return the `peft_type` of a JSON object; raise `ConfigError` if it is not a PEFT configuration."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{source}: expected a JSON object, found {json_kind(values)}")
    values = cast("Mapping[str, Any]", values)
    if "peft_type" not in values:
        _refuse_untyped(values, source)
    name: object = values["peft_type"]
    if not isinstance(name, str):
        raise ConfigError(f'{source}: peft_type: expected a string, found {json_kind(name)}; write for example "LORA"')
    name = str.__str__(name)
    if re.fullmatch("[A-Z][A-Z0-9_]*", name):
        return name
    # PEFT refuses "lora", "PeftType.LORA" and "prefix-tuning" too; the error names the valid spelling.
    corrected = re.sub("[^A-Z0-9]+", "_", name.removeprefix("PeftType.").upper()).strip("_")
    way_out = f'write "{corrected}"' if re.fullmatch("[A-Z][A-Z0-9_]*", corrected) else 'write for example "LORA"'
    raise ConfigError(f"{source}: peft_type: expected a type in capitals, found {name!r}; {way_out}")


def mlx_keys(values: Mapping[str, Any]) -> list[str]:
    """Return the keys that show a configuration of mlx-lm; none for PEFT's.

    >>> mlx_keys({"num_layers": 4, "iters": 10}), mlx_keys({"num_layers": 4, "peft_type": "P_TUNING"})
    (['num_layers'], [])
    """
    return [] if "peft_type" in values else [key for key in _MLX if key in values]


def _refuse_untyped(values: Mapping[str, Any], source: str) -> NoReturn:
    """Raise `ConfigError` for values without a `peft_type`, with a suggestion by their keys."""
    mlx = mlx_keys(values)
    if mlx:
        raise ConfigError(
            f"{source}: expected PEFT's schema, found an mlx-lm file (no peft_type, but {', '.join(mlx)}), whose"
            " tensors have other names and layouts; `jaxadapt convert FOLDER OUT` reads mlx-lm's folder (with"
            " adapters.safetensors) and writes PEFT's"
        )
    keys = ", ".join(sorted(values)[:12]) or "no key at all"
    if "lora_alpha" in values or "lora_dropout" in values:
        way_out = 'if this is a LoRA configuration, add "peft_type": "LORA"'
    elif "init_ia3_weights" in values or "feedforward_modules" in values:
        way_out = 'if this is an IA3 configuration, add "peft_type": "IA3"'
    else:
        way_out = "this does not look like a PEFT configuration"
    raise ConfigError(f"{source}: expected a peft_type, found none (keys: {keys}); {way_out}")


def json_kind(value: object) -> str:
    """Return the JSON kind of a value, with its article, for messages."""
    if value is None:
        return "null"
    kinds: dict[type, str] = {
        bool: "a boolean",
        int: "a number",
        float: "a number",
        str: "a string",
        list: "a list",
    }
    return kinds.get(type(value), "an object" if isinstance(value, Mapping) else type(value).__name__)
