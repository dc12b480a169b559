"""The table of methods: each line names a type, and the module and the class of its configuration.

The method of the type VERA is in the file `vera.py` of `jaxadapt.methods`. All other parts of jaxadapt read this table,
and load a class or a method on first use.
"""

from __future__ import annotations

from collections.abc import Mapping

CLASSES: Mapping[str, tuple[str, str]] = {
    "ADALORA": ("jaxadapt.configs.low_rank", "AdaLoraConfig"),
    "ADAPTION_PROMPT": ("jaxadapt.configs.prompts", "AdaptionPromptConfig"),
    "BEFT": ("jaxadapt.configs.full_rank", "BeftConfig"),
    "BOFT": ("jaxadapt.configs.full_rank", "BOFTConfig"),
    "C3A": ("jaxadapt.configs.fixed_bases", "C3AConfig"),
    "CARTRIDGE": ("jaxadapt.configs.prompts", "CartridgeConfig"),
    "CPT": ("jaxadapt.configs.prompts", "CPTConfig"),
    "DEFT": ("jaxadapt.configs.low_rank", "DeftConfig"),
    "DELORA": ("jaxadapt.configs.low_rank", "DeloraConfig"),
    "FOURIERFT": ("jaxadapt.configs.fixed_bases", "FourierFTConfig"),
    "GRALORA": ("jaxadapt.configs.low_rank", "GraloraConfig"),
    "HIRA": ("jaxadapt.configs.low_rank", "HiraConfig"),
    "HRA": ("jaxadapt.configs.full_rank", "HRAConfig"),
    "IA3": ("jaxadapt.configs.full_rank", "IA3Config"),
    "LN_TUNING": ("jaxadapt.configs.full_rank", "LNTuningConfig"),
    "LOHA": ("jaxadapt.configs.low_rank", "LoHaConfig"),
    "LOKR": ("jaxadapt.configs.low_rank", "LoKrConfig"),
    "LORA": ("jaxadapt.configs.lora", "LoraConfig"),
    "MISS": ("jaxadapt.configs.low_rank", "MissConfig"),
    "MULTITASK_PROMPT_TUNING": ("jaxadapt.configs.prompts", "MultitaskPromptTuningConfig"),
    "OFT": ("jaxadapt.configs.full_rank", "OFTConfig"),
    "OSF": ("jaxadapt.configs.full_rank", "OSFConfig"),
    "P_TUNING": ("jaxadapt.configs.prompts", "PromptEncoderConfig"),
    "PEANUT": ("jaxadapt.configs.low_rank", "PeanutConfig"),
    "PREFIX_TUNING": ("jaxadapt.configs.prompts", "PrefixTuningConfig"),
    "PROMPT_TUNING": ("jaxadapt.configs.prompts", "PromptTuningConfig"),
    "PVERA": ("jaxadapt.configs.fixed_bases", "PveraConfig"),
    "RANDLORA": ("jaxadapt.configs.fixed_bases", "RandLoraConfig"),
    "ROAD": ("jaxadapt.configs.full_rank", "RoadConfig"),
    "SHIRA": ("jaxadapt.configs.full_rank", "ShiraConfig"),
    "SUPERTUNING": ("jaxadapt.configs.full_rank", "SupertuningConfig"),
    "TINYLORA": ("jaxadapt.configs.fixed_bases", "TinyLoraConfig"),
    "TRAINABLE_TOKENS": ("jaxadapt.configs.full_rank", "TrainableTokensConfig"),
    "UNILORA": ("jaxadapt.configs.fixed_bases", "UniLoraConfig"),
    "VBLORA": ("jaxadapt.configs.fixed_bases", "VBLoRAConfig"),
    "VERA": ("jaxadapt.configs.fixed_bases", "VeraConfig"),
    "WAVEFT": ("jaxadapt.configs.fixed_bases", "WaveFTConfig"),
}
"""{type: (module, class)}."""
