"""The base class of configurations whose values need no checks besides those that follow from fields and defaults."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, cast

from jaxadapt.configs.base import Config
from jaxadapt.configs.validation import COMMON, Problems, is_int


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class MethodConfig(Config):
    """A configuration that checks each field by its name or by the type of its default.

    Fields that several methods have (`target_modules`, `modules_to_save`, `rank_pattern`, …) have the same check
    everywhere. A field whose default is a boolean, an integer, a number or a string takes only such values.

    Attributes:
        checks: `{field: check}` for the other fields: "rank" (a positive integer), "probability", "any", or the tuple
            of the possible values.
    """

    checks: ClassVar[Mapping[str, Any]] = {"r": "rank"}

    def _check(self, problems: Problems) -> None:
        super()._check(problems)
        known = {item.name for item in dataclasses.fields(Config)}
        for item in dataclasses.fields(self):
            if item.name not in known:
                self._check_field(problems, item.name, getattr(self, item.name), item.default)
        if self.get("layers_pattern") and self.get("layers_to_transform") is None:
            way_out = "set layers_to_transform, or remove the pattern"
            problems.add("layers_pattern", "null if layers_to_transform is null", self.get("layers_pattern"), way_out)

    def _check_field(self, problems: Problems, name: str, value: object, default: object) -> None:
        check = self.checks.get(name)
        if isinstance(check, tuple):
            problems.one_of(name, value, cast("tuple[str, ...]", check), optional=default is None)
        elif check == "rank":
            problems.rank(name, value)
        elif check == "probability":
            problems.probability(name, value)
        elif check == "any":
            return
        elif name in COMMON:
            problems.common(name, value)
        elif isinstance(default, bool):
            problems.flag(name, value)
        elif is_int(default):
            if not is_int(value):
                problems.add(name, "an integer", value)
        elif isinstance(default, float):
            problems.number(name, value)
        elif isinstance(default, str) and not isinstance(value, str):
            problems.add(name, "a string", value)
