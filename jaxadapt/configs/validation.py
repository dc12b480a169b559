"""The checks of configuration values; one error lists all problems of a configuration.

A field of a configuration states its own check with its default (`checked`). Other fields have the check of their name,
which is the same in all classes (`COMMON`), or of their default's type.

A slow regular expression is refused before it is used. Python's `re` backtracks: it tries one way to match after the
other, and "(a+)+$" has 2^n ways on n letters. PEFT has the same weakness, but an untrusted file must not stop the
program.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn, TypeVar, cast

from jaxadapt.core.errors import ConfigError

# ---------------------------------------------------------------- regex cost


REPEAT = re.compile(r"[*+?{]")
"""The characters of repeats. An expression without repeats has at most one way to match per alternative."""

_MAX_WAYS = 1e8
_NAME_LENGTH = 256  # letters of a long name
# A letter, an escape, a class, or the beginning of a group, and its repeat.
_PART = re.compile(
    r"(?P<text>\((?:\?(?:P<\w+>|P=\w+\)|<?[=!]|>|[a-zA-Z-]*[:)]))?|\[\^?\]?(?:\\.|[^\\\]])*\]"
    r"|\\(?:x..|u.{4}|U.{8}|N\{[^}]*\}|\d{1,3}|.)|.)(?P<times>(?:[*+?]|\{(?:\d+,?\d*|,\d*)\})?)[?+]?",
    re.DOTALL,
)
_NO_WIDTH = re.compile(r"[\^$]|\\[bBAZ]|\(\?(?:<?[=!]|[a-zA-Z-]+\))")
_REFERENCE = re.compile(r"\\[1-9]|\(\?P=")
_LETTER = re.compile(r"\[?(?:\\(\W)|([^\\]))\]?", re.DOTALL)
_TIMES = {"": (1, 1), "*": (0, sys.maxsize), "+": (1, sys.maxsize), "?": (0, 1)}


def is_slow(expression: str) -> bool:
    """Return True if a valid expression may try more than about 10^8 ways to match a long name.

    This is an estimate. A repeat counts as many ways as it can give back letters to the part that follows it. It counts
    one way if the part that follows begins with a letter that the repeat does not match. An expression with repeats and
    a condition, "(?(1)…)", a comment, "(?#…)", or the flag x counts as slow.

    >>> is_slow(r"(a+)+$"), is_slow(r"(.*a){9}b"), is_slow(r".*\\.layers\\.\\d+\\.(self_attn|mlp)\\..*_proj$")
    (True, True, False)
    """
    if not REPEAT.search(expression):
        return False
    flags = "".join(re.findall(r"\(\?([a-zA-Z]+)", expression))
    if "x" in flags or re.search(r"\(\?[(#]", expression):
        return True
    try:
        return _log_choice(_read_group(_PART.finditer(expression))[0], "", 0, "i" in flags) > math.log(_MAX_WAYS)
    except RecursionError:
        return True


class _Part(NamedTuple):
    """One part of an expression: its text, the alternatives of a group, and the bounds of its repeat."""

    text: str
    branches: Sequence[Sequence[_Part]]
    least: int
    most: int


def _read_group(found: Iterator[re.Match[str]]) -> tuple[list[list[_Part]], str]:
    """Return the alternatives of a group, and its repeat. Groups with one alternative and no repeat are spliced in."""
    branches: list[list[_Part]] = [[]]
    for part in found:
        text, times = part["text"], part["times"]
        if text == ")":
            return branches, times
        if text == "|":
            branches.append([])
            continue
        inner: list[list[_Part]] = []
        if text.startswith("(") and not text.endswith(")"):
            inner, times = _read_group(found)
            if len(inner) == 1 and not times and not _NO_WIDTH.match(text):
                branches[-1] += inner[0]
                continue
        least, comma, most = times[1:-1].partition(",")
        bounds = _TIMES.get(times) or (int(least or 0), int(most or (sys.maxsize if comma else least)))
        branches[-1].append(_Part(text, inner, *bounds))
    return branches, ""


def _log_choice(branches: Sequence[Sequence[_Part]], after: str | None, width: int, caseless: bool) -> float:
    """Return the logarithm of the number of ways to match one of `branches`; see `_log_ways`."""
    ambiguous = caseless or any(b.startswith(a) for a, b in itertools.pairwise(sorted(map(_read_letters, branches))))
    return math.log(len(branches) if ambiguous else 1) + max(
        _log_ways(each, after, width, caseless) for each in branches
    )


def _log_ways(parts: Sequence[_Part], after: str | None, width: int, caseless: bool) -> float:
    """Return the logarithm of the number of ways to match `parts`.

    Args:
        parts: the parts in a row.
        after: the text of the part that follows; "" at the end of the expression, None for several texts.
        width: the number of letters that must follow, up to and including the minimum of the next repeat.
        caseless: True if a letter also matches that of the other case.
    """
    total = 0.0
    for part in reversed(parts):
        begins = _first([part._replace(least=1)])
        inside = (begins, min(map(_min_width, part.branches), default=0)) if part.most > 1 else (after, width)
        inside = ("", 0) if _NO_WIDTH.match(part.text) else inside
        ways = _log_choice(part.branches, *inside, caseless) if part.branches else 0.0
        if part.most > 1 and ways > 0:  # each round has as many ways as the first
            ways = ways * part.most if part.most <= _NAME_LENGTH else math.inf
        if part.least < part.most and _gives_back(part, begins, after, caseless):
            ways += math.log(min(part.most - part.least + 1, _NAME_LENGTH / max(1, width)))
        total += ways
        if not _NO_WIDTH.match(part.text):
            after, width = _first([part]), _min_width([part]) + (width if part.least == part.most == 1 else 0)
    return total


def _gives_back(part: _Part, begins: str | None, after: str | None, caseless: bool) -> bool:
    """Return True if a shorter match of a repeat may succeed after its longest match has failed."""
    if after == "":
        return part.text != "."  # ".*" at the end takes all remaining letters
    letter = _letter(after)
    return caseless or not begins or letter is None or re.fullmatch(begins, letter) is not None


def _first(parts: Sequence[_Part]) -> str | None:
    """Return the text of the part that comes first; "" without parts, None if it is not known or may be left out."""
    for part in (each for each in parts if not _NO_WIDTH.match(each.text)):
        # The text of other escapes, such as a reference to a group, is no expression.
        texts = [_first(branch) for branch in part.branches] or [
            None if re.match(r"\\(?![dDwWsS])\w|\(", part.text) else part.text
        ]
        return "|".join(text or "" for text in texts) if part.least and all(texts) else None
    return ""


def _read_letters(parts: Sequence[_Part]) -> str:
    """Return the letters with which every match begins, as far as they are known."""
    letters = ""
    for part in (each for each in parts if not _NO_WIDTH.match(each.text)):
        letters += _letter(_first([part])) or ""
        if part.branches or (part.least, part.most) != (1, 1) or _letter(part.text) is None:
            break
    return letters


def _letter(text: str | None) -> str | None:
    """Return the letter that the text of a part matches; None if there are several."""
    found = None if text is None or text == "." else _LETTER.fullmatch(text)
    return None if found is None else found[1] or found[2]


def _min_width(parts: Sequence[_Part]) -> int:
    """Return the number of letters that parts match at least, up to and including the minimum of the first repeat."""
    total = 0
    for part in (each for each in parts if not _NO_WIDTH.match(each.text)):
        # The group of a reference may be empty.
        total += part.least * min(map(_min_width, part.branches), default=not _REFERENCE.match(part.text))
        if (part.least, part.most) != (1, 1):
            break
    return total


# ---------------------------------------------------------------- peft type


# Keys of mlx-lm's file of the same name. PEFT has only `num_layers` among them; it is read only without a peft_type.
_MLX = ("lora_parameters", "fine_tune_type", "lora_layers", "adapter_path", "grad_checkpoint", "num_layers")


def read_peft_type(values: object, source: str) -> str:
    """Return the `peft_type` of a JSON object; raise `ConfigError` if it is not a PEFT configuration."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{source}: expected a JSON object, found {json_kind(values)}")
    values = cast("Mapping[str, Any]", values)
    if "peft_type" not in values:
        _refuse_untyped(values, source)
    name: object = values["peft_type"]
    if not isinstance(name, str):
        raise ConfigError(f'{source}: peft_type: expected a string, found {json_kind(name)}; write for example "LORA"')
    name = str.__str__(name)
    if re.fullmatch("[A-Z][A-Z0-9_]*", name):
        return name
    # PEFT refuses "lora", "PeftType.LORA" and "prefix-tuning" too; the error names the valid spelling.
    corrected = re.sub("[^A-Z0-9]+", "_", name.removeprefix("PeftType.").upper()).strip("_")
    way_out = f'write "{corrected}"' if re.fullmatch("[A-Z][A-Z0-9_]*", corrected) else 'write for example "LORA"'
    raise ConfigError(f"{source}: peft_type: expected a type in capitals, found {name!r}; {way_out}")


