"""The programs that read an adapter, and the model card (README.md) that tells people about them.

Programs read a given file rightly, refuse it, or silently compute something else. The rules are pure functions of
configuration and keys. Those for PEFT, transformers, vLLM, llama.cpp and mlx-lm come from runs of these programs on
adapters of one model, compared with PEFT's log-probabilities; those for SGLang, TGI, TensorRT-LLM and Ollama from their
sources. `Reader.version` names the version of each. `PROGRAMS` lists those that `jaxadapt export` writes a form for.

The front matter of a card is the same as PEFT's. The last line of a card stores digests of its two parts. They show if
a person edited the card; an edited card is never overwritten, and only missing front matter is added.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Literal, cast

from jaxadapt.adapters import peft_tensors
from jaxadapt.arrays.tensor_source import Kinds
from jaxadapt.configs import lora
from jaxadapt.configs.base import Config
from jaxadapt.configs.table import FACTS
from jaxadapt.core import paths
from jaxadapt.core.errors import ConfigError, raise_as
from jaxadapt.keymaps.keymap import PEFT_PREFIX
from jaxadapt.persistence import expert_keys
from jaxadapt.storage.location import HubAddress

# ---------------------------------------------------------------- programs


RIGHT, REFUSED, WRONG, UNKNOWN = "right", "refused", "wrong", "unknown"
"""The verdicts. "wrong" means: loads without a message and computes something else."""
WORDS = {WRONG: "silently computes something else", REFUSED: "refuses it", UNKNOWN: "not known"}
"""{verdict: words for it}, for the verdicts other than "right"; the worst first."""

# The ways out, by name. A program without a form for an adapter reads the merged model.
_MERGE = "jaxadapt merge BASE ADAPTER --out FOLDER"
_MERGE_IN_MEMORY = "jaxadapt.export.export_base(MODEL, FOLDER, ADAPTER)"
_EXPORTS = {
    **dict.fromkeys(("llama.cpp", "Ollama"), "jaxadapt export ADAPTER --for gguf --base BASE --out FILE.gguf"),
    "MLX": "jaxadapt export ADAPTER --for mlx{base} --out FOLDER",
}


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
    "variant", "init", "norm copies", "heads", "copies", "other tensors", *expert_keys.PROPERTIES,
))  # fmt: skip
"""The properties of an adapter that some program refuses or misreads."""

_IGNORED = (WRONG, "ignored")
_REFUSE = (REFUSED, "refused")
_ONLY_LORA = (REFUSED, "reads only LoRA")
_OF_PEFT = {prop: (WRONG, text) for prop, text in expert_keys.WRONG_IN_PEFT.items()}
_ON_ORIGINAL = (WRONG, "added to the original base weights")

_RULES: Mapping[str, tuple[str, _Rule]] = {
    "PEFT": ("0.21.2, measured", {"type": (REFUSED, "unknown to this version"), **_OF_PEFT}),
    "transformers load_adapter": (
        "5.12.1 and 5.24.0, measured",
        {
            "type": (REFUSED, "unknown to PEFT"),
            **_OF_PEFT,
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
            "copies": _REFUSE, "norm copies": _REFUSE, "other tensors": (REFUSED, "unknown names"),
            "experts": (WRONG, "gate, up and down are right for GPT-OSS, without effect in Mixtral, and else refused"),
            "router": (WRONG, "without effect in Mixtral, and else right"),
            "parts of experts": (REFUSED, "stops at an expert without a LoRA of gate, up and down"),
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
            "experts": (REFUSED, "its converter stops at experts"), "other tensors": (REFUSED, "unknown names"),
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
            "init": _ON_ORIGINAL, "router": (REFUSED, "has no LoRA for routers"),
            **dict.fromkeys(("kasa", "copies", "heads", "norm copies", "tokens", "bias", "other tensors"), _IGNORED),
            **dict.fromkeys(("lora_bias", "variant", "parameters"), (UNKNOWN, "not run")),
            "experts": (REFUSED, "stops at all experts in one parameter"),
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
_CURED = frozenset((
    "any", "rslora", "alpha_pattern", "rank_pattern", "fraction", "init", "expression", *expert_keys.CURED
))  # fmt: skip
"""The properties that every export removes."""

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


require_known({*_CURED}.union(*(rule for _, rule in _RULES.values()), *expert_keys.FOR_MODEL.values()), "the rules")


def judge_readers(
    config: Config, keys: Iterable[str] = (), tied: bool | None = None, kind: str | None = None
) -> tuple[Reader, ...]:
    """Return each program with its verdict about an adapter.

    Args:
        config: the adapter's configuration.
        keys: the keys of its file, in PEFT's names.
        tied: True if the base model ties its output head to the token embedding; None if unknown.
        kind: the `model_type` of the base; None if unknown.

    >>> from jaxadapt.configs.lora import LoraConfig
    >>> found = {r.name: r for r in judge_readers(LoraConfig(r=8, target_modules=["q_proj"], use_rslora=True))}
    >>> found["vLLM"].verdict, found["llama.cpp"].verdict, found["llama.cpp"].reasons
    ('right', 'wrong', ('use_rslora: ignored',))
    """
    readers: list[Reader] = []
    properties = _properties(config, list(keys), tied)
    require_known(properties, "this adapter")
    for name, (version, rule) in _RULES.items():
        own = {**rule, **expert_keys.FOR_MODEL.get((name, kind), {})}
        hits = {prop: found for prop in properties if (found := own.get(prop)) is not None}
        verdict = min((each for each, _ in hits.values()), key=(REFUSED, WRONG, UNKNOWN).index, default=RIGHT)
        reasons = tuple(f"{properties[prop]}: {effect}" for prop, (_, effect) in hits.items())
        readers.append(Reader(name, version, verdict, reasons, _remedy(name, hits, verdict, properties)))
    return tuple(readers)


def _remedy(name: str, hits: Collection[str], verdict: str, properties: Mapping[str, str]) -> str:
    """Return the way out: an export if it has a form for the adapter, else the merged model; "" if there is none."""
    if verdict in (RIGHT, UNKNOWN) or "type" in hits:
        return ""
    if _is_exported(name, properties):
        form = next((form for prop, form in expert_keys.FORMS.items() if prop in hits), "plain")
        command = _EXPORTS.get(name, f"jaxadapt export ADAPTER --for {form} --out FOLDER").format(
            base=" --base BASE" * bool({"parameters", "single experts"} & properties.keys())
        )
        # START is the folder of the initial adapter, for an initialization that changed the base.
        return f"{command} --first START" if "init" in properties else command
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
    lost -= expert_keys.EXPORTED if name in expert_keys.READERS else set()
    lost -= ({"layers"} if name in _EXPORTS else {"layers", "embedding", "tied embedding"}) - _RULES[name][1].keys()
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
    wrong = (reader for verdict in WORDS for reader in readers if reader.verdict == verdict)
    groups = paths.group([((reader.verdict, reader.reasons, reader.remedy), reader.name) for reader in wrong])
    return [(verdict, ", ".join(names), reasons, remedy) for (verdict, reasons, remedy), names in groups.items()]


def _properties(config: Config, keys: list[str], tied: bool | None) -> dict[str, str]:
    """Return {property: setting} for the properties of an adapter that some program does not read."""
    is_other = config.peft_type not in ("LORA", "IA3")
    kind = ("method" if peft_tensors.is_method_of_peft(config.peft_type) else "type") if is_other else "ia3"
    init, bias, alpha = config.get("init_lora_weights"), config.get("bias", "none"), config.get("lora_alpha")
    is_other_base = isinstance(init, str) and lora.changes_base(config) and not config.get("kasa_config")
    settings = {
        "any": "PEFT's format",
        kind: "" if config.peft_type == "LORA" else config.peft_type,
        **{prop: setting if config.get(setting) else "" for prop, setting in _SETTINGS.items()},
        "variant": ", ".join(name for name in _VARIANTS if config.get(name)),
        "init": f"init_lora_weights={init!r}" if is_other_base else "",
        **_copy_properties(config),
        "bias": f"bias={bias!r}" if bias != "none" else "",
        "fraction": f"lora_alpha={alpha:g}" if isinstance(alpha, float) and not alpha.is_integer() else "",
        **_target_properties(config, keys, tied),
    }
    found = {prop: setting for prop, setting in settings.items() if setting}
    return found | {prop: text for prop, text in _key_properties(config, keys, found).items() if text}


def _target_properties(config: Config, keys: Iterable[str], tied: bool | None) -> dict[str, str]:
    target: Any = config.get("target_modules")
    is_expression = isinstance(target, str) and target not in ("all", "all-linear")
    named = [] if isinstance(target, str) else [name for name in target or () if name in _EMBEDDINGS]
    adapts = bool(named) or any(key.endswith("lora_embedding_A") for key in keys)
    text = f"target_modules={named}" if named else "an adapted embedding"
    return {
        "expression": "target_modules is an expression" if is_expression else "",
        "tied embedding" if tied else "embedding": (
            text if config.peft_type == "LORA" and adapts and tied is not False else ""
        ),
    }


def _copy_properties(config: Config) -> dict[str, str]:
    saved: list[str] = list(config.get("modules_to_save") or ())
    norms = [name for name in saved if "norm" in name.lower() or name.startswith("ln_")]
    heads = [name for name in saved if name in _HEADS]
    kinds = {"norm copies": norms, "heads": heads, "copies": [name for name in saved if name not in (*norms, *heads)]}
    return {kind: f"modules_to_save={names}" for kind, names in kinds.items() if names}


def _key_properties(config: Config, keys: list[str], found: Mapping[str, str]) -> dict[str, str]:
    """Return the properties that only keys show. All programs pass over the base's weight of an adapted module."""
    known = {"dora", "lora_bias", "kasa", "tokens", "bias", "variant"}
    is_explained = config.peft_type != "LORA" or config.get("modules_to_save") or not known.isdisjoint(found)
    others = [key for key in keys if not (is_explained or _PAIR.fullmatch(key) or key.endswith(".base_layer.weight"))]
    count = "a tensor" if len(others) == 1 else f"{len(others)} tensors"
    return {
        "layers": "" if "layers" in found else _partial_layers(keys),
        "other tensors": f"{count} such as {others[0].removeprefix(PEFT_PREFIX)}" if others else "",
        **(expert_keys.find_properties(config, keys) if "parameters" in found or "expert" in "".join(keys) else {}),
    }


