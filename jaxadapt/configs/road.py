"""ROAD: `RoadConfig`, with the fields and defaults of PEFT 0.21.2."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxadapt.configs.base import MethodFacts
from jaxadapt.configs.method_config import QUERY_AND_VALUE, TargetsConfig
from jaxadapt.configs.validation import Problems


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class RoadConfig(TargetsConfig):
    """RoAd (arXiv:2409.00119): pairs of outputs of a module are rotated and scaled.

    Besides the attributes of `Config`:

    Attributes:
        variant: "road_1" has one angle and one scale per pair, "road_2" one per output, "road_4" two per output.
        group_size: the first half of each group of outputs is paired with the second half; an even divisor of the
            outputs.
        init_weights: true starts without a change, false with random angles and scales.
        target_modules, modules_to_save: as in `LoraConfig`.

    Raises:
        ConfigError: a value is invalid, or two values contradict each other; one error lists all problems.

    >>> RoadConfig(target_modules=["q_proj"]).variant
    'road_1'
    """

    facts: ClassVar[MethodFacts] = MethodFacts(
        trains="road_alpha, road_theta", rows="call", learning_rate=1e-2, accuracy=0.385, time=1.04
    )
    checks: ClassVar[Mapping[str, Any]] = {"variant": ("road_1", "road_2", "road_4"), "group_size": "rank"}
    default_targets: ClassVar[Mapping[str, Mapping[str, Any]]] = QUERY_AND_VALUE

    peft_type: str = "ROAD"
    variant: str = "road_1"
    group_size: int = 64
    init_weights: bool = True

    def _check(self, problems: Problems) -> None:
        super()._check(problems)
        if "group_size" not in problems and self.group_size % 2:
            problems.add("group_size", "an even number", self.group_size)
