"""What all configuration classes share, and the class for methods without one of their own."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any, ClassVar, Self, cast

from jaxadapt.configs.frozen import Frozen, FrozenDict, freeze, thaw
from jaxadapt.configs.name_patterns import PatternIndex
from jaxadapt.configs.peft_type import read_peft_type
from jaxadapt.configs.validation import Problems
from jaxadapt.core.errors import ConfigError

# The version of PEFT whose schema is written here; what a new configuration says of itself.
PEFT_VERSION = "0.21.2"

TASK_TYPES = ("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")

# Lists whose order means nothing (PEFT turns them into sets): kept as given, compared as sets.
_SETS = frozenset({"target_modules", "exclude_modules", "feedforward_modules"})


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Config:
    """What a PEFT configuration of any method holds. Deeply immutable, hashable, picklable.

    Two configurations are equal when they mean the same mathematics: where the base model came from, which
    version wrote the file and the like take no part in equality and hash (a jitted function that has one as
    static data is not traced again for them), and neither does the order of `target_modules`.

    Attributes:
        extra: every key that the class does not know (older, newer or forked versions), written back on top.

    >>> import jaxadapt
    >>> config = jaxadapt.LoraConfig(r=4, target_modules=["q_proj"])
    >>> isinstance(config, Config), config.replace(r=2) == config, config.to_dict()["lora_alpha"]
    (True, False, 8)
    """

    task_type: str | None = field(default=None, compare=False)
    peft_type: str = ""
    auto_mapping: Mapping[str, Any] | None = field(default=None, compare=False)
    peft_version: str | None = field(default=PEFT_VERSION, compare=False)
    base_model_name_or_path: str | None = field(default=None, compare=False)
    revision: str | None = field(default=None, compare=False)
    inference_mode: bool = field(default=False, compare=False)
    extra: Mapping[str, Any] = field(default_factory=FrozenDict)

    # The one type a class is for; None: the class is for every type that has none of its own.
    _type: ClassVar[str | None] = None

    # {peft_type: its class}, of every subclass that is for one type.
    classes: ClassVar[dict[str, type[Config]]] = {}

    # Other libraries' words for fields, and the fields that they mean.
    _spellings: ClassVar[Mapping[str, str]] = {}

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if cls._type is not None:
            Config.classes[cls._type] = cls

    def __new__(cls, *args: object, **values: object) -> Self:
        """Say what is meant by a keyword that is no field: `__init__` would raise a TypeError without it."""
        names = _field_names(cls)
        if args:
            first = "target_modules" if "target_modules" in names else "peft_type"
            raise ConfigError(f"{cls.__name__}: expected keywords only, such as {cls.__name__}({first}=…)")
        if unknown := sorted(set(values) - set(names)):
            raise ConfigError("\n".join(cls._unknown(name) for name in unknown))
        return super().__new__(cls)

    @classmethod
    def _unknown(cls, name: str) -> str:
        import difflib  # only a mistake needs it

        meant = cls._spellings.get(name) or " or ".join(difflib.get_close_matches(name, _field_names(cls), 2))
        return f"{cls.__name__} has no field {name!r}; " + (
            f"it is called {meant}"
            if meant
            else f"it has: {', '.join(_field_names(cls))}; a key of another version goes into extra={{…}}"
        )

    def __post_init__(self) -> None:
        if type(self) is Config:
            raise ConfigError("Config is the base class; use LoraConfig, IA3Config or GenericConfig")
        problems = Problems()
        for name in _field_names(type(self)):
            try:
                object.__setattr__(self, name, self._freeze(name, getattr(self, name)))
            except TypeError as error:
                problems.note(name, f"{name}: {error}")
            except RecursionError:
                problems.note(name, f"{name}: expected a value of a few levels, found one nested too deeply")
                object.__setattr__(self, name, None)
        self._check(problems)
        problems.raise_if_any(type(self).__name__)

    def _freeze(self, name: str, value: object) -> Frozen:
        """What is kept of the value of a field."""
        return freeze(value)

    def _check(self, problems: Problems) -> None:
        """Check the frozen values; a subclass extends it."""
        if self._type is not None and self.peft_type != self._type:
            problems.add("peft_type", f'"{self._type}"', self.peft_type, "use configs.loads for any type")
        problems.one_of("task_type", self.task_type, TASK_TYPES, optional=True)
        problems.mapping("auto_mapping", self.auto_mapping)
        for name in ("peft_version", "base_model_name_or_path", "revision"):
            problems.text(name, getattr(self, name))
        problems.flag("inference_mode", self.inference_mode)
        if not isinstance(self.extra, FrozenDict):
            problems.add("extra", "an object of unknown keys", self.extra)
            return
        for key in sorted(set(self.extra) & set(_field_names(type(self))) - {"extra"}):
            problems.add(f"extra[{key!r}]", f"no key that {type(self).__name__} has itself", self.extra[key])
        for key, value in self.extra.items():
            problems.common(key, value)

    @cached_property
    def _looked_up(self) -> dict[str, Any]:
        return {}

    def names(self, key: str) -> frozenset[Any]:
        """The entries of a list, to look up in; made once, as lists of thousands meet thousands of modules."""
        if key not in self._looked_up:
            self._looked_up[key] = frozenset(cast("tuple[Any, ...]", self.get(key) or ()))
        return self._looked_up[key]

    def sizes(self, key: str) -> frozenset[int]:
        """The lengths of a list's names."""
        at = f"sizes of {key}"
        if at not in self._looked_up:
            self._looked_up[at] = frozenset(map(len, self.names(key)))
        return self._looked_up[at]

    def index(self, key: str) -> PatternIndex:
        """The entries of a list as patterns, to look up in. Raises `ConfigError`: an invalid expression."""
        at = f"index of {key}"
        if at not in self._looked_up:
            self._looked_up[at] = PatternIndex(key, self.get(key) or ())
        return self._looked_up[at]

    @cached_property
    def _identity(self) -> tuple[Any, ...]:
        """What takes part in equality and hash."""
        values: list[Any] = []
        for item in dataclasses.fields(self):
            if item.compare and item.name != "extra":
                values.append(_unordered(item.name, getattr(self, item.name)))
        values.append(FrozenDict({key: _unordered(key, value) for key, value in self.extra.items()}))
        return tuple(values)

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, Config):
            return NotImplemented
        return type(self) is type(other) and self._identity == other._identity

    def __hash__(self) -> int:
        return hash((type(self).__name__, self._identity))

    def __repr__(self) -> str:
        """What differs from the defaults, as it would be written.

        >>> GenericConfig(peft_type="VERA", extra={"r": 256})
        GenericConfig(peft_type='VERA', extra={'r': 256})
        """
        values = [(item.name, getattr(self, item.name), item) for item in dataclasses.fields(self)]
        given = [f"{name}={thaw(value)!r}" for name, value, item in values if value != _default(item)]
        return f"{type(self).__name__}({', '.join(given)})"

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _field_names(type(self))}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: object) -> Self:
        return self

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a JSON key, whether the class knows it or `extra` holds it; `default` if neither.

        >>> GenericConfig(peft_type="VERA", extra={"projection_prng_key": 0}).get("projection_prng_key")
        0
        """
        if key != "extra" and key in _field_names(type(self)):
            return getattr(self, key)
        return self.extra.get(key, default)

    def replace(self, **changes: Any) -> Self:
        """A copy with other values, checked anew; for a key the class does not know, replace `extra`.

        Raises:
            ConfigError: an unknown field, or an invalid value.
        """
        unknown = sorted(set(changes) - set(_field_names(type(self))))
        if unknown:
            raise ConfigError("\n".join(self._unknown(name) for name in unknown))
        return dataclasses.replace(self, **changes)

    def differences(self, other: Config, theirs: str = "in the file") -> str:
        """The keys that make it another configuration, with both values: of the attached one, and of `theirs`."""
        x, y = self.to_dict(), other.to_dict()
        ignored = {f.name for f in dataclasses.fields(self) if not f.compare}
        keys = [key for key in self.changed_keys(other) if key not in ignored]
        return ", ".join(f"{key} ({x.get(key)!r} attached, {y.get(key)!r} {theirs})" for key in keys)

    def changed_keys(self, other: Config) -> list[str]:
        """The keys whose values differ."""
        x, y = ({key: _ordered(value) for key, value in config.to_dict().items()} for config in (self, other))
        return [key for key in sorted(x | y) if x.get(key) != y.get(key)]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, with the keys of `adapter_config.json`, in its order."""
        known = {name: thaw(getattr(self, name)) for name in _field_names(type(self)) if name != "extra"}
        return dict(sorted({**known, **thaw(self.extra)}.items()))

    def to_json(self) -> str:
        """The text of `adapter_config.json` as PEFT writes it: indent 2, keys sorted, no final newline.

        Patterns that may match one module stay in their order, of which the first counts: sorted, as PEFT has them,
        the file could mean another rank than its tensors have.
        """
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = "configuration") -> Self:
        """A configuration from the values of an `adapter_config.json`.

        On `Config` itself the class follows from `peft_type`. Absent keys get PEFT's defaults, except
        `peft_version`: null, as nobody knows which version it was.

        Args:
            values: the JSON object; unknown keys are kept in `extra`.
            source: what errors call it, a file name for example.

        Raises:
            ConfigError: whatever is wrong, all problems in one.

        >>> GenericConfig.from_dict({"peft_type": "VERA", "r": 256}).extra
        FrozenDict({'r': 256})
        """
        if cls is Config:
            name = read_peft_type(values, source)
            return cast("Self", Config.classes.get(name, GenericConfig).from_dict(values, source))
        names = set(_field_names(cls)) - {"extra"}
        known: dict[str, Any] = {
            "peft_version": None,
            **{key: value for key, value in values.items() if key in names},
        }
        extra = {key: value for key, value in values.items() if key not in names}
        try:
            return cls(**known, extra=extra)
        except ConfigError as error:
            raise ConfigError(f"{source}: {error}") from error


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class GenericConfig(Config):
    """The configuration of a method that has no class of its own here: `extra` keeps every key.

    >>> GenericConfig(peft_type="VERA", extra={"r": 256}).get("r")
    256
    """

    def _check(self, problems: Problems) -> None:
        super()._check(problems)
        name = cast("object", self.peft_type)
        if not (isinstance(name, str) and re.fullmatch("[A-Z][A-Z0-9_]*", name)):
            problems.add("peft_type", 'a type in capitals, such as "VERA"', name)
        elif any(name == cls.__dataclass_fields__["peft_type"].default for cls in Config.__subclasses__()):
            problems.add("peft_type", "a type without a class of its own", name, "use its class")


def _default(item: dataclasses.Field[Any]) -> Any:
    made = item.default_factory
    return item.default if made is dataclasses.MISSING else made()


@cache
def _field_names(cls: type[Config]) -> tuple[str, ...]:
    return tuple(item.name for item in dataclasses.fields(cls))


def _ordered(value: Any) -> Any:
    return list(cast("dict[str, Any]", value).items()) if isinstance(value, dict) else value


def _unordered(name: str, value: Any) -> Any:
    if name in _SETS and isinstance(value, tuple):
        return frozenset(cast("tuple[Any, ...]", value))
    return value
