"""SUPERTUNING: `SupertuningConfig`, with the fields and defaults of PEFT 0.21.2."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxadapt.configs.base import MethodFacts
from jaxadapt.configs.method_config import QUERY_AND_VALUE, TargetsConfig
from jaxadapt.configs.validation import Problems, is_int, is_number


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class SupertuningConfig(TargetsConfig):
    """Super-Tuning (arXiv:2607.09287): a change of the largest entries of a weight, optionally with LoRA's.

    Besides the attributes of `Config`:

    Attributes:
        target_modules: the modules to adapt, as in `LoraConfig`.
        modules_to_save: as in `LoraConfig`.
        sparsity: the share of a weight's entries that stays as it is, from 0 to below 1.
        select_top: true changes the entries of the largest magnitude, false those of the smallest.
        r: the rank of an additional LoRA; null for none.
        lora_alpha: its change is multiplied by lora_alpha / r; 2·r by default.
        lora_dropout: the dropout of its input in training.
        init_weights: true starts without a change of the weight, false with a random one.
        save_precomputed_indices: false leaves the positions out of the file; a reader finds them in the base weight.

    Raises:
        ConfigError: a value is invalid, or two values contradict each other; one error lists all problems.

    >>> SupertuningConfig(target_modules=["q_proj"], r=4).lora_alpha
    8
    """

    facts: ClassVar[MethodFacts] = MethodFacts(trains="supertuning_values", learning_rate=1e-2)
    checks: ClassVar[Mapping[str, Any]] = {"r": "any", "lora_alpha": "any", "lora_dropout": "probability"}
    default_targets: ClassVar[Mapping[str, Mapping[str, Any]]] = QUERY_AND_VALUE

    peft_type: str = "SUPERTUNING"
    sparsity: float = 0.99
    select_top: bool = True
    r: int | None = None
    lora_alpha: float | None = None
    lora_dropout: float = 0.0
    init_weights: bool = True
    save_precomputed_indices: bool = True

    def __post_init__(self) -> None:
        if self.lora_alpha is None and isinstance(self.r, int):
            object.__setattr__(self, "lora_alpha", 2 * self.r)  # as in PEFT
        super().__post_init__()

    def _check(self, problems: Problems) -> None:
        super()._check(problems)
        sparsity, r, alpha = self.get("sparsity"), self.get("r"), self.get("lora_alpha")
        if not (is_number(sparsity) and 0 <= sparsity < 1):
            problems.add("sparsity", "from 0 to below 1", sparsity)
        if r is not None and not (is_int(r) and r > 0):
            problems.add("r", "a positive integer or null", r)
        if r is None and alpha is not None:
            problems.add("lora_alpha", "null if r is null", alpha, "set r, or remove lora_alpha")
        elif alpha is not None and not is_number(alpha):
            problems.add("lora_alpha", "a number or null", alpha)
