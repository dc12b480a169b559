"""TRAINABLE_TOKENS: `TrainableTokensConfig`, with the fields and defaults of PEFT 0.21.2."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxadapt.configs.base import MethodFacts
from jaxadapt.configs.frozen import FrozenDict
from jaxadapt.configs.method_config import MethodConfig
from jaxadapt.configs.validation import Problems, is_ints


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class TrainableTokensConfig(MethodConfig):
    """Training of single rows of an embedding, as LoRA's `trainable_token_indices` without LoRA.

    Besides the attributes of `Config`:

    Attributes:
        token_indices: the rows to train.
        target_modules: the embeddings, as in `LoraConfig`; None selects the model's token embedding.
        init_weights: true starts with the embedding's own rows, false with random ones.

    Raises:
        ConfigError: a value is invalid, or two values contradict each other; one error lists all problems.

    >>> TrainableTokensConfig(token_indices=[5, 7]).token_indices
    (5, 7)
    """

    facts: ClassVar[MethodFacts] = MethodFacts(
        trains="trainable_tokens_delta",
        demo=FrozenDict({"target_modules": ("embed_tokens",), "token_indices": tuple(range(64))}),
        accuracy=0.246,
        time=1.04,
    )
    checks: ClassVar[Mapping[str, Any]] = {}
    default_targets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "gpt2|gptj|gpt_neo(?!x)": {"target_modules": ("wte",)},
        "gpt_neox": {"target_modules": ("embed_in",)},
        "bert|roberta|bloom|falcon": {"target_modules": ("word_embeddings",)},
        "t5": {"target_modules": ("shared",)},
        "": {"target_modules": ("embed_tokens",)},
    }

    peft_type: str = "TRAINABLE_TOKENS"
    token_indices: Collection[int] = ()
    target_modules: str | Collection[str] | None = None
    init_weights: bool = True

    def _check(self, problems: Problems) -> None:
        super()._check(problems)
        indices: Any = self.token_indices
        if not (is_ints(indices) and min(indices, default=0) >= 0):
            problems.add("token_indices", "a list of integers from 0 on", indices)
        elif len(set(indices)) < len(indices):
            repeated = sorted({i for i in indices if tuple(indices).count(i) > 1})
            problems.add("token_indices", "each token once", repeated, "remove the repeated tokens")
