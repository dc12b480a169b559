"""HIRA: `HiraConfig`, with the fields and defaults of PEFT 0.21.2."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from jaxadapt.configs.base import MethodFacts
from jaxadapt.configs.frozen import FrozenDict
from jaxadapt.configs.method_config import QUERY_AND_VALUE, LayersConfig
from jaxadapt.configs.validation import Problems


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class HiraConfig(LayersConfig):
    """HiRA (Huang et al., ICLR 2025): the change of a weight is its elementwise product with a low-rank matrix.

    Besides the attributes of `Config`:

    Attributes:
        r: the rank of the low-rank matrix.
        target_modules, exclude_modules, fan_in_fan_out, modules_to_save, layers_to_transform, layers_pattern: as in
            `LoraConfig`.
        hira_dropout: the dropout of the input in training; embeddings have none.
        init_weights: true and "gaussian" start without a change of the weight, false with a random one. "gaussian"
            draws A of a linear layer from a normal distribution.
        rank_pattern: kept in the file. PEFT ignores it, so that a new adapter may not set it.

    Raises:
        ConfigError: a value is invalid, or two values contradict each other; one error lists all problems.

    >>> HiraConfig(target_modules=["q_proj"]).r
    32
    """

    new_values: ClassVar[Mapping[str, float]] = {"hira_B": 0.0, "hira_embedding_A": 0.0}
    tensor_pairs: ClassVar[tuple[tuple[str, str], ...]] = (("hira_A", "hira_B"),)
    facts: ClassVar[MethodFacts] = MethodFacts(trains="hira_A, hira_B", learning_rate=1e-2, accuracy=0.513, time=1.4)
    checks: ClassVar[Mapping[str, Any]] = {"r": "rank", "hira_dropout": "probability", "init_weights": "any"}
    default_targets: ClassVar[Mapping[str, Mapping[str, Any]]] = QUERY_AND_VALUE

    peft_type: str = "HIRA"
    r: int = 32
    exclude_modules: str | Collection[str] | None = None
    hira_dropout: float = 0.0
    fan_in_fan_out: bool = False
    init_weights: bool | str | None = True
    rank_pattern: Mapping[str, int] | None = field(default_factory=FrozenDict)

    def _check(self, problems: Problems) -> None:
        super()._check(problems)
        self._check_layers(problems, with_expression=False)
