"""Tinker's downloaded adapter → `PeftTensors`: files with PEFT's names, and keys of Tinker's own.

| key in Tinker's file | module in PyTorch |
|---|---|
| `…mlp.experts.w1`, `w3`, `w2`, tensors of three axes | gate_proj, up_proj and down_proj of each expert |
| `model.unembed_tokens`, `model.lm_head` | lm_head |
| `model.layers.N.attn.…`, of GPT-OSS | `model.layers.N.self_attn.…` |

A is (r, in) and B (out, r), as PEFT's; those of experts have the experts' axis before them. It has size 1 for a factor
that all experts share. The change of a weight is lora_alpha / r · B·A with the `r` of the configuration, whatever the
rank of the tensors. Nothing is read that has two meanings without the base.

The source is the weights' code of Tinker's cookbook (August 2026). It shows no reader of such files but its own
conversion and merge, so that this format is only read.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Generator, Mapping, Sequence
from typing import Any, NoReturn, cast

import numpy as np

from jaxadapt.adapters.peft_tensors import PeftTensors
from jaxadapt.arrays.tensor_source import Derived, TensorSource, TensorSpec, combine, is_float, rename
from jaxadapt.configs.base import Config, unique_keys
from jaxadapt.configs.lora import LoraConfig
from jaxadapt.core.errors import AdapterError, ConfigError, FileError, MismatchError, Report, raise_listed
from jaxadapt.keymaps.keymap import PEFT_PREFIX
from jaxadapt.persistence.formats import EXPECTED, Finding, Format, Opened, Place, Wanted, error, read_text
from jaxadapt.storage import location, safetensors

MERGE = "merge it into its base with Tinker's own cookbook"
# {axes of a tensor: the keys that only Tinker gives to such tensors}; PEFT's have two axes
_SIGNS = {
    2: re.compile(r".+\.model\.unembed_tokens\.lora_[AB]\..+"),
    3: re.compile(r".+\.experts\.w[123]\.lora_[AB]\..+"),
}
_KEY = re.compile(re.escape(PEFT_PREFIX) + r"(.+)\.lora_([AB])\.weight")
_EXPERTS = re.compile(r"(model\.layers\.\d+\.mlp\.experts)\.(w[123])")
_LAYER = re.compile(r"model\.layers\.(\d+)\..+")
_GPT_OSS = re.compile(r"(model\.layers\.\d+)\.attn(\.[qkvo]_proj)")
_HEADS = ("model.unembed_tokens", "model.lm_head", "lm_head")
_PROJECTIONS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
# (pattern of a module's name, why no tensor of PEFT has its values without the base)
_REFUSED = tuple(
    (re.compile(pattern), why)
    for pattern, why in (
        (r"(.*\.)?(mixer|backbone)\..+", "Nemotron: its Mamba layers' projections are parts of one weight in the base"),
        (r".+\.in_proj_[qkv]", "Qwen 3.5: these projections are parts of one weight, in_proj_qkv, in the base"),
        (r".+\.embed_tokens", "Tinker's source names no adapter of the token embedding"),
    )
)
# {field of PEFT: the value that leaves the change of a weight at lora_alpha / r · B·A}
_PLAIN: Mapping[str, Any] = {
    "use_rslora": False, "use_dora": False, "rank_pattern": {}, "alpha_pattern": {}, "bias": "none",
    "fan_in_fan_out": False, "lora_bias": False, "modules_to_save": None, "target_parameters": None,
}  # fmt: skip


# ---------------------------------------------------------------- finding


def recognises(place: Place) -> bool:
    """Return False: the names of the files are PEFT's. `peft_folder` asks `is_named_like` after reading them."""
    return False


def is_named_like(tensors: Mapping[str, safetensors.TensorInfo], config: location.Location) -> bool:
    """Return True for keys of Tinker, or a configuration of Tinker: `r` and `lora_alpha` without a type and targets."""
    signs = ((_SIGNS.get(len(info.shape)), key) for key, info in tensors.items())
    if any(sign is not None and sign.fullmatch(key) for sign, key in signs):
        return True
    values: Mapping[str, Any] = {}
    with contextlib.suppress(ConfigError, FileError):  # the reader of PEFT's folder reports it
        values = _parse_object(read_text(config)) if location.exists(config) else {}
    return {"r", "lora_alpha"} <= values.keys() and values.keys().isdisjoint({"peft_type", "target_modules"})


def _parse_object(text: str) -> dict[str, Any]:
    """Return a JSON object; an empty one for any other text."""
    try:
        values: object = json.loads(text, object_pairs_hook=unique_keys)
    except (ValueError, ConfigError, RecursionError):
        return {}
    return cast("dict[str, Any]", values) if isinstance(values, dict) else {}


# ---------------------------------------------------------------- reading


