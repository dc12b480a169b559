"""Configurations of image adapters in one file, inferred from the tensors and alphas."""

from __future__ import annotations

import collections
import json
import math
from collections.abc import Collection, Mapping
from typing import Any

from jaxadapt import configs
from jaxadapt.configs import Config, LoraConfig
from jaxadapt.core.errors import FormatError, raise_listed
from jaxadapt.persistence import image_names
from jaxadapt.persistence.image_names import DIFFUSERS, Layout
from jaxadapt.storage.source import TensorSource, View

METADATA = "lora_adapter_metadata"
"""diffusers' key of a header: {"<model>.<field>": value} of the LoraConfig of each model of the pipeline, as JSON."""

_RANK = ("lora_A.weight", "hada_w1_b", "lokr_w2_b", "lokr_w1_b")
"""Tensors whose first axis is the rank, the first of them in a module."""


def infer_config(tensors: View, layout: Layout, file: TensorSource, metadata: Mapping[str, str]) -> tuple[Config, str]:
    """Return the configuration that the tensors, the alphas and diffusers' metadata show, and its method."""
    opaque = configs.Config.from_dict({"peft_type": image_names.LYCORIS, "peft_version": None, "inference_mode": True})
    if layout.method == image_names.LYCORIS:
        return opaque, image_names.LYCORIS
    modules: dict[str, dict[str, tuple[int, ...]]] = {}
    for key, spec in tensors.specs.items():
        module, name = image_names.split_key(key)
        modules.setdefault(module, {})[name] = tuple(spec.shape)
    fields = _FIELDS[layout.method](modules)
    if fields is None:
        return opaque, image_names.LYCORIS
    ranks = {module: _rank(shapes) for module, shapes in modules.items()}
    values = {module: _alpha(file, key) for module, key in layout.alphas.items()}
    stated = _stated_alphas(layout, ranks, values, file.source, metadata)
    alphas = {module: values.get(module, stated.get(module, float(rank))) for module, rank in ranks.items()}
    for module, shapes in modules.items():
        if {"lokr_w1", "lokr_w2"} <= shapes.keys():
            alphas[module] = float(ranks[module])  # LyCORIS does not scale a product of two full matrices
    alpha_field = "lora_alpha" if layout.method == "LORA" else "alpha"
    r, rank_pattern = split_common(ranks)
    alpha, alpha_pattern = split_common({m: int(a) if a.is_integer() else a for m, a in alphas.items()})
    values_by_field = {
        "peft_type": layout.method, "r": r, "rank_pattern": rank_pattern, alpha_field: alpha,
        "alpha_pattern": alpha_pattern, "target_modules": sorted(modules), "inference_mode": True, **fields,
    }  # fmt: skip
    return Config.from_dict(values_by_field, file.source), layout.method


def _stated_alphas(
    layout: Layout, ranks: Mapping[str, int], alphas: Mapping[str, float], source: str, metadata: Mapping[str, str]
) -> dict[str, float]:
    """Return the alpha of each module of a model that diffusers' metadata configures; with rsLoRA times √rank.

    Raises `FormatError` for metadata that is no JSON object or contradicts the tensors, `ConfigError` for its values.
    """
    if METADATA not in metadata or (layout.style, layout.method) != (DIFFUSERS, "LORA"):
        return {}
    place = f"{source}: {METADATA} of the header"
    try:
        fields = dict(json.loads(metadata[METADATA]).items())
    except (ValueError, AttributeError, RecursionError) as error:
        raise FormatError(f"{place}: expected a JSON object: {error}; save the file again with diffusers") from error
    by_model: dict[str, LoraConfig] = {}
    for model in layout.models:
        own = {key.removeprefix(f"{model}."): x for key, x in fields.items() if key.startswith(f"{model}.")}
        if own:  # diffusers takes a model without fields as one without metadata, if its rank is 8
            by_model[model] = LoraConfig.from_dict(own, f"{place}: {model}")
    stated: dict[str, float] = {}
    wrong: list[str] = []
    for module, rank in ranks.items():
        model, _, name = module.partition(".")
        if model not in by_model:
            continue
        config = by_model[model]
        alpha = config.alpha_of(name) * (math.sqrt(rank) if config.use_rslora else 1)
        if config.rank_of(name) != rank:
            wrong.append(f"{module}: rank {config.rank_of(name)} in the header, {rank} in its tensors")
        elif alphas.get(module, alpha) != alpha:
            wrong.append(f"{module}: alpha {alpha:g} in the header, {alphas[module]:g} in its tensor")
        stated[module] = float(alpha)
    raise_listed(
        FormatError,
        f"{place} contradicts the tensors:",
        wrong,
        "\nSave the file again with the program that trained it; or without metadata (safetensors' load_file and"
        " save_file), so that each alpha is the rank",
    )
    return stated


def diffusers_metadata(settings: Mapping[str, tuple[int, float]], use_dora: bool) -> str:
    """Return the text of diffusers' metadata, from {module: (rank, alpha)}: the fields that it needs for every file."""
    models: dict[str, dict[str, tuple[int, float]]] = {}
    for module, values in settings.items():
        model, _, name = module.partition(".")
        # transformers 5 has no "text_model" in CLIP; without it, the name is the end of that of every version.
        models.setdefault(model, {})[name.removeprefix("text_model.")] = values
    fields: dict[str, Any] = {}
    for model, own in models.items():
        for number, (field, pattern) in enumerate((("r", "rank_pattern"), ("lora_alpha", "alpha_pattern"))):
            common, others = split_common({name: values[number] for name, values in own.items()})
            fields |= {f"{model}.{field}": common, f"{model}.{pattern}": anchored(others, own)}
        fields |= {f"{model}.target_modules": sorted(own), f"{model}.use_dora": use_dora}
    return json.dumps(fields, indent=2, sort_keys=True)


