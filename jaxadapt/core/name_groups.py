"""Many names of modules in one short line: numbers as ranges, and the ends of names in braces."""

from __future__ import annotations

from collections.abc import Collection, Iterable


def group_names(names: Iterable[str], limit: int = 6) -> str:
    """Return names in groups, each with the number of its names if it stands for several.

    Names that differ in their numbers or in their last part are one group if the group stands for no other names.

    Args:
        names: dotted names.
        limit: the number of groups to list.

    >>> names = [f"layers.{l}.mlp.{p}_proj" for l in (0, 1, 2, 5) for p in ("gate", "up", "down")]
    >>> group_names([*names, "lm_head"])
    'layers.{0-2,5}.mlp.{gate,up,down}_proj (12), lm_head'
    >>> group_names(["a..b", "", "h.01.x"])
    'a..b, , h.01.x'
    """
    numbers: dict[tuple[str | None, ...], dict[tuple[int, ...], None]] = {}
    for name in names:
        parts = name.split(".")
        is_number = [_is_number(part) for part in parts]
        template = tuple(None if known else part for part, known in zip(parts, is_number, strict=True))
        own = tuple(int(part) for part, known in zip(parts, is_number, strict=True) if known)
        numbers.setdefault(template, {})[own] = None
    groups: dict[tuple[str, ...], dict[str, int]] = {}
    for template, found in numbers.items():
        for ranges, count in _ranges(list(found)):
            texts = iter(ranges)
            *start, end = (next(texts) if part is None else part for part in template)
            groups.setdefault((*start, str(count)), {})[end] = count
    lines: list[str] = []
    for (*start, _), ends in groups.items():
        count = sum(ends.values())
        lines.append(".".join((*start, _braces(list(ends)))) + (f" ({count})" if count > 1 else ""))
    more = f" and {len(lines) - limit} more groups" if len(lines) > limit else ""
    return ", ".join(lines[:limit]) + more


def _is_number(part: str) -> bool:
    """Return True for the number of a layer or an expert, without leading zeros; a name may hold very long ones."""
    return part.isascii() and part.isdecimal() and len(part) < 10 and part == str(int(part))


def _ranges(found: Collection[tuple[int, ...]]) -> list[tuple[tuple[str, ...], int]]:
    """Return (one text for each place, the number of tuples) of groups whose product is exactly the tuples."""
    if () in found:
        return [((), len(found))]
    rest_of: dict[int, set[tuple[int, ...]]] = {}
    for first, *rest in found:
        rest_of.setdefault(first, set()).add(tuple(rest))
    equal: dict[frozenset[tuple[int, ...]], list[int]] = {}
    for first, rest in rest_of.items():
        equal.setdefault(frozenset(rest), []).append(first)
    return [
        ((_range(firsts), *texts), len(firsts) * count)
        for rest, firsts in equal.items()
        for texts, count in _ranges(rest)
    ]


def _range(numbers: Collection[int]) -> str:
    """Return numbers as runs.

    >>> _range([3, 0, 1, 2]), _range([7]), _range([0, 2])
    ('0-3', '7', '{0,2}')
    """
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    texts = [f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]
    return texts[0] if len(texts) == 1 else f"{{{','.join(texts)}}}"


def _braces(ends: list[str]) -> str:
    """Return the last parts of names in braces, without the end that all share."""
    if len(ends) == 1:
        return ends[0]
    tails = {end[end.rfind("_") :] if "_" in end else "" for end in ends}
    shared = tails.pop() if len(tails) == 1 else ""
    return "{" + ",".join(end.removesuffix(shared) for end in ends) + "}" + shared
