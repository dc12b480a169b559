"""LN_TUNING: `LNTuningConfig`, with the fields and defaults of PEFT 0.21.2."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxadapt.configs.base import MethodFacts
from jaxadapt.configs.frozen import FrozenDict
from jaxadapt.configs.method_config import MethodConfig

_NORMS = ("input_layernorm", "post_attention_layernorm")


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class LNTuningConfig(MethodConfig):
    """LN tuning (arXiv:2312.11420): full training of the norms of a model.

    Besides the attributes of `Config`:

    Attributes:
        target_modules: the norms to train, or any other modules, as in `LoraConfig`. None selects PEFT's default for
            the model family.
        exclude_modules, modules_to_save: as in `LoraConfig`.

    Raises:
        ConfigError: a value is invalid, or two values contradict each other; one error lists all problems.

    >>> LNTuningConfig(target_modules=["norm"]).peft_type
    'LN_TUNING'
    """

    facts: ClassVar[MethodFacts] = MethodFacts(
        trains="all tensors of the target modules",
        demo=FrozenDict({"target_modules": (*_NORMS, "norm")}),
        learning_rate=5e-3,
        accuracy=0.0,
        time=0.97,
    )
    checks: ClassVar[Mapping[str, Any]] = {}
    default_targets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "gpt2": {"target_modules": ("ln_1", "ln_2", "ln_f")},
        "gptj": {"target_modules": ("ln_1", "ln_f")},
        "t5": {"target_modules": ("layer_norm", "final_layer_norm")},
        "gemma[23]": {
            "target_modules": (*_NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm", "norm"),
        },
        # The keymap "llama" also serves Qwen2, which has other defaults in PEFT, so only numbered Llamas have one here.
        r"llama[123]|mistral|gemma": {"target_modules": (*_NORMS, "norm")},
        r"qwen[23](?!_moe)": {"target_modules": ("post_attention_layernorm",)},
    }

    peft_type: str = "LN_TUNING"
    target_modules: str | Collection[str] | None = None
    exclude_modules: str | Collection[str] | None = None
    modules_to_save: str | Collection[str] | None = None
