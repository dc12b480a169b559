"""TINYLORA: `TinyLoraConfig`, with the fields and defaults of PEFT 0.21.2."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxadapt.configs.base import MethodFacts
from jaxadapt.configs.method_config import QUERY_AND_VALUE, LayersConfig
from jaxadapt.configs.validation import Problems


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class TinyLoraConfig(LayersConfig):
    """TinyLoRA (arXiv:2602.04118): a tiny vector mixes random matrices between a weight's largest singular vectors.

    Besides the attributes of `Config`:

    Attributes:
        r: the number of singular vectors.
        u: the length of each trained vector.
        weight_tying: the share of modules that have no vector of their own: 0 gives each module a vector, 1 all
            modules the same.
        projection_seed: the seed of the random matrices, drawn as PyTorch draws them.
        save_projection: false leaves the random matrices out of the file; a reader draws them again.
        init_v_bound: the bound of the vector's initial values with `init_weights="uniform"`.
        target_modules: the modules to adapt, as in `LoraConfig`.
        tinylora_dropout: the dropout of the input in training.
        fan_in_fan_out, bias, modules_to_save, layers_to_transform, layers_pattern: as in `LoraConfig`.
        init_weights: true starts with zeros, "uniform" with values between `init_v_bound` and its negative. PEFT leaves
            the vector without values for false; here false starts with zeros.

    Raises:
        ConfigError: a value is invalid, or two values contradict each other; one error lists all problems.

    >>> TinyLoraConfig(target_modules=["q_proj"]).u
    64
    """

    facts: ClassVar[MethodFacts] = MethodFacts(
        trains="tinylora_v", rows="put", merges_files=False, learning_rate=1e-3, accuracy=0.012, time=1.1
    )
    tensor_parts: ClassVar[tuple[str, ...]] = ("tinylora_v",)
    checks: ClassVar[Mapping[str, Any]] = {
        "r": "rank",
        "u": "rank",
        "tinylora_dropout": "probability",
        "weight_tying": "number",
        "init_weights": (True, False, "uniform"),
        "bias": ("none", "all", "tinylora_only"),
    }
    default_targets: ClassVar[Mapping[str, Mapping[str, Any]]] = QUERY_AND_VALUE

    peft_type: str = "TINYLORA"
    r: int = 2
    u: int = 64
    weight_tying: float = 0.0
    projection_seed: int = 42
    save_projection: bool = True
    init_v_bound: float = 0.02
    tinylora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    init_weights: bool | str = True

    def _check(self, problems: Problems) -> None:
        super()._check(problems)
        if not 0 <= self.weight_tying <= 1:
            problems.add("weight_tying", "a number in [0, 1]", self.weight_tying)
