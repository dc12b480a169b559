"""The table of methods: each line names a configuration class, and with it a type and the file of its method.

The file `vera.py` holds the type VERA: its configuration in this package, and its method in `jaxadapt.methods`. All
other parts of jaxadapt read this table. The classes load on first use.
"""

from __future__ import annotations

import functools
import importlib
from typing import TYPE_CHECKING, Any

from jaxadapt.core.lazy import typed_imports

if TYPE_CHECKING:
    from jaxadapt.configs.adalora import AdaLoraConfig as AdaLoraConfig
    from jaxadapt.configs.adaption_prompt import AdaptionPromptConfig as AdaptionPromptConfig
    from jaxadapt.configs.beft import BeftConfig as BeftConfig
    from jaxadapt.configs.boft import BOFTConfig as BOFTConfig
    from jaxadapt.configs.c3a import C3AConfig as C3AConfig
    from jaxadapt.configs.cartridge import CartridgeConfig as CartridgeConfig
    from jaxadapt.configs.cpt import CPTConfig as CPTConfig
    from jaxadapt.configs.deft import DeftConfig as DeftConfig
    from jaxadapt.configs.delora import DeloraConfig as DeloraConfig
    from jaxadapt.configs.fourierft import FourierFTConfig as FourierFTConfig
    from jaxadapt.configs.gralora import GraloraConfig as GraloraConfig
    from jaxadapt.configs.hira import HiraConfig as HiraConfig
    from jaxadapt.configs.hra import HRAConfig as HRAConfig
    from jaxadapt.configs.ia3 import IA3Config as IA3Config
    from jaxadapt.configs.ln_tuning import LNTuningConfig as LNTuningConfig
    from jaxadapt.configs.loha import LoHaConfig as LoHaConfig
    from jaxadapt.configs.lokr import LoKrConfig as LoKrConfig
    from jaxadapt.configs.lora import LoraConfig as LoraConfig
    from jaxadapt.configs.miss import MissConfig as MissConfig
    from jaxadapt.configs.multitask_prompt_tuning import MultitaskPromptTuningConfig as MultitaskPromptTuningConfig
    from jaxadapt.configs.oft import OFTConfig as OFTConfig
    from jaxadapt.configs.osf import OSFConfig as OSFConfig
    from jaxadapt.configs.p_tuning import PromptEncoderConfig as PromptEncoderConfig
    from jaxadapt.configs.peanut import PeanutConfig as PeanutConfig
    from jaxadapt.configs.prefix_tuning import PrefixTuningConfig as PrefixTuningConfig
    from jaxadapt.configs.prompt_tuning import PromptTuningConfig as PromptTuningConfig
    from jaxadapt.configs.pvera import PveraConfig as PveraConfig
    from jaxadapt.configs.randlora import RandLoraConfig as RandLoraConfig
    from jaxadapt.configs.road import RoadConfig as RoadConfig
    from jaxadapt.configs.shira import ShiraConfig as ShiraConfig
    from jaxadapt.configs.supertuning import SupertuningConfig as SupertuningConfig
    from jaxadapt.configs.tinylora import TinyLoraConfig as TinyLoraConfig
    from jaxadapt.configs.trainable_tokens import TrainableTokensConfig as TrainableTokensConfig
    from jaxadapt.configs.unilora import UniLoraConfig as UniLoraConfig
    from jaxadapt.configs.vblora import VBLoRAConfig as VBLoRAConfig
    from jaxadapt.configs.vera import VeraConfig as VeraConfig
    from jaxadapt.configs.waveft import WaveFTConfig as WaveFTConfig


@functools.cache
def config_classes() -> dict[str, tuple[str, str]]:
    """Return `{peft_type: (module, class name)}` of the table.

    >>> config_classes()["LORA"]
    ('jaxadapt.configs.lora', 'LoraConfig')
    """
    return {module.rpartition(".")[2].upper(): (module, name) for name, (module, _) in typed_imports(__name__).items()}


def load_class(peft_type: str) -> Any:
    """Return the configuration class of a type in the table, or None."""
    found = config_classes().get(peft_type)
    return None if found is None else vars(importlib.import_module(found[0]))[found[1]]


def __getattr__(name: str) -> Any:
    found = next((module for module, known in config_classes().values() if known == name), None)
    if found is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name)
    return vars(importlib.import_module(found))[name]
