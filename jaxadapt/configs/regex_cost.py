"""How much work a regular expression of a file may make of a module's name.

Python's `re` tries one way to match after the other: "(a+)+$" has 2^n of them on n letters. PEFT has the same fault. A
file that somebody else wrote must not stop this program, so what could is refused before it is used.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from re import _parser as parser  # pyright: ignore[reportAttributeAccessIssue, reportUnknownVariableType]
from typing import Any, NamedTuple

REPEAT = re.compile(r"[*+?{]")
"""What an expression without is matched in one way at most for each of its alternatives."""

_MOST = 1e8
_LENGTH = 256  # letters of a long name
_REPEATS = ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT")
_LOOKS = ("ASSERT", "ASSERT_NOT")


def is_slow(expression: str) -> bool:
    """Whether a valid expression could try more than some 10^8 ways to match a long name.

    An estimate: a repeat counts with how often it can give letters back to what follows it, and not at all where what
    follows is no letter that it matches.

    >>> is_slow(r"(a+)+$"), is_slow(r"(.*a){9}b"), is_slow(r".*\\.layers\\.\\d+\\.(self_attn|mlp)\\..*_proj$")
    (True, True, False)
    """
    if not REPEAT.search(expression):
        return False
    try:
        found: Any = parser.parse(expression)
        return _ways(_flat(found), None, bool(found.state.flags & re.IGNORECASE)) > math.log(_MOST)
    except RecursionError:
        return True


class _Rest(NamedTuple):
    """What comes after a part of an expression. (Not a list of its own for each part: those would grow as n^2.)"""

    items: Sequence[tuple[str, Any]]
    start: int
    after: _Rest | None

    def walk(self) -> Iterator[tuple[str, Any]]:
        rest: _Rest | None = self
        while rest is not None:
            for i in range(rest.start, len(rest.items)):
                yield rest.items[i]
            rest = rest.after


def _flat(items: Any) -> list[tuple[str, Any]]:
    """The parts of an expression, groups opened."""
    out: list[tuple[str, Any]] = []
    for code, value in items:
        name = str(code)
        if name == "SUBPATTERN":
            out += _flat(value[-1])
        elif name == "ATOMIC_GROUP":
            out += _flat(value)
        else:
            out.append((name, value))
    return out


def _ways(items: Sequence[tuple[str, Any]], after: _Rest | None, caseless: bool) -> float:
    """The logarithm of how many ways there are to match, with what comes after."""
    total = 0.0
    for i, (name, value) in enumerate(items):
        rest = _Rest(items, i + 1, after)
        if name in _REPEATS:
            total += _repeat(value, rest, caseless)
        elif name == "BRANCH":
            branches = [_flat(branch) for branch in value[1]]
            starts = [branch[0][1] if branch and branch[0][0] == "LITERAL" else None for branch in branches]
            each = [_ways(branch, rest, caseless) for branch in branches]
            alike = None in starts or len(set(starts)) < len(starts) or caseless
            total += max(each) + (math.log(len(each)) if alike else 0.0)
        elif name in _LOOKS:
            total += _ways(_flat(value[1]), None, caseless)
        elif name == "GROUPREF_EXISTS":
            total += sum(_ways(_flat(branch), rest, caseless) for branch in value[1:] if branch is not None)
    return total


def _repeat(value: Any, rest: _Rest, caseless: bool) -> float:
    least, most, body = int(value[0]), int(value[1]), _flat(value[2])
    inner = _ways(body, _Rest(body, 0, rest) if most > 1 else rest, caseless)
    if most > 1 and inner > 0:
        within = inner * most if most <= _LENGTH else math.inf  # each round has as many ways as the first
    else:
        within = inner
    if least == most or not _gives_back(body, rest, caseless):
        return within
    return within + math.log(min(most - least + 1, _LENGTH / max(1, _width(rest.walk()))))


def _gives_back(body: Sequence[tuple[str, Any]], rest: _Rest, caseless: bool) -> bool:
    """Whether a shorter match of a repeat may succeed where the longest does not."""
    following = next((item for item in rest.walk() if item[0] not in ("AT", *_LOOKS)), None)
    if following is None:
        return body != [("ANY", None)]  # ".*" takes all that is left
    if caseless or not body or following[0] != "LITERAL":
        return True
    return _may_be(body[0], chr(following[1]))


def _may_be(item: tuple[str, Any], letter: str) -> bool:
    """Whether a part of an expression may begin with a letter."""
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


def _width(items: Iterable[tuple[str, Any]]) -> int:
    """How many letters must follow, up to the next repeat of any number."""
    total = 0
    for name, value in items:
        if name in _REPEATS:
            return total + int(value[0]) * _width(_flat(value[2]))
        if name == "BRANCH":
            total += min(_width(_flat(branch)) for branch in value[1])
        elif name in ("LITERAL", "NOT_LITERAL", "ANY", "IN"):
            total += 1
    return total
