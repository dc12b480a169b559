"""Fast lookup of the patterns that match a module name: `rank_pattern`, `alpha_pattern` and `modules_to_save`.

EVA writes one name per module, and a mixture of experts has thousands of modules. So plain names are looked up in a
dictionary, and only real expressions are tried one by one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from jaxadapt.configs.validation import compile_pattern, match

PLAIN = re.compile(r"[\w.]+")
"""Matches a plain name, in which only the dots are special to `re`."""


class PatternIndex:
    """The patterns of one field, indexed for lookup by module name.

    Args:
        field: the field's name, which selects how PEFT embeds a pattern (see `validation.TEMPLATES`).
        keys: the patterns, in their order.

    Raises:
        ConfigError: an invalid regular expression.

    >>> index = PatternIndex("rank_pattern", ["q_proj", r"h\\.\\d+", "3.q_proj"])
    >>> index.matching("model.h.3.q_proj"), index.matching("h.12"), index.matching("proj")
    ([0, 2], [1], [])
    """

    def __init__(self, field: str, keys: Iterable[str]) -> None:
        self._field = field
        self.keys = tuple(keys)
        self._anywhere = field == "modules_to_save"  # the other fields match the end of a path
        self._order: dict[str, int] = {}
        self._expressions: dict[int, str] = {}
        # The dot of a pattern matches any character. So a name is looked up with dots put where a pattern has them.
        self._dots: dict[int, set[tuple[int, ...]]] = {}
        for order, key in enumerate(self.keys):
            if PLAIN.fullmatch(key):
                self._order.setdefault(key, order)
                self._dots.setdefault(len(key), set()).add(tuple(i for i, letter in enumerate(key) if letter == "."))
            else:
                compile_pattern(field, key)
                self._expressions[order] = key

    def matching(self, name: str) -> list[int]:
        """Return the positions of all patterns that match a name, ascending."""
        expressions = {order for order, key in self._expressions.items() if match(self._field, key, name)}
        return sorted(expressions | self._match_plain(name))

    def first(self, name: str) -> int | None:
        """Return the position of the first pattern that matches a name; None if no pattern matches."""
        best = min(self._match_plain(name), default=None)
        for order, key in self._expressions.items():
            if best is not None and order > best:
                break
            if match(self._field, key, name):
                return order
        return best

    def _match_plain(self, name: str) -> set[int]:
        """Return the positions of the plain names that match a name."""
        name, _, more_lines = name.partition("\n")  # "." matches no newline, and "$" also before the last one
        ends = [i for i, letter in enumerate(name) if letter == "."]
        starts = [0, *(i + 1 for i in ends)]
        stops = [*(ends if self._anywhere else ()), *(() if more_lines else (len(name),))]
        positions: set[int] = set()
        for stop in stops:
            for start in starts:
                for dots in self._dots.get(stop - start, ()):
                    letters = list(name[start:stop])
                    for i in dots:
                        letters[i] = "."
                    order = self._order.get("".join(letters))
                    if order is not None:
                        positions.add(order)
        return positions
