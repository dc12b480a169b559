"""The pattern of a line, `"d {l} n h -> (n h) d"`: the axes of a leaf, then PyTorch's. Pure: strings only."""

from __future__ import annotations

import functools
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from jaxadapt.core.errors import MismatchError

_TOKEN = re.compile(r"\(([^()]*)\)|(\{?\w+\}?)")


class Pattern(NamedTuple):
    """A pattern read.

    `left` names the leaf's axes (braced ones keep their braces, a split one its parentheses), `right` PyTorch's, each a
    group of names flattened together; `plain` and `braced` are the names on the left by kind.
    """

    left: tuple[str, ...]
    right: tuple[tuple[str, ...], ...]
    plain: frozenset[str]
    braced: frozenset[str]
    problems: tuple[str, ...]


@functools.lru_cache(maxsize=4096)  # the lines of all families have some hundred
def parse_pattern(text: str) -> Pattern:
    """A pattern read, with what is wrong with it by itself.

    >>> parse_pattern("{p} n d h -> (n h) d")[:2]
    (('{p}', 'n', 'd', 'h'), (('n', 'h'), ('d',)))
    """
    if text.count("->") != 1:
        none = frozenset[str]()
        problem = "a pattern has one '->': JAX axes on the left, PyTorch's on the right"
        return Pattern((), (), none, none, (problem,))
    ours, theirs = text.split("->")
    left = tuple(m.group(2) or f"({' '.join(m.group(1).split())})" for m in _TOKEN.finditer(ours))
    right = tuple(
        tuple((m.group(1) if m.group(1) is not None else m.group(2)).split()) for m in _TOKEN.finditer(theirs)
    )
    names, flat = [n for axis in left for n in axis_parts(axis)], [n for group in right for n in group]
    rest = re.sub(_TOKEN, "", text.replace("->", " ")).strip()
    problems = [f"{rest!r} is no axis name"] if rest else []
    problems += [
        f"axis {n!r} is on the {side} twice"
        for side, found in (("left", names), ("right", flat))
        for n in repeated(found)
    ]
    plain = frozenset(n for n in names if not n.startswith("{"))
    problems += [f"axis {n!r} is only on the left (braces mark axes PyTorch lacks)" for n in sorted(plain - set(flat))]
    problems += [f"axis {n!r} is only on the right" for n in sorted(set(flat) - plain)]
    braced = frozenset(n.strip("{}") for n in names if n.startswith("{"))
    return Pattern(left, right, plain, braced, tuple(problems))


def repeated(names: Sequence[str]) -> list[str]:
    """The names that are there more than once.

    >>> repeated(["n", "h", "n"])
    ['n']
    """
    return sorted(name for name, count in Counter(names).items() if count > 1)


def axis_parts(axis: str) -> tuple[str, ...]:
    """The parts of one of a leaf's axes: itself, unless it stands in parentheses."""
    return tuple(axis[1:-1].split()) if axis.startswith("(") else (axis,)


def part_sizes(axis: str, size: int, fixed: Mapping[str, int]) -> dict[str, int]:
    """The sizes of an axis' parts; `MismatchError` where they do not divide it.

    >>> part_sizes("(c p)", 8, {"p": 2}), part_sizes("h", 8, {})
    ({'c': 4, 'p': 2}, {'h': 8})
    """
    names = axis_parts(axis)
    if names == (axis,):
        return {axis: size}
    known = math.prod(fixed[n] for n in names if n in fixed)
    if size % known:
        raise MismatchError(f"an axis of size {size} cannot be split as {axis} with {dict(fixed)}")
    return {n: fixed.get(n, size // known) for n in names}
