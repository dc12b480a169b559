"""The dialects, one file for each library that trains LoRA. A new dialect is a file and a row of `_TABLE`."""

from __future__ import annotations

import importlib
from collections.abc import Collection

from jaxadapt.core.errors import KeyMapError
from jaxadapt.core.paths import bullets
from jaxadapt.models.foreign.dialect import Dialect, is_like

_TABLE = {
    "qwix": "QWIX",
    "flax": "NNX_LORA",
    "gemma": "GEMMA",
    "maxtext": "MAXTEXT",
    "levanter": "LEVANTER",
    "lorax": "LORAX",
    "skyrl": "SKYRL",
    "keras": "KERAS",
    "openpi": "OPENPI",
}
"""`{file of this package: its dialect}`."""
DIALECTS: dict[str, Dialect] = {
    dialect.name: dialect
    for file, name in _TABLE.items()
    for dialect in (vars(importlib.import_module(f"{__name__}.{file}"))[name],)
}


def get_dialect(name: str) -> Dialect:
    """Return a dialect by name: "qwix" for layers that call einsum, "qwix/flat" for layers that call dot_general."""
    base, _, change = name.partition("/")
    if base not in DIALECTS or change not in ("", "flat"):
        raise KeyMapError(
            f"no dialect is called {name!r}; known are {', '.join(sorted(DIALECTS))} (append /flat if the"
            " layers call dot_general, so that inputs and outputs are one axis each)"
        )
    return DIALECTS[base].flattened() if change else DIALECTS[base]


def dialect_of(library: str) -> Dialect | None:
    """Return the dialect that trains the models of a library (the part of a family's name before the colon).

    >>> dialect_of("gemma").name
    'gemma'
    """
    for dialect in DIALECTS.values():
        if library in dialect.trains:
            return dialect
        if f"{library}/flat" in dialect.trains:
            return dialect.flattened()
    return None


def recognize_dialect(paths: Collection[str]) -> Dialect | None:
    """Return the dialect that claims every path that looks like a LoRA leaf; None if no path does.

    Raises `KeyMapError` listing the paths that no dialect claims, or if several dialects claim all of them.

    >>> recognize_dialect(["q.kernel", "q.kernel_lora_a", "q.kernel_lora_b"]).name
    'qwix'
    """
    paths = frozenset(paths)
    like = {p for p in paths if is_like(p)}
    claimed = {d: d.owned(paths) for d in DIALECTS.values()}
    if not like:
        return None
    fitting = [d for d, mine in claimed.items() if mine and like <= mine]
    fitting = [d for d in fitting if d.named] or fitting
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise KeyMapError(
            "the LoRA leaves of this tree are ambiguous: they match the dialects"
            f" {', '.join(dialect.name for dialect in fitting)}"
        )
    best = max(claimed, key=lambda d: len(claimed[d]))
    known = f" (those of {best.name}: {len(claimed[best])})" if claimed[best] else ""
    raise KeyMapError(
        f"{len(like)} leaves of this tree look like LoRA leaves{known}, but no dialect matches these:\n"
        + bullets(sorted(like - claimed[best]))
        + f"\nKnown dialects are {', '.join(DIALECTS)}. Remove these leaves from the tree if they are not part of the"
        " adapter"
    )
