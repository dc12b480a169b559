"""Configurations: the base class, `GenericConfig` for methods without a class of their own, and their text.

`Config` holds the values of an `adapter_config.json`; `loads` reads the text, and `Config.to_json` writes it.
`Change` is the size of the change that an adapter makes to a weight; NumPy is imported where it is used.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, Self, TypeVar, cast

from jaxadapt.configs.frozen import Frozen, FrozenDict, PatternIndex, freeze, thaw
from jaxadapt.configs.table import FACTS
from jaxadapt.configs.validation import OBJECT, TASK_TYPES, TEXT, Problems, checked, checks_of, one_of
from jaxadapt.core.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np


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
    if value is None:
        return "null"
    kinds: dict[type, str] = {
        bool: "a boolean",
        int: "a number",
        float: "a number",
        str: "a string",
        list: "a list",
    }
    return kinds.get(type(value), "an object" if isinstance(value, Mapping) else type(value).__name__)


# ---------------------------------------------------------------- change


@dataclasses.dataclass(frozen=True)
class Change:
    """The size of the change that an adapter makes to one weight.

    Attributes:
        norm: the norm, as `describe_change` of the configuration or of the method describes it.
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
    import numpy as np

    p = s[s > 0] / max(s.sum(), np.finfo(s.dtype).tiny)
    return float(np.exp(-(p * np.log(p)).sum())) if p.size else 0.0


def change_of_matrix(delta: np.ndarray[Any, Any], rank: int | None = None) -> Change:
    """Return the Frobenius norm and the effective rank of a change (out, in), in float64."""
    import numpy as np

    if not np.isfinite(delta).all():  # a diverged run, on which decompositions fail
        return Change(math.nan, None, rank)
    s = np.linalg.svd(delta, compute_uv=False)
    return Change(float(np.sqrt((s**2).sum())), effective_rank(np.where(s > 1e-12 * s.max(), s, 0.0)), rank)


# ---------------------------------------------------------------- base


_T = TypeVar("_T")

