"""Collecting what is wrong with a configuration, so that one error names everything."""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable, Collection, Mapping
from typing import Any, NoReturn, cast

from jaxadapt.configs import regex_cost as expressions
from jaxadapt.core.errors import ConfigError

# How PEFT embeds a pattern of each field into the expression it matches module names with. A key such as
# "a)(b" is a valid expression inside one of these and an invalid one alone, so only the whole is judged.
TEMPLATES: Mapping[str, str] = {
    "target_modules": "{}",
    "exclude_modules": "{}",
    "feedforward_modules": "{}",
    "modules_to_save": r"(^|.*\.){}($|\..*)",
    "layers_pattern": r"(?:^|.*?\.){}\.(?P<idx>\d+)\.",
    "rank_pattern": r"(.*\.)?({})$",
    "alpha_pattern": r"(.*\.)?({})$",
}
_WHOLE = ("target_modules", "exclude_modules", "feedforward_modules")  # which must match the whole name


LONGEST = 512
"""Letters that a name may have where an expression is tried on it. The names of PyTorch's modules have up to 150."""


def match(field: str, pattern: str, name: str) -> re.Match[str] | None:
    """What PEFT's use of `pattern`, an entry of `field`, finds in the name of a module; None where it does not match.

    Raises:
        ConfigError: the pattern is no valid regular expression, or a slow one, or the name is too long for any.
    """
    expression = compile_pattern(field, pattern)
    if len(name) > LONGEST and expressions.REPEAT.search(pattern):
        raise ConfigError(
            f"{field}: the expression {_show(pattern)} is tried on names of at most {LONGEST} letters, found one of"
            f" {len(name)} that begins with {name[:80]!r}; names in a list may be longer"
        )
    return expression.fullmatch(name) if field in _WHOLE else expression.match(name)


@functools.lru_cache(maxsize=4096)
def compile_pattern(field: str, pattern: str) -> re.Pattern[str]:
    """The compiled expression in which PEFT uses `pattern`, an entry of `field` (a key of `TEMPLATES`).

    Python's `re` backtracks: an expression such as "(a+)+b" takes exponential time on a long name. A file that somebody
    else wrote must not stop the program that reads it, so such an expression is an error (see `expressions`).

    Raises:
        ConfigError: the pattern is no valid regular expression, or a slow one.
    """
    try:
        expression = re.compile(TEMPLATES[field].replace("{}", pattern))
        if expressions.is_slow(_alone(pattern, expression)):
            raise ConfigError(
                f"{field}: expected a regular expression that is matched in a few steps, found {_show(pattern)}, which"
                " can take very many: repeats in it match the same letters; write a list of names, or [^.]+ for .*"
            )
        return expression
    except (re.error, OverflowError, RecursionError) as error:
        raise ConfigError(
            f"{field}: expected a regular expression of Python's `re`, found {pattern!r} ({error}); "
            "escape what is meant literally, for example with re.escape"
        ) from error


def _alone(pattern: str, whole: re.Pattern[str]) -> str:
    """The pattern by itself; the whole expression where only that is a valid one."""
    try:
        return re.compile(pattern).pattern
    except re.error:
        return whole.pattern