def _partial_layers(keys: Iterable[str]) -> str:
    """Return the first module that some layers lack, as far as the keys show it; "" if no layer lacks one."""
    modules = dict.fromkeys(match[1] for match in map(_PAIR.fullmatch, keys) if match)
    split = filter(None, (re.fullmatch(r"(.+?)\.(\d{1,18})\.(.+)", module) for module in modules))
    layers = paths.group([(f"{parts[1]}.*.{parts[3]}", int(parts[2])) for parts in split])
    most = max((max(numbers) for numbers in layers.values()), default=-1) + 1
    missing = [name.removeprefix(PEFT_PREFIX) for name, numbers in layers.items() if len(numbers) < most]
    return f"{missing[0]} of some layers" if missing else ""


# ---------------------------------------------------------------- export


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
    style: Literal["safetensors", "gguf", "mlx"]
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


# ---------------------------------------------------------------- model card


_PIPELINES = {
    "CAUSAL_LM": "text-generation", "SEQ_CLS": "text-classification", "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering", "FEATURE_EXTRACTION": "feature-extraction",
}  # fmt: skip
_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM", "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification", "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM", "FEATURE_EXTRACTION": "AutoModel",
}  # fmt: skip
_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
_MARK = re.compile(r"\n<!-- jaxadapt card ([0-9a-f]{12}) ([0-9a-f]{12}): [^\n]*-->\n?\Z")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_WORD = re.compile(r"[A-Za-z][\w./-]*(:[\w./-]+)*")
_NO_WORDS = {"true", "false", "null", "yes", "no", "on", "off", "y", "n"}  # not strings in YAML 1.1 or 1.2


