"""Programs that read adapter files: which read a given one rightly, refuse it, or silently compute something else.

Pure functions of configuration and keys. The rules for PEFT, transformers, vLLM, llama.cpp and mlx-lm come from runs of
these programs on adapters of one model, compared with PEFT's log-probabilities; those for SGLang, TGI, TensorRT-LLM and
Ollama from their sources. `Reader.version` names the version of each.
`PROGRAMS` lists those for which `jaxadapt export` writes a form of its own.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Literal

from jaxadapt.adapters import peft_tensors
from jaxadapt.configs import lora
from jaxadapt.configs.base import Config
from jaxadapt.configs.table import FACTS
from jaxadapt.keymaps.keymap import PEFT_PREFIX

RIGHT, REFUSED, WRONG, UNKNOWN = "right", "refused", "wrong", "unknown"
"""The verdicts. "wrong" means: loads without a message and computes something else."""
WORDS = {WRONG: "silently computes something else", REFUSED: "refuses it", UNKNOWN: "not known"}
"""{verdict: words for it}, for the verdicts other than "right"; the worst first."""

# The ways out, by name. A program without a form for an adapter reads the merged model.
_MERGE = "jaxadapt merge BASE ADAPTER --out FOLDER"
_MERGE_IN_MEMORY = "jaxadapt.export.export_base(MODEL, FOLDER, ADAPTER)"
_EXPORTS = {
    "llama.cpp": "jaxadapt export ADAPTER --for gguf --base BASE --out FILE.gguf",
    "Ollama": "jaxadapt export ADAPTER --for gguf --base BASE --out FILE.gguf",
    "MLX": "jaxadapt export ADAPTER --for mlx --out FOLDER",
}
_PLAIN = "jaxadapt export ADAPTER --for plain --out FOLDER"
_START = " --first START"
"""For an initialization that changed the base: START is the folder of the initial adapter."""


@dataclasses.dataclass(frozen=True)
class Reader:
    """A program and what it does with one adapter.

    Attributes:
        name: the program.
        version: the version that the rules were measured with, or read in.
        verdict: "right", "refused", "wrong" (silently) or "unknown" (not measured).
        reasons: "setting: effect" for each setting that the program refuses or misreads.
        remedy: a command or a function that helps; "" if none is needed or known.
    """

    name: str
    version: str
    verdict: str
    reasons: tuple[str, ...] = ()
    remedy: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {**dataclasses.asdict(self), "reasons": list(self.reasons)}


# A rule: {property of an adapter: (verdict, effect)}. A program reads the other properties of `PROPERTIES` rightly.
_Rule = Mapping[str, tuple[str, str]]

_SETTINGS = {
    "rslora": "use_rslora", "dora": "use_dora", "lora_bias": "lora_bias", "alora": "alora_invocation_tokens",
    "kasa": "kasa_config", "tokens": "trainable_token_indices", "parameters": "target_parameters",
    "layers": "layers_to_transform", "rank_pattern": "rank_pattern", "alpha_pattern": "alpha_pattern",
}  # fmt: skip
PROPERTIES = frozenset((
    *_SETTINGS, "any", "type", "method", "ia3", "bias", "fraction", "expression", "embedding", "tied embedding",
    "variant", "init", "norm copies", "heads", "copies", "other tensors",
))  # fmt: skip
"""The properties of an adapter that some program refuses or misreads."""

_IGNORED = (WRONG, "ignored")
_REFUSE = (REFUSED, "refused")
_ONLY_LORA = (REFUSED, "reads only LoRA")
_ON_ORIGINAL = (WRONG, "added to the original base weights")

_RULES: Mapping[str, tuple[str, _Rule]] = {
    "PEFT": ("0.21.2, measured", {"type": (REFUSED, "unknown to this version")}),
    "transformers load_adapter": (
        "5.12.1 and 5.24.0, measured",
        {
            "type": (REFUSED, "unknown to PEFT"),
            "dora": (WRONG, "the magnitudes are not loaded"),
            "alora": (WRONG, "the adapter has no effect"),
            **dict.fromkeys(
                ("copies", "heads", "norm copies", "tokens"), (WRONG, "ignored by 5.12.1, right in 5.24.0")
            ),
            "init": (UNKNOWN, "not measured"),
            "method": (UNKNOWN, "not measured"),
            "variant": (UNKNOWN, "not measured"),
        },
    ),
    "vLLM": (
        "0.32.0, measured",
        {
            "type": _ONLY_LORA, "method": _ONLY_LORA, "ia3": _ONLY_LORA,
            **dict.fromkeys(("dora", "lora_bias", "bias", "tokens", "alora", "kasa", "init", "variant"), _REFUSE),
            "copies": _REFUSE, "norm copies": _REFUSE, "parameters": (UNKNOWN, "not measured"),
            "other tensors": (REFUSED, "unknown names"),
        },
    ),
    "llama.cpp": (
        "the converter of llama-cpp-python 0.3.36, measured",
        {
            "type": _ONLY_LORA, "method": _ONLY_LORA, "ia3": (REFUSED, "its converter stops: no lora_alpha"),
            "rslora": _IGNORED, "alpha_pattern": _IGNORED, "alora": (WRONG, "applied to all tokens"),
            "init": _ON_ORIGINAL, "norm copies": (WRONG, "dropped"),
            **dict.fromkeys(("dora", "lora_bias", "copies", "heads", "tokens", "kasa"), _REFUSE),
            "embedding": (UNKNOWN, "right if the base has a head of its own; if its head is tied, the program stops"),
            "tied embedding": (REFUSED, "stops the program at the first token, because the head is tied to it"),
            "bias": (UNKNOWN, "not measured"), "variant": (UNKNOWN, "not measured"),
            "parameters": (UNKNOWN, "not measured"), "other tensors": (REFUSED, "unknown names"),
        },
    ),
    "Ollama": (
        "its source of 2026, not run; only Llama and Gemma 2",
        {
            "type": _ONLY_LORA, "method": _ONLY_LORA, "ia3": _ONLY_LORA,
            "fraction": (REFUSED, "expected an integer"),
            "rslora": _IGNORED, "alpha_pattern": _IGNORED, "alora": (WRONG, "applied to all tokens"),
            "init": _ON_ORIGINAL,
            **dict.fromkeys(
                ("dora", "lora_bias", "copies", "heads", "norm copies", "tokens", "kasa", "bias", "variant",
                 "embedding", "tied embedding", "parameters", "other tensors"), (UNKNOWN, "not run"),
            ),
        },
    ),
    "MLX": ("mlx-lm 0.32.2, measured", {"any": (REFUSED, "not read")}),
    "SGLang": (
        "0.5.23, its source, not run",
        {
            "type": _ONLY_LORA, "method": _ONLY_LORA, "ia3": _ONLY_LORA, "dora": _REFUSE,
            "expression": _REFUSE, "rank_pattern": (REFUSED, "expected one rank"),
            "rslora": _IGNORED, "alpha_pattern": _IGNORED, "alora": (WRONG, "applied to all tokens"),
            "init": _ON_ORIGINAL, "lora_bias": (UNKNOWN, "not run"),
            **dict.fromkeys(("kasa", "copies", "heads", "norm copies", "tokens", "bias"), _IGNORED),
            "variant": (UNKNOWN, "not run"), "parameters": (UNKNOWN, "not run"), "other tensors": _IGNORED,
        },
    ),
    "TGI and LoRAX": (
        "TGI's source of 2025, not run",
        {
            "type": _ONLY_LORA, "method": _ONLY_LORA, "ia3": _ONLY_LORA,
            **dict.fromkeys(
                ("dora", "lora_bias", "alpha_pattern", "kasa", "copies", "heads", "norm copies", "tokens", "bias"),
                _IGNORED,
            ),
            "rank_pattern": (WRONG, "the scale is that of r"), "alora": (WRONG, "applied to all tokens"),
            "init": _ON_ORIGINAL, "layers": (WRONG, "modules that some layers lack are left out in all layers"),
            **dict.fromkeys(("embedding", "tied embedding", "parameters", "other tensors"), _IGNORED),
            "variant": (UNKNOWN, "not run"),
        },
    ),
    "TensorRT-LLM": (
        "its source of 2025, not run",
        {
            "type": _ONLY_LORA, "method": _ONLY_LORA, "ia3": _ONLY_LORA, "alpha_pattern": _IGNORED,
            "alora": (WRONG, "applied to all tokens"), "init": _ON_ORIGINAL, "lora_bias": _IGNORED, "kasa": _IGNORED,
            "norm copies": _IGNORED, "tokens": _IGNORED, "bias": _IGNORED, "other tensors": _IGNORED,
            **dict.fromkeys(
                ("copies", "heads", "embedding", "tied embedding", "variant", "parameters"), (UNKNOWN, "not run")
            ),
        },
    ),
}  # fmt: skip

_VARIANTS = ("use_qalora", "layer_replication", "use_bdlora", "arrow_config", "velora_config", "monteclora_config")
_CONVERTED = ("use_qalora", "use_bdlora", "velora_config", "monteclora_config")
_CURED = frozenset(("any", "rslora", "alpha_pattern", "rank_pattern", "fraction", "init", "expression"))
"""The properties that an export removes."""

_PAIR = re.compile(r"(base_model\.model\..+)\.(lora_[AB]\.weight|lora_embedding_[AB])")
_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "shared")
_HEADS = ("classifier", "score")


def require_known(names: Collection[str], place: str) -> None:
    """Raise `ValueError` for names that are not in `PROPERTIES`: a misspelt rule would count as "right".

    >>> require_known(["rslora", "rs_lora"], "vLLM")
    Traceback (most recent call last):
    ValueError: vLLM: unknown properties of an adapter: ['rs_lora']
    """
    unknown = sorted(set(names) - PROPERTIES)
    if unknown:
        raise ValueError(f"{place}: unknown properties of an adapter: {unknown}")


for _name, (_, _rule) in _RULES.items():
    require_known(_rule, _name)
require_known(_CURED, "the properties that an export removes")


def judge_readers(config: Config, keys: Iterable[str] = (), tied: bool | None = None) -> tuple[Reader, ...]:
    """Return each program with its verdict about an adapter.

    Args:
        config: the adapter's configuration.
        keys: the keys of its file, in PEFT's names.
        tied: True if the base model ties its output head to the token embedding; None if unknown.

    >>> from jaxadapt.configs.lora import LoraConfig
    >>> found = {r.name: r for r in judge_readers(LoraConfig(r=8, target_modules=["q_proj"], use_rslora=True))}
    >>> found["vLLM"].verdict, found["llama.cpp"].verdict, found["llama.cpp"].reasons
    ('right', 'wrong', ('use_rslora: ignored',))
    """
    properties, readers = _properties(config, list(keys), tied), list[Reader]()
    require_known(properties, "this adapter")
    for name, (version, rule) in _RULES.items():
        hits = {prop: rule[prop] for prop in properties if prop in rule}
        verdict = min((each for each, _ in hits.values()), key=(REFUSED, WRONG, UNKNOWN).index, default=RIGHT)
        reasons = tuple(f"{properties[prop]}: {effect}" for prop, (_, effect) in hits.items())
        readers.append(Reader(name, version, verdict, reasons, _remedy(name, hits, verdict, properties)))
    return tuple(readers)


def _remedy(name: str, hits: Collection[str], verdict: str, properties: Mapping[str, str]) -> str:
    """Return the way out: an export if it has a form for the adapter, else the merged model; "" if there is none."""
    if verdict in (RIGHT, UNKNOWN) or "type" in hits:
        return ""
    if _is_exported(name, properties):
        return _EXPORTS.get(name, _PLAIN) + (_START if "init" in properties else "")
    # aLoRA applies to a part of the tokens, and KaSA belongs to a base that it changed: neither can be merged here.
    peft_type = properties.get("method") or properties.get("type", "LORA")
    facts = FACTS[peft_type]
    if {"alora", "kasa", "init"} & properties.keys() or peft_type not in FACTS or not facts.merges:
        return ""
    if "parameters" in properties or "layer_replication" in properties.get("variant", "") or not facts.merges_files:
        return _MERGE_IN_MEMORY
    return f"{_MERGE}: if the adapted modules of the base have biases" if "lora_bias" in properties else _MERGE


def _is_exported(name: str, properties: Mapping[str, str]) -> bool:
    """Return True if `jaxadapt export` has a form for an adapter with these properties that the program reads."""
    lost = properties.keys() - _CURED - ({"dora"} if name == "MLX" else set())
    if name in _EXPORTS:
        lost -= {"layers"}
    elif "embedding" in lost or "tied embedding" in lost:
        lost -= {"embedding", "tied embedding"} - _RULES[name][1].keys()
    if "variant" in properties and set(properties["variant"].split(", ")) <= set(_CONVERTED):
        lost -= {"variant"}
    return not lost


def reads_copies(name: str, config: Config) -> bool:
    """Return True if a program reads the copies of modules (`modules_to_save`) that an adapter has.

    >>> from jaxadapt.configs.lora import LoraConfig
    >>> reads_copies("vLLM", LoraConfig(modules_to_save=["score"])), reads_copies("vLLM", LoraConfig())
    (True, False)
    """
    copies = _copy_properties(config)
    return bool(copies) and copies.keys().isdisjoint(_RULES[name][1])


def grouped(readers: Iterable[Reader]) -> list[tuple[str, str, tuple[str, ...], str]]:
    """Return (verdict, names, reasons, remedy) of the readers whose verdict is not "right", equal ones together.

    The worst come first.
    """
    groups: dict[tuple[str, tuple[str, ...], str], list[str]] = {}
    for verdict in WORDS:
        for reader in readers:
            if reader.verdict == verdict:
                groups.setdefault((verdict, reader.reasons, reader.remedy), []).append(reader.name)
    return [(verdict, ", ".join(names), reasons, remedy) for (verdict, reasons, remedy), names in groups.items()]


def _properties(config: Config, keys: list[str], tied: bool | None) -> dict[str, str]:
    """Return {property: setting} for the properties of an adapter that some program does not read."""
    found: dict[str, str] = {"any": "PEFT's format"}
    if config.peft_type == "IA3":
        found["ia3"] = "IA3"
    elif config.peft_type != "LORA":
        found["method" if peft_tensors.is_known_method(config.peft_type) else "type"] = config.peft_type
    found |= {prop: setting for prop, setting in _SETTINGS.items() if config.get(setting)}
    if variants := [name for name in _VARIANTS if config.get(name)]:
        found["variant"] = ", ".join(variants)
    init = config.get("init_lora_weights")
    if isinstance(init, str) and lora.changes_base(config) and not config.get("kasa_config"):
        found["init"] = f"init_lora_weights={init!r}"
    found |= _copy_properties(config)
    if config.get("bias", "none") != "none":
        found["bias"] = f"bias={config.get('bias')!r}"
    alpha: Any = config.get("lora_alpha")
    if isinstance(alpha, float) and not alpha.is_integer():
        found["fraction"] = f"lora_alpha={alpha:g}"
    found |= _target_properties(config, keys, tied)
    return found | _key_properties(config, keys, found)


def _target_properties(config: Config, keys: Iterable[str], tied: bool | None) -> dict[str, str]:
    target: Any = config.get("target_modules")
    if isinstance(target, str):
        found = {} if target in ("all", "all-linear") else {"expression": "target_modules is an expression"}
        named = []
    else:
        found, named = dict[str, str](), [name for name in target or () if name in _EMBEDDINGS]
    adapts = named or any(key.endswith("lora_embedding_A") for key in keys)
    if config.peft_type == "LORA" and adapts and tied is not False:
        kind = "tied embedding" if tied else "embedding"
        found[kind] = f"target_modules={named}" if named else "an adapted embedding"
    return found


def _copy_properties(config: Config) -> dict[str, str]:
    saved: list[str] = list(config.get("modules_to_save") or ())
    norms = [name for name in saved if "norm" in name.lower() or name.startswith("ln_")]
    heads = [name for name in saved if name in _HEADS]
    kinds = {"norm copies": norms, "heads": heads, "copies": [name for name in saved if name not in (*norms, *heads)]}
    return {kind: f"modules_to_save={names}" for kind, names in kinds.items() if names}


def _key_properties(config: Config, keys: list[str], found: Mapping[str, str]) -> dict[str, str]:
    """Return the properties that only keys show. All programs pass over the base's weight of an adapted module."""
    explained = {"dora", "lora_bias", "kasa", "tokens", "bias", "variant"} & found.keys() or config.get(
        "modules_to_save"
    )
    layers = {} if "layers" in found else _layer_properties(keys)
    if config.peft_type != "LORA" or explained:
        return layers
    others = [key for key in keys if not _PAIR.fullmatch(key) and not key.endswith(".base_layer.weight")]
    if not others:
        return layers
    count = "a tensor" if len(others) == 1 else f"{len(others)} tensors"
    return layers | {"other tensors": f"{count} such as {others[0].removeprefix(PEFT_PREFIX)}"}


