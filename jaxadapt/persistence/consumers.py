"""Which programs take an adapter file, and why not. Pure: a configuration and the names of the tensors.

What each reader does was found by giving it the same adapters and comparing what it computes with PEFT: vLLM 0.32, the
llama.cpp converter (of llama-cpp-python 0.3.36), and the sources of SGLang, TGI and LoRAX.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from jaxadapt.configs import Config

_VLLM_KEYS = re.compile(r".*\.(lora_[AB]\.weight|lora_embedding_[AB])|.*\b(score|classifier)\..*")
_VLLM_INITS = ("pissa", "olora", "corda", "loftq")
_PAIR = re.compile(r"base_model\.model\..+\.lora_[AB]\.weight")


def refusals(config: Config, keys: Iterable[str] = ()) -> dict[str, list[str]]:
    """`{reader: [why it refuses the file, or reads it wrongly]}`; an empty list where it takes it.

    >>> from jaxadapt.configs import LoraConfig
    >>> refusals(LoraConfig(r=8, target_modules=["q_proj"], use_rslora=True))["vLLM"]
    []
    >>> refusals(LoraConfig(r=8, target_modules=["q_proj"], use_rslora=True))["llama.cpp"]
    ['use_rslora: ignored, so it computes something else']
    """
    keys = list(keys)
    if config.peft_type != "LORA":
        why = [f"LoRA only, and this is {config.peft_type}"]
        return {reader: list(why) for reader in ("vLLM", "SGLang", "llama.cpp", "TGI and LoRAX")}
    return {
        "vLLM": _vllm(config, keys),
        "SGLang": _sglang(config),
        "llama.cpp": _llama_cpp(config, keys),
        "TGI and LoRAX": _tgi(config, keys),
    }


def _vllm(config: Config, keys: list[str]) -> list[str]:
    extra = [m for m in config.get("modules_to_save") or () if m not in ("classifier", "score")]
    found = [f"modules_to_save={extra}: refused"] if extra else []
    found += _given(config, {"use_dora": "refused", "lora_bias": "refused", "use_qalora": "refused"})
    found += _given(config, {"layer_replication": "refused", "use_bdlora": "refused"})
    found += _given(config, {"alora_invocation_tokens": "refused"})
    if config.get("bias", "none") != "none":
        found.append(f"bias={config.get('bias')!r}: refused")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_VLLM_INITS):
        found.append(f"init_lora_weights={init!r}: refused")
    odd = sum(not _VLLM_KEYS.fullmatch(key) for key in keys)
    if odd and not found:
        found.append(f"{_count(odd)} unknown to it: refused")
    return found


def _llama_cpp(config: Config, keys: list[str]) -> list[str]:
    wrong = "ignored, so it computes something else"
    found = _given(config, {"use_rslora": wrong, "alpha_pattern": wrong, "use_dora": "refused", "lora_bias": "refused"})
    found += _given(config, {"modules_to_save": "refused"})
    odd = sum(not _PAIR.fullmatch(key) for key in keys)
    if odd and not found:
        found.append(f"{_count(odd)} other than A and B of linear layers: refused")
    return found


def _sglang(config: Config) -> list[str]:
    wrong = "ignored, so it computes something else"
    found = _given(config, {"use_rslora": wrong, "alpha_pattern": wrong, "rank_pattern": wrong, "use_dora": "refused"})
    target = config.get("target_modules")
    if isinstance(target, str) and target not in ("all", "all-linear"):
        found.append("target_modules is an expression: refused")
    return found


def _tgi(config: Config, keys: list[str]) -> list[str]:
    wrong = "ignored, so they compute something else"
    found = _given(config, {"use_dora": wrong})
    odd = sum(not _PAIR.fullmatch(key) for key in keys)
    if odd:
        found.append(f"{_count(odd)} other than A and B of linear layers: skipped without a word")
    return found


def _given(config: Config, what: dict[str, str]) -> list[str]:
    return [f"{name}: {effect}" for name, effect in what.items() if config.get(name)]


def _count(tensors: int) -> str:
    return "a tensor" if tensors == 1 else f"{tensors} tensors"
