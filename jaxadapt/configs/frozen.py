"""Deeply immutable, hashable forms of JSON values, for use as static data of jitted functions; patterns as keys.

`PatternIndex` looks up the patterns that match a module name: `rank_pattern`, `alpha_pattern` and `modules_to_save`.
EVA writes one name per module, and a mixture of experts has thousands of modules. So plain names are looked up in a
dictionary, and only real expressions are tried one by one.
"""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import ItemsView, Iterable, Iterator, Mapping, Set
from typing import Any, TypeAlias, TypeVar, cast

from jaxadapt.configs.validation import compile_pattern, match

# ---------------------------------------------------------------- name patterns


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
    >>> [list(index.matching(name)) for name in ("model.h.3.q_proj", "h.12", "proj")]
    [[0, 2], [1], []]
    """

    def __init__(self, field: str, keys: Iterable[str]) -> None:
        self._field = field
        self.keys: tuple[str, ...] = tuple(keys)
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

    def matching(self, name: str) -> Iterator[int]:
        """Yield the positions of all patterns that match a name, ascending."""
        plain = self._match_plain(name)
        for order in sorted([*self._expressions, *plain]):
            if order in plain or match(self._field, self._expressions[order], name):
                yield order

    def first(self, name: str) -> int | None:
        """Return the position of the first pattern that matches a name; None if no pattern matches."""
        return next(self.matching(name), None)

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


# ---------------------------------------------------------------- frozen


_T = TypeVar("_T")

# The result of `freeze`. It is a string because the alias is recursive.
Frozen: TypeAlias = "bool | int | float | str | tuple[Frozen, ...] | FrozenDict | None"


class FrozenDict(Mapping[str, Any]):
    """An immutable, hashable mapping with string keys, in sorted order as in `adapter_config.json`.

    >>> d = FrozenDict({"b": 1, "a": 2})
    >>> d
    FrozenDict({'a': 2, 'b': 1})
    >>> d == {"a": 2, "b": 1}, hash(d) == hash(FrozenDict({"a": 2, "b": 1}))
    (True, True)
    """

    __slots__ = ("_index", "_items")
    _items: dict[str, Any]
    _index: PatternIndex | None

    def __init__(self, items: Mapping[str, Any] | None = None) -> None:
        """Freeze every value of `items`.

        Raises:
            TypeError: a key is not a string, or JSON cannot hold a value.
        """
        source: Mapping[Any, Any] = items or {}
        plain: dict[str, Frozen] = {}
        for key, value in source.items():
            if not isinstance(key, str):
                raise TypeError(f"keys must be strings, found the key {key!r} ({type(key).__name__})")
            _check_text(key)
            try:
                plain[str.__str__(key)] = freeze(value)
            except TypeError as error:
                raise TypeError(f"{key}: {error}") from error
        object.__setattr__(self, "_items", dict(sorted(plain.items())))
        object.__setattr__(self, "_index", None)

    @property
    def index(self) -> PatternIndex:
        """The keys as patterns of module names, in their order. Raises `ConfigError` for an invalid expression."""
        if self._index is None:
            object.__setattr__(self, "_index", PatternIndex("rank_pattern", self))
        return cast("PatternIndex", self._index)

    def __getitem__(self, key: str) -> Any:
        return self._items[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def items(self) -> ItemsView[str, Any]:
        return self._items.items()  # Mapping.items looks up every key, which is slow for the many patterns of EVA

    def __hash__(self) -> int:
        return hash(tuple(self._items.items()))

    def __eq__(self, other: object) -> bool:
        if isinstance(other, FrozenDict):
            return self._items == other._items
        if isinstance(other, Mapping):
            return self._items == dict(cast("Mapping[Any, Any]", other))
        return NotImplemented

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"cannot set {name!r}: a FrozenDict is immutable")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"cannot delete {name!r}: a FrozenDict is immutable")

    def __repr__(self) -> str:
        return f"FrozenDict({self._items!r})"

    def __copy__(self) -> FrozenDict:
        return self

    def __deepcopy__(self, memo: object) -> FrozenDict:
        return self

    def __reduce__(self) -> tuple[type[FrozenDict], tuple[dict[str, Any]]]:
        return type(self), (dict(self._items),)


class Patterns(FrozenDict):
    """A mapping from patterns to values in which the first matching pattern applies.

    The patterns keep their order if two of them may match one module. Otherwise they are sorted, as in PEFT's file, so
    that the order does not affect equality. PEFT tries patterns in the given order but always sorts them in its file,
    so its file may contradict its tensors.

    >>> list(Patterns({"v_proj": 1, "q_proj": 2})), list(Patterns({"v_proj": 1, "0.v_proj": 2}))
    (['q_proj', 'v_proj'], ['v_proj', '0.v_proj'])
    """

    __slots__ = ()

    def __init__(self, items: Mapping[str, Any] | None = None) -> None:
        super().__init__(items)
        given = [str.__str__(key) for key in items or ()]
        if given != list(self._items) and _overlap(given):
            object.__setattr__(self, "_items", {key: self._items[key] for key in given})

    def __eq__(self, other: object) -> bool:
        same = super().__eq__(other)
        return same and list(self) == list(other) if isinstance(other, Patterns) else same

    def __hash__(self) -> int:
        return super().__hash__()


def _overlap(keys: list[str]) -> bool:
    """Return True if two of the patterns may match one module; True if any pattern is more than a plain name."""
    if not all(PLAIN.fullmatch(key) for key in keys):
        return True
    index = PatternIndex("rank_pattern", keys)
    return any(list(index.matching(key)) != [order] for order, key in enumerate(keys))


def find_pattern_value(patterns: Mapping[str, _T] | None, name: str, default: _T) -> _T:
    """Return the value of the first pattern that matches the module `name`; `default` if no pattern matches.

    Used for `rank_pattern` and `alpha_pattern`. A pattern must match the whole name, or its end after a dot.

    Raises:
        ConfigError: a regular expression is invalid.

    >>> find_pattern_value({"q_proj": 4, r"layers\\.\\d+\\.v_proj": 2}, "model.layers.7.v_proj", 8)
    2
    """
    if not patterns:
        return default
    index = _index(patterns)
    order = index.first(name)
    # A key that does not match itself as an expression ("a+b") still applies to the module of exactly that name.
    return patterns.get(name, default) if order is None else patterns[index.keys[order]]


def find_value_after_dot(patterns: Mapping[str, _T] | None, name: str, default: _T) -> _T:
    """Return the value of the first pattern that matches the end of a module's name after a dot, or is the name.

    PEFT's C3A and FOURIERFT match so. An expression that matches only the whole name does not apply.

    >>> [find_value_after_dot({r"h\\.\\d+\\.q": 4}, name, 8) for name in ("model.h.0.q", "h.0.q")]
    [4, 8]
    """
    _, dot, end = name.partition(".")
    value = (patterns or {}).get(name, default)
    return find_pattern_value(patterns, end, value) if dot else value


def matching_patterns(patterns: Mapping[str, Any], name: str) -> list[str]:
    """Return all patterns that match the module `name`; the first one applies."""
    index = _index(patterns)
    keys = [index.keys[order] for order in index.matching(name)]
    return [*keys, name] if name in patterns and name not in keys else keys


def _index(patterns: Mapping[str, Any]) -> PatternIndex:
    return patterns.index if isinstance(patterns, FrozenDict) else PatternIndex("rank_pattern", patterns)


def _check_text(text: str) -> None:
    """Raise `TypeError` for a lone surrogate, which JSON can escape but UTF-8 cannot encode."""
    if not text.isascii() and (surrogate := re.search("[\ud800-\udfff]", text)):
        raise TypeError(
            f"expected text, found {text!a}, in which {surrogate[0]!a} is a lone surrogate (half of a character); write"
            " the whole character"
        )


def freeze(value: object) -> Frozen:
    """Return a JSON-like value in immutable form: lists become tuples, sets sorted tuples, dicts FrozenDicts.

    Raises:
        TypeError: JSON cannot hold the value or a part of it (NaN and infinity included).

    >>> freeze({"a": [1, {"y", "x"}]})
    FrozenDict({'a': (1, ('x', 'y'))})
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        _check_text(value)
        return str.__str__(value)  # a member of a str enum becomes its plain string
    if isinstance(value, numbers.Integral):  # includes NumPy's integers
        return int(value)
    if isinstance(value, numbers.Real):
        if not math.isfinite(value):
            raise TypeError(f"numbers must be finite, found {value!r}")
        return float(value)
    if isinstance(value, FrozenDict):
        return value
    if isinstance(value, Mapping):
        return FrozenDict(cast("Mapping[str, Any]", value))
    if isinstance(value, (list, tuple)):
        return tuple(freeze(item) for item in cast("list[object]", value))
    if isinstance(value, Set):
        return tuple(
            sorted([freeze(item) for item in cast("Set[object]", value)], key=lambda item: (type(item).__name__, item))
        )
    raise TypeError(f"found {value!r} ({type(value).__name__}), which JSON cannot hold")


def thaw(value: object) -> Any:
    """Return the plain JSON value (new dicts and lists) of a result of `freeze`.

    >>> thaw(freeze({"a": (1, 2)}))
    {'a': [1, 2]}
    """
    if isinstance(value, Mapping):
        return {key: thaw(item) for key, item in cast("Mapping[str, object]", value).items()}
    if isinstance(value, tuple):
        return [thaw(item) for item in cast("tuple[object, ...]", value)]
    return value
