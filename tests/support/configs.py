"""The classes of configurations by their type, from the public names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jaxadapt

_CONFIGS = [getattr(jaxadapt, name) for name in jaxadapt.__all__ if name.endswith("Config") and name != "Config"]
CLASSES: dict[str, type[jaxadapt.Config]] = {config.peft_type: config for config in _CONFIGS}


def class_of(peft_type: str) -> type[jaxadapt.Config] | None:
    """The class of a type; None if jaxadapt has no class for it."""
    return CLASSES.get(peft_type)


def value_of(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """The value of the first pattern that ends a module's name, as PEFT reads `rank_pattern`."""
    found = (value for pattern, value in (patterns or {}).items() if re.match(rf"(.*\.)?({pattern})$", module))
    return next(found, default)
