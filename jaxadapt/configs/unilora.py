"""UNILORA: `UniLoraConfig`, with the fields and defaults of PEFT 0.21.2."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxadapt.configs.base import MethodFacts
from jaxadapt.configs.method_config import QUERY_AND_VALUE, LayersConfig
from jaxadapt.configs.validation import Problems


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class UniLoraConfig(LayersConfig):
    """Uni-LoRA (arXiv:2506.00799): the entries of all LoRA matrices are those of one trained vector.

    Besides the attributes of `Config`:

    Attributes:
        r: the rank.
        proj_seed: the seed of the positions of the vector's entries.
        theta_d_length: the length of the vector.
        target_modules: the modules to adapt, as in `LoraConfig`.
        unilora_dropout: the dropout of the input in training.
        fan_in_fan_out, bias, modules_to_save, layers_to_transform, layers_pattern: as in `LoraConfig`.
        init_theta_d_bound: the vector starts uniform between this number and its negative.
        init_weights: false starts with normal values.
        save_indices: true for a file that holds the positions, so that reading needs no order of modules.

    Raises:
        ConfigError: a value is invalid, or two values contradict each other; one error lists all problems.

    >>> UniLoraConfig(target_modules=["q_proj"]).theta_d_length
    256
    """

    facts: ClassVar[MethodFacts] = MethodFacts(
        trains="unilora_theta_d", rows="put", merges_files=False, learning_rate=1.0, accuracy=0.002, time=1.14
    )
    checks: ClassVar[Mapping[str, Any]] = {
        "r": "rank",
        "theta_d_length": "rank",
        "unilora_dropout": "probability",
        "bias": ("none", "all", "unilora_only"),
    }
    default_targets: ClassVar[Mapping[str, Mapping[str, Any]]] = QUERY_AND_VALUE

    peft_type: str = "UNILORA"
    r: int = 4
    proj_seed: int = 42
    theta_d_length: int = 256
    unilora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    init_theta_d_bound: float = 0.02
    init_weights: bool = True
    save_indices: bool = False

    def _check(self, problems: Problems) -> None:
        super()._check(problems)
        if not self.init_theta_d_bound > 0:
            problems.add("init_theta_d_bound", "a positive number", self.init_theta_d_bound)