@dataclasses.dataclass(frozen=True)
class Card:
    """Texts and results for a model card, which states the facts of the adapter's files by itself.

    Args:
        license: the license, such as "apache-2.0".
        metrics: `{name: value}` of results.
        picture: True for a picture of how much each weight is changed; None: if matplotlib is installed.

    >>> Card(metrics={"loss": 3.2})
    Card(license=None, metrics={'loss': 3.2}, picture=None)
    """

    license: str | None = None
    metrics: Mapping[str, Any] = dataclasses.field(default_factory=dict[str, Any])
    picture: bool | None = None


def card_text(
    config: Config,
    tensors: Kinds,
    nbytes: int,
    page: Card,
    place: HubAddress | None = None,
    image: str | None = None,
) -> str:
    """Return a complete card, with valid front matter.

    Args:
        config: the configuration.
        tensors: those of the file.
        nbytes: the size of the weights' file in bytes.
        page: what the card says beside the facts of the files.
        place: the repository that the card is for, if there is one.
        image: the name of an image file beside the card.
    """
    readers = judge_readers(config, tensors)
    refused = {reader.name for reader in readers if reader.verdict != RIGHT}
    base, places = _base(config), "JAX" if "PEFT" in refused else "JAX and in PyTorch"
    title, link = (f" for {base}", f" for [{base}](https://huggingface.co/{base})") if base else ("", "")
    lines = [
        f"# {config.peft_type} adapter{title}",
        "",
        f"An adapter{link} in PEFT's format, saved by jaxadapt: it loads in {places}.",
        "",
        *_usage(config, place, refused),
        *_settings(config, tensors, nbytes, page, image),
        *_readers(readers),
    ]
    front = _front_matter(config, page.license)
    body = "\n" + "\n".join(lines).strip() + "\n"
    mark = f"<!-- jaxadapt card {_digest(front)} {_digest(body)}: written anew until you edit it; then it is yours -->"
    return f"---\n{front}---\n{body}\n{mark}\n"


