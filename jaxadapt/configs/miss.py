"""MISS: `MissConfig`, with the fields and defaults of PEFT 0.21.2."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxadapt.configs.base import MethodFacts
from jaxadapt.configs.method_config import QUERY_AND_VALUE, LayersConfig


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class MissConfig(LayersConfig):
    """MiSS (arXiv:2409.15371): all blocks of r inputs get the same change of the weight.

    Besides the attributes of `Config`:

    Attributes:
        r: the number of inputs of a block.
        miss_dropout: the dropout of the input in training. PEFT ignores it with `init_weights="bat"`.
        mini_r: with `init_weights="mini"`, the number of outputs of a block, a divisor of the outputs.
        target_modules, exclude_modules, layers_to_transform, layers_pattern, bias, modules_to_save: as in `LoraConfig`.
        init_weights: the variant: true adds a matrix to each block, "bat" multiplies the blocks by matrices too, and
            "mini" adds a smaller matrix that is the same for blocks of outputs. False is true with a random start.

    Raises:
        ConfigError: a value is invalid, or two values contradict each other; one error lists all problems.

    >>> MissConfig(target_modules=["q_proj"]).r
    64
    """

    new_values: ClassVar[Mapping[str, float]] = {"miss_block": 0.0}
    facts: ClassVar[MethodFacts] = MethodFacts(trains="miss_block", rows="call", accuracy=0.487, time=0.95)
    checks: ClassVar[Mapping[str, Any]] = {
        "r": "rank",
        "mini_r": "rank",
        "miss_dropout": "probability",
        "bias": ("none", "all", "MiSS_only"),
        "init_weights": (True, False, "bat", "mini"),
    }
    default_targets: ClassVar[Mapping[str, Mapping[str, Any]]] = QUERY_AND_VALUE

    peft_type: str = "MISS"
    r: int = 64
    miss_dropout: float = 0.0
    mini_r: int = 1
    exclude_modules: str | Collection[str] | None = None
    init_weights: bool | str = True
    bias: str = "none"