def parse_settings(text: str, source: str) -> LoraConfig:
    """Return PEFT's configuration for Tinker's, without the modules, which the tensors name.

    Raises `ConfigError` for another method than LoRA, a missing or invalid number, or a setting that changes the scale.
    """
    values = _parse_object(text)
    if not {"r", "lora_alpha"} <= values.keys():
        raise ConfigError(f"{source}: expected a JSON object with r and lora_alpha, as Tinker writes; fetch it again")
    config = Config.from_dict({"peft_type": "LORA", **values}, source)
    if not isinstance(config, LoraConfig):
        raise ConfigError(f"{source}: peft_type: expected LORA in Tinker's adapter, found {config.peft_type}")
    raise_listed(
        ConfigError,
        f"{source}: Tinker's adapter changes a weight by lora_alpha / r · B·A, and these fields say otherwise. Remove"
        " them, or correct the keys of the file if it is PEFT's:",
        [
            f"{name}: expected {plain!r}, found {config.get(name)!r}"
            for name, plain in _PLAIN.items()
            if config.get(name) and config.get(name) != plain
        ],
    )
    return config


@contextlib.contextmanager
def open_files(place: Place) -> Generator[Opened]:
    """Open an adapter of Tinker under PEFT's names; the tensors of an expert are cut from a file's when they are read.

    Raises:
        ConfigError: see `parse_settings`.
        MismatchError: a tensor is missing, or PEFT has no form for it; all are listed.
        FileError: a file cannot be read.
    """
    weights = place.at if place.names is None else place.at / location.WEIGHTS[0]
    config = weights.parent / location.CONFIG
    settings = parse_settings(read_text(config), str(config))
    with safetensors.TensorFile(weights) as file:
        yield Opened(read_tensors(file, settings, os.fspath(place.path)), weights, "Tinker's folder")


def read_tensors(file: TensorSource, settings: LoraConfig, source: str) -> PeftTensors:
    """Return the content of an open file as PEFT's; see `open_files`."""
    modules = _group_keys(file, settings, source)
    whole: dict[str, str] = {}
    parts: dict[str, tuple[str, int]] = {}
    ranks: dict[str, int] = {}
    twice: list[str] = []
    for module, keys in modules.items():
        shapes = {side: file.specs[key].shape for side, key in keys.items()}
        names = _module_names(module, max(shapes["A"][0], shapes["B"][0]))
        twice += [f"{PEFT_PREFIX}{module}: {name} has an adapter already" for name in names if name in ranks]
        ranks |= dict.fromkeys(names, shapes["A"][-2])
        for side, key in keys.items():
            new = [f"{PEFT_PREFIX}{name}.lora_{side}.weight" for name in names]
            if len(shapes[side]) == 2:
                whole[new[0]] = key
            else:
                parts |= {name: (key, expert % shapes[side][0]) for expert, name in enumerate(new)}
    raise_listed(MismatchError, f"{source}: two modules of the file are one in PyTorch; remove one of each:", twice)
    config = settings.replace(target_modules=_targets(list(ranks)))
    if set(ranks.values()) != {settings.r}:
        config = config.with_ranks(ranks, {name: _alpha(settings, rank) for name, rank in ranks.items()})
    return PeftTensors(config, combine(source, [rename(file, whole), _single_experts(file, parts)]), source)


def _group_keys(file: TensorSource, settings: LoraConfig, source: str) -> dict[str, dict[str, str]]:
    """Return {module: {"A": its key, "B": its key}}. Raises `MismatchError` listing tensors without a form in PEFT."""
    modules: dict[str, dict[str, str]] = {}
    problems: list[str] = []
    for key in file:
        match = _KEY.fullmatch(key)
        if match is None:
            problems.append(f"{key}: expected {PEFT_PREFIX}<module>.lora_A.weight or lora_B.weight")
        else:
            modules.setdefault(match[1], {})[match[2]] = key
    is_gpt_oss = any(map(_GPT_OSS.fullmatch, modules)) or "gpt-oss" in str(settings.base_model_name_or_path).lower()
    for module, keys in modules.items():
        if problem := _problem(module, {side: file.specs[key] for side, key in keys.items()}, is_gpt_oss):
            problems.append(f"{PEFT_PREFIX}{module}: {problem}")
    raise_listed(MismatchError, f"{source}: cannot read Tinker's adapter in PEFT's form; {MERGE}:", problems)
    return modules


def _alpha(settings: LoraConfig, rank: int) -> float:
    """Return the alpha with which a rank has the scale lora_alpha / r."""
    alpha = settings.lora_alpha * rank / settings.r
    return int(alpha) if float(alpha).is_integer() else alpha


