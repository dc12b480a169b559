"""VERA: `VeraConfig`, with the fields and defaults of PEFT 0.21.2."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxadapt.configs.base import MethodFacts
from jaxadapt.configs.method_config import QUERY_AND_VALUE, LayersConfig


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class VeraConfig(LayersConfig):
    """VeRA (arXiv:2310.11454): two vectors per module scale random projections that all modules share.

    Besides the attributes of `Config`:

    Attributes:
        r: the rank, which is larger than LoRA's.
        target_modules: the modules to adapt, as in `LoraConfig`.
        projection_prng_key: the seed of the shared projections, drawn as PyTorch draws them.
        save_projection: false leaves the projections out of the file; a reader draws them again from the seed.
        vera_dropout: the dropout of the input in training.
        d_initial: the initial value of the vector over ranks.
        fan_in_fan_out, bias, modules_to_save, layers_to_transform, layers_pattern: as in `LoraConfig`.
        init_weights: false draws the vector over ranks at random, and fills the vector over outputs with ones.

    Raises:
        ConfigError: a value is invalid, or two values contradict each other; one error lists all problems.

    >>> VeraConfig(target_modules=["q_proj"]).r
    256
    """

    new_values: ClassVar[Mapping[str, float]] = {"vera_lambda_b": 0.0}
    tensor_pairs: ClassVar[tuple[tuple[str, str], ...]] = (("vera_lambda_b", "vera_lambda_d"),)
    facts: ClassVar[MethodFacts] = MethodFacts(
        trains="vera_lambda_b, vera_lambda_d",
        rows="call",
        learning_rate=2e-2,
        accuracy=0.354,
        time=1.07,
    )
    checks: ClassVar[Mapping[str, Any]] = {
        "r": "rank",
        "vera_dropout": "probability",
        "bias": ("none", "all", "vera_only"),
    }
    default_targets: ClassVar[Mapping[str, Mapping[str, Any]]] = QUERY_AND_VALUE

    peft_type: str = "VERA"
    r: int = 256
    projection_prng_key: int = 0
    save_projection: bool = True
    vera_dropout: float = 0.0
    d_initial: float = 0.1
    fan_in_fan_out: bool = False
    bias: str = "none"
    init_weights: bool = True
