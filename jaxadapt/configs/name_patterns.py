"""Which of many patterns match a module's name: `rank_pattern`, `alpha_pattern` and `modules_to_save`.

EVA writes one name a module. A mixture of experts has thousands, and each module asks for the first that matches. The
names are looked up here; only what is more than a name is tried one by one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from jaxadapt.configs.validation import compile_pattern, match

PLAIN = re.compile(r"[\w.]+")
"""A pattern that is a name: only its dots are special to `re`."""


class PatternIndex:
    """Patterns of one field, looked up by what they match.

    Args:
        field: the field, which says how PEFT embeds a pattern (see `check.TEMPLATES`).
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
        self._anywhere = field == "modules_to_save"  # which may match any part of a path; the others match its end
        self._order: dict[str, int] = {}
        self._expressions: dict[int, str] = {}
        # A dot of a plain name matches any letter. So a name is looked up with dots where the patterns have them.
        self._dots: dict[int, set[tuple[int, ...]]] = {}
        for order, key in enumerate(self.keys):
            if PLAIN.fullmatch(key):
                self._order.setdefault(key, order)
                self._dots.setdefault(len(key), set()).add(tuple(i for i, letter in enumerate(key) if letter == "."))
            else:
                compile_pattern(field, key)
                self._expressions[order] = key

    def matching(self, name: str) -> list[int]:
        """The numbers of all patterns that match a name, in their order."""
        found = {order for order, key in self._expressions.items() if match(self._field, key, name)}
        return sorted(found | self._plain(name))

    def first(self, name: str) -> int | None:
        """The number of the first pattern that matches a name; None if none does."""
        best = min(self._plain(name), default=None)
        for order, key in self._expressions.items():
            if best is not None and order > best:
                break
            if match(self._field, key, name):
                return order
        return best

    def _plain(self, name: str) -> set[int]:
        if "\n" in name:  # to which "." and "$" mean something else
            return {order for key, order in self._order.items() if match(self._field, key, name)}
        ends = [i for i, letter in enumerate(name) if letter == "."]
        starts = [0, *(i + 1 for i in ends)]
        stops = [*ends, len(name)] if self._anywhere else [len(name)]
        found: set[int] = set()
        for stop in stops:
            for start in starts:
                for dots in self._dots.get(stop - start, ()):
                    letters = list(name[start:stop])
                    for i in dots:
                        letters[i] = "."
                    order = self._order.get("".join(letters))
                    if order is not None:
                        found.add(order)
        return found