def _module_names(module: str, count: int) -> list[str]:
    """Return PyTorch's names for a module of Tinker: one, or one for each of `count` experts.

    >>> _module_names("model.unembed_tokens", 0), _module_names("model.layers.0.attn.q_proj", 0)
    (['lm_head'], ['model.layers.0.self_attn.q_proj'])
    >>> _module_names("model.layers.0.mlp.experts.w2", 2)
    ['model.layers.0.mlp.experts.0.down_proj', 'model.layers.0.mlp.experts.1.down_proj']
    """
    if match := _EXPERTS.fullmatch(module):
        return [f"{match[1]}.{expert}.{_PROJECTIONS[match[2]]}" for expert in range(count)]
    return ["lm_head" if module in _HEADS else _GPT_OSS.sub(r"\1.self_attn\2", module)]


def _problem(module: str, specs: Mapping[str, TensorSpec], is_gpt_oss: bool) -> str:
    """Return why a module of Tinker has no form in PEFT; "" if it has one."""
    if why := next((why for pattern, why in _REFUSED if pattern.fullmatch(module)), ""):
        return why
    if len(specs) != 2:
        return f"expected lora_A.weight and lora_B.weight, found only lora_{''.join(specs)}.weight"
    a, b = (tuple(specs[side].shape) for side in "AB")
    if not all(is_float(spec.dtype) for spec in specs.values()):
        return f"expected floating-point numbers, found {specs['A'].dtype} and {specs['B'].dtype}"
    if "experts" in module.split("."):
        return _problem_of_experts(module, a, b, is_gpt_oss)
    is_pair = len(a) == len(b) == 2 and a[0] == b[1] and 0 not in (*a, *b)
    return "" if is_pair else f"expected A (r, in) and B (out, r), found {list(a)} and {list(b)}"


def _problem_of_experts(module: str, a: tuple[int, ...], b: tuple[int, ...], is_gpt_oss: bool) -> str:
    if is_gpt_oss:
        return "GPT-OSS: PEFT adapts its experts as two parameters, with gate and up interleaved, not read yet"
    if not _EXPERTS.fullmatch(module):
        return "expected model.layers.<N>.mlp.experts.w1, w2 or w3, the only names of experts in Tinker's source"
    if len(a) != 3 or len(b) != 3 or a[1] != b[2] or 0 in (*a, *b):
        return f"expected A (experts, r, in) and B (experts, out, r), found {list(a)} and {list(b)}"
    if a[0] != b[0] and 1 not in (a[0], b[0]):
        return f"expected as many experts in A as in B, or 1 in the factor that all share, found {a[0]} and {b[0]}"
    return "" if max(a[0], b[0]) > 1 else "A and B are both shared, so that the number of experts is not known"


def _targets(modules: Sequence[str]) -> list[str]:
    """Return `target_modules` for names of modules: the last part of the names, if modules in each layer have it.

    The projections of experts have no other form: PEFT finds their modules' names only by this part.

    >>> _targets(["model.layers.0.mlp.q", "model.layers.1.mlp.q", "model.layers.1.v", "lm_head"])
    ['lm_head', 'model.layers.1.v', 'q']
    """
    layers: dict[str, set[str]] = {}
    for name in modules:
        if match := _LAYER.fullmatch(name):
            layers.setdefault(name.rpartition(".")[2], set()).add(match[1])
    everywhere = set[str]().union(*layers.values())
    short = {end for end, found in layers.items() if found == everywhere}
    short |= {name.rpartition(".")[2] for name in modules if ".experts." in name}
    return sorted({end if (end := name.rpartition(".")[2]) in short else name for name in modules})


def _single_experts(file: TensorSource, parts: Mapping[str, tuple[str, int]]) -> TensorSource:
    """Return the matrices of single experts, from `{new name: (key, expert)}`; each is cut when it is read."""

    def spec(name: str) -> TensorSpec:
        shape, dtype = file.specs[parts[name][0]]
        return TensorSpec(tuple(shape[1:]), dtype)

    def read(name: str, slices: Sequence[slice]) -> np.ndarray:
        key, expert = parts[name]
        return file.read_slice(key, (slice(expert, expert + 1), *slices))[0]

    return Derived(file.source, parts, spec, read)


# ---------------------------------------------------------------- the other direction


def refuse_writing(tensors: PeftTensors, target: location.Location, wanted: Wanted, report: Report) -> NoReturn:
    """Raise `FileError`: no loader of Tinker for such files is known."""
    raise FileError(f"{target}: cannot write Tinker's files: no program that loads them is known; write PEFT's folder")


def describe(source: str, opened: Opened | AdapterError) -> Finding:
    """Return the finding about a folder: how to convert it, or why it cannot be converted."""
    if isinstance(opened, AdapterError):
        return error(
            "other-library", (), str(opened), "an adapter of Tinker that PEFT has a form for",
            f"correct what the message names; otherwise {MERGE}",
        )  # fmt: skip
    return error(
        "other-library", (), "the keys are Tinker's, which PEFT and vLLM do not read; jaxadapt does", EXPECTED,
        f"run: jaxadapt convert {source} OUT",
    )  # fmt: skip


FORMAT = Format(recognises, open_files, refuse_writing, describe=describe)
