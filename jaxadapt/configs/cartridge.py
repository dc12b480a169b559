"""CARTRIDGE: `CartridgeConfig`, with the fields and defaults of PEFT 0.21.2."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxadapt.configs.base import MethodFacts
from jaxadapt.configs.method_config import PromptLearningConfig
from jaxadapt.configs.validation import Problems, is_int


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class CartridgeConfig(PromptLearningConfig):
    """Cartridges (arXiv:2506.06266): a prefix of keys and values whose first tokens stay fixed.

    The fields are PEFT's. Those of every configuration are described in `Config`, those of every prompt method in
    `PromptLearningConfig`.

    Attributes:
        peft_type: always "CARTRIDGE".
        num_frozen_tokens: the number of virtual tokens at the start that are not trained (default 1).

    Raises:
        ConfigError: a value is invalid, or two values contradict each other; one error lists all problems.

    >>> CartridgeConfig(num_virtual_tokens=20).num_frozen_tokens
    1
    """

    facts: ClassVar[MethodFacts] = MethodFacts(trains="trainable_embedding", merges=False, learning_rate=3e-2)
    _sizes: ClassVar[tuple[str, ...]] = ("num_virtual_tokens", "token_dim", "num_layers", "num_attention_heads")
    checks: ClassVar[Mapping[str, Any]] = {**PromptLearningConfig.checks, "num_frozen_tokens": "size"}

    peft_type: str = "CARTRIDGE"
    num_frozen_tokens: int = 1

    def _check(self, problems: Problems) -> None:
        super()._check(problems)
        frozen, n = self.num_frozen_tokens, self.num_virtual_tokens
        if is_int(frozen) and is_int(n) and n is not None and frozen > n:
            problems.add("num_frozen_tokens", f"at most num_virtual_tokens={n}", frozen)