def refresh_card(old: str | None, new: str) -> str:
    """Return a folder's card after another save: the new card, unless a person edited the old one."""
    return old if old is not None and is_edited(old) else merge_card(old, new)


def merge_card(old: str | None, new: str) -> str:
    """Return the Hub's card after an upload: like `refresh_card`, but add missing front matter to an edited card."""
    if old is None:
        return new
    front, front_is_ours, body, body_is_ours = _parts(old)
    if body_is_ours and (front_is_ours or front is None):
        return new
    wanted, _, new_body, _ = _parts(new)
    if front is None:
        return f"---\n{wanted or ''}---\n\n{old.lstrip()}"
    return f"---\n{_with_missing(front, wanted or '')}---\n{new_body if body_is_ours else body}"


def is_edited(card: str) -> bool:
    """Return True if a person wrote the card or edited its body."""
    return not _parts(card)[3]


def size_text(count: int) -> str:
    """Return a number of bytes as text.

    >>> size_text(9_820_000), size_text(12)
    ('9.8 MB', '12 bytes')
    """
    power = min((len(str(count)) - 1) // 3, 3)
    return f"{count / 1000**power:.1f} {('bytes', 'kB', 'MB', 'GB')[power]}" if power else f"{count} bytes"


# ---------------------------------------------------------------- a card's parts


def _digest(part: str) -> str:
    return hashlib.sha256("\n".join(map(str.rstrip, part.strip().splitlines())).encode()).hexdigest()[:12]


def _parts(card: str) -> tuple[str | None, bool, str, bool]:
    """Split a card: front matter (or None), True if it is unedited, the body, True if the body is unedited."""
    card = card.replace("\r\n", "\n")
    head = re.match(r"---[ \t]*\n(.*?)^---[ \t]*$\n?", card, re.S | re.M)
    front, body = (head[1], card[head.end() :]) if head else (None, card)
    mark = _MARK.search(card)
    if mark is None:
        return front, False, body, False
    return front, front is not None and mark[1] == _digest(front), body, mark[2] == _digest(_MARK.sub("", body))


def _with_missing(front: str, wanted: str) -> str:
    """Add missing keys and tags to front matter. Works on the text, so that the rest is not reformatted."""
    blocks = re.split(r"^(?=[A-Za-z_])", wanted, flags=re.M)
    have = set(re.findall(r"^([A-Za-z_][\w-]*)[ \t]*:", front, re.M))
    front = front if not front or front.endswith("\n") else f"{front}\n"
    for block in filter(None, blocks):
        name = block.split(":")[0]
        if name not in have:
            front += block
        elif name == "tags":
            front = _with_tags(front, re.findall(r"^- (.*)$", block, re.M))
    return front


def _with_tags(front: str, tags: list[str]) -> str:
    match = re.search(r"^tags[ \t]*:[ \t]*+(\[(?P<row>[^\]\n]*)\])?[ \t]*\n(?P<list>([ \t]*- .*\n)*)", front, re.M)
    if match is None:
        return front  # another form, which a person wrote
    if match["row"] is not None:
        have = [t.strip().strip("\"'") for t in match["row"].split(",")]
        row = ", ".join([*filter(None, [match["row"].strip()]), *(t for t in tags if t not in have)])
        return front[: match.start("row")] + row + front[match.end("row") :]
    items = match["list"]
    have = [line.strip().removeprefix("- ").strip().strip("\"'") for line in items.splitlines()]
    pad = items[: len(items) - len(items.lstrip(" \t"))]
    missing = "".join(f"{pad}- {t}\n" for t in tags if t not in have)
    return front[: match.end("list")] + missing + front[match.end("list") :]


# ---------------------------------------------------------------- its text


def _plain(value: str) -> str:
    """Return a text as a YAML scalar."""
    return value if _WORD.fullmatch(value) and value.lower() not in _NO_WORDS else json.dumps(value)


def _base(config: Config) -> str | None:
    """Return the base model if it is a name on the Hub; a local path means nothing to other readers."""
    base = config.base_model_name_or_path
    return base if base and _HUB_NAME.fullmatch(base) and ".." not in base else None


def _front_matter(config: Config, license_name: str | None) -> str:
    base = _base(config)
    fields = {
        "base_model": base,
        "library_name": "peft",
        "license": license_name,
        "pipeline_tag": _PIPELINES.get(config.task_type or ""),
    }
    tags = [*([f"base_model:adapter:{base}"] if base else []), config.peft_type.lower(), "jax", "jaxadapt"]
    lines = [f"{name}: {_plain(value)}" for name, value in fields.items() if value]
    return "\n".join([*lines, "tags:", *(f"- {_plain(tag)}" for tag in tags)]) + "\n"


def _usage(config: Config, place: HubAddress | None, refused: Collection[str]) -> list[str]:
    base = _base(config)
    here = there = json.dumps("path/to/this/folder")
    if place is not None:
        here = json.dumps(str(place._replace(revision=None)))
        there = json.dumps(place.repo) + (f", subfolder={json.dumps(place.subfolder)}" if place.subfolder else "")
    name = _CLASSES.get(config.task_type or "")
    load_base = f"from transformers import {name}\n\nbase_model = {name}.from_pretrained({json.dumps(base)})"
    pytorch = [
        "In PyTorch (`pip install peft`):\n",
        "```python\nfrom peft import PeftModel",
        load_base if base and name else "",
        f"model = PeftModel.from_pretrained(base_model, {there})",
        "```",
        "",
    ]
    return [
        "## Use it",
        "",
        "In JAX (`pip install jaxadapt`), into a Flax model of the base:",
        "",
        "```python",
        "import jaxadapt",
        "",
        f"model = jaxadapt.load({here}, model)  # NNX, in place",
        f'variables = jaxadapt.load({here}, {{"params": params}})  # Linen',
        "```",
        "",
        *([] if "PEFT" in refused else pytorch),
        *([] if "vLLM" in refused else _vllm(config, place, base)),
    ]


def _vllm(config: Config, place: HubAddress | None, base: str | None) -> list[str]:
    source, subfolder = ("path/to/this/folder", "") if place is None else (place.repo, place.subfolder)
    called = (subfolder or source).rpartition("/")[2]
    if subfolder:
        source = f"$(jaxadapt pull {source}/{subfolder})"
    rank = config.largest_rank if isinstance(config, lora.LoraConfig) else 0
    option = f" --max-lora-rank {next((r for r in _VLLM_RANKS if r >= rank), rank)}" if rank > 16 else ""
    return [
        "In vLLM:",
        "",
        "```bash",
        f"vllm serve {base or 'path/to/the/base/model'} --enable-lora{option} --lora-modules {called}={source}",
        "```",
        "",
    ]


def _settings(config: Config, tensors: Kinds, nbytes: int, page: Card, image: str | None) -> list[str]:
    target = config.get("target_modules")
    targets = target if isinstance(target, str) else ", ".join(sorted(target or ()))
    rows = [
        ("method", config.peft_type + (f", {config.task_type}" if config.task_type else "")),
        *([] if target is None else [("target_modules", targets)]),
        *((name, _value(value)) for name, value in config.shown_fields().items()),
    ]
    size = f"{sum(math.prod(shape) for _, shape in tensors.values()):,} parameters in {len(tensors)} tensors"
    dtypes = "/".join(sorted({dtype for dtype, _ in tensors.values()}))
    rows.append(("size", f"{size}, {dtypes}, {size_text(nbytes)}"))
    lines = ["## What it is", "", *_table(("setting", "value"), rows)]
    if page.metrics:
        lines += [
            "## Results",
            "",
            *_table(("metric", "value"), [(n, _value(_plain_number(n, value))) for n, value in page.metrics.items()]),
        ]
    if image:
        from jaxadapt.analysis.changes import measure_of  # imports NumPy, which a card without a picture does not need

        alt = "How much the adapter changes each weight, layer by module"
        what, _ = measure_of(config)
        caption = f"Layer by module: how much each weight changes{f' ({what})' if what else ''}."
        lines += ["## How much it changes", "", f"![{alt}]({image})", "", caption, ""]
    return lines


def _readers(readers: Sequence[Reader]) -> list[str]:
    """List the programs that read the adapter rightly, and the others with the reasons and the ways out."""
    right = [reader.name for reader in readers if reader.verdict == RIGHT]
    lines = ["## Who reads it", "", *([f"As it is: {', '.join(right)}.", ""] if right else [])]
    rows = [
        (names, WORDS[verdict], "; ".join(map(_reason, reasons)), _code(remedy))
        for verdict, names, reasons, remedy in grouped(readers)
    ]
    lines += _table(("program", "what it does", "why", "what helps"), rows)
    return [*lines, f"These rules hold for {', '.join(f'{reader.name} ({reader.version})' for reader in readers)}.", ""]


def _code(remedy: str) -> str:
    """Return a way out with its commands as code."""
    steps = (step.partition(": ") for step in remedy.split("; then "))
    return "; then ".join(f"`{command}`{colon}{rest}" for command, colon, rest in steps) if remedy else ""


def _reason(reason: str) -> str:
    name, _, effect = reason.partition(": ")
    return f"`{name}`: {effect}" if "=" in name or name.isidentifier() else reason


def _plain_number(name: str, value: Any) -> Any:
    """Return a metric as a JSON value; convert a numpy or JAX array of one number to that number."""
    if value is None or isinstance(value, str | int | float | list | tuple | dict):
        return cast("Any", value)
    with raise_as(ConfigError, f"metrics: {name}: expected a number or text", TypeError, ValueError):
        return float(value)


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    def cell(value: str) -> str:
        return value.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")

    lines = [f"| {' | '.join(map(cell, row))} |" for row in (head, *rows)]
    return [lines[0], f"|{'---|' * len(head)}", *lines[1:], ""]
