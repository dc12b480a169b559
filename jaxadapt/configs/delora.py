"""DELORA: `DeloraConfig`, with the fields and defaults of PEFT 0.21.2."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from jaxadapt.configs.base import MethodFacts
from jaxadapt.configs.frozen import FrozenDict
from jaxadapt.configs.method_config import QUERY_AND_VALUE, RanksConfig


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class DeloraConfig(RanksConfig):
    """DeLoRA (arXiv:2503.18225): a low-rank change whose components have unit length and one learned strength.

    Besides the attributes of `Config`:

    Attributes:
        r: the rank.
        delora_lambda: the initial strength.
        module_dropout: the dropout of the input in training. Despite its name, PEFT drops single entries of the input.
        target_modules, exclude_modules, modules_to_save, bias, layers_to_transform, layers_pattern, rank_pattern: as in
            `LoraConfig`.
        init_weights: true starts without a change of the weight, false with a random one.
        lambda_pattern: {pattern: initial strength} for modules with another one, matched like `rank_pattern`.

    Raises:
        ConfigError: a value is invalid, or two values contradict each other; one error lists all problems.

    >>> DeloraConfig(target_modules=["q_proj"]).delora_lambda
    15
    """

    new_values: ClassVar[Mapping[str, float]] = {"delora_B": 0.0}
    facts: ClassVar[MethodFacts] = MethodFacts(
        trains="delora_A, delora_B, delora_lambda",
        rows="call",
        demo=FrozenDict({"delora_lambda": 2.0}),
        accuracy=0.468,
        time=1.1,
    )
    checks: ClassVar[Mapping[str, Any]] = {
        "r": "rank",
        "delora_lambda": "number",
        "module_dropout": "probability",
        "lambda_pattern": "numbers",
        "bias": ("none", "all", "delora_only"),
    }
    default_targets: ClassVar[Mapping[str, Mapping[str, Any]]] = QUERY_AND_VALUE

    peft_type: str = "DELORA"
    delora_lambda: int | float = 15
    module_dropout: float = 0.0
    exclude_modules: str | Collection[str] | None = None
    bias: str = "none"
    init_weights: bool = True
    lambda_pattern: Mapping[str, float] | None = field(default_factory=FrozenDict)
