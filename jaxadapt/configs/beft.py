"""BEFT: `BeftConfig`, with the fields and defaults of PEFT 0.21.2."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxadapt.configs.base import MethodFacts
from jaxadapt.configs.method_config import TargetsConfig


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class BeftConfig(TargetsConfig):
    """BEFT: a trained vector is added to the output of each module, as a bias.

    Besides the attributes of `Config`:

    Attributes:
        target_modules: the modules to adapt, as in `LoraConfig`. None selects the projection of the values.
        modules_to_save: as in `LoraConfig`.
        init_weights: true starts with zeros, false with normal values.

    Raises:
        ConfigError: a value is invalid, or two values contradict each other; one error lists all problems.

    >>> BeftConfig(target_modules=["v_proj"]).init_weights
    True
    """

    new_values: ClassVar[Mapping[str, float]] = {"beft_bias": 0.0}
    facts: ClassVar[MethodFacts] = MethodFacts(
        trains="beft_bias", rows="call", learning_rate=1e-2, accuracy=0.321, time=0.94
    )
    checks: ClassVar[Mapping[str, Any]] = {}
    default_targets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "bert|roberta": {"target_modules": ("value",)},
        "t5": {"target_modules": ("v",)},
        r"gpt_neo(?!x)|gptj|llama|mi[sx]tral|qwen(?!\d_moe)|gemma": {"target_modules": ("v_proj",)},
    }

    peft_type: str = "BEFT"
    init_weights: bool = True
