"""RANDLORA: `RandLoraConfig`, with the fields and defaults of PEFT 0.21.2."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxadapt.configs.base import MethodFacts
from jaxadapt.configs.method_config import QUERY_AND_VALUE, LayersConfig


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class RandLoraConfig(LayersConfig):
    """RandLoRA (arXiv:2502.00987): scaled random bases, shared by all modules, make a change of full rank.

    Besides the attributes of `Config`:

    Attributes:
        r: the rank of each basis.
        target_modules: the modules to adapt, as in `LoraConfig`.
        projection_prng_key: the seed of the bases of a new adapter.
        save_projection: true, since the bases that PEFT draws depend on the machine.
        sparse, very_sparse: true draws bases of -1, 0 and 1; two thirds or most of these are 0.
        randlora_dropout: the dropout of the input in training.
        fan_in_fan_out, bias, modules_to_save, layers_to_transform, layers_pattern: as in `LoraConfig`.
        randlora_alpha: the change is multiplied by randlora_alpha / r.
        init_weights: true starts without a change of the weight, false with a random one.

    Raises:
        ConfigError: a value is invalid, or two values contradict each other; one error lists all problems.

    >>> RandLoraConfig(target_modules=["q_proj"]).randlora_alpha
    640
    """

    new_values: ClassVar[Mapping[str, float]] = {"randlora_lambda": 0.0}
    facts: ClassVar[MethodFacts] = MethodFacts(
        trains="randlora_gamma, randlora_lambda", rows="call", accuracy=0.478, time=1.51
    )
    checks: ClassVar[Mapping[str, Any]] = {
        "r": "rank",
        "randlora_dropout": "probability",
        "bias": ("none", "all", "randlora_only"),
    }
    default_targets: ClassVar[Mapping[str, Mapping[str, Any]]] = QUERY_AND_VALUE

    peft_type: str = "RANDLORA"
    r: int = 32
    projection_prng_key: int = 0
    save_projection: bool = True
    sparse: bool = False
    very_sparse: bool = False
    randlora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    randlora_alpha: int = 640
    bias: str = "none"
    init_weights: bool = True
