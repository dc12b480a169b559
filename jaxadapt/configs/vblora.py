"""VBLORA: `VBLoRAConfig`, with the fields and defaults of PEFT 0.21.2."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxadapt.configs.base import MethodFacts
from jaxadapt.configs.frozen import FrozenDict
from jaxadapt.configs.method_config import QUERY_AND_VALUE, LayersConfig
from jaxadapt.configs.validation import Problems


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class VBLoRAConfig(LayersConfig):
    """VB-LoRA (arXiv:2405.15179): the matrices of LoRA consist of vectors from one bank that all modules share.

    Besides the attributes of `Config`:

    Attributes:
        r: the rank.
        num_vectors: the number of vectors in the bank.
        vector_length: the length of each vector, which divides the inputs and the outputs of every module.
        topk: the number of vectors that are mixed for each part of a matrix.
        target_modules: the modules to adapt, as in `LoraConfig`.
        save_only_topk_weights: true for a file with the chosen vectors and their weights, which cannot be trained
            further; false for one with the logits of all vectors.
        vblora_dropout: the dropout of the input in training.
        exclude_modules, fan_in_fan_out, bias, modules_to_save, layers_to_transform, layers_pattern: as in `LoraConfig`.
        init_vector_bank_bound: the bank starts uniform between this number and its negative.
        init_logits_std: the logits start normal with this deviation.

    Raises:
        ConfigError: a value is invalid, or two values contradict each other; one error lists all problems.

    >>> VBLoRAConfig(target_modules=["q_proj"]).num_vectors
    256
    """

    facts: ClassVar[MethodFacts] = MethodFacts(
        trains="vblora_logits_A, vblora_logits_B, vblora_vector_bank",
        rows="put",
        learning_rate=1e-2,
        demo=FrozenDict({"vector_length": 64}),
        accuracy=0.334,
        time=1.27,
    )
    checks: ClassVar[Mapping[str, Any]] = {
        "r": "rank",
        "num_vectors": "rank",
        "vector_length": "rank",
        "topk": "rank",
        "vblora_dropout": "probability",
        "bias": ("none", "all", "vblora_only"),
    }
    default_targets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        **QUERY_AND_VALUE,
        "t5": {"target_modules": ("q", "k", "v", "o", "wi", "wo")},
    }

    peft_type: str = "VBLORA"
    r: int = 4
    num_vectors: int = 256
    vector_length: int = 256
    topk: int = 2
    exclude_modules: str | Collection[str] | None = None
    save_only_topk_weights: bool = False
    vblora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    init_vector_bank_bound: float = 0.02
    init_logits_std: float = 0.1

    def _check(self, problems: Problems) -> None:
        super()._check(problems)
        if self.topk > self.num_vectors:
            problems.add("topk", f"at most num_vectors, {self.num_vectors}", self.topk)