def _layer_properties(keys: Iterable[str]) -> dict[str, str]:
    """Return the property of an adapter that lacks a module in some layers, as far as the keys show it."""
    layers: dict[str, set[int]] = {}
    for key in keys:
        match = _PAIR.fullmatch(key)
        parts = re.fullmatch(r"(.+?)\.(\d{1,18})\.(.+)", match[1]) if match else None
        if parts:
            layers.setdefault(f"{parts[1]}.*.{parts[3]}", set()).add(int(parts[2]))
    most = max((max(numbers) for numbers in layers.values()), default=-1) + 1
    missing = [name for name, numbers in layers.items() if len(numbers) < most]
    return {"layers": f"{missing[0].removeprefix(PEFT_PREFIX)} of some layers"} if missing else {}


# ---------------------------------------------------------------- export


Style = Literal["safetensors", "gguf", "mlx"]


@dataclasses.dataclass(frozen=True)
class Program:
    """A program that reads adapters.

    Attributes:
        name: its name on the command line.
        style: that of its files in `formats`: "safetensors" (PEFT's folder, with the adapter in its plain form), "gguf"
            or "mlx".
        reader: its name in `_RULES`; "" for every reader of PEFT's folders.
        version: the version with which the form was measured, or in whose source it was read.
        keeps: fields of the configuration that it reads although a plain LoRA has none.
    """

    name: str
    style: Style
    reader: str
    version: str
    keeps: tuple[str, ...] = ()


PROGRAMS: Mapping[str, Program] = {
    program.name: program
    for program in (
        Program("plain", "safetensors", "", "every program that reads PEFT's LoRA"),
        Program("transformers", "safetensors", "transformers load_adapter", _RULES["transformers load_adapter"][0]),
        Program("vllm", "safetensors", "vLLM", _RULES["vLLM"][0]),
        Program("gguf", "gguf", "llama.cpp", "llama.cpp in llama-cpp-python 0.3.36, measured"),
        Program("mlx", "mlx", "MLX", _RULES["MLX"][0], keeps=("use_dora",)),
        Program("sglang", "safetensors", "SGLang", _RULES["SGLang"][0]),
        Program("tgi", "safetensors", "TGI and LoRAX", _RULES["TGI and LoRAX"][0]),
        Program("tensorrt-llm", "safetensors", "TensorRT-LLM", _RULES["TensorRT-LLM"][0]),
    )
}
"""{name: program}, in the order of the command's help."""
