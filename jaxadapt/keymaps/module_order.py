"""The order of PyTorch's modules, on which the meaning of some adapters depends."""

from __future__ import annotations

import re
from collections.abc import Iterable

from jaxadapt.core.errors import KeyMapError, raise_listed
from jaxadapt.keymaps.keymap import KeyMap


def sort_modules(keymap: KeyMap, modules: Iterable[str]) -> tuple[str, ...]:
    """Return PyTorch modules in the order of `named_modules`: by their numbers, and other names by `KeyMap.order`.

    Raises `KeyMapError` listing the modules whose order the keymap does not state.

    >>> sort_modules(KeyMap("tiny", (), order=("v", "q")), ("h.10.q", "h.2.q", "h.2.v"))
    ('h.2.v', 'h.2.q', 'h.10.q')
    """
    modules = tuple(dict.fromkeys(modules))
    places = {name: place for place, name in enumerate(keymap.order)}
    inside: dict[str, set[str]] = {}
    for module in modules:
        parts = module.split(".")
        for i, part in enumerate(parts):
            inside.setdefault(".".join(parts[:i]), set()).add(part)
    unknown = {
        re.sub(r"(?<![^.])\d+(?![^.])", "#", f"{parent}.{name}".strip("."))
        for parent, names in inside.items()
        for name in names
        if len(names) > 1 and not name.isdigit() and name not in places
    }
    raise_listed(
        KeyMapError,
        f"this adapter depends on the order of PyTorch's modules, which the keymap {keymap.name!r} does not state for"
        " these. Pass a KeyMap with order=(their last names, in the order of the PyTorch model's named_modules):",
        sorted(unknown),
    )

    def position(module: str) -> list[int]:
        return [int(part) if part.isdigit() else places.get(part, 0) for part in module.split(".")]

    return tuple(sorted(modules, key=position))
