"""Detection of regular expressions that take too long to match a module name.

Python's `re` backtracks: it tries one way to match after the other, and "(a+)+$" has 2^n ways on n letters. PEFT has
the same weakness. An untrusted file must not stop the program, so a slow expression is refused before it is used.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from re import _parser as parser  # pyright: ignore[reportAttributeAccessIssue, reportUnknownVariableType]
from typing import Any, NamedTuple

REPEAT = re.compile(r"[*+?{]")
"""The characters of repeats. An expression without repeats has at most one way to match per alternative."""

_MAX_WAYS = 1e8
_NAME_LENGTH = 256  # letters of a long name
_REPEATS = ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT")
_LOOKS = ("ASSERT", "ASSERT_NOT")


def is_slow(expression: str) -> bool:
    """Return True if a valid expression may try more than about 10^8 ways to match a long name.

    This is an estimate. A repeat counts as many ways as it can give back letters to the part that follows it. It counts
    one way if the part that follows begins with a letter that the repeat does not match.

    >>> is_slow(r"(a+)+$"), is_slow(r"(.*a){9}b"), is_slow(r".*\\.layers\\.\\d+\\.(self_attn|mlp)\\..*_proj$")
    (True, True, False)
    """
    if not REPEAT.search(expression):
        return False
    try:
        parsed: Any = parser.parse(expression)
        return _log_ways(_flatten_groups(parsed), None, bool(parsed.state.flags & re.IGNORECASE)) > math.log(_MAX_WAYS)
    except RecursionError:
        return True


class _Rest(NamedTuple):
    """The parts after one part of an expression. A linked list, because a list per part would take n^2 memory."""

    items: Sequence[tuple[str, Any]]
    start: int
    after: _Rest | None

    def walk(self) -> Iterator[tuple[str, Any]]:
        """Yield the following parts, from the innermost group outwards."""
        rest: _Rest | None = self
        while rest is not None:
            for i in range(rest.start, len(rest.items)):
                yield rest.items[i]
            rest = rest.after


def _flatten_groups(items: Any) -> list[tuple[str, Any]]:
    """Return the parts of an expression, with groups replaced by their parts."""
    out: list[tuple[str, Any]] = []
    for code, value in items:
        name = str(code)
        if name == "SUBPATTERN":
            out += _flatten_groups(value[-1])
        elif name == "ATOMIC_GROUP":
            out += _flatten_groups(value)
        else:
            out.append((name, value))
    return out


def _log_ways(items: Sequence[tuple[str, Any]], after: _Rest | None, caseless: bool) -> float:
    """Return the logarithm of the number of ways to match `items`, followed by `after`."""
    total = 0.0
    for i, (name, value) in enumerate(items):
        rest = _Rest(items, i + 1, after)
        if name in _REPEATS:
            total += _log_repeat_ways(value, rest, caseless)
        elif name == "BRANCH":
            branches = [_flatten_groups(branch) for branch in value[1]]
            starts = [branch[0][1] if branch and branch[0][0] == "LITERAL" else None for branch in branches]
            branch_ways = [_log_ways(branch, rest, caseless) for branch in branches]
            ambiguous = None in starts or len(set(starts)) < len(starts) or caseless
            total += max(branch_ways) + (math.log(len(branch_ways)) if ambiguous else 0.0)
        elif name in _LOOKS:
            total += _log_ways(_flatten_groups(value[1]), None, caseless)
        elif name == "GROUPREF_EXISTS":
            total += sum(
                _log_ways(_flatten_groups(branch), rest, caseless) for branch in value[1:] if branch is not None
            )
    return total


def _log_repeat_ways(value: Any, rest: _Rest, caseless: bool) -> float:
    """Return the logarithm of the number of ways to match a repeat."""
    least, most, body = int(value[0]), int(value[1]), _flatten_groups(value[2])
    inner = _log_ways(body, _Rest(body, 0, rest) if most > 1 else rest, caseless)
    if most > 1 and inner > 0:
        ways = inner * most if most <= _NAME_LENGTH else math.inf  # each round has as many ways as the first
    else:
        ways = inner
    if least == most or not _gives_back(body, rest, caseless):
        return ways
    return ways + math.log(min(most - least + 1, _NAME_LENGTH / max(1, _min_width(rest.walk()))))


def _gives_back(body: Sequence[tuple[str, Any]], rest: _Rest, caseless: bool) -> bool:
    """Return True if a shorter match of a repeat may succeed after its longest match has failed."""
    following = next((item for item in rest.walk() if item[0] not in ("AT", *_LOOKS)), None)
    if following is None:
        return body != [("ANY", None)]  # ".*" at the end takes all remaining letters
    if caseless or not body or following[0] != "LITERAL":
        return True
    return _may_begin_with(body[0], chr(following[1]))


def _may_begin_with(item: tuple[str, Any], letter: str) -> bool:
    """Return True if a part of an expression may begin with `letter`."""
    name, value = item
    if name == "LITERAL":
        return chr(value) == letter
    if name == "NOT_LITERAL":
        return chr(value) != letter
    if name == "ANY":
        return letter != "\n"
    if name != "IN":
        return True
    kinds = {"DIGIT": letter.isdecimal(), "WORD": letter.isalnum() or letter == "_", "SPACE": letter.isspace()}
    hit = negated = False
    for code, inner in value:
        if str(code) == "NEGATE":
            negated = True
        elif str(code) == "LITERAL":
            hit |= chr(inner) == letter
        elif str(code) == "RANGE":
            hit |= inner[0] <= ord(letter) <= inner[1]
        else:
            kind = str(inner).removeprefix("CATEGORY_").removeprefix("UNI_")
            hit |= kinds[kind.removeprefix("NOT_")] != kind.startswith("NOT_")
    return hit != negated


def _min_width(items: Iterable[tuple[str, Any]]) -> int:
    """Return the number of letters that must follow, up to and including the minimum of the next repeat."""
    total = 0
    for name, value in items:
        if name in _REPEATS:
            return total + int(value[0]) * _min_width(_flatten_groups(value[2]))
        if name == "BRANCH":
            total += min(_min_width(_flatten_groups(branch)) for branch in value[1])
        elif name in ("LITERAL", "NOT_LITERAL", "ANY", "IN"):
            total += 1
    return total
