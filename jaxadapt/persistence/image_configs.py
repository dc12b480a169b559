"""Configurations of image adapters in one file, inferred from the tensors and alphas."""

from __future__ import annotations

import collections
import math
from collections.abc import Mapping
from typing import Any

from jaxadapt import configs
from jaxadapt.configs import Config
from jaxadapt.core.errors import FormatError
from jaxadapt.persistence import image_names
from jaxadapt.persistence.image_names import Layout
from jaxadapt.storage.source import TensorSource, View

_RANK = ("lora_A.weight", "hada_w1_b", "lokr_w2_b", "lokr_w1_b")
"""Tensors whose first axis is the rank, the first of them in a module."""


def infer_config(tensors: View, layout: Layout, file: TensorSource) -> tuple[Config, str]:
    """Return the configuration that the tensors and alphas show, and its method."""
    opaque = configs.Config.from_dict({"peft_type": "LYCORIS", "peft_version": None, "inference_mode": True})
    if layout.method == "LYCORIS":
        return opaque, "LYCORIS"
    modules: dict[str, dict[str, tuple[int, ...]]] = {}
    for key, spec in tensors.specs.items():
        module, name = image_names.split_key(key)
        modules.setdefault(module, {})[name] = tuple(spec.shape)
    fields = _FIELDS[layout.method](modules)
    if fields is None:
        return opaque, "LYCORIS"
    ranks = {module: _rank(shapes) for module, shapes in modules.items()}
    values = {module: _alpha(file, key) for module, key in layout.alphas.items()}
    alphas = {module: values.get(module, float(rank)) for module, rank in ranks.items()}
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
    full: set[bool] = set()
    for shapes in modules.values():
        first = shapes.get("lokr_w1") or _product(shapes.get("lokr_w1_a"), shapes.get("lokr_w1_b"))
        turned = "lokr_t2" in shapes  # (r, k) and (r, n) around the middle tensor
        a, b = shapes.get("lokr_w2_a"), shapes.get("lokr_w2_b")
        second = shapes.get("lokr_w2") or _product(a[::-1] if a and turned else a, b)
        if not first or not second or len(first) < 2 or len(second) < 2 or 0 in (*first, *second):
            return None
        full.add("lokr_w1" in shapes)
        wanted += [(first[0] * second[0], first[0]), (first[1] * second[1], first[1])]
    candidates = [-1, *sorted({factor for _, factor in wanted})]
    factor = next((f for f in candidates if all(split_size(size, f)[0] == one for size, one in wanted)), None)
    if factor is None or len(full) > 1:
        return None
    return {
        "decompose_factor": factor,
        "decompose_both": full == {False},
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
    return max(shapes["lokr_w2"][:2])


def _alpha(file: TensorSource, key: str) -> float:
    """Read one alpha. Raises `FormatError` if it is not one finite number."""
    value = file[key]
    if value.size != 1 or not math.isfinite(number := float(value.reshape(())[()])):
        raise FormatError(f"{file.source}: {key}: expected one finite number, found {value.size} values")
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
