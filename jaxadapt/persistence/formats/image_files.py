"""Image adapters in one file (kohya-ss, LyCORIS, diffusers) ↔ `PeftTensors`.

The values never change: a file that is read and written again has the same tensors, bit for bit (an alpha becomes one
number in the dtype of its module, where that holds it). kohya-ss stores each module's alpha as a tensor; in PEFT it is
`lora_alpha` (or `alpha`) of the configuration, with a pattern for each module that differs. A file without alphas has
the scale 1, so that its alpha is the rank.

The configuration is inferred from the tensors and alphas.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import math
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from typing import Any

from jaxadapt.adapters.peft_tensors import PeftTensors, require_floats
from jaxadapt.arrays.tensor_source import TensorSource, View, as_source, rename
from jaxadapt.configs.base import Config
from jaxadapt.configs.lora import LoraConfig
from jaxadapt.core.errors import AdapterError, FormatError, MismatchError, raise_listed
from jaxadapt.core.progress import Report, byte_counter
from jaxadapt.keymaps.keymap import PEFT_PREFIX
from jaxadapt.persistence.findings import Finding, note
from jaxadapt.persistence.formats import Format, Opened, Place, Wanted, image_names
from jaxadapt.persistence.formats.image_names import DIFFUSERS, KOHYA, Layout
from jaxadapt.storage import safetensors
from jaxadapt.storage.location import Location

# ---------------------------------------------------------------- image configs


METADATA = "lora_adapter_metadata"
"""diffusers' key of a header: {"<model>.<field>": value} of the LoraConfig of each model of the pipeline, as JSON."""

_RANK = ("lora_A.weight", "hada_w1_b", "lokr_w2_b", "lokr_w1_b")
"""Tensors whose first axis is the rank, the first of them in a module."""


def infer_config(tensors: View, layout: Layout, file: TensorSource, metadata: Mapping[str, str]) -> tuple[Config, str]:
    """Return the configuration that the tensors, the alphas and diffusers' metadata show, and its method."""
    opaque = Config.from_dict({"peft_type": image_names.LYCORIS, "peft_version": None, "inference_mode": True})
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
    from jaxadapt.methods.lycoris import split_size

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


# ---------------------------------------------------------------- image files


def recognises(place: Place) -> bool:
    """Return True for a file with the names of an image adapter. Reads only the header."""
    is_file = place.names is None and place.at.suffix == ".safetensors"
    return is_file and image_names.find_layout(safetensors.read_header(place.at).tensors) is not None


@contextlib.contextmanager
def open_file(place: Location) -> Generator[Opened]:
    """Open an image adapter; its tensors are read on demand.

    Raises `FormatError` if the file is not one, or `FileError` if it cannot be read.
    """
    with safetensors.TensorFile(place) as file:
        layout = image_names.find_layout(file.header.tensors)
        if layout is None:
            raise FormatError(
                f"{place}: expected the keys of an image adapter of kohya-ss, LyCORIS or diffusers, such as"
                f" lora_unet_….lora_down.weight or unet.….lora_A.weight, found {next(iter(file), 'no tensor')}"
            )
        yield read_tensors(file, layout, file.header.metadata, place)


def read_tensors(file: TensorSource, layout: Layout, metadata: Mapping[str, str], place: Location) -> Opened:
    """Return the content of an open file; its tensors are read on demand.

    Raises `FormatError` for an alpha that is no number, and for metadata of diffusers that contradicts the tensors.
    """
    scales = [name for name, key in layout.keys.items() if key.endswith(".dora_scale") and layout.method == "LORA"]
    if not all(_outputs(file, layout, name) for name in scales):  # one magnitude for each input, or a damaged one
        layout = dataclasses.replace(layout, method=image_names.LYCORIS, keys={key: key for key in file}, alphas={})
    tensors = _rename(file, layout)
    config, method = infer_config(tensors, layout, file, metadata)
    if method != layout.method:  # PEFT's configuration cannot describe these tensors: they only pass through
        layout = dataclasses.replace(layout, method=method, keys={key: key for key in file}, alphas={})
        tensors = rename(file, layout.keys)
    adapter = PeftTensors(config, tensors, file.source)
    return Opened(adapter, place, "an image adapter's file", layout.style, layout, dict(metadata), split_models)


