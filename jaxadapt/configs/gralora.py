"""GRALORA: `GraloraConfig`, with the fields and defaults of PEFT 0.21.2."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxadapt.configs.base import MethodFacts
from jaxadapt.configs.method_config import QUERY_AND_VALUE, LayersConfig
from jaxadapt.configs.validation import Problems


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class GraloraConfig(LayersConfig):
    """GraLoRA (arXiv:2505.20355): the weight is a grid of equal blocks, each with a low-rank change of its own.

    Besides the attributes of `Config`:

    Attributes:
        r: the rank of a row of blocks, a multiple of `gralora_k`; each block has the rank r / gralora_k.
        hybrid_r: the rank of a LoRA of the whole weight beside the blocks; 0 for none.
        target_modules, fan_in_fan_out, bias, modules_to_save, layers_to_transform, layers_pattern: as in `LoraConfig`.
        alpha: the change is multiplied by alpha / (r + hybrid_r).
        gralora_dropout: the dropout of the input in training.
        gralora_k: the number of blocks in each row and column, which must divide the inputs and the outputs.
        init_weights: true starts without a change of the weight, false with a random one.

    Raises:
        ConfigError: a value is invalid, or two values contradict each other; one error lists all problems.

    >>> GraloraConfig(target_modules=["q_proj"]).gralora_k
    2
    """

    facts: ClassVar[MethodFacts] = MethodFacts(trains="gralora_A, gralora_B", rows="call", accuracy=0.495, time=1.16)
    checks: ClassVar[Mapping[str, Any]] = {
        "r": "rank",
        "hybrid_r": "size",
        "alpha": "number",
        "gralora_k": "rank",
        "gralora_dropout": "probability",
        "bias": ("none", "all", "gralora_only"),
    }
    default_targets: ClassVar[Mapping[str, Mapping[str, Any]]] = QUERY_AND_VALUE

    peft_type: str = "GRALORA"
    r: int = 32
    hybrid_r: int = 0
    alpha: int | float = 64
    gralora_dropout: float = 0.0
    gralora_k: int = 2
    fan_in_fan_out: bool = False
    bias: str = "none"
    init_weights: bool = True

    def _check(self, problems: Problems) -> None:
        super()._check(problems)
        if "r" not in problems and "gralora_k" not in problems and self.r % self.gralora_k:
            problems.add("r", f"a multiple of gralora_k = {self.gralora_k}", self.r)