# The version of PEFT whose schema this package writes: the default of `peft_version`.
PEFT_VERSION = "0.21.2"

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

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if cls.peft_type:
            Config.classes[cls.peft_type] = cls

    def __new__(cls, *args: object, **values: object) -> Self:
        """Raise `ConfigError` with a suggestion for an unknown keyword; `__init__` would raise TypeError."""
        names = _field_names(cls)
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

        similar = cls._spellings.get(name) or " or ".join(difflib.get_close_matches(name, _field_names(cls), 2))
        return f"{cls.__name__} has no field {name!r}; " + (
            f"it is called {similar}"
            if similar
            else f"its fields are {', '.join(_field_names(cls))}; pass a key of another version in extra={{…}}"
        )

    def __post_init__(self) -> None:
        if type(self) is Config:
            raise ConfigError("Config is a base class; use LoraConfig, IA3Config or GenericConfig")
        self._keep(_field_names(type(self)))

    def _keep(self, names: Iterable[str]) -> None:
        """Freeze the values of these fields, and check all fields."""
        problems = Problems()
        for name in names:
            try:
                object.__setattr__(self, name, self._freeze(name, getattr(self, name)))
            except TypeError as error:
                problems.note(name, f"{name}: {error}")
            except RecursionError:
                problems.note(name, f"{name}: the value is nested too deeply; expected a few levels")
                problems.raise_if_any(type(self).__name__)
        self._check(problems)
        problems.raise_if_any(type(self).__name__)

    def _freeze(self, name: str, value: object) -> Frozen:
        """Return the immutable value that the field keeps."""
        return freeze(value)

    def _check(self, problems: Problems) -> None:
        """Add the problems of the frozen values to `problems`; subclasses extend it."""
        own = type(self).peft_type
        if own and self.peft_type != own:
            problems.add("peft_type", f'"{own}"', self.peft_type, "use jaxadapt.Config.from_dict to read any type")
        for name, check in checks_of(type(self)):
            check(problems, name, getattr(self, name))
        if not isinstance(self.extra, FrozenDict):
            problems.add("extra", "an object of unknown keys", self.extra)
            return
        for key in sorted(set(self.extra) & set(_field_names(type(self))) - {"extra"}):
            problems.add(f"extra[{key!r}]", f"no key that is a field of {type(self).__name__}", self.extra[key])
        for key, value in self.extra.items():
            problems.common(key, value)

    def _check_layers(self, problems: Problems, *, with_expression: bool) -> None:
        """Add a problem if the fields of layers have no effect; `with_expression` if an expression may go with them."""
        pattern, targets = self.get("layers_pattern"), self.get("target_modules")
        if pattern and self.get("layers_to_transform") is None:
            way_out = "set layers_to_transform, or remove the pattern"
            problems.add("layers_pattern", "null if layers_to_transform is null", pattern, way_out)
        for name in ("layers_to_transform", "layers_pattern"):
            if isinstance(targets, str) and not with_expression and self.get(name) is not None:
                way_out = "write the layers into the expression, or make target_modules a list"
                problems.add(name, "null if target_modules is a string", self.get(name), way_out)

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
    def _identity(self) -> tuple[Any, ...]:
        """The values that equality and hash compare."""
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
        """Return the fields that differ from their defaults, as a constructor call.

        >>> GenericConfig(peft_type="XLORA", extra={"xlora_depth": 1})
        GenericConfig(peft_type='XLORA', extra={'xlora_depth': 1})
        """
        values = [(item.name, getattr(self, item.name), item) for item in dataclasses.fields(self)]
        changed = [f"{name}={thaw(value)!r}" for name, value, item in values if value != _default(item)]
        return f"{type(self).__name__}({', '.join(changed)})"

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _field_names(type(self))}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: object) -> Self:
        return self

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value of a field or of a key in `extra`; `default` if there is no such key.

        >>> GenericConfig(peft_type="XLORA", extra={"xlora_depth": 2}).get("xlora_depth")
        2
        """
        if key != "extra" and key in _field_names(type(self)):
            return getattr(self, key)
        return self.extra.get(key, default)

    def replace(self, **changes: Any) -> Self:
        """Return a checked copy with other values. To change a key that is not a field, replace `extra`.

        Raises:
            ConfigError: a name is no field, or a value is invalid.
        """
        unknown = sorted(set(changes) - set(_field_names(type(self))))
        if unknown:
            raise ConfigError("\n".join(self._unknown(name) for name in unknown))
        new = object.__new__(type(self))
        for name in _field_names(type(self)):  # all but the cached properties
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
        plain = {item.name: _default(item) for item in dataclasses.fields(self)}
        hidden = {item.name for item in dataclasses.fields(Config)} | {"target_modules"}
        main = FACTS[self.peft_type].main_fields
        values = {name: thaw(getattr(self, name)) for name in plain} | thaw(self.extra)
        return {
            name: value
            for name, value in values.items()
            if name not in hidden
            and value not in (None, [], {})
            and ((value and name in main) or value != thaw(plain.get(name, False)))
        }

    def describe_change(self) -> str | None:
        """Return what the norms of `measure_change` measure; None if only the method can tell."""
        return None

    def measure_change(self, module: str, arrays: Mapping[str, Any]) -> Change | None:
        """Return the size of the change of one module from its file tensors in float64; None if they do not tell."""
        return None

    def differences(self, other: Config, theirs: str = "in the file") -> str:
        """Describe the keys that make the configurations unequal, with the values of `self` and of `other`."""
        x, y = self.to_dict(), other.to_dict()
        ignored = {f.name for f in dataclasses.fields(self) if not f.compare}
        keys = [key for key in self.changed_keys(other) if key not in ignored]
        return ", ".join(f"{key} ({x.get(key)!r} attached, {y.get(key)!r} {theirs})" for key in keys)

    def changed_keys(self, other: Config) -> list[str]:
        """Return the keys whose values differ, sorted."""
        x, y = ({key: _ordered(value) for key, value in config.to_dict().items()} for config in (self, other))
        return [key for key in sorted(x | y) if x.get(key) != y.get(key)]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values under the keys of `adapter_config.json`, in its order."""
        known = {name: thaw(getattr(self, name)) for name in _field_names(type(self)) if name != "extra"}
        return dict(sorted({**known, **thaw(self.extra)}.items()))

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
        `peft_version`, which becomes None.

        Args:
            values: the JSON object; unknown keys are kept in `extra`.
            source: the name of the configuration in errors, such as its file name.

        Raises:
            ConfigError: the values are invalid; one error lists all problems.

        >>> GenericConfig.from_dict({"peft_type": "XLORA", "xlora_depth": 1}).extra
        FrozenDict({'xlora_depth': 1})
        """
        if cls is Config:
            name = read_peft_type(values, source)
            return cast("Self", (class_of(name) or GenericConfig).from_dict(values, source))
        names = set(_field_names(cls)) - {"extra"}
        known: dict[str, Any] = {"peft_version": None, **{key: x for key, x in values.items() if key in names}}
        extra = {key: value for key, value in values.items() if key not in names}
        try:
            return cls(**known, extra=extra)
        except ConfigError as error:
            raise ConfigError(f"{source}: {error}") from error


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

    def _check(self, problems: Problems) -> None:
        super()._check(problems)
        name = cast("object", self.peft_type)
        if not (isinstance(name, str) and re.fullmatch("[A-Z][A-Z0-9_]*", name)):
            problems.add("peft_type", 'a type in capitals, such as "XLORA"', name)
        elif class_of(name) is not None:
            problems.add("peft_type", "a type without a class of its own", name, "use its class")


def _default(item: dataclasses.Field[Any]) -> Any:
    factory = item.default_factory
    return item.default if factory is dataclasses.MISSING else factory()


@cache
def _field_names(cls: type[Config]) -> tuple[str, ...]:
    return tuple(item.name for item in dataclasses.fields(cls))


def _ordered(value: Any) -> Any:
    return list(cast("dict[str, Any]", value).items()) if isinstance(value, dict) else value


def _unordered(name: str, value: Any) -> Any:
    if name in _UNORDERED and isinstance(value, tuple):
        return frozenset(cast("tuple[Any, ...]", value))
    return value


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
        values: object = json.loads(text, object_pairs_hook=_object, parse_constant=_constant)
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


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        repeated = sorted(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ConfigError(f"expected every key once, found twice: {', '.join(repeated)}; keep one")
    return values


def _constant(name: str) -> NoReturn:
    raise ConfigError(f"expected finite numbers, found {name}, which JSON does not have")