def _rename(file: TensorSource, layout: Layout) -> View:
    """Return the tensors under PEFT's names; DoRA's magnitudes get PEFT's shape."""
    shaped: dict[str, Any] = {}
    for name, key in layout.keys.items():
        b = _outputs(file, layout, name) if layout.method == "LORA" and key.endswith(".dora_scale") else ()
        if b:
            shaped[name] = file[key].reshape((b[0],) if len(b) == 2 else (1, b[0], *(1 for _ in b[2:])))
    origins: dict[str, tuple[TensorSource, str]] = {name: (file, key) for name, key in layout.keys.items()}
    return View(file.source, origins | {name: (as_source(shaped), name) for name in shaped})


def _outputs(file: TensorSource, layout: Layout, name: str) -> tuple[int, ...]:
    """Return the shape of B beside a magnitude of (out, 1, …), one for each output; () for another magnitude."""
    b_key = layout.keys.get(name.replace("lora_magnitude_vector", "lora_B.weight"), "")
    b = tuple(file.specs[b_key].shape) if b_key in file else ()
    return b if b and tuple(file.specs[layout.keys[name]].shape) == (b[0], *(1 for _ in b[1:])) else ()


# ---------------------------------------------------------------- writing


Specs = dict[str, tuple[Any, Sequence[int]]]
_NAMED = "\nkohya-ss has names for LoRA, LoHa and LoKr (--format kohya-ss); keep PEFT's folder for all else"


def write_file(tensors: PeftTensors, target: Location, wanted: Wanted, report: Report) -> int:
    """Write an image adapter as one file, durably and atomically; return the number of its tensors.

    Args:
        tensors: the modules have the names of a pipeline's models: unet.…, text_encoder.…
        target: the file.
        wanted: the style, "kohya-ss" or "diffusers"; in the style of its origin, the modules keep their names.
        report: called with ("save", bytes done, total bytes).

    Raises `MismatchError` for tensors and settings that the style has no form for.
    """
    source, origin = as_source(tensors.tensors), wanted.origin
    require_floats(tensors.config, source.specs, target)
    layout = origin.names if origin is not None and origin.style == wanted.style else None
    specs, get, alphas = file_tensors(tensors, wanted.style, layout)
    header = dict(origin.metadata if origin is not None and origin.metadata else {"format": "pt"})
    stated = header.pop(METADATA, None) if tensors.config.peft_type == "LORA" else None
    if alphas and (stated is not None or any(rank != alpha for rank, alpha in alphas.values())):
        header[METADATA] = diffusers_metadata(alphas, bool(tensors.config.get("use_dora")))
    count = byte_counter(report, "save", sum(map(source.nbytes, source)))
    safetensors.write(target, specs, get, header, progress=count)
    return len(specs)


def file_tensors(
    tensors: PeftTensors, style: str, layout: Layout | None
) -> tuple[Specs, Callable[[str], Any], dict[str, tuple[int, float]]]:
    """Return `{the file's key: (dtype, shape)}`, a function that returns one tensor, and what the header must state.

    The header of diffusers' file states the rank and alpha of each module. It has no tensors of alphas, which its
    loader refuses for most pipelines, unless the file that the adapter came from has them.
    """
    names, alphas, stated = _file_keys(tensors, style, layout)
    source = as_source(tensors.tensors)
    specs: Specs = {}
    origins: dict[str, str] = {}
    dtypes: dict[str, Any] = {}
    for key, name in names.items():
        shape = tuple(source.specs[key].shape)
        if name.endswith(".dora_scale") and key != name:
            b = source.specs[key.replace("lora_magnitude_vector", "lora_B.weight")].shape
            shape = (b[0], *(1 for _ in b[1:]))
        specs[name], origins[name] = (source.specs[key].dtype, shape), key
        dtypes.setdefault(image_names.split_key(key)[0], source.specs[key].dtype)
    values: dict[str, Any] = {}
    for module, (name, alpha) in alphas.items():
        specs[name], values[name] = (_exact_dtype(alpha, dtypes[module]), ()), alpha

    def get(name: str) -> Any:
        import numpy as np

        if name in values:
            return np.asarray(values[name], specs[name][0])
        return np.asarray(source[origins[name]]).reshape(specs[name][1])

    return specs, get, stated