def is_int(value: object) -> bool:
    """An int that is no bool (True is an int to Python, but not in a configuration)."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """A finite int or float (and no int that is too large for one)."""
    most = sys.float_info.max
    return (is_int(value) or isinstance(value, float)) and -most <= cast("float", value) <= most


def is_strings(value: object) -> bool:
    """A (frozen) list of strings."""
    if not isinstance(value, tuple):
        return False
    return all(isinstance(item, str) for item in cast("tuple[object, ...]", value))


def is_ints(value: object) -> bool:
    """A (frozen) list of ints."""
    return isinstance(value, tuple) and all(is_int(item) for item in cast("tuple[object, ...]", value))


_MOST_LAYERS = 100_000  # layer_replication lists them, one by one


class Problems:
    """What is wrong with one configuration; each field is reported once."""

    def __init__(self) -> None:
        self._lines: dict[str, str] = {}

    def add(self, field: str, expected: str, found: object, way_out: str = "") -> None:
        """Report `field`, unless it has been already (a later finding would only follow from the first)."""
        line = f"{field}: expected {expected}, found {_show(found)}"
        self._lines.setdefault(field, f"{line}; {way_out}" if way_out else line)

    def note(self, field: str, line: str) -> None:
        """Report `field` with a ready line."""
        self._lines.setdefault(field, line)

    def __contains__(self, field: str) -> bool:
        return field in self._lines

    def raise_if_any(self, owner: str) -> None:
        """Raise one ConfigError that lists every problem, if there is one."""
        if self._lines:
            self._raise(owner)

    def _raise(self, owner: str) -> NoReturn:
        lines = list(self._lines.values())
        if len(lines) == 1:
            raise ConfigError(f"{owner}: {lines[0]}")
        raise ConfigError("\n  ".join([f"{owner}: {len(lines)} problems", *lines]))

    # One method for each kind of value; all take the frozen value.

    def common(self, field: str, value: object) -> None:
        """A field that is read of any configuration, whether its class has the field or not."""
        if field in COMMON:
            COMMON[field](self, field, value)

    def flag(self, field: str, value: object, *, optional: bool = False) -> None:
        """true or false."""
        if not (isinstance(value, bool) or (optional and value is None)):
            self.add(field, "true, false or null" if optional else "true or false", value)

    def text(self, field: str, value: object) -> None:
        """A string or null."""
        if value is not None and not isinstance(value, str):
            self.add(field, "a string or null", value)

    def mapping(self, field: str, value: object) -> None:
        """An object or null."""
        if value is not None and not isinstance(value, Mapping):
            self.add(field, "an object or null", value)

    def rank(self, field: str, value: object) -> None:
        """A positive int."""
        if is_int(value) and cast("int", value) > 0:
            return
        whole = isinstance(value, float) and value.is_integer() and value > 0
        self.add(field, "a positive integer", value, f"write {int(cast('float', value))}" if whole else "")

    def number(self, field: str, value: object) -> None:
        """A finite int or float."""
        if not is_number(value):
            self.add(field, "a finite number", value)

    def probability(self, field: str, value: object) -> None:
        """A number in [0, 1)."""
        if not (is_number(value) and 0 <= cast("float", value) < 1):
            self.add(field, "a number in [0, 1)", value)

    def one_of(self, field: str, value: object, known: Collection[str], *, optional: bool = False) -> None:
        """One of a few strings (or null)."""
        if (value is None and optional) or (isinstance(value, str) and value in known):
            return
        names = ", ".join(f'"{name}"' for name in known)
        self.add(field, f"one of {names}{' or null' if optional else ''}", value)

    def strings(self, field: str, value: object) -> None:
        """A list of strings or null; a lone string would be read letter by letter."""
        if value is None or is_strings(value):
            return
        way_out = f"write [{_show(value)}]" if isinstance(value, str) else ""
        self.add(field, "a list of strings or null", value, way_out)

    def integers(self, field: str, value: object) -> None:
        """A list of ints or null."""
        if value is not None and not is_ints(value):
            self.add(field, "a list of integers or null", value)

    def layers(self, field: str, value: object) -> None:
        """An int, a list of ints or null."""
        if not (value is None or is_int(value) or is_ints(value)):
            self.add(field, "an integer, a list of integers, or null", value)

    def selection(self, field: str, value: object) -> None:
        """A regular expression, a list of names, or null."""
        if value is None or is_strings(value):
            return
        if isinstance(value, str):
            self.pattern(field, value)
        else:
            self.add(field, "a regular expression (string), a list of names, or null", value)

    def pattern(self, field: str, value: str) -> None:
        """A regular expression that is valid where PEFT uses it."""
        if re.fullmatch(r"[\w.]*", value):
            return  # a plain name, the usual case, is valid anywhere; compiling hundreds of them takes time
        try:
            compile_pattern(field, value)
        except ConfigError as error:
            self.note(field, str(error))

    def patterns(self, field: str, value: object) -> None:
        """`rank_pattern` or `alpha_pattern`: expressions -> positive ints or finite numbers."""
        if not isinstance(value, Mapping):
            self.add(field, "an object (of patterns)", value, "write {}" if value is None else "")
            return
        for key, item in cast("Mapping[object, Any]", value).items():
            if not isinstance(key, str):
                return  # reported when it could not be frozen
            self.pattern(field, key)
            if field == "rank_pattern":
                self.rank(f"{field}[{key!r}]", item)
            else:
                self.number(f"{field}[{key!r}]", item)

    def expressions(self, field: str, value: object) -> None:
        """A list of regular expressions or null."""
        self.strings(field, value)
        for item in cast("tuple[str, ...]", value or ()) if field not in self else ():
            self.pattern(field, item)

    def expression_or_list(self, field: str, value: object) -> None:
        """A regular expression, a list of them, or null."""
        self.pattern(field, value) if isinstance(value, str) else self.expressions(field, value)

    def pairs(self, field: str, value: object) -> None:
        """A list of [start, end] pairs or null."""
        if value is not None and not (
            isinstance(value, tuple) and all(_is_pair(pair) for pair in cast("tuple[object, ...]", value))
        ):
            self.add(field, "a list of [start, end] pairs, or null", value)
        elif value is not None:
            count = sum(end - start for start, end in cast("tuple[tuple[int, int], ...]", value))
            if count > _MOST_LAYERS:
                self.add(field, f"pairs that make at most {_MOST_LAYERS} layers", count)

    def tokens(self, field: str, value: object) -> None:
        """A list of ints, an object of them by the name of a module, or null."""
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
"""What a value of each field may be, where the class of the configuration has no rule of its own."""


def _is_pair(value: object) -> bool:
    if not is_ints(value) or len(pair := cast("tuple[int, ...]", value)) != 2:
        return False
    return 0 <= pair[0] < pair[1]


def _show(value: object) -> str:
    """A value as JSON would write it, short enough for a message."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}…"
