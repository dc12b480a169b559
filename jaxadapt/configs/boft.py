"""BOFT: `BOFTConfig`, with the fields and defaults of PEFT 0.21.2."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxadapt.configs.base import MethodFacts
from jaxadapt.configs.method_config import QUERY_AND_VALUE, LayersConfig
from jaxadapt.configs.validation import Problems


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class BOFTConfig(LayersConfig):
    """BOFT (arXiv:2311.06243): a block-diagonal orthogonal matrix rotates the inputs, and a vector scales the outputs.

    Besides the attributes of `Config`:

    Attributes:
        boft_block_size: the size of a block; 0 if `boft_block_num` is given.
        boft_block_num: the number of blocks; 0 if `boft_block_size` is given.
        boft_n_butterfly_factor: the number of block-diagonal factors, which are permuted against each other. jaxadapt
            computes one.
        target_modules, exclude_modules, fan_in_fan_out, bias, modules_to_save, layers_to_transform, layers_pattern: as
            in `LoraConfig`.
        boft_dropout: the share of blocks, rounded down, that are the identity in each call in training.
        init_weights: true starts without a change, false with random rotations and scales.

    Raises:
        ConfigError: a value is invalid, or two values contradict each other; one error lists all problems.

    >>> BOFTConfig(target_modules=["q_proj"]).boft_block_size
    4
    """

    facts: ClassVar[MethodFacts] = MethodFacts(trains="boft_R, boft_s", rows="call", accuracy=0.343, time=7.35)
    checks: ClassVar[Mapping[str, Any]] = {
        "boft_n_butterfly_factor": "rank",
        "boft_dropout": "probability",
        "bias": ("none", "all", "boft_only"),
    }
    default_targets: ClassVar[Mapping[str, Mapping[str, Any]]] = QUERY_AND_VALUE

    peft_type: str = "BOFT"
    boft_block_size: int = 4
    boft_block_num: int = 0
    boft_n_butterfly_factor: int = 1
    exclude_modules: str | Collection[str] | None = None
    boft_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    init_weights: bool = True

    def _check(self, problems: Problems) -> None:
        super()._check(problems)
        size, number = self.boft_block_size, self.boft_block_num
        if (size == 0) == (number == 0):
            way_out = "set one of them to 0"
            problems.add("boft_block_size", "0 if boft_block_num is given, else the size of a block", size, way_out)