def mlx_keys(values: Mapping[str, Any]) -> list[str]:
    """Return the keys that show a configuration of mlx-lm; none for PEFT's.

    >>> mlx_keys({"num_layers": 4, "iters": 10}), mlx_keys({"num_layers": 4, "peft_type": "P_TUNING"})
    (['num_layers'], [])
    """
    return [] if "peft_type" in values else [key for key in _MLX if key in values]


def _refuse_untyped(values: Mapping[str, Any], source: str) -> NoReturn:
    """Raise `ConfigError` for values without a `peft_type`, with a suggestion by their keys."""
    mlx = mlx_keys(values)
    if mlx:
        raise ConfigError(
            f"{source}: expected PEFT's schema, found an mlx-lm file (no peft_type, but {', '.join(mlx)}), whose"
            " tensors have other names and layouts; `jaxadapt convert FOLDER OUT` reads mlx-lm's folder (with"
            " adapters.safetensors) and writes PEFT's"
        )
    keys = ", ".join(sorted(values)[:12]) or "no key at all"
    if "lora_alpha" in values or "lora_dropout" in values:
        way_out = 'if this is a LoRA configuration, add "peft_type": "LORA"'
    elif "init_ia3_weights" in values or "feedforward_modules" in values:
        way_out = 'if this is an IA3 configuration, add "peft_type": "IA3"'
    else:
        way_out = "this does not look like a PEFT configuration"
    raise ConfigError(f"{source}: expected a peft_type, found none (keys: {keys}); {way_out}")


