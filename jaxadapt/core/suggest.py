"""Suggestions for errors about names that matched nothing: similar names and available names."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any, cast

# The largest number of names that an error lists.
_MAX_LISTED = 30


def close_matches(targets: Sequence[str], names: Sequence[str]) -> list[str]:
    """Return the last segments and the full names that are similar to one of `targets`."""
    similar: dict[str, None] = {}
    segments = sorted({name.rpartition(".")[2] for name in names})
    full = sorted(set(names))[:500]  # difflib is slow, and a few hundred comparisons suffice
    for target in targets[:20]:
        last = target.rpartition(".")[2]
        by_case = [segment for segment in segments if segment.lower() == last.lower() and segment != target]
        close = difflib.get_close_matches(last, segments, n=3, cutoff=0.6)
        close_full = difflib.get_close_matches(target, full, n=2, cutoff=0.8) if "." in target else []
        similar.update(dict.fromkeys([*by_case, *(item for item in close if item != target), *close_full]))
    return list(similar)


def describe_available(names: Sequence[str]) -> str:
    """Return a phrase that lists the last segments of the available module names."""
    segments = sorted({name.rpartition(".")[2] for name in names} - {""})  # the root module has an empty name
    return f"the last segments {quote_list(segments)}" if segments else "no modules at all"


def quote_list(items: Sequence[str]) -> str:
    """Return the items separated by commas, and the number of those beyond the limit."""
    rest = f" and {len(items) - _MAX_LISTED} more" if len(items) > _MAX_LISTED else ""
    return ", ".join(items[:_MAX_LISTED]) + rest


def tuple_to_list(value: Any) -> Any:
    """Return a tuple as a list, so that it prints like JSON, and any other value as it is."""
    return list(cast("tuple[Any, ...]", value)) if isinstance(value, tuple) else value
