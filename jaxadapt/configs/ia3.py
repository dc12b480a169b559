"""IA3: `IA3Config`, with the fields and defaults of PEFT 0.21.2."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

from jaxadapt.configs.base import Config
from jaxadapt.configs.validation import Problems


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class IA3Config(Config):
    """(IA)³: one trained vector a module, which scales its outputs (or its inputs, in feedforward modules).

    Attributes:
        target_modules: as in `LoraConfig`.
        feedforward_modules: those of the targets whose vector scales the inputs; a list must be a subset of
            `target_modules`.
        init_ia3_weights: false starts from random vectors; true from ones, which change nothing.

    Raises:
        ConfigError: everything that is wrong or contradictory, in one error.

    >>> IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]).peft_type
    'IA3'
    """

    _type: ClassVar[str | None] = "IA3"

    peft_type: str = "IA3"
    target_modules: str | Collection[str] | None = None
    exclude_modules: str | Collection[str] | None = None
    feedforward_modules: str | Collection[str] | None = None
    fan_in_fan_out: bool | None = False
    modules_to_save: Collection[str] | None = None
    init_ia3_weights: bool = True

    def _check(self, problems: Problems) -> None:
        super()._check(problems)
        for name in ("target_modules", "exclude_modules", "feedforward_modules"):
            problems.selection(name, getattr(self, name))
        problems.flag("fan_in_fan_out", self.fan_in_fan_out, optional=True)
        problems.flag("init_ia3_weights", self.init_ia3_weights)
        problems.expressions("modules_to_save", self.modules_to_save)
        targets, inputs = self.target_modules, self.feedforward_modules
        if isinstance(targets, tuple) and isinstance(inputs, tuple):
            beyond = sorted(set(inputs) - set(targets), key=str)
            if beyond:
                way_out = "add them to target_modules, or leave them out"
                problems.add("feedforward_modules", "a subset of target_modules", beyond, way_out)
