"""What an error says of names that matched nothing: what comes near, and what there is."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any, cast

# How many names an error lists.
_LISTED = 30


def close_matches(targets: Sequence[str], names: Sequence[str]) -> list[str]:
    """Last segments, longer endings and full names that look like what was asked for."""
    found: dict[str, None] = {}
    segments = sorted({name.rpartition(".")[2] for name in names})
    full = sorted(set(names))[:500]  # difflib is slow; a few hundred comparisons are enough to help
    for target in targets[:20]:
        last = target.rpartition(".")[2]
        by_case = [segment for segment in segments if segment.lower() == last.lower() and segment != target]
        close = difflib.get_close_matches(last, segments, n=3, cutoff=0.6)
        whole = difflib.get_close_matches(target, full, n=2, cutoff=0.8) if "." in target else []
        found.update(dict.fromkeys([*by_case, *(item for item in close if item != target), *whole]))
    return list(found)


def describe_available(names: Sequence[str]) -> str:
    segments = sorted({name.rpartition(".")[2] for name in names} - {""})  # the model itself has no name
    return f"the last segments {quote_list(segments)}" if segments else "no modules at all"


def quote_list(items: Sequence[str]) -> str:
    more = f" and {len(items) - _LISTED} more" if len(items) > _LISTED else ""
    return ", ".join(items[:_LISTED]) + more


def tuple_to_list(value: Any) -> Any:
    return list(cast("tuple[Any, ...]", value)) if isinstance(value, tuple) else value