def json_kind(value: object) -> str:
    """Return the JSON kind of a value, with its article, for messages."""
    kinds: dict[type, str] = {
        type(None): "null",
        bool: "a boolean",
        int: "a number",
        float: "a number",
        str: "a string",
        list: "a list",
    }
    return kinds.get(type(value), "an object" if isinstance(value, Mapping) else type(value).__name__)


# ---------------------------------------------------------------- validation


_T = TypeVar("_T")

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
    **dict.fromkeys(("block_size_pattern", "lambda_pattern", "n_frequency_pattern"), r"(.*\.)?({})$"),
}
TASK_TYPES = ("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")

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
            f"{field}: cannot match the expression {_show(pattern)} with a name of {len(name)} characters, which begins"
            f" with {name[:80]!r}: the limit is {LONGEST}; list plain names instead, which may be longer"
        )
    return expression.fullmatch(name) if field in _FULL_MATCH else expression.match(name)


MAX_EXPRESSIONS = 2048
"""The largest number of expressions in one configuration. Plain names are looked up, expressions tried one by one."""


@functools.lru_cache(maxsize=2 * MAX_EXPRESSIONS)  # a check and a `PatternIndex` may embed one pattern differently
def compile_pattern(field: str, pattern: str) -> re.Pattern[str]:
    """Compile the expression in which PEFT embeds `pattern`, an entry of `field` (a key of `TEMPLATES`).

    Python's `re` backtracks: an expression such as "(a+)+b" takes exponential time on a long name. An untrusted file
    must not stop the program that reads it, so such an expression is an error (see `is_slow`).

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
    return isinstance(value, tuple) and all(isinstance(item, str) for item in cast("tuple[object, ...]", value))


def is_ints(value: object) -> bool:
    """Return True for a tuple (a frozen list) of ints."""
    return isinstance(value, tuple) and all(is_int(item) for item in cast("tuple[object, ...]", value))


_MAX_LAYERS = 100_000  # layer_replication is expanded to a list of layers


class Problems:
    """The problems of one configuration, at most one per field."""

    def __init__(self) -> None:
        self._lines: dict[str, str] = {}
        self._expressions = 0

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
            lines = list(self._lines.values())
            listed = "\n  ".join([f"{len(lines)} problems", *lines])
            raise ConfigError(f"{owner}: {lines[0] if len(lines) == 1 else listed}")

    def pattern(self, field: str, value: str) -> None:
        """Check that a pattern is a valid regular expression where PEFT uses it."""
        if re.fullmatch(r"[\w.]*", value) and field != "layers_pattern":
            return  # a plain name is always valid, and compiling hundreds of them takes time
        self._expressions += 1
        if self._expressions > MAX_EXPRESSIONS:
            self.note(
                field,
                f"{field}: expected at most {MAX_EXPRESSIONS} regular expressions in one configuration, found more;"
                " write plain names, which are looked up",
            )
            return
        try:
            compile_pattern(field, value)
        except ConfigError as error:
            self.note(field, str(error))


Check = Callable[[Problems, str, Any], None]
"""A function that adds a problem if the value of a field is of another kind than the function's."""


