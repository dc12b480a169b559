"""P_TUNING: `PromptEncoderConfig`, with the fields and defaults of PEFT 0.21.2."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxadapt.configs.base import MethodFacts
from jaxadapt.configs.method_config import PromptLearningConfig


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class PromptEncoderConfig(PromptLearningConfig):
    """P-tuning (arXiv:2103.10385): prompt tuning whose embeddings are the output of a trained network.

    The fields are PEFT's. Those of every configuration are described in `Config`, those of every prompt method in
    `PromptLearningConfig`. A saved file holds the network's output, and cannot be trained further in this form.

    Attributes:
        peft_type: always "P_TUNING".
        encoder_reparameterization_type: the network: "MLP" (three dense layers) or "LSTM" (a bidirectional LSTM and two
            dense layers).
        encoder_hidden_size: the width of the network. None: `token_dim`.
        encoder_num_layers: the number of layers of the LSTM (default 2). An MLP always has three dense layers.
        encoder_dropout: the dropout between the layers of the LSTM. `adapt` refuses it; files keep it.

    Raises:
        ConfigError: a value is invalid, or two values contradict each other; one error lists all problems.

    >>> PromptEncoderConfig(num_virtual_tokens=20).encoder_reparameterization_type
    'MLP'
    """

    facts: ClassVar[MethodFacts] = MethodFacts(
        trains="all tensors of the encoder", merges=False, accuracy=0.35, time=0.97
    )
    checks: ClassVar[Mapping[str, Any]] = {
        **PromptLearningConfig.checks,
        "encoder_reparameterization_type": ("MLP", "LSTM"),
        "encoder_hidden_size": "rank",
        "encoder_num_layers": "rank",
        "encoder_dropout": "probability",
    }

    peft_type: str = "P_TUNING"
    encoder_reparameterization_type: str = "MLP"
    encoder_hidden_size: int | None = None
    encoder_num_layers: int = 2
    encoder_dropout: float = 0.0
