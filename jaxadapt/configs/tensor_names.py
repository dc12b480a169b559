"""The names of the tensors in the files of all methods."""

from __future__ import annotations

from functools import cache

from jaxadapt.configs import registry
from jaxadapt.configs.base import Config, class_of


def tensor_prefixes() -> tuple[str, ...]:
    """Return the first parts of the names of all methods' file tensors, the longest first.

    >>> {"lora_", "ia3_", "vera_"} <= set(tensor_prefixes())
    True
    """
    return _names_of(tuple(Config.classes))[0]


def tensors_with_parts() -> frozenset[str]:
    """Return the names of all methods' file tensors that consist of parts.

    >>> "osf_svd_params" in tensors_with_parts()
    True
    """
    return _names_of(tuple(Config.classes))[1]


@cache
def _names_of(loaded: tuple[str, ...]) -> tuple[tuple[str, ...], frozenset[str]]:
    """Return both results, for the types of the table and the loaded ones."""
    types = dict.fromkeys([*registry.config_classes(), *loaded])
    classes = {name: cls for name in types if (cls := class_of(name)) is not None}
    prefixes = {cls.tensor_prefix or f"{name.lower()}_" for name, cls in classes.items()}
    parts = frozenset(part for cls in classes.values() for part in cls.tensor_parts)
    return tuple(sorted(prefixes, key=lambda prefix: (-len(prefix), prefix))), parts
