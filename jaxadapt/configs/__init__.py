"""PEFT-compatible configuration classes, read from and written to `adapter_config.json`. Imports no JAX."""

from jaxadapt.configs.base import PEFT_VERSION, TASK_TYPES, Config, GenericConfig
from jaxadapt.configs.frozen import FrozenDict, freeze, thaw
from jaxadapt.configs.ia3 import IA3Config
from jaxadapt.configs.lora import LoraConfig
from jaxadapt.configs.prefix_tuning import PrefixTuningConfig
from jaxadapt.configs.prompt import PromptLearningConfig
from jaxadapt.configs.serialization import dumps, from_dict, loads

__all__ = [
    "PEFT_VERSION",
    "TASK_TYPES",
    "Config",
    "FrozenDict",
    "GenericConfig",
    "IA3Config",
    "LoraConfig",
    "PrefixTuningConfig",
    "PromptLearningConfig",
    "dumps",
    "freeze",
    "from_dict",
    "loads",
    "thaw",
]