def _exact_dtype(number: float, dtype: Any) -> Any:
    """Return the dtype if it holds the number exactly, or else the narrowest one that does."""
    import numpy as np

    with np.errstate(over="ignore"):
        fitting = [d for d in (np.dtype(dtype), np.dtype("float32")) if float(np.asarray(number, d)) == number]
    return fitting[0] if fitting else np.dtype("float64")


def _file_keys(
    tensors: PeftTensors, style: str, layout: Layout | None
) -> tuple[dict[str, str], dict[str, tuple[str, float]], dict[str, tuple[int, float]]]:
    """Return {PEFT's key: the file's key}, {module: (the key of its alpha, alpha)}, and what the header states."""
    method = tensors.config.peft_type
    if method not in ("LORA", "LOHA", "LOKR"):
        return {key: key for key in tensors.tensors}, {}, {}
    modules = {key: image_names.split_key(key) for key in tensors.tensors}
    settings = _file_settings(tensors, modules)
    kohya, known = image_names.kohya_keys(settings), {} if layout is None else layout.keys

    def file_key(key: str) -> str | None:
        module, name = modules[key]
        if key in known:
            return known[key]
        if style == DIFFUSERS:
            return key.removeprefix(PEFT_PREFIX) if method == "LORA" and name else None
        ending = image_names.KOHYA_ENDINGS.get((method, name))
        return None if ending is None else f"{kohya[module]}.{ending}"

    names = {key: found for key in modules if (found := file_key(key)) is not None}
    others = [key for key, (_, name) in modules.items() if key not in names or not name]
    problem = f"{tensors.source}: cannot write one file of {style}, which has no name for:"
    raise_listed(MismatchError, problem, others, _NAMED)
    if layout is None:
        _require_pipeline(tensors, style, {name: modules[key][0] for key, name in names.items()})
    stored = {} if layout is None else layout.alphas
    if style == DIFFUSERS and not stored:
        return names, {}, settings
    alphas: dict[str, tuple[str, float]] = {}
    for module, (rank, alpha) in settings.items():
        if module in stored or rank != alpha or (style == KOHYA and layout is None):
            end = f"{kohya[module] if style == KOHYA else module}.{image_names.ALPHA}"
            alphas[module] = (stored.get(module, end), alpha)
    return names, alphas, {}


def _file_settings(tensors: PeftTensors, modules: Mapping[str, tuple[str, str]]) -> dict[str, tuple[int, float]]:
    """Return {module: (rank, alpha)} of a file, whose scale is alpha divided by the rank of its tensors.

    Raises `MismatchError` if the configuration has other ranks than the tensors.
    """
    specs, pairs = as_source(tensors.tensors).specs, {m: find_settings(tensors.config, m) for m, _ in modules.values()}
    found = {module: list(specs[key].shape) for key, (module, name) in modules.items() if name == "lora_A.weight"}
    wrong = [f"{m}: {pairs[m][0]}, the tensor is {shape}" for m, shape in found.items() if shape[:1] != [pairs[m][0]]]
    raise_listed(MismatchError, f"{tensors.source}: the configuration has other ranks than the tensors:", wrong)
    rooted = bool(tensors.config.get("use_rslora"))  # PEFT's scale is then alpha / √rank
    return {module: (rank, alpha * math.sqrt(rank) if rooted else alpha) for module, (rank, alpha) in pairs.items()}


def _require_pipeline(tensors: PeftTensors, style: str, modules: Mapping[str, str]) -> None:
    """Raise `MismatchError` if readers would not recognise a file, from {the file's key: module}."""
    if image_names.find_layout(modules) is None:
        raise_listed(
            MismatchError,
            f"{tensors.source}: cannot write one file of {style}: these modules are in no model of a pipeline (unet,"
            " text_encoder, transformer …):",
            list(dict.fromkeys(m for name, m in modules.items() if image_names.find_layout([name]) is None)),
            "\nName a PEFT folder as its model, and convert the folder above it. The flattened names of an unknown"
            " model have only kohya-ss' form",
        )


# ---------------------------------------------------------------- one folder for each model


