"""CPT: `CPTConfig`, with the fields and defaults of PEFT 0.21.2."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxadapt.configs.base import MethodFacts
from jaxadapt.configs.frozen import FrozenDict
from jaxadapt.configs.method_config import PromptLearningConfig
from jaxadapt.configs.validation import Problems, is_ints

_LISTS = ("cpt_token_ids", "cpt_mask", "cpt_tokens_type_mask")


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class CPTConfig(PromptLearningConfig):
    """Context-aware prompt tuning (arXiv:2410.17222): the embeddings of examples, each moved by a short vector.

    The fields are PEFT's. Those of every configuration are described in `Config`, those of every prompt method in
    `PromptLearningConfig`. `num_virtual_tokens` is the number of token ids.

    Attributes:
        peft_type: always "CPT".
        cpt_token_ids: the token ids of the examples, whose embeddings the prompt starts from (default [0]).
        cpt_mask: one integer for each token, which PEFT keeps and does not use (default 1).
        cpt_tokens_type_mask: the type of each token (default 1). The remainder by 4 is 1 for the template of an input,
            2 for an input, 3 for the template of an output and 0 for an output, which is not trained. Outputs with
            larger types belong to later examples. 0 itself is no part of an example.
        opt_weighted_loss_type: "decay" weights the loss of each example's output (`jaxadapt.methods.cpt.loss`).
        opt_loss_decay_factor: the factor from one example to the one before it.
        opt_projection_epsilon: the largest norm of the vector of an input's token, times sqrt(token_dim / 2048).
        opt_projection_format_epsilon: the same for a template's token.
        tokenizer_name_or_path: the tokenizer of the token ids, for PEFT.

    Raises:
        ConfigError: a value is invalid, or two values contradict each other; one error lists all problems.

    >>> CPTConfig(cpt_token_ids=[5, 2, 7], task_type="CAUSAL_LM").num_virtual_tokens
    3
    """

    facts: ClassVar[MethodFacts] = MethodFacts(
        trains="delta_embedding",
        merges=False,
        learning_rate=1e-2,
        demo=FrozenDict({"cpt_token_ids": tuple(range(32, 48)), "opt_projection_epsilon": 10.0}),
    )
    checks: ClassVar[Mapping[str, Any]] = {
        **PromptLearningConfig.checks,
        **dict.fromkeys(_LISTS, "any"),
        "opt_weighted_loss_type": ("none", "decay"),
        "tokenizer_name_or_path": "text",
    }

    peft_type: str = "CPT"
    cpt_token_ids: Sequence[int] | None = None
    cpt_mask: Sequence[int] | None = None
    cpt_tokens_type_mask: Sequence[int] | None = None
    opt_weighted_loss_type: str = "none"
    opt_loss_decay_factor: float = 1.0
    opt_projection_epsilon: float = 0.1
    opt_projection_format_epsilon: float = 0.1
    tokenizer_name_or_path: str | None = None

    def __post_init__(self) -> None:
        ids: Any = (0,) if self.cpt_token_ids is None else self.cpt_token_ids
        defaults = {"cpt_token_ids": ids, "num_transformer_submodules": 1}
        if isinstance(ids, Sequence):
            ones = (1,) * len(ids)
            defaults |= {"cpt_mask": ones, "cpt_tokens_type_mask": ones, "num_virtual_tokens": len(ids)}
        for name, value in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        super().__post_init__()

    def _check(self, problems: Problems) -> None:
        super()._check(problems)
        for name in _LISTS:
            value: Any = getattr(self, name)
            if not (is_ints(value) and value and min(value) >= 0):
                problems.add(name, "a list of integers of 0 or more", value)
        ids: Any = self.cpt_token_ids
        count = len(ids) if is_ints(ids) else None
        if count is not None:
            for name in _LISTS[1:]:
                value = getattr(self, name)
                if is_ints(value) and len(value) != count:
                    problems.add(name, f"{count} integers, as many as cpt_token_ids", value)
            if self.num_virtual_tokens != count:
                problems.add("num_virtual_tokens", f"{count}, the number of cpt_token_ids", self.num_virtual_tokens)
        if self.task_type != "CAUSAL_LM":
            problems.add("task_type", '"CAUSAL_LM"', self.task_type)
        if self.num_transformer_submodules not in (None, 1):
            problems.add("num_transformer_submodules", "1", self.num_transformer_submodules)