def expects(expected: str, accepts: Callable[[Any], bool], way_out: Callable[[Any], str] = lambda _: "") -> Check:
    """Return the check for values that a predicate accepts; `way_out` returns the advice for a wrong value."""

    def check(problems: Problems, field: str, value: Any) -> None:
        if not accepts(value):
            problems.add(field, expected, value, way_out(value))

    return check


def one_of(*known: str | bool | None, optional: bool = False) -> Check:
    """Return the check for values that must be one of a few strings and booleans, or null if `optional`."""
    values = (*known, None) if optional else known
    *others, last = (json.dumps(value) for value in values)
    listed = ", ".join(others)
    if isinstance(known[0], bool):
        expected = f"{listed} or {last}"
    else:
        expected = f"one of {listed}{' or ' if optional else ', '}{last}"
    return expects(expected, lambda x: any(x is value or (isinstance(x, str) and x == value) for value in values))


def flag_or_text(expected: str, pattern: str) -> Check:
    """Return the check for values that must be booleans, or strings that match a regular expression in full."""
    return expects(
        expected, lambda x: isinstance(x, bool) or (isinstance(x, str) and re.fullmatch(pattern, x) is not None)
    )


def all_of(*checks: Check) -> Check:
    """Return the check that makes these checks in turn, up to the first problem of the field."""

    def check(problems: Problems, field: str, value: Any) -> None:
        for each in checks:
            if field not in problems:
                each(problems, field, value)

    return check


def patterns(item_check: Check) -> Check:
    """Return the check for an object {expression: value} whose values have their own check."""

    def check(problems: Problems, field: str, value: Any) -> None:
        if not isinstance(value, Mapping):
            problems.add(field, "an object (of patterns)", value, "write {}" if value is None else "")
            return
        for key, item in cast("Mapping[object, Any]", value).items():
            if isinstance(key, str):  # freezing has reported other keys
                problems.pattern(field, key)
                item_check(problems, f"{field}[{key!r}]", item)

    return check


def _valid_expressions(problems: Problems, field: str, value: Any) -> None:
    """Check the expression, or each expression of a list."""
    for item in (value,) if isinstance(value, str) else value or ():
        problems.pattern(field, item)


def _selection(problems: Problems, field: str, value: Any) -> None:
    """Check a value that must be a regular expression, a list of names, or null."""
    if isinstance(value, str):
        problems.pattern(field, value)
    elif value is not None and not is_strings(value):
        problems.add(field, "a regular expression (string), a list of names, or null", value)


def _layer_pairs(problems: Problems, field: str, value: Any) -> None:
    """Check a value that must be a list of [start, end] pairs or null."""
    if value is not None and not (isinstance(value, tuple) and all(map(_is_pair, cast("tuple[object, ...]", value)))):
        problems.add(field, "a list of [start, end] pairs, or null", value)
    elif (count := sum(end - start for start, end in value or ())) > _MAX_LAYERS:
        problems.add(field, f"pairs that make at most {_MAX_LAYERS} layers", count)


def _is_pair(value: object) -> bool:
    """Return True for two ints with 0 <= start < end."""
    pair = cast("tuple[int, ...]", value)
    return is_ints(value) and len(pair) == 2 and 0 <= pair[0] < pair[1]


TEXT = expects("a string or null", lambda x: isinstance(x, str | None))
OBJECT = expects("an object or null", lambda x: x is None or isinstance(x, Mapping))
NUMBER = expects("a finite number", is_number)
RANK = expects(
    "a positive integer",
    lambda x: is_int(x) and x > 0,
    lambda x: f"write {int(x)}" if isinstance(x, float) and x.is_integer() and x > 0 else "",
)
SIZE = expects("an integer of at least 0", lambda x: is_int(x) and x >= 0)
INTEGER = expects("an integer or null", lambda x: x is None or is_int(x))
POSITIVE = expects("a positive number", lambda x: is_number(x) and x > 0)
PROBABILITY = expects("a number in [0, 1)", lambda x: is_number(x) and 0 <= x < 1)
RANKS = patterns(RANK)
NUMBERS = patterns(NUMBER)
ANY: Check = lambda problems, field, value: None  # noqa: E731 (the configuration's own check follows)
_strings = expects(  # a single string would be read letter by letter
    "a list of strings or null",
    lambda x: x is None or is_strings(x),
    lambda x: f"write [{_show(x)}]" if isinstance(x, str) else "",
)

