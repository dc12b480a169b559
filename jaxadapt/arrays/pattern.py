"""Patterns of keymap entries, such as "d {l} n h -> (n h) d": a leaf's axes, then PyTorch's. Strings only."""

from __future__ import annotations

import functools
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from jaxadapt.core.errors import MismatchError

_TOKEN = re.compile(r"\(([^()]*)\)|(\{?\w+\}?)")


class Pattern(NamedTuple):
    """A parsed pattern.

    Attributes:
        left: the leaf's axes. Braced axes keep their braces, and a split axis its parentheses.
        right: PyTorch's axes, each as the group of names that are flattened into it.
        plain: the names on the left without braces.
        braced: the names on the left in braces, without the braces.
        problems: the errors in the pattern.
    """

    left: tuple[str, ...]
    right: tuple[tuple[str, ...], ...]
    plain: frozenset[str]
    braced: frozenset[str]
    problems: tuple[str, ...]


@functools.lru_cache(maxsize=4096)  # all families together have a few hundred patterns
def parse_pattern(text: str) -> Pattern:
    """Parse a pattern; `problems` lists its errors.

    >>> parse_pattern("{p} n d h -> (n h) d")[:2]
    (('{p}', 'n', 'd', 'h'), (('n', 'h'), ('d',)))
    """
    if text.count("->") != 1:
        none = frozenset[str]()
        problem = "a pattern must have exactly one '->', with JAX axes on the left and PyTorch axes on the right"
        return Pattern((), (), none, none, (problem,))
    ours, theirs = map(_axes, text.split("->"))
    left, right = tuple(axis for axis, _ in ours), tuple(names for _, names in theirs)
    names, flat = ([name for _, group in side for name in group] for side in (ours, theirs))
    rest = re.sub(_TOKEN, "", text.replace("->", " ")).strip()
    problems = [f"{rest!r} is no axis name"] if rest else []
    problems += [
        f"axis {n!r} occurs twice on the {side}"
        for side, side_names in (("left", names), ("right", flat))
        for n in repeated_names(side_names)
    ]
    plain = frozenset(n for n in names if not n.startswith("{"))
    problems += [
        f"axis {n!r} is only on the left (put an axis that PyTorch lacks in braces)" for n in sorted(plain - set(flat))
    ]
    problems += [f"axis {n!r} is only on the right" for n in sorted(set(flat) - plain)]
    braced = frozenset(n.strip("{}") for n in names if n.startswith("{"))
    return Pattern(left, right, plain, braced, tuple(problems))


def _axes(text: str) -> list[tuple[str, tuple[str, ...]]]:
    """Return the axes on one side of a pattern, each with its names."""
    found = ((match[2], tuple((match[1] or match[2] or "").split())) for match in _TOKEN.finditer(text))
    return [(name or f"({' '.join(names)})", names) for name, names in found]


def repeated_names(names: Sequence[str]) -> list[str]:
    """Return the names that occur more than once, sorted.

    >>> repeated_names(["n", "h", "n"])
    ['n']
    """
    return sorted(name for name, count in Counter(names).items() if count > 1)


def axis_parts(axis: str) -> tuple[str, ...]:
    """Return the names in a parenthesised axis of a leaf, or the axis itself."""
    return tuple(axis[1:-1].split()) if axis.startswith("(") else (axis,)


def part_sizes(axis: str, size: int, fixed: Mapping[str, int]) -> dict[str, int]:
    """Return the sizes of the parts of an axis. Raises `MismatchError` if the fixed sizes do not divide its size.

    >>> part_sizes("(c p)", 8, {"p": 2}), part_sizes("h", 8, {})
    ({'c': 4, 'p': 2}, {'h': 8})
    """
    names = axis_parts(axis)
    if names == (axis,):
        return {axis: size}
    known = math.prod(fixed[n] for n in names if n in fixed)
    if size % known:
        raise MismatchError(f"an axis of size {size} cannot be split as {axis} with the sizes {dict(fixed)}")
    return {n: fixed.get(n, size // known) for n in names}


def split_sizes(sizes: Iterable[tuple[str, int]], fixed: Mapping[str, int]) -> dict[str, int]:
    """Return the sizes of the parts of several axes, given as `(axis, size)`; see `part_sizes`."""
    return {name: part for axis, size in sizes for name, part in part_sizes(axis, size, fixed).items()}


def scale_factor(scale: tuple[str, float] | None, sizes: Iterable[tuple[str, int]], fixed: Mapping[str, int]) -> float:
    """Return the product of the sizes of the axes that `scale` names, to its power; 1 without a scale.

    >>> scale_factor(("c p", -0.5), [("d", 3), ("(c p)", 4)], {"p": 2})
    0.5
    """
    if scale is None:
        return 1.0
    parts = split_sizes(sizes, fixed)
    return float(math.prod(parts[name] for name in scale[0].split()) ** scale[1])
