"""Validation of configuration values; one error lists all problems of a configuration."""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable, Collection, Mapping
from typing import Any, NoReturn, cast

from jaxadapt.configs.regex_cost import REPEAT, is_slow
from jaxadapt.core.errors import ConfigError

# How PEFT embeds a pattern of each field in the expression that it matches with module names. A key such as "a)(b" is
# valid inside such an expression and invalid by itself, so only the complete expression is checked.
TEMPLATES: Mapping[str, str] = {
    "target_modules": "{}",
    "exclude_modules": "{}",
    "feedforward_modules": "{}",
    "modules_to_save": r"(^|.*\.){}($|\..*)",
    "layers_pattern": r"(?:^|.*?\.){}\.(?P<idx>\d+)\.",
    "rank_pattern": r"(.*\.)?({})$",
    "alpha_pattern": r"(.*\.)?({})$",
}
_FULL_MATCH = ("target_modules", "exclude_modules", "feedforward_modules")  # these match the whole name

LONGEST = 512
"""The largest length of a name that expressions are matched with. PyTorch's module names have up to 150 letters."""


def match(field: str, pattern: str, name: str) -> re.Match[str] | None:
    """Match `pattern`, an entry of `field`, with a module name as PEFT does; None if it does not match.

    Raises:
        ConfigError: the pattern is an invalid or a slow regular expression, or the name is too long.
    """
    expression = compile_pattern(field, pattern)
    if len(name) > LONGEST and REPEAT.search(pattern):
        raise ConfigError(
            f"{field}: cannot match the expression {_show(pattern)} with a name of {len(name)} letters, which begins"
            f" with {name[:80]!r}: the limit is {LONGEST}; list plain names instead, which may be longer"
        )
    return expression.fullmatch(name) if field in _FULL_MATCH else expression.match(name)


@functools.lru_cache(maxsize=4096)
def compile_pattern(field: str, pattern: str) -> re.Pattern[str]:
    """Compile the expression in which PEFT embeds `pattern`, an entry of `field` (a key of `TEMPLATES`).

    Python's `re` backtracks: an expression such as "(a+)+b" takes exponential time on a long name. An untrusted file
    must not stop the program that reads it, so such an expression is an error (see `regex_cost`).

    Raises:
        ConfigError: the pattern is an invalid or a slow regular expression.
    """
    try:
        expression = re.compile(TEMPLATES[field].replace("{}", pattern))
        if is_slow(_valid_part(pattern, expression)):
            raise ConfigError(
                f"{field}: expected a regular expression that is matched in a few steps, found {_show(pattern)}, which"
                " may take very many, because its repeats match the same letters; write a list of names, or [^.]+ for"
                " .*"
            )
        return expression
    except (re.error, OverflowError, RecursionError) as error:
        raise ConfigError(
            f"{field}: expected a regular expression of Python's `re`, found {pattern!r} ({error}); escape literal"
            " characters, for example with re.escape"
        ) from error


def _valid_part(pattern: str, expression: re.Pattern[str]) -> str:
    """Return the pattern if it is valid by itself, else the complete expression."""
    try:
        return re.compile(pattern).pattern
    except re.error:
        return expression.pattern


def is_int(value: object) -> bool:
    """Return True for an int that is not a bool (in Python, bool is a subclass of int)."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Return True for a finite float, or an int within the range of floats."""
    largest = sys.float_info.max
    return (is_int(value) or isinstance(value, float)) and -largest <= cast("float", value) <= largest


def is_strings(value: object) -> bool:
    """Return True for a tuple (a frozen list) of strings."""
    if not isinstance(value, tuple):
        return False
    return all(isinstance(item, str) for item in cast("tuple[object, ...]", value))


def is_ints(value: object) -> bool:
    """Return True for a tuple (a frozen list) of ints."""
    return isinstance(value, tuple) and all(is_int(item) for item in cast("tuple[object, ...]", value))


_MAX_LAYERS = 100_000  # layer_replication is expanded to a list of layers


