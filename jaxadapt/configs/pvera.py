"""PVERA: `PveraConfig`, with the fields and defaults of PEFT 0.21.2."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxadapt.configs.base import MethodFacts
from jaxadapt.configs.method_config import QUERY_AND_VALUE, LayersConfig


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class PveraConfig(LayersConfig):
    """PVeRA (arXiv:2512.07703): VeRA whose vector over ranks is the mean and the variance of a distribution.

    Besides the attributes of `Config`:

    Attributes:
        r: the rank, which is larger than LoRA's.
        target_modules: the modules to adapt, as in `LoraConfig`.
        projection_prng_key: the seed of the shared projections, drawn as PyTorch draws them.
        save_projection: false leaves the projections out of the file; a reader draws them again from the seed.
        pvera_dropout: the dropout of the input in training.
        d_initial: the initial value of the vector over ranks.
        fan_in_fan_out, bias, modules_to_save, layers_to_transform, layers_pattern: as in `LoraConfig`.
        init_weights: false draws the vector over ranks at random, and fills the vector over outputs with ones.
        sample_at_inference: true draws from the distribution outside training as well, which jaxadapt refuses.
        generator_seed: the seed of these draws in PEFT.

    Raises:
        ConfigError: a value is invalid, or two values contradict each other; one error lists all problems.

    >>> PveraConfig(target_modules=["q_proj"]).r
    256
    """

    new_values: ClassVar[Mapping[str, float]] = {"pvera_lambda_b": 0.0}
    facts: ClassVar[MethodFacts] = MethodFacts(
        trains="pvera_lambda_b, pvera_lambda_d", rows="call", learning_rate=2e-2, accuracy=0.353, time=1.15
    )
    checks: ClassVar[Mapping[str, Any]] = {
        "r": "rank",
        "pvera_dropout": "probability",
        "bias": ("none", "all", "pvera_only"),
        "generator_seed": "integer",
    }
    default_targets: ClassVar[Mapping[str, Mapping[str, Any]]] = QUERY_AND_VALUE

    peft_type: str = "PVERA"
    r: int = 256
    projection_prng_key: int = 0
    save_projection: bool = True
    pvera_dropout: float = 0.0
    d_initial: float = 0.1
    fan_in_fan_out: bool = False
    bias: str = "none"
    init_weights: bool = True
    sample_at_inference: bool = False
    generator_seed: int | None = None
