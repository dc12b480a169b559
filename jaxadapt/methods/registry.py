"""The methods by type: those of `configs.table`, loaded on first use, and those that other packages register."""

from __future__ import annotations

import importlib
from collections.abc import Collection, Iterator, Mapping

from jaxadapt.configs.base import Config, class_of
from jaxadapt.configs.listing import reason_not_applied
from jaxadapt.configs.table import FACTS, NO_FACTS, MethodFacts
from jaxadapt.core.errors import ConfigError, raise_listed
from jaxadapt.methods.base import ROLES, Method


class Methods(Mapping[str, Method]):
    """`{peft_type: method}`."""

    def __init__(self) -> None:
        self._loaded: dict[str, Method] = {}

    def __getitem__(self, peft_type: str) -> Method:
        if peft_type not in self._loaded and peft_type in FACTS:
            module = importlib.import_module(f"jaxadapt.methods.{peft_type.lower()}")
            classes = (x for x in vars(module).values() if isinstance(x, type) and issubclass(x, Method))
            self._loaded[peft_type] = next(x for x in classes if vars(x).get("peft_type") == peft_type)()
        return self._loaded[peft_type]

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys([*FACTS, *self._loaded]))

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __contains__(self, peft_type: object) -> bool:
        return peft_type in FACTS or peft_type in self._loaded

    def add(self, method: Method, facts: MethodFacts = NO_FACTS) -> None:
        """Add a method.

        Raises `ConfigError` if its type is taken or has no configuration class, or if a role of its tensors is unknown.
        """
        raise_listed(
            ConfigError,
            f"cannot register the method {method.peft_type!r}: expected the roles {', '.join(ROLES)}, found:",
            [f"{tensor}: {role!r}" for tensor, role in method.roles.items() if role not in ROLES],
        )
        if method.peft_type in self and self[method.peft_type] != method:
            raise ConfigError(
                f"cannot register the method {method.peft_type!r}: the type has a method already; choose another"
                " peft_type"
            )
        if class_of(method.peft_type) is None:
            raise ConfigError(
                f"cannot register the method {method.peft_type!r}: the type has no configuration. Define a subclass of"
                f' jaxadapt.Config first, with peft_type: str = "{method.peft_type}"'
            )
        self._loaded[method.peft_type] = method
        if not FACTS[method.peft_type].module:
            FACTS[method.peft_type] = facts


class _Collections(Collection[str]):
    """The names of the Linen collections, or of the attributes of an NNX layer, that hold each method's adapters."""

    def __iter__(self) -> Iterator[str]:
        return (name.lower() for name in METHODS)

    def __len__(self) -> int:
        return len(METHODS)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name == name.lower() and name.upper() in METHODS


METHODS = Methods()

COLLECTIONS = _Collections()


def get_method(config: Config) -> Method:
    """Return the method of a configuration; raise `ConfigError` if there is none, or if it would ignore a field."""
    if not isinstance(config, Config):  # pyright: ignore[reportUnnecessaryIsInstance]
        kind = f"{type(config).__module__}.{type(config).__name__}".removeprefix("builtins.")
        raise ConfigError(
            f"expected a configuration such as jaxadapt.LoraConfig(…), found {kind}. The model comes first, as in"
            " adapt(model, config), init(model, config), select(model, config) and initializers.start(model, config)"
        )
    method = METHODS.get(config.peft_type)
    if method is None:
        raise ConfigError(
            f"cannot apply peft_type {config.peft_type!r}: {reason_not_applied(config.peft_type)}. Its files can be"
            f" read and written unchanged. Implemented methods: {', '.join(sorted(METHODS))}"
        )
    method.check(config)
    return method


def register(method: Method, facts: MethodFacts = NO_FACTS) -> Method:
    """Add a method of another package for this process, and return it.

    Its configuration is a subclass of `jaxadapt.Config` with the same `peft_type` by default. Files of this type then
    read into that class, and `adapt`, `save`, `load`, `merge` and the other functions accept it.

    Args:
        method: the method.
        facts: what lists, cards, `jaxadapt verify`, the demo and servers read about it; see `MethodFacts`.

    Raises `ConfigError` if the type has a method already, or no configuration class, or if a role is unknown.

    >>> register(METHODS["IA3"]).peft_type
    'IA3'
    """
    METHODS.add(method, facts)
    return method
