"""PEFT's default targets that several methods share, by a pattern of the model type.

PEFT has no defaults for GPT-OSS, DeepSeek, Qwen 3 MoE and the language model of Llama 4.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

QUERY_AND_VALUE: Mapping[str, Mapping[str, Any]] = {
    "gpt2": {"target_modules": ("c_attn",)},
    "bert|roberta": {"target_modules": ("query", "value")},
    "t5": {"target_modules": ("q", "v")},
    "gpt_neo(?!x)|gptj": {"target_modules": ("q_proj", "v_proj")},
    r"llama(?!4)|mi[sx]tral|qwen(?!\d_moe)|gemma": {"target_modules": ("q_proj", "v_proj")},
}
"""The projections of queries and values."""