def anchored(values: Mapping[str, Any], modules: Collection[str]) -> dict[str, Any]:
    """Return {pattern: value} that matches only the given names, where others of the modules end with one of them.

    >>> anchored({"proj_out": 4, "conv": 2}, ["proj_out", "blocks.0.proj_out", "conv"])
    {'^proj_out': 4, 'conv': 2}
    """
    ends = {name[i + 1 :] for name in modules for i, letter in enumerate(name) if letter == "."}
    return {f"^{name}" if name in ends else name: value for name, value in values.items()}


Modules = Mapping[str, Mapping[str, tuple[int, ...]]]


def _lora_fields(modules: Modules) -> dict[str, Any] | None:
    if any(not {"lora_A.weight", "lora_B.weight"} <= shapes.keys() for shapes in modules.values()):
        return None
    if any(0 in s or len(s) < 2 for shapes in modules.values() for n, s in shapes.items() if n.endswith(".weight")):
        return None
    vectors = [shapes for shapes in modules.values() if "lora_magnitude_vector" in shapes]
    for shapes in vectors:
        b = shapes["lora_B.weight"]
        if shapes["lora_magnitude_vector"] not in ((b[0],), (1, b[0], *(1 for _ in b[2:]))) or len(b) < 2:
            return None
        if (len(shapes["lora_magnitude_vector"]) == 1) != (len(b) == 2):
            return None
    if vectors and len(vectors) < len(modules):
        return None
    return {"use_dora": True} if vectors else {}


def _loha_fields(modules: Modules) -> dict[str, Any] | None:
    wanted = {f"hada_w{i}_{side}" for i in "12" for side in "ab"}
    if any(not wanted <= shapes.keys() or not shapes["hada_w1_b"] for shapes in modules.values()):
        return None
    return {"use_effective_conv2d": any("hada_t1" in shapes for shapes in modules.values())}


def _lokr_fields(modules: Modules) -> dict[str, Any] | None:
    """Return the fields of LoKr; None if no one factor gives the sizes of all modules."""
    from jaxadapt.methods.lokr import split_size

    wanted: list[tuple[int, int]] = []  # (size of the module, its first factor)
    both = any("lokr_w1_a" in shapes for shapes in modules.values())
    for shapes in modules.values():
        first = shapes.get("lokr_w1") or _product(shapes.get("lokr_w1_a"), shapes.get("lokr_w1_b"))
        turned = "lokr_t2" in shapes  # (r, k) and (r, n) around the middle tensor
        a, b = shapes.get("lokr_w2_a"), shapes.get("lokr_w2_b")
        second = shapes.get("lokr_w2") or _product(a[::-1] if a and turned else a, b)
        if not first or not second or len(first) < 2 or len(second) < 2 or 0 in (*first, *second):
            return None
        if ("lokr_w1" in shapes) != (not both or _rank(shapes) >= max(first[:2]) / 2):  # as PEFT builds the module
            return None
        wanted += [(first[0] * second[0], first[0]), (first[1] * second[1], first[1])]
    candidates = [-1, *sorted({factor for _, factor in wanted})]
    factor = next((f for f in candidates if all(split_size(size, f)[0] == one for size, one in wanted)), None)
    if factor is None:
        return None
    return {
        "decompose_factor": factor,
        "decompose_both": both,
        "use_effective_conv2d": any("lokr_t2" in shapes for shapes in modules.values()),
    }


def _product(a: tuple[int, ...] | None, b: tuple[int, ...] | None) -> tuple[int, ...] | None:
    return None if not a or not b else (a[0], *b[1:])


_FIELDS = {"LORA": _lora_fields, "LOHA": _loha_fields, "LOKR": _lokr_fields}


def _rank(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Return the rank of a module; for LoKr with two full matrices the smallest with which PEFT keeps them full."""
    for name in _RANK:
        if shapes.get(name):
            return shapes[name][0]
    return max(*shapes["lokr_w1"][:2], *shapes["lokr_w2"][:2])


def _alpha(file: TensorSource, key: str) -> float:
    """Read one alpha. Raises `FormatError` if it is not one finite number."""
    value = file[key]
    if value.size != 1 or not math.isfinite(number := float(value.reshape(())[()])):
        found = f"{value.size} values" if value.size != 1 else str(value.reshape(())[()])
        raise FormatError(f"{file.source}: {key}: expected one finite number, found {found}")
    return number


def split_common(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return the most frequent value, and {module: value} of the others."""
    counts = collections.Counter(values.values())
    common = max(counts, key=lambda value: (counts[value], value))
    return common, {module: value for module, value in sorted(values.items()) if value != common}


def find_settings(config: Config, module: str) -> tuple[int, float]:
    """Return the rank and alpha of a module."""
    from jaxadapt.configs.frozen import find_pattern_value

    alpha = config.get("lora_alpha") if config.peft_type == "LORA" else config.get("alpha")
    return (
        find_pattern_value(config.get("rank_pattern"), module, config.get("r")),
        find_pattern_value(config.get("alpha_pattern"), module, alpha),
    )
