"""Conversion between the text of `adapter_config.json` and configurations."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any, NoReturn, cast

from jaxadapt.configs.base import Config
from jaxadapt.core.errors import ConfigError


def loads(text: str | bytes, source: str = "adapter_config.json") -> Config:
    """Return the configuration that the text of an `adapter_config.json` describes.

    The class is `LoraConfig` or `IA3Config` for their types, and `GenericConfig` for any other type. Numbers keep
    their kind (8.0 stays a float), and `extra` keeps unknown keys.

    Args:
        text: the content of the file; bytes are UTF-8.
        source: the file name in errors.

    Raises:
        ConfigError: the text is not a JSON object, has a key twice or NaN, belongs to another library, has no valid
            `peft_type`, or has invalid values.

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
        place = f"{error.msg} at line {error.lineno}, column {error.colno}"
        raise ConfigError(f"{source}: expected JSON, found invalid text: {place}") from error
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None
    except RecursionError as error:
        raise ConfigError(f"{source}: expected a configuration, found JSON nested too deeply") from error
    except ValueError as error:  # an integer with more digits than Python converts
        raise ConfigError(f"{source}: expected a configuration, found invalid JSON: {error}") from error
    return from_dict(values, source)


def dumps(config: Config) -> str:
    """Return the text of `adapter_config.json`, exactly as PEFT formats it (no newline at the end)."""
    return config.to_json()


def from_dict(values: object, source: str = "configuration") -> Config:
    """Return the configuration that a JSON value describes, as `loads` does for its text.

    Raises:
        ConfigError: the value is no object, or is invalid; see `loads`.
    """
    return Config.from_dict(cast("Mapping[str, Any]", values), source)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        repeated = sorted(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ConfigError(f"expected every key once, found twice: {', '.join(repeated)}; keep one")
    return values


def _constant(name: str) -> NoReturn:
    raise ConfigError(f"expected finite numbers, found {name}, which JSON does not have")
