"""OSF: `OSFConfig`, with the fields and defaults of PEFT 0.21.2."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxadapt.configs.base import MethodFacts
from jaxadapt.configs.method_config import TargetsConfig
from jaxadapt.configs.validation import Problems, is_number

_LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "up_proj")


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class OSFConfig(TargetsConfig):
    """OSF (arXiv:2504.07097): the small singular directions of a weight are trained, and the large ones are kept.

    Besides the attributes of `Config`:

    Attributes:
        effective_rank: the number of singular directions to keep, or a fraction of the smaller size of the weight.
            None keeps half of them.
        target_modules, modules_to_save: as in `LoraConfig`, but None means "all-linear" for the families without a
            default of PEFT.
        rank_pattern: other values of `effective_rank`, by a regular expression that is searched in the module's path;
            the first one that matches is used.
        init_weights: false starts with random directions instead of the weight's own.
        target_svd_config: ignored, as in PEFT.

    Raises:
        ConfigError: a value is invalid, or two values contradict each other; one error lists all problems.

    >>> OSFConfig(target_modules=["q_proj"]).effective_rank
    """

    facts: ClassVar[MethodFacts] = MethodFacts(
        trains="osf_svd_params_S_low, osf_svd_params_U_low, osf_svd_params_V_low",
        merges_files=False,
        learning_rate=1e-4,
        accuracy=0.427,
        time=2.82,
    )
    tensor_parts: ClassVar[tuple[str, ...]] = ("osf_svd_params",)
    checks: ClassVar[Mapping[str, Any]] = {"effective_rank": "any", "init_weights": (True, False, None)}
    default_targets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "gpt2": {"target_modules": ("c_attn", "c_proj")},
        "gptj": {"target_modules": ("q_proj", "v_proj", "k_proj", "out_proj", "fc_in", "fc_out")},
        r"llama|mi[sx]tral|qwen[23](?!_moe)|gemma": {"target_modules": _LLAMA},
        ".*": {"target_modules": "all-linear"},
    }

    peft_type: str = "OSF"
    effective_rank: int | float | None = None
    rank_pattern: Mapping[str, int | float] | None = None
    init_weights: bool | None = True
    target_svd_config: Mapping[str, int] | None = None

    def _check(self, problems: Problems) -> None:
        super()._check(problems)
        ranks: dict[str, Any] = {"effective_rank": self.effective_rank}
        if isinstance(self.rank_pattern, Mapping):
            ranks |= {f"rank_pattern[{key!r}]": value for key, value in self.rank_pattern.items()}
            for key in self.rank_pattern:
                problems.pattern("rank_pattern", key)
        for name, value in ranks.items():
            if value is not None and not (is_number(value) and value > 0):
                problems.add(name, "a positive number or null", value)