class Problems:
    """The problems of one configuration, at most one per field."""

    def __init__(self) -> None:
        self._lines: dict[str, str] = {}

    def add(self, field: str, expected: str, found: object, way_out: str = "") -> None:
        """Report a problem of `field`. The first problem of a field wins, since later ones usually follow from it."""
        line = f"{field}: expected {expected}, found {_show(found)}"
        self._lines.setdefault(field, f"{line}; {way_out}" if way_out else line)

    def note(self, field: str, line: str) -> None:
        """Report a problem of `field` with a complete line of text."""
        self._lines.setdefault(field, line)

    def __contains__(self, field: str) -> bool:
        return field in self._lines

    def raise_if_any(self, owner: str) -> None:
        """Raise one `ConfigError` that lists every problem, if there are any."""
        if self._lines:
            self._raise(owner)

    def _raise(self, owner: str) -> NoReturn:
        lines = list(self._lines.values())
        if len(lines) == 1:
            raise ConfigError(f"{owner}: {lines[0]}")
        raise ConfigError("\n  ".join([f"{owner}: {len(lines)} problems", *lines]))

    # One method per kind of value. Each takes the frozen value and adds a problem if it is of another kind.

    def common(self, field: str, value: object) -> None:
        """Check a field that is read from any configuration, even if its class does not have the field."""
        if field in COMMON:
            COMMON[field](self, field, value)

    def flag(self, field: str, value: object, *, optional: bool = False) -> None:
        """Check a value that must be true or false."""
        if not (isinstance(value, bool) or (optional and value is None)):
            self.add(field, "true, false or null" if optional else "true or false", value)

    def text(self, field: str, value: object) -> None:
        """Check a value that must be a string or null."""
        if value is not None and not isinstance(value, str):
            self.add(field, "a string or null", value)

    def mapping(self, field: str, value: object) -> None:
        """Check a value that must be an object or null."""
        if value is not None and not isinstance(value, Mapping):
            self.add(field, "an object or null", value)

    def rank(self, field: str, value: object) -> None:
        """Check a value that must be a positive int."""
        if is_int(value) and cast("int", value) > 0:
            return
        is_integral = isinstance(value, float) and value.is_integer() and value > 0
        self.add(field, "a positive integer", value, f"write {int(cast('float', value))}" if is_integral else "")

    def number(self, field: str, value: object) -> None:
        """Check a value that must be a finite int or float."""
        if not is_number(value):
            self.add(field, "a finite number", value)

    def probability(self, field: str, value: object) -> None:
        """Check a value that must be a number in [0, 1)."""
        if not (is_number(value) and 0 <= cast("float", value) < 1):
            self.add(field, "a number in [0, 1)", value)

    def one_of(self, field: str, value: object, known: Collection[str], *, optional: bool = False) -> None:
        """Check a value that must be one of a few strings, or null if `optional`."""
        if (value is None and optional) or (isinstance(value, str) and value in known):
            return
        names = ", ".join(f'"{name}"' for name in known)
        self.add(field, f"one of {names}{' or null' if optional else ''}", value)

    def strings(self, field: str, value: object) -> None:
        """Check a value that must be a list of strings or null. (A single string would be read letter by letter.)"""
        if value is None or is_strings(value):
            return
        way_out = f"write [{_show(value)}]" if isinstance(value, str) else ""
        self.add(field, "a list of strings or null", value, way_out)

    def integers(self, field: str, value: object) -> None:
        """Check a value that must be a list of ints or null."""
        if value is not None and not is_ints(value):
            self.add(field, "a list of integers or null", value)

    def layers(self, field: str, value: object) -> None:
        """Check a value that must be an int, a list of ints or null."""
        if not (value is None or is_int(value) or is_ints(value)):
            self.add(field, "an integer, a list of integers, or null", value)

    def selection(self, field: str, value: object) -> None:
        """Check a value that must be a regular expression, a list of names, or null."""
        if value is None or is_strings(value):
            return
        if isinstance(value, str):
            self.pattern(field, value)
        else:
            self.add(field, "a regular expression (string), a list of names, or null", value)

    def pattern(self, field: str, value: str) -> None:
        """Check that a pattern is a valid regular expression where PEFT uses it."""
        if re.fullmatch(r"[\w.]*", value):
            return  # a plain name is always valid, and compiling hundreds of them takes time
        try:
            compile_pattern(field, value)
        except ConfigError as error:
            self.note(field, str(error))

    def patterns(self, field: str, value: object) -> None:
        """Check `rank_pattern` ({expression: positive int}) or `alpha_pattern` ({expression: finite number})."""
        if not isinstance(value, Mapping):
            self.add(field, "an object (of patterns)", value, "write {}" if value is None else "")
            return
        for key, item in cast("Mapping[object, Any]", value).items():
            if not isinstance(key, str):
                return  # freezing has reported it
            self.pattern(field, key)
            if field == "rank_pattern":
                self.rank(f"{field}[{key!r}]", item)
            else:
                self.number(f"{field}[{key!r}]", item)

    def expressions(self, field: str, value: object) -> None:
        """Check a value that must be a list of regular expressions or null."""
        self.strings(field, value)
        for item in cast("tuple[str, ...]", value or ()) if field not in self else ():
            self.pattern(field, item)

    def expression_or_list(self, field: str, value: object) -> None:
        """Check a value that must be a regular expression, a list of them, or null."""
        self.pattern(field, value) if isinstance(value, str) else self.expressions(field, value)

    def pairs(self, field: str, value: object) -> None:
        """Check a value that must be a list of [start, end] pairs or null."""
        if value is not None and not (
            isinstance(value, tuple) and all(_is_pair(pair) for pair in cast("tuple[object, ...]", value))
        ):
            self.add(field, "a list of [start, end] pairs, or null", value)
        elif value is not None:
            count = sum(end - start for start, end in cast("tuple[tuple[int, int], ...]", value))
            if count > _MAX_LAYERS:
                self.add(field, f"pairs that make at most {_MAX_LAYERS} layers", count)

    def tokens(self, field: str, value: object) -> None:
        """Check a value that must be a list of ints, an object {module name: list of ints}, or null."""
        if value is None or is_ints(value):
            return
        if not (isinstance(value, Mapping) and all(map(is_ints, cast("Mapping[str, object]", value).values()))):
            self.add(field, "a list of integers, an object of module name -> list of integers, or null", value)


COMMON: Mapping[str, Callable[[Problems, str, object], None]] = {
    "target_modules": Problems.selection,
    "exclude_modules": Problems.selection,
    "feedforward_modules": Problems.selection,
    "modules_to_save": Problems.expressions,
    "target_parameters": Problems.strings,
    "layers_to_transform": Problems.layers,
    "layers_pattern": Problems.expression_or_list,
    "layer_replication": Problems.pairs,
    "trainable_token_indices": Problems.tokens,
    "alora_invocation_tokens": Problems.integers,
    "rank_pattern": Problems.mapping,  # AdaLoRA's values are lists
    "alpha_pattern": Problems.mapping,
    "bias": Problems.text,
}
"""The check of each field whose configuration class has no check of its own."""


def _is_pair(value: object) -> bool:
    """Return True for two ints with 0 <= start < end."""
    if not is_ints(value) or len(pair := cast("tuple[int, ...]", value)) != 2:
        return False
    return 0 <= pair[0] < pair[1]


def _show(value: object) -> str:
    """Return a value as JSON writes it, cut to 200 characters for a message."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}…"
