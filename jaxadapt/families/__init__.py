"""The tables, one file a model family, and how `keymap=` finds one. A new family is a file and a line."""

from __future__ import annotations

from collections.abc import Mapping

from jaxadapt.errors import KeyMapError
from jaxadapt.families.gpt2 import GPT2
from jaxadapt.families.llama import LLAMA
from jaxadapt.generic import GENERIC
from jaxadapt.keymap import KeyMap

FAMILIES: dict[str, KeyMap] = {table.name: table for table in (LLAMA, GPT2)}
_SCAN = "/scan"


def named(name: str) -> KeyMap:
    """A table by name: "llama", or "llama/scan1" for layers stacked on axis 1; "generic" for none.

    >>> named("llama/scan1").name
    'llama/scan1'
    """
    base, scan, axis = name.partition(_SCAN)
    table = {**FAMILIES, GENERIC.name: GENERIC}.get(base)
    if table is None or (scan and not axis.isdecimal()):
        raise KeyMapError(
            f"no family is called {name!r}; known are {', '.join(sorted(FAMILIES))} (add /scan0, /scan1, … for"
            f" layers stacked on that axis) and {GENERIC.name!r}"
        )
    return table.scanned(int(axis)) if scan else table


def resolve(keymap: KeyMap | str | None, shapes: Mapping[str, tuple[int, ...]]) -> KeyMap:
    """The table `keymap=` asks for; None and "auto" recognise it from the model's paths and shapes.

    "auto" takes the family that accounts for most leaves: a head or a norm it does not know is left
    unmapped, and an error only if it is targeted. A tie raises `KeyMapError` naming the candidates; where no
    family knows a leaf, the generic map serves.
    """
    if isinstance(keymap, KeyMap):
        return keymap
    if keymap not in (None, "auto"):
        return named(keymap)
    tables = [t for f in FAMILIES.values() for t in (f, *(f.scanned(axis) for axis in range(3)))]
    counts = {t: t.covers(shapes) for t in tables}
    best = max(counts.values())
    fitting = [t for t, count in counts.items() if count == best > 0]
    if len(fitting) > 1:
        raise KeyMapError(
            f"the model's leaves fit several tables: {', '.join(t.name for t in fitting)}; say which with keymap="
        )
    return fitting[0] if fitting else GENERIC


__all__ = ["FAMILIES", "named", "resolve"]
