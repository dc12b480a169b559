"""SHIRA: `ShiraConfig`, with the fields and defaults of PEFT 0.21.2."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxadapt.configs.base import MethodFacts
from jaxadapt.configs.method_config import QUERY_AND_VALUE, TargetsConfig


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class ShiraConfig(TargetsConfig):
    """SHiRA (arXiv:2406.13175): a sparse change of the weight, at positions that stay fixed.

    Besides the attributes of `Config`:

    Attributes:
        r: the number of changed entries of a weight (out, in) is r·(out + in).
        mask_type: how the positions are chosen: "random". A file may have any other, since it holds the positions.
        random_seed: the seed of the random positions, drawn as PyTorch draws them; null draws from the adapter's key.
        target_modules: the modules to adapt, as in `LoraConfig`.
        fan_in_fan_out, modules_to_save: as in `LoraConfig`.
        init_weights: true starts without a change of the weight, false with a random one.

    Raises:
        ConfigError: a value is invalid, or two values contradict each other; one error lists all problems.

    >>> ShiraConfig(target_modules=["q_proj"]).r
    32
    """

    new_values: ClassVar[Mapping[str, float]] = {"shira_weight": 0.0}
    facts: ClassVar[MethodFacts] = MethodFacts(trains="shira_weight", accuracy=0.51, time=1.06)
    checks: ClassVar[Mapping[str, Any]] = {"r": "rank", "random_seed": "integer"}
    default_targets: ClassVar[Mapping[str, Mapping[str, Any]]] = QUERY_AND_VALUE

    peft_type: str = "SHIRA"
    r: int = 32
    mask_type: str = "random"
    random_seed: int | None = None
    fan_in_fan_out: bool = False
    init_weights: bool = True
