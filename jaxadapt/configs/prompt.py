"""The fields that all prompt methods have: `PromptLearningConfig`, with those of PEFT 0.21.2."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxadapt.configs.facts import MethodFacts
from jaxadapt.configs.method_config import MethodConfig
from jaxadapt.configs.validation import Problems, is_int


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class PromptLearningConfig(MethodConfig):
    """The base class of the configurations whose adapter is a sequence of virtual tokens. Use one of its subclasses.

    `adapt` fills the sizes of the base that are None in, as PEFT does, if it can trace the model (`example=`).

    Attributes:
        num_virtual_tokens: the number n of virtual tokens, a positive integer.
        token_dim: the size of one virtual token: the width of the embeddings, or for keys and values the number of
            their heads times the size of one head. None: the base's.
        num_transformer_submodules: 2 for an encoder with a decoder, else 1. None: 2 if `task_type` is "SEQ_2_SEQ_LM".
        num_attention_heads: the number of attention heads of the base; for keys and values that of their heads. None:
            the base's.
        num_layers: the number of attention layers of the base. None: the base's.
        modules_to_save: modules that are trained in full beside the virtual tokens.
    """

    facts: ClassVar[MethodFacts] = MethodFacts(merges=False)
    file_tensors: ClassVar[tuple[str, ...]] = ("prompt_embeddings",)
    checks: ClassVar[Mapping[str, Any]] = dict.fromkeys(
        ("num_virtual_tokens", "token_dim", "num_attention_heads", "num_layers"), "rank"
    )
    # The size fields that the file must state. PEFT fills in the others from the base when it loads.
    _sizes: ClassVar[tuple[str, ...]] = ("num_virtual_tokens", "token_dim")

    num_virtual_tokens: int | None = None
    token_dim: int | None = None
    num_transformer_submodules: int | None = None
    num_attention_heads: int | None = None
    num_layers: int | None = None
    modules_to_save: Collection[str] | None = None

    def _check(self, problems: Problems) -> None:
        super()._check(problems)
        if self.num_transformer_submodules not in (None, 1, 2):
            problems.add("num_transformer_submodules", "1, 2 or null", self.num_transformer_submodules)
        width, heads = self.token_dim, self.num_attention_heads
        if is_int(width) and is_int(heads) and width and heads and heads > 0 and width % heads:
            problems.add("token_dim", f"a multiple of num_attention_heads={heads}", width)

    @property
    def submodules(self) -> int:
        """The number of transformers in the base that get virtual tokens of their own."""
        default = 2 if self.task_type == "SEQ_2_SEQ_LM" else 1
        return self.num_transformer_submodules or default

    @property
    def missing_sizes(self) -> tuple[str, ...]:
        """The fields that must have a value before the adapter's tensors have shapes."""
        return tuple(name for name in self._sizes if getattr(self, name) is None)
