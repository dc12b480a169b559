"""`adapter_config.json` <-> configuration."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, NoReturn, cast

from jaxadapt.configs.base import Config, GenericConfig
from jaxadapt.configs.ia3 import IA3Config
from jaxadapt.configs.lora import LoraConfig
from jaxadapt.core.errors import ConfigError

# One line a method with a class of its own.
CLASSES: Mapping[str, type[Config]] = {
    "LORA": LoraConfig,
    "IA3": IA3Config,
}

# Keys that mlx-lm writes into a file of the same name. None is a key of any PEFT configuration, except
# num_layers, which counts only where there is no peft_type.
_MLX = ("lora_parameters", "fine_tune_type", "lora_layers", "adapter_path", "grad_checkpoint", "num_layers")


def loads(text: str | bytes, source: str = "adapter_config.json") -> Config:
    """The configuration in the text of an `adapter_config.json`.

    `LoraConfig` and `IA3Config` for their types, `GenericConfig` for any other. Numbers keep their kind (8.0
    stays a float), unknown keys stay in `extra`.

    Args:
        text: the content of the file; bytes are UTF-8.
        source: the file's name, for errors.

    Raises:
        ConfigError: not JSON, a key twice, NaN, no object, the file of another library, no or an unknown
            `peft_type`, or invalid values.

    >>> loads('{"peft_type": "LORA", "r": 4, "target_modules": ["q"]}').r
    4
    >>> loads('{"peft_type": "lora"}', "old.json")
    Traceback (most recent call last):
    ...
    jaxadapt.core.errors.ConfigError: old.json: peft_type: expected a type in capitals, found 'lora'; write "LORA"
    """
    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(f"{source}: expected JSON in UTF-8, found an invalid byte at {error.start}") from error
    if text.startswith("version https://git-lfs"):
        raise ConfigError(
            f"{source}: expected JSON, found a Git LFS pointer; fetch the file itself with `git lfs pull`"
        )
    try:
        values: object = json.loads(text, object_pairs_hook=_object, parse_constant=_constant)
    except json.JSONDecodeError as error:
        what = f"{error.msg} at line {error.lineno}, column {error.colno}"
        raise ConfigError(f"{source}: expected JSON, found invalid text: {what}") from error
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None
    except RecursionError as error:
        raise ConfigError(f"{source}: expected a configuration, found JSON nested too deeply") from error
    except ValueError as error:  # an integer of more digits than Python converts
        raise ConfigError(f"{source}: expected a configuration, found invalid JSON: {error}") from error
    return from_dict(values, source)


def dumps(config: Config) -> str:
    """The text of `adapter_config.json`, exactly as PEFT formats it (no newline at the end)."""
    return config.to_json()


def from_dict(values: object, source: str = "configuration") -> Config:
    """As `loads`, from the JSON value itself.

    Raises:
        ConfigError: as `loads`.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{source}: expected a JSON object, found {_kind(values)}")
    values = cast("Mapping[str, Any]", values)
    name = _peft_type(values, source)
    return CLASSES.get(name, GenericConfig).from_dict(values, source)


def _peft_type(values: Mapping[str, Any], source: str) -> str:
    if "peft_type" not in values:
        _refuse_untyped(values, source)
    name: object = values["peft_type"]
    if not isinstance(name, str):
        raise ConfigError(f'{source}: peft_type: expected a string, found {_kind(name)}; write for example "LORA"')
    name = str.__str__(name)
    if re.fullmatch("[A-Z][A-Z0-9_]*", name):
        return name
    # "lora", "PeftType.LORA", "prefix-tuning": what was meant is plain, but PEFT refuses them as well.
    meant = re.sub("[^A-Z0-9]+", "_", name.removeprefix("PeftType.").upper()).strip("_")
    way_out = f'write "{meant}"' if re.fullmatch("[A-Z][A-Z0-9_]*", meant) else 'write for example "LORA"'
    raise ConfigError(f"{source}: peft_type: expected a type in capitals, found {name!r}; {way_out}")


def _refuse_untyped(values: Mapping[str, Any], source: str) -> NoReturn:
    mlx = [key for key in _MLX if key in values]
    if mlx:
        raise ConfigError(
            f"{source}: expected PEFT's schema, found an mlx-lm file (no peft_type, but {', '.join(mlx)}); "
            "its tensors have other names and layouts too: convert the adapter to PEFT's format first"
        )
    found = ", ".join(sorted(values)[:12]) or "no key at all"
    if "lora_alpha" in values or "lora_dropout" in values:
        way_out = 'if this is a LoRA configuration, add "peft_type": "LORA"'
    elif "init_ia3_weights" in values or "feedforward_modules" in values:
        way_out = 'if this is an IA3 configuration, add "peft_type": "IA3"'
    else:
        way_out = "this looks like no PEFT configuration"
    raise ConfigError(f"{source}: expected a peft_type, found none (keys: {found}); {way_out}")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        twice = sorted(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ConfigError(f"expected every key once, found twice: {', '.join(twice)}; keep one")
    return values


def _constant(name: str) -> NoReturn:
    raise ConfigError(f"expected finite numbers, found {name}, which JSON does not have")


def _kind(value: object) -> str:
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
