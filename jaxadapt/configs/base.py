"""Configurations: the base classes, `GenericConfig` for methods without a class of their own, and their text.

`Config` holds the values of an `adapter_config.json`; `loads` reads the text, and `Config.to_json` writes it.
`Change` is the size of the change that an adapter makes to a weight; NumPy is imported where it is used. The last base
classes have the fields that several methods have, described and checked once.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import cache, cached_property
from typing import Any, ClassVar, NoReturn, Self, TypeVar, cast

from jaxadapt.configs.frozen import FrozenDict, PatternIndex, Patterns, find_pattern_value, freeze, thaw
from jaxadapt.configs.table import FACTS
from jaxadapt.configs.validation import (
    COMMON,
    LAYERS_FOR_PATTERN,
    OBJECT,
    RANK,
    RANKS,
    TASK_TYPES,
    TEXT,
    Problems,
    Rule,
    check_fields,
    check_rules,
    checked,
    one_of,
    read_peft_type,
)
from jaxadapt.core.errors import ConfigError, raise_as, repeated
from jaxadapt.core.lazy import np

# ---------------------------------------------------------------- change


@dataclasses.dataclass(frozen=True)
class Change:
    """The size of the change that an adapter makes to one weight.

    Attributes:
        norm: the norm, as `describe_change` of the method describes it.
        effective_rank: exp of the entropy of the change's normalized singular values; None if it has none.
        rank: the rank r, if the method has one.
        scale: the scale s, if the method has one.
    """

    norm: float
    effective_rank: float | None = None
    rank: int | None = None
    scale: float | None = None


def effective_rank(s: np.ndarray[Any, Any]) -> float:
    """Return exp of the entropy of normalized singular values (Roy and Vetterli 2007); 0 if all are 0.

    >>> import numpy as np
    >>> effective_rank(np.array([2.0, 2.0, 0.0]))
    2.0
    """
    p = s[s > 0] / max(s.sum(), np.finfo(s.dtype).tiny)
    return float(np.exp(-(p * np.log(p)).sum())) if p.size else 0.0


def change_of_matrix(delta: np.ndarray[Any, Any], rank: int | None = None) -> Change:
    """Return the Frobenius norm and the effective rank of a change (out, in), in float64."""
    if not np.isfinite(delta).all():  # a diverged run, on which decompositions fail
        return Change(math.nan, None, rank)
    s = np.linalg.svd(delta, compute_uv=False)
    return Change(float(np.sqrt((s**2).sum())), effective_rank(np.where(s > 1e-12 * s.max(), s, 0.0)), rank)


# ---------------------------------------------------------------- base


_T = TypeVar("_T")

# The version of PEFT whose schema this package writes: the default of `peft_version`.
PEFT_VERSION = "0.21.2"


def release_of(version: str | None) -> tuple[int, ...]:
    """Return the numbers of a version, to compare with others; none if it is not stated or does not begin with one.

    >>> release_of("0.18.0.dev0"), release_of(None)
    ((0, 18, 0), ())
    """
    found = re.match(r"v?(\d{1,9}(\.\d{1,9})*)", version or "")
    return tuple(map(int, found[1].split("."))) if found else ()


# Lists whose order has no meaning (PEFT turns them into sets). They are kept as given and compared as sets.
_UNORDERED = frozenset({"target_modules", "exclude_modules", "feedforward_modules"})


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Config:
    """The fields that every PEFT configuration has. Deeply immutable, hashable and picklable.

    Two configurations are equal if they define the same computation. The fields that only describe the adapter
    (`task_type`, `auto_mapping`, `peft_version`, `base_model_name_or_path`, `revision`, `inference_mode`) and the order
    of `target_modules` take no part in equality and hash, so a change of them does not retrace a jitted function.

    Attributes:
        task_type: the task of the model, one of `TASK_TYPES` or None. A new adapter for "SEQ_CLS", "TOKEN_CLS" or
            "QUESTION_ANS" also trains the head of the task, where the model has one (as in PEFT).
        peft_type: the method in capitals, such as "LORA". A class for one method sets it.
        auto_mapping: PEFT's record of the base model's class, an object or None. Kept in the file but not applied.
        peft_version: the version of PEFT whose schema the file follows. None if a file does not state it.
        base_model_name_or_path: the Hub name or path of the base model, or None.
        revision: the Hub revision of the base model, or None.
        inference_mode: PEFT's flag for an adapter that is not trained. Saved files have true, as PEFT writes them;
            jaxadapt does not read it.
        extra: every key that the class does not know (from older, newer or forked versions). `to_dict` writes these
            keys beside the fields.

    >>> import jaxadapt
    >>> config = jaxadapt.LoraConfig(r=4, target_modules=["q_proj"])
    >>> isinstance(config, Config), config.replace(r=2) == config, config.to_dict()["lora_alpha"]
    (True, False, 8)
    """

    task_type: str | None = checked(one_of(*TASK_TYPES, optional=True), None, compare=False)
    peft_type: str = ""
    auto_mapping: Mapping[str, Any] | None = checked(OBJECT, None, compare=False)
    peft_version: str | None = checked(TEXT, PEFT_VERSION, compare=False)
    base_model_name_or_path: str | None = checked(TEXT, None, compare=False)
    revision: str | None = checked(TEXT, None, compare=False)
    inference_mode: bool = dataclasses.field(default=False, compare=False)
    extra: Mapping[str, Any] = dataclasses.field(default_factory=FrozenDict)

    # {peft_type: class} of every loaded subclass for one type, the default of its field `peft_type`. `class_of` loads
    # those of the table.
    classes: ClassVar[dict[str, type[Config]]] = {}

    # {name of a field in another library: name of the field here}.
    _spellings: ClassVar[Mapping[str, str]] = {}

    # The fields whose patterns keep their order: the first pattern that matches applies.
    _ordered_patterns: ClassVar[tuple[str, ...]] = ()

    # The conditions on several fields. A subclass states those that it adds.
    _rules: ClassVar[tuple[Rule, ...]] = ()

    def __init_subclass__(cls, peft_type: str = "") -> None:
        """Register the class for its type; the keyword states the default of the field `peft_type`."""
        super().__init_subclass__()
        if peft_type:
            cls.__annotations__["peft_type"] = "str"
            cls.peft_type = peft_type
        if cls.peft_type:
            Config.classes[cls.peft_type] = cls

    def __new__(cls, *args: object, **values: object) -> Self:
        """Raise `ConfigError` with a suggestion for an unknown keyword; `__init__` would raise TypeError."""
        names = _defaults(cls)
        if args:
            first = "target_modules" if "target_modules" in names else "peft_type"
            raise ConfigError(
                f"{cls.__name__} takes keyword arguments only; write for example {cls.__name__}({first}=…)"
            )
        if unknown := sorted(set(values) - set(names)):
            raise ConfigError("\n".join(cls._unknown(name) for name in unknown))
        return super().__new__(cls)

    @classmethod
    def _unknown(cls, name: str) -> str:
        import difflib  # only errors use it

        similar = cls._spellings.get(name) or " or ".join(difflib.get_close_matches(name, _defaults(cls), 2))
        return f"{cls.__name__} has no field {name!r}; " + (
            f"it is called {similar}"
            if similar
            else f"its fields are {', '.join(_defaults(cls))}; pass a key of another version in extra={{…}}"
        )

    def __post_init__(self) -> None:
        if type(self) is Config:
            raise ConfigError("Config is a base class; use LoraConfig, IA3Config or GenericConfig")
        self._keep(_defaults(type(self)))

    def _keep(self, names: Iterable[str]) -> None:
        """Freeze the values of these fields, and check all fields."""
        problems = Problems()
        for name in names:
            try:
                value = getattr(self, name)
                ordered = name in self._ordered_patterns and isinstance(value, Mapping)
                object.__setattr__(self, name, Patterns(value) if ordered else freeze(value))
            except TypeError as error:
                problems.note(name, f"{name}: {error}")
            except RecursionError:
                problems.note(name, f"{name}: the value is nested too deeply; expected a few levels")
                problems.raise_if_any(type(self).__name__)
        self._check(problems)
        check_rules(problems, self)
        problems.raise_if_any(type(self).__name__)

    def _check(self, problems: Problems) -> None:
        """Add the problems of single fields to `problems`; subclasses extend it."""
        own = type(self).peft_type
        if own and self.peft_type != own:
            problems.add("peft_type", f'"{own}"', self.peft_type, "use jaxadapt.Config.from_dict to read any type")
        check_fields(problems, self)
        if not isinstance(self.extra, FrozenDict):
            problems.add("extra", "an object of unknown keys", self.extra)
            object.__setattr__(self, "extra", FrozenDict())  # for the rules; the problem is raised after them
        for key in sorted(set(self.extra) & _defaults(type(self)).keys() - {"extra"}):
            problems.add(f"extra[{key!r}]", f"no key that is a field of {type(self).__name__}", self.extra[key])
        for key in sorted(set(self.extra) & COMMON.keys()):  # read from any configuration, also without the field
            COMMON[key](problems, key, self.extra[key])

    @cached_property
    def _lookup_cache(self) -> dict[tuple[str, str], Any]:
        return {}

    def _cached(self, kind: str, key: str, make: Callable[[tuple[Any, ...]], _T]) -> _T:
        """Return a value made of a list field; cached, because thousands of modules may be looked up in it."""
        if (kind, key) not in self._lookup_cache:
            self._lookup_cache[kind, key] = make(cast("tuple[Any, ...]", self.get(key) or ()))
        return self._lookup_cache[kind, key]

    def names(self, key: str) -> frozenset[Any]:
        """Return the entries of a list field as a set; cached."""
        return self._cached("names", key, frozenset)

    def sizes(self, key: str) -> frozenset[int]:
        """Return the lengths of the names in a list field; cached."""
        return self._cached("sizes", key, lambda names: frozenset(map(len, names)))

    def index(self, key: str) -> PatternIndex:
        """Return an index of the patterns in a list field; cached. Raises `ConfigError` for an invalid expression."""
        return self._cached("index", key, lambda patterns: PatternIndex(key, patterns))

    @cached_property
    def _identity(self) -> FrozenDict:
        """The values that equality and hash compare. No key of `extra` is a field."""
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(self) if item.compare}
        values |= values.pop("extra")
        return FrozenDict(
            {key: frozenset(x) if key in _UNORDERED and isinstance(x, tuple) else x for key, x in values.items()}
        )

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, Config):
            return NotImplemented
        return type(self) is type(other) and self._identity == other._identity

    def __hash__(self) -> int:
        return hash((type(self).__name__, self._identity))

    def __repr__(self) -> str:
        """Return the fields that differ from their defaults, as a constructor call.

        >>> GenericConfig(peft_type="XLORA", extra={"xlora_depth": 1})
        GenericConfig(peft_type='XLORA', extra={'xlora_depth': 1})
        """
        changed = [
            f"{name}={thaw(getattr(self, name))!r}"
            for name, default in _defaults(type(self)).items()
            if getattr(self, name) != default
        ]
        return f"{type(self).__name__}({', '.join(changed)})"

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _defaults(type(self))}

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: object) -> Self:
        return self

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value of a field or of a key in `extra`; `default` if there is no such key.

        >>> GenericConfig(peft_type="XLORA", extra={"xlora_depth": 2}).get("xlora_depth")
        2
        """
        if key != "extra" and key in _defaults(type(self)):
            return getattr(self, key)
        return self.extra.get(key, default)

    def replace(self, **changes: Any) -> Self:
        """Return a checked copy with other values. To change a key that is not a field, replace `extra`.

        Raises:
            ConfigError: a name is no field, or a value is invalid.
        """
        unknown = sorted(changes.keys() - _defaults(type(self)).keys())
        if unknown:
            raise ConfigError("\n".join(self._unknown(name) for name in unknown))
        new = object.__new__(type(self))
        for name in _defaults(type(self)):  # all but the cached properties
            object.__setattr__(new, name, changes[name] if name in changes else getattr(self, name))
        new._keep(changes)
        return new

    def with_targets(self, targets: Sequence[str]) -> Self:
        """Return the configuration with other targets, which select the same modules."""
        return self.with_value("target_modules", targets)

    def with_value(self, key: str, value: Any) -> Self:
        """Return the configuration with another value of a field, or of a key in `extra`."""
        return self.replace(**({"extra": {**self.extra, key: value}} if key in self.extra else {key: value}))

    def shown_fields(self) -> dict[str, Any]:
        """Return the fields of the method that describe an adapter: its main fields, and those that are not default.

        The targets, the task and the origin of the adapter are not among them.

        >>> class_of("LORA")(r=4, target_modules=["q"], use_dora=True).shown_fields()
        {'r': 4, 'lora_alpha': 8, 'use_dora': True}
        """
        plain, main = thaw(_defaults(type(self))), FACTS[self.peft_type].main_fields
        hidden = {*_defaults(Config), "target_modules"}
        values = thaw({name: getattr(self, name) for name in plain} | {**self.extra})
        return {
            name: value
            for name, value in values.items()
            if name not in hidden
            and value not in (None, [], {})
            and ((value and name in main) or value != plain.get(name, False))
        }

    def differences(self, other: Config, theirs: str = "in the file") -> str:
        """Describe the keys that make the configurations unequal, with the values of `self` and of `other`."""
        x, y = self.to_dict(), other.to_dict()
        ignored = {f.name for f in dataclasses.fields(self) if not f.compare}
        return ", ".join(
            f"{key} ({x.get(key)!r} attached, {y.get(key)!r} {theirs})"
            for key in self.changed_keys(other)
            if key not in ignored
        )

    def changed_keys(self, other: Config) -> list[str]:
        """Return the keys whose values differ, sorted."""
        x, y = (
            {key: list(value.items()) if isinstance(value, dict) else value for key, value in config.to_dict().items()}
            for config in (self, other)
        )
        return [key for key in sorted(x | y) if x.get(key) != y.get(key)]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values under the keys of `adapter_config.json`, in its order."""
        known = {name: getattr(self, name) for name in _defaults(type(self)) if name != "extra"}
        return dict(sorted(thaw({**known, **self.extra}).items()))

    def to_json(self) -> str:
        """Return the text of `adapter_config.json` as PEFT writes it: indent 2, sorted keys, no final newline.

        `rank_pattern` and `alpha_pattern` keep their order if two patterns may match one module, because the first
        match applies. PEFT sorts them, so its file may state another rank than its tensors have.
        """
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = "configuration") -> Self:
        """Return the configuration that the values of an `adapter_config.json` describe.

        Called on `Config`, it selects the class by `peft_type`. Absent keys get PEFT's defaults, except
        `peft_version`, which becomes None. A null becomes what PEFT computes with: false for a boolean, and the
        default of a field that PEFT does not use to load an adapter.

        Args:
            values: the JSON object; unknown keys are kept in `extra`.
            source: the name of the configuration in errors, such as its file name.

        Raises:
            ConfigError: the values are invalid; one error lists all problems.

        >>> GenericConfig.from_dict({"peft_type": "XLORA", "xlora_depth": 1}).extra
        FrozenDict({'xlora_depth': 1})
        """
        if cls is Config:
            return cast("Self", (class_of(read_peft_type(values, source)) or GenericConfig).from_dict(values, source))
        names = _defaults(cls).keys() - {"extra"}
        known: dict[str, Any] = {
            "peft_version": None,
            **{key: _nulls(cls).get(key) if x is None else x for key, x in values.items() if key in names},
        }
        extra = {key: value for key, value in values.items() if key not in names}
        with raise_as(ConfigError, source, ConfigError):
            return cls(**known, extra=extra)


def class_of(peft_type: str) -> type[Config] | None:
    """Return the configuration class of a type, or None if it has no class of its own.

    >>> class_of("IA3").__name__, class_of("XLORA")
    ('IA3Config', None)
    """
    if peft_type not in Config.classes and (module := FACTS[peft_type].module):
        importlib.import_module(f"{__package__}.{module}")
    return Config.classes.get(peft_type)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class GenericConfig(Config):
    """The configuration of a method without a class of its own; `extra` keeps the keys of the method.

    >>> GenericConfig(peft_type="XLORA", extra={"xlora_depth": 1}).get("xlora_depth")
    1
    """

    _rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "peft_type",
            'a type in capitals, such as "XLORA"',
            lambda c: not (isinstance(c.peft_type, str) and re.fullmatch("[A-Z][A-Z0-9_]*", c.peft_type)),
        ),
        Rule(
            "peft_type",
            "a type without a class of its own",
            lambda c: class_of(c.peft_type) is not None,
            "use its class",
        ),
    )


@cache
def _defaults(cls: type[Config]) -> Mapping[str, Any]:
    """Return `{field: its default}` of a class."""
    return {
        item.name: item.default if item.default_factory is dataclasses.MISSING else item.default_factory()
        for item in dataclasses.fields(cls)
    }


@cache
def _nulls(cls: type[Config]) -> Mapping[str, Any]:
    """Return `{field: the value that null in a file stands for}`, where that is not None."""
    return {
        item.name: False if isinstance(item.default, bool) else _defaults(cls)[item.name]
        for item in dataclasses.fields(cls)
        if item.metadata.get("null", isinstance(item.default, bool))
    }


# ---------------------------------------------------------------- fields of several methods


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class MethodConfig(Config):
    """A configuration of a method.

    Fields that several methods have (`target_modules`, `modules_to_save`, `layers_pattern`, …) have the same check
    everywhere. A field whose default is a boolean, an integer, a number or a string takes only such values. Another
    check is stated with the default: `checked(RANK, 8)` for a positive integer, `SIZE` (an integer of at least 0),
    `INTEGER` (also null), `NUMBER`, `PROBABILITY`, `TEXT`, `OBJECT`, `RANKS` and `NUMBERS` (objects of patterns with
    such values), `one_of(…)` of the possible values, or `ANY`. A condition on several fields is a `Rule` in `_rules`.
    """

    _rules: ClassVar[tuple[Rule, ...]] = (LAYERS_FOR_PATTERN,)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class TargetsConfig(MethodConfig):
    """A configuration that selects modules; its fields are as in `LoraConfig`."""

    target_modules: str | Collection[str] | None = None
    modules_to_save: Collection[str] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class LayersConfig(TargetsConfig):
    """A configuration that selects modules of some layers; its fields are as in `LoraConfig`."""

    layers_to_transform: int | Collection[int] | None = None
    layers_pattern: str | Collection[str] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class BiasConfig(MethodConfig):
    """A configuration whose biases may be trained; `bias` is as in `LoraConfig`, with a last value of its own.

    A subclass states that value as `bias=`.
    """

    bias: str = "none"

    def __init_subclass__(cls, peft_type: str = "", bias: str = "") -> None:
        super().__init_subclass__(peft_type)
        if bias:
            cls.__annotations__["bias"] = "str"
            cls.bias = checked(one_of("none", "all", bias), "none")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class ExcludesConfig(LayersConfig):
    """A configuration that leaves out some of the selected modules, as in `LoraConfig`."""

    exclude_modules: str | Collection[str] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class InitConfig(MethodConfig):
    """A configuration of a method whose new adapter may change the weight or not.

    Attributes:
        init_weights: true starts without a change of the weight, unless the class states another meaning.
    """

    init_weights: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class LinearConfig(InitConfig, LayersConfig):
    """A configuration of a method for linear layers; `fan_in_fan_out` is as in `LoraConfig`."""

    fan_in_fan_out: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class RanksConfig(ExcludesConfig):
    """A configuration whose modules may have ranks of their own; its fields are as in `LoraConfig`."""

    r: int = checked(RANK, 8)
    rank_pattern: Mapping[str, int] = checked(RANKS, FrozenDict())

    def rank_of(self, module: str) -> int:
        """Return the rank of one PyTorch module."""
        return find_pattern_value(self.rank_pattern, module, self.r)


# ---------------------------------------------------------------- serialization


def loads(text: str | bytes, source: str = "adapter_config.json") -> Config:
    """Return the configuration that the text of an `adapter_config.json` describes.

    The class is `LoraConfig` or `IA3Config` for their types, and `GenericConfig` for any other type. Numbers keep
    their kind (8.0 stays a float), and `extra` keeps unknown keys.

    Args:
        text: the content of the file; bytes are UTF-8.
        source: the file name in errors.

    Raises:
        ConfigError: the text is not a JSON object, has a key twice or NaN, belongs to another library, has no valid
            `peft_type`, or has invalid values.

    >>> loads('{"peft_type": "LORA", "r": 4, "target_modules": ["q"]}').r
    4
    >>> loads('{"peft_type": "lora"}', "old.json")
    Traceback (most recent call last):
    ...
    jaxadapt.core.errors.ConfigError: old.json: peft_type: expected a type in capitals, found 'lora'; write "LORA"
    """
    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(f"{source}: expected JSON in UTF-8, found an invalid byte at {error.start}") from error
    if text.startswith("version https://git-lfs"):
        raise ConfigError(
            f"{source}: expected JSON, found a Git LFS pointer; fetch the file itself with `git lfs pull`"
        )
    try:
        values: object = json.loads(text, object_pairs_hook=unique_keys, parse_constant=_constant)
    except json.JSONDecodeError as error:
        place = f"{error.msg} at line {error.lineno}, column {error.colno}"
        raise ConfigError(f"{source}: expected JSON, found invalid text: {place}") from error
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None
    except RecursionError as error:
        raise ConfigError(f"{source}: expected a configuration, found JSON nested too deeply") from error
    except ValueError as error:  # an integer with more digits than Python converts
        raise ConfigError(f"{source}: expected a configuration, found invalid JSON: {error}") from error
    return Config.from_dict(cast("Mapping[str, Any]", values), source)


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the object of a JSON text. Raises `ConfigError` if it has a key twice."""
    values = dict(pairs)
    if len(values) < len(pairs):
        twice = ", ".join(repeated(key for key, _ in pairs))
        raise ConfigError(f"expected every key once, found twice: {twice}; keep one")
    return values


def _constant(name: str) -> NoReturn:
    raise ConfigError(f"expected finite numbers, found {name}, which JSON does not have")
