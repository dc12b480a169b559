"""PEFT-compatible configuration classes, read from and written to `adapter_config.json`. Imports no JAX."""

from jaxadapt.configs.base import PEFT_VERSION, TASK_TYPES, Config, GenericConfig
from jaxadapt.configs.cartridge import CartridgeConfig
from jaxadapt.configs.frozen import FrozenDict, freeze, thaw
from jaxadapt.configs.ia3 import IA3Config
from jaxadapt.configs.lora import LoraConfig
from jaxadapt.configs.p_tuning import PromptEncoderConfig
from jaxadapt.configs.prefix_tuning import PrefixTuningConfig
from jaxadapt.configs.prompt import PromptLearningConfig
from jaxadapt.configs.prompt_tuning import MultitaskPromptTuningConfig, PromptTuningConfig
from jaxadapt.configs.serialization import dumps, from_dict, loads

__all__ = [
    "PEFT_VERSION",
    "TASK_TYPES",
    "CartridgeConfig",
    "Config",
    "FrozenDict",
    "GenericConfig",
    "IA3Config",
    "LoraConfig",
    "MultitaskPromptTuningConfig",
    "PrefixTuningConfig",
    "PromptEncoderConfig",
    "PromptLearningConfig",
    "PromptTuningConfig",
    "dumps",
    "freeze",
    "from_dict",
    "loads",
    "thaw",
]
