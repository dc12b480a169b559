"""PROMPT_TUNING: `PromptTuningConfig`, with the fields and defaults of PEFT 0.21.2."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxadapt.configs.base import MethodFacts
from jaxadapt.configs.frozen import FrozenDict
from jaxadapt.configs.method_config import PromptLearningConfig
from jaxadapt.configs.validation import Problems


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class PromptTuningConfig(PromptLearningConfig):
    """Prompt tuning (arXiv:2104.08691): trained embeddings before those of the tokens.

    The fields are PEFT's. Those of every configuration are described in `Config`, those of every prompt method in
    `PromptLearningConfig`.

    Attributes:
        peft_type: always "PROMPT_TUNING".
        prompt_tuning_init: the initial values: "RANDOM" (normal), "SAMPLE_VOCAB" (the embeddings of random tokens) or
            "TEXT" (those of the tokens of a text, repeated or cut; pass them to `adapt` as `prompt_tokens=`).
        prompt_tuning_init_text: the text of "TEXT". jaxadapt keeps it and has no tokenizer.
        tokenizer_name_or_path: the tokenizer of "TEXT", for PEFT.
        tokenizer_kwargs: arguments of the tokenizer of "TEXT", for PEFT.

    Raises:
        ConfigError: a value is invalid, or two values contradict each other; one error lists all problems.

    >>> PromptTuningConfig(num_virtual_tokens=20).prompt_tuning_init
    'RANDOM'
    """

    facts: ClassVar[MethodFacts] = MethodFacts(
        trains="prompt_embeddings",
        merges=False,
        learning_rate=3e-2,
        demo=FrozenDict({"prompt_tuning_init": "SAMPLE_VOCAB"}),
        accuracy=0.343,
        time=1.52,
    )
    checks: ClassVar[Mapping[str, Any]] = {
        **PromptLearningConfig.checks,
        "prompt_tuning_init": ("TEXT", "SAMPLE_VOCAB", "RANDOM"),
        "prompt_tuning_init_text": "text",
        "tokenizer_name_or_path": "text",
        "tokenizer_kwargs": "object",
    }

    peft_type: str = "PROMPT_TUNING"
    prompt_tuning_init: str = "RANDOM"
    prompt_tuning_init_text: str | None = None
    tokenizer_name_or_path: str | None = None
    tokenizer_kwargs: Mapping[str, Any] | None = None

    def _check(self, problems: Problems) -> None:
        super()._check(problems)
        if self.prompt_tuning_init == "TEXT":
            for name in ("prompt_tuning_init_text", "tokenizer_name_or_path"):
                if not getattr(self, name):
                    problems.add(name, 'a value, because prompt_tuning_init is "TEXT"', getattr(self, name))
        elif self.tokenizer_kwargs:
            problems.add("tokenizer_kwargs", 'null unless prompt_tuning_init is "TEXT"', self.tokenizer_kwargs)