def split_models(tensors: PeftTensors) -> dict[str, PeftTensors]:
    """Return {model of the pipeline: its adapter}, each with the names that the model itself gives its modules.

    Raises `MismatchError` for modules whose names stay flattened, because no list has them, and for tensors of a method
    that PEFT does not have.
    """
    if tensors.config.peft_type == image_names.LYCORIS:
        raise MismatchError(
            f"{tensors.source}: PEFT has no method for these tensors ({image_names.lycoris_types(tensors.tensors)}), so"
            " that they only pass through; write one file (.safetensors) instead"
        )
    by_model: dict[str, dict[str, str]] = {}
    flat: list[str] = []
    for key in tensors.tensors:
        model, dot, rest = key.removeprefix(PEFT_PREFIX).partition(".")
        if "." not in image_names.split_key(key)[0] or not dot:
            flat.append(key)
        by_model.setdefault(model, {})[PEFT_PREFIX + rest] = key
    raise_listed(
        MismatchError,
        f"{tensors.source}: cannot write PEFT's folders, because these modules are of a model whose names"
        " jaxadapt does not know (it knows Stable Diffusion 1, 2 and XL). Write one file instead:",
        flat,
    )
    source = as_source(tensors.tensors)
    return {
        model: PeftTensors(_config_of(tensors.config, model), rename(source, names), tensors.source)
        for model, names in by_model.items()
    }


def _config_of(config: Config, model: str) -> Config:
    """Return the settings of the modules of one model, under the model's own names."""
    values = config.to_dict()
    targets = [name.partition(".")[2] for name in values["target_modules"] if name.partition(".")[0] == model]
    for field in ("rank_pattern", "alpha_pattern"):
        items = (values.get(field) or {}).items()
        own = {name.partition(".")[2]: value for name, value in items if name.partition(".")[0] == model}
        values[field] = anchored(own, targets)
    values["target_modules"] = targets
    return Config.from_dict(values)


def join_models(parts: Mapping[str, PeftTensors], source: str) -> PeftTensors:
    """Return one adapter from {model of the pipeline: its adapter}; the reverse of `split_models`.

    Raises `MismatchError` if their methods differ in more than ranks and alphas.
    """
    whole = {model: part.config.to_dict() for model, part in parts.items()}
    first = next(iter(whole.values()))
    scale = "lora_alpha" if first["peft_type"] == "LORA" else "alpha"
    own = ("r", scale, "rank_pattern", "alpha_pattern", "target_modules", "base_model_name_or_path", "auto_mapping")
    differing = sorted({k for v in whole.values() for k in v if k not in own and v[k] != first.get(k)})
    if differing:
        raise MismatchError(f"{source}: the adapters of {', '.join(whole)} differ in {', '.join(differing)}")
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    origins: dict[str, tuple[TensorSource, str]] = {}
    for model, part in parts.items():
        tensors = as_source(part.tensors)
        for key in tensors:
            module, _ = image_names.split_key(key)
            ranks[f"{model}.{module}"], alphas[f"{model}.{module}"] = find_settings(part.config, module)
            origins[f"{PEFT_PREFIX}{model}.{key.removeprefix(PEFT_PREFIX)}"] = (tensors, key)
    (r, rank_pattern), (alpha, alpha_pattern) = split_common(ranks), split_common(alphas)
    values = first | {
        "r": r, "rank_pattern": rank_pattern, scale: alpha, "alpha_pattern": alpha_pattern,
        "target_modules": sorted(ranks), "auto_mapping": None, "base_model_name_or_path": None,
    }  # fmt: skip
    return PeftTensors(Config.from_dict(values), View(source, origins), source)


def describe(source: str, opened: Opened | AdapterError) -> Finding:
    """Return the finding about a file, which is sound. Raises the error that refused it."""
    if isinstance(opened, AdapterError):
        raise opened
    layout = opened.names
    if layout.method == image_names.LYCORIS:
        types = image_names.lycoris_types(layout.keys)
        text = f"a file of {layout.style} whose method PEFT does not have ({types}); it passes through as it is"
    elif layout.unknown:
        text = f"a file of {layout.style} with modules of an unknown model, whose names stay flattened"
    else:
        text = f"a file of {layout.style} for {', '.join(layout.models)}"
    return note("image-file", layout.unknown, text)


FORMAT = Format(
    recognises,
    lambda place: open_file(place.at),
    write_file,
    describe=describe,
    join=join_models,
    styles=(KOHYA, DIFFUSERS),
    suffix=".safetensors",
)
