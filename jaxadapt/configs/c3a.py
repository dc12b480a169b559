"""C3A: `C3AConfig`, with the fields and defaults of PEFT 0.21.2."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from jaxadapt.configs.base import MethodFacts
from jaxadapt.configs.frozen import FrozenDict
from jaxadapt.configs.method_config import QUERY_AND_VALUE, LayersConfig
from jaxadapt.configs.validation import Problems


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class C3AConfig(LayersConfig):
    """C3A (arXiv:2407.19342): the change of a weight consists of circulant blocks.

    Besides the attributes of `Config`:

    Attributes:
        block_size: the size of a block, which divides the inputs and the outputs of each module.
        target_modules, modules_to_save, bias, layers_to_transform, layers_pattern: as in `LoraConfig`.
        block_size_pattern: {pattern: block size} for modules with another block size, matched like `rank_pattern`. PEFT
            does not group a pattern, so alternatives at its top level ("q|v") are refused.
        init_weights: true starts with zeros; "gaussian", "kaiming_uniform", "xavier_uniform" or false (the same as
            "xavier_uniform") with a random change.

    Raises:
        ConfigError: a value is invalid, or two values contradict each other; one error lists all problems.

    >>> C3AConfig(target_modules=["q_proj"]).block_size
    256
    """

    new_values: ClassVar[Mapping[str, float]] = {"c3a_kernel": 0.0}
    facts: ClassVar[MethodFacts] = MethodFacts(
        trains="c3a_kernel",
        rows="call",
        learning_rate=0.1,
        demo=FrozenDict({"block_size": 64}),
        accuracy=0.487,
        time=1.24,
    )
    checks: ClassVar[Mapping[str, Any]] = {
        "block_size": "rank",
        "block_size_pattern": "ranks",
        "bias": ("none", "all", "c3a_only"),
        "init_weights": (True, False, "gaussian", "kaiming_uniform", "xavier_uniform"),
    }
    default_targets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        **QUERY_AND_VALUE,
        "gpt2": {"target_modules": ("mlp.c_proj",)},
    }

    peft_type: str = "C3A"
    block_size: int = 256
    bias: str = "none"
    block_size_pattern: Mapping[str, int] | None = field(default_factory=FrozenDict)
    init_weights: bool | str = "xavier_uniform"

    def _check(self, problems: Problems) -> None:
        super()._check(problems)
        if "block_size_pattern" not in problems:
            refuse_alternatives(problems, "block_size_pattern", self.block_size_pattern)


def refuse_alternatives(problems: Problems, name: str, patterns: Mapping[str, Any] | None) -> None:
    """Report the patterns with alternatives at their top level, which PEFT's `.*\\.{pattern}$` splits."""
    for pattern in patterns or ():
        rest, groups = pattern, 1
        while groups:
            rest, groups = re.subn(r"\\.|\[[^]]*\]|\([^()]*\)", "", rest)
        if "|" in rest:
            problems.add(name, "patterns without alternatives at the top level", pattern, "put them in parentheses")
