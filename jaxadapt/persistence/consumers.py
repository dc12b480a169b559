"""Programs that read adapter files, and the reasons reasons they refuse one. Pure functions of configuration and keys.

Tested by comparing each reader's outputs with PEFT's for the same adapters (vLLM 0.32, the llama.cpp converter of
llama-cpp-python 0.3.36); for SGLang, TGI and LoRAX taken from their sources.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from jaxadapt.configs import Config

_VLLM_KEYS = re.compile(r".*\.(lora_[AB]\.weight|lora_embedding_[AB])|.*\b(score|classifier)\..*")
_VLLM_INITS = ("pissa", "olora", "corda", "loftq")
_PAIR = re.compile(r"base_model\.model\..+\.lora_[AB]\.weight")


def refusals(config: Config, keys: Iterable[str] = ()) -> dict[str, list[str]]:
    """Return {reader: [reasons reasons it refuses or misreads the file]}; an empty list if it reads the file correctly.

    >>> from jaxadapt.configs import LoraConfig
    >>> refusals(LoraConfig(r=8, target_modules=["q_proj"], use_rslora=True))["vLLM"]
    []
    >>> refusals(LoraConfig(r=8, target_modules=["q_proj"], use_rslora=True))["llama.cpp"]
    ['use_rslora: ignored, so it computes something else']
    """
    keys = list(keys)
    if config.peft_type != "LORA":
        reasons = [f"reads only LoRA, not {config.peft_type}"]
        return {reader: list(reasons) for reader in ("vLLM", "SGLang", "llama.cpp", "TGI and LoRAX")}
    return {
        "vLLM": _vllm(config, keys),
        "SGLang": _sglang(config),
        "llama.cpp": _llama_cpp(config, keys),
        "TGI and LoRAX": _tgi(config, keys),
    }


def _vllm(config: Config, keys: list[str]) -> list[str]:
    extra = [m for m in config.get("modules_to_save") or () if m not in ("classifier", "score")]
    reasons = [f"modules_to_save={extra}: refused"] if extra else []
    reasons += _reasons_for(config, {"use_dora": "refused", "lora_bias": "refused", "use_qalora": "refused"})
    reasons += _reasons_for(config, {"layer_replication": "refused", "use_bdlora": "refused"})
    reasons += _reasons_for(config, {"alora_invocation_tokens": "refused"})
    if config.get("bias", "none") != "none":
        reasons.append(f"bias={config.get('bias')!r}: refused")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_VLLM_INITS):
        reasons.append(f"init_lora_weights={init!r}: refused")
    others = sum(not _VLLM_KEYS.fullmatch(key) for key in keys)
    if others and not reasons:
        reasons.append(f"{_count(others)} with unknown names: refused")
    return reasons


def _llama_cpp(config: Config, keys: list[str]) -> list[str]:
    wrong = "ignored, so it computes something else"
    reasons = _reasons_for(
        config, {"use_rslora": wrong, "alpha_pattern": wrong, "use_dora": "refused", "lora_bias": "refused"}
    )
    reasons += _reasons_for(config, {"modules_to_save": "refused"})
    others = sum(not _PAIR.fullmatch(key) for key in keys)
    if others and not reasons:
        reasons.append(f"{_count(others)} other than A and B of linear layers: refused")
    return reasons


def _sglang(config: Config) -> list[str]:
    wrong = "ignored, so it computes something else"
    reasons = _reasons_for(
        config, {"use_rslora": wrong, "alpha_pattern": wrong, "rank_pattern": wrong, "use_dora": "refused"}
    )
    target = config.get("target_modules")
    if isinstance(target, str) and target not in ("all", "all-linear"):
        reasons.append("target_modules is an expression: refused")
    return reasons


def _tgi(config: Config, keys: list[str]) -> list[str]:
    wrong = "ignored, so they compute something else"
    reasons = _reasons_for(config, {"use_dora": wrong})
    others = sum(not _PAIR.fullmatch(key) for key in keys)
    if others:
        reasons.append(f"{_count(others)} other than A and B of linear layers: ignored without a warning")
    return reasons


def _reasons_for(config: Config, effects: dict[str, str]) -> list[str]:
    """Return a reason for each of these options that the configuration sets."""
    return [f"{name}: {effect}" for name, effect in effects.items() if config.get(name)]


def _count(tensors: int) -> str:
    return "a tensor" if tensors == 1 else f"{tensors} tensors"
