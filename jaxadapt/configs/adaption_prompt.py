"""ADAPTION_PROMPT: `AdaptionPromptConfig`, with the fields and defaults of PEFT 0.21.2."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxadapt.configs.base import MethodFacts
from jaxadapt.configs.frozen import FrozenDict
from jaxadapt.configs.method_config import MethodConfig


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class AdaptionPromptConfig(MethodConfig):
    """LLaMA-Adapter (arXiv:2303.16199): trained tokens that the last layers attend to, by a gate that starts closed.

    The fields are PEFT's. Those of every configuration are described in `Config`.

    Attributes:
        peft_type: always "ADAPTION_PROMPT".
        target_modules: the end of the names of the attention modules. None: "self_attn", Llama's.
        adapter_len: the number of tokens in each layer.
        adapter_layers: the number of layers that have tokens, counted from the last one.

    Raises:
        ConfigError: a value is invalid, or two values contradict each other; one error lists all problems.

    >>> AdaptionPromptConfig(adapter_len=4, adapter_layers=2).adapter_len
    4
    """

    tensor_prefix: ClassVar[str | None] = "adaption_"
    target_is_expression: ClassVar[bool] = False
    new_values: ClassVar[Mapping[str, float]] = {"adaption_gate": 0.0}
    facts: ClassVar[MethodFacts] = MethodFacts(
        trains="adaption_gate, adaption_prompt",
        merges=False,
        learning_rate=0.1,
        demo=FrozenDict({"target_modules": "self_attn", "adapter_len": 10, "adapter_layers": 20}),
        accuracy=0.384,
        time=1.21,
    )
    checks: ClassVar[Mapping[str, Any]] = {"target_modules": "text", "adapter_len": "rank", "adapter_layers": "rank"}
    default_targets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"": {"target_modules": "self_attn"}}
    main_fields: ClassVar[tuple[str, ...]] = ("adapter_len", "adapter_layers")

    peft_type: str = "ADAPTION_PROMPT"
    target_modules: str | None = None
    adapter_len: int | None = None
    adapter_layers: int | None = None