COMMON: Mapping[str, Check] = {
    **dict.fromkeys(("target_modules", "exclude_modules", "feedforward_modules"), _selection),
    "modules_to_save": all_of(_strings, _valid_expressions),
    "target_parameters": _strings,
    "layers_to_transform": expects(
        "an integer, a list of integers, or null", lambda x: x is None or is_int(x) or is_ints(x)
    ),
    "layers_pattern": all_of(
        expects("a list of strings or null", lambda x: isinstance(x, str | None) or is_strings(x)), _valid_expressions
    ),
    "layer_replication": _layer_pairs,
    "trainable_token_indices": expects(
        "a list of integers, an object of module name -> list of integers, or null",
        lambda x: x is None or is_ints(x) or (isinstance(x, Mapping) and all(map(is_ints, cast("Any", x).values()))),
    ),
    "alora_invocation_tokens": expects("a list of integers or null", lambda x: x is None or is_ints(x)),
    "rank_pattern": OBJECT,  # AdaLoRA's values are lists
    "alpha_pattern": OBJECT,
    "bias": TEXT,
}
"""The checks of the fields that are read from any configuration, also one of a class without these fields."""

_BY_DEFAULT: Mapping[type, Check] = {
    bool: expects("true or false", lambda x: isinstance(x, bool)),
    int: expects("an integer", is_int),
    float: NUMBER,
    str: expects("a string", lambda x: isinstance(x, str)),
}


def checked(check: Check, default: _T, *, compare: bool = True, null: bool = False) -> _T:
    """Return a field of a configuration with a check of its own.

    Null is valid if it is the default. With `null=True` it is valid in a file, and `Config.from_dict` replaces it.
    """
    return cast("Any", dataclasses.field(default=default, compare=compare, metadata={"check": check, "null": null}))


class Rule(NamedTuple):
    """A condition on several fields of a configuration.

    Attributes:
        field: the field that the message names.
        expected: the valid values of the field, a text or a function of the configuration that returns the text.
        broken: returns a true value for a configuration that breaks the rule.
        way_out: the advice.
        reads: other fields. The rule is not checked if the field or one of them has a problem of its own.
        found: returns the value to show; None for the value of the field.
    """

    field: str
    expected: str | Callable[[Any], str]
    broken: Callable[[Any], object]
    way_out: str = ""
    reads: tuple[str, ...] = ()
    found: Callable[[Any], object] | None = None


LAYERS_FOR_PATTERN = Rule(
    "layers_pattern",
    "null if layers_to_transform is null",
    lambda c: c.get("layers_pattern") and c.get("layers_to_transform") is None,
    "set layers_to_transform, or remove the pattern",
)
NO_LAYERS_WITH_EXPRESSION = tuple(
    Rule(
        name,
        "null if target_modules is a string",
        lambda c, name=name: isinstance(c.target_modules, str) and getattr(c, name) is not None,
        "write the layers into the expression, or make target_modules a list",
    )
    for name in ("layers_to_transform", "layers_pattern")
)
"""The rules of a class whose fields of layers may not go with a `target_modules` that is an expression."""


@functools.cache
def _rules_of(cls: type[Any]) -> tuple[Rule, ...]:
    """Return the rules of a configuration's class, those of its bases first."""
    return tuple(rule for base in reversed(cls.__mro__) for rule in vars(base).get("_rules", ()))


def check_rules(problems: Problems, config: Any) -> None:
    """Add the problems of a configuration that breaks rules of its class."""
    for rule in _rules_of(type(config)):
        if not any(name in problems for name in (rule.field, *rule.reads)) and rule.broken(config):
            expected = rule.expected if isinstance(rule.expected, str) else rule.expected(config)
            found = config.get(rule.field) if rule.found is None else rule.found(config)
            problems.add(rule.field, expected, found, rule.way_out)


@functools.cache
def _checks_of(cls: type[Any]) -> tuple[tuple[str, Check, bool], ...]:
    """Return for each field of a class its name, its check and if null is valid without a check.

    The check is the field's own, or that of its name or of its default.
    """
    found = [
        (item.name, item.metadata.get("check") or COMMON.get(item.name) or _BY_DEFAULT.get(type(item.default)), item)
        for item in dataclasses.fields(cls)
        if item.name not in ("peft_type", "extra")
    ]
    return tuple((name, check, item.default is None) for name, check, item in found if check is not None)


def check_fields(problems: Problems, config: Any) -> None:
    """Add the problems of single fields of a configuration."""
    for name, check, optional in _checks_of(type(config)):
        value = getattr(config, name)
        if value is not None or not optional:
            check(problems, name, value)


def _show(value: object) -> str:
    """Return a value as JSON writes it, cut to 200 characters for a message."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}…"
