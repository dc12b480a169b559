"""Image adapters in one file (kohya-ss, LyCORIS, diffusers) ↔ `PeftTensors`.

The values never change: a file that is read and written again has the same tensors, bit for bit (an alpha becomes one
number in the dtype of its module, where that holds it). kohya-ss stores each module's alpha as a tensor; in PEFT it is
`lora_alpha` (or `alpha`) of the configuration, with a pattern for each module that differs. A file without alphas has
the scale 1, so that its alpha is the rank.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

from jaxadapt.adapters.peft_tensors import PeftTensors, require_floats
from jaxadapt.configs import Config
from jaxadapt.core.errors import FormatError, MismatchError, raise_listed
from jaxadapt.keymaps.keymap import PEFT_PREFIX
from jaxadapt.persistence import image_configs, image_names
from jaxadapt.persistence.image_names import DIFFUSERS, KOHYA, Layout
from jaxadapt.storage import hub, location, safetensors
from jaxadapt.storage.location import Location
from jaxadapt.storage.source import TensorSource, View, as_source, rename


@dataclasses.dataclass(frozen=True)
class ImageFile:
    """An open file: its content as PEFT's tensors, and the names in it."""

    tensors: PeftTensors
    layout: Layout
    metadata: Mapping[str, str]


def is_file(path: str | os.PathLike[str]) -> bool:
    """Return True if a path names one file of tensors in place of a folder."""
    return location.to_location(path).suffix == ".safetensors"


def is_image_file(path: str | os.PathLike[str]) -> bool:
    """Return True if a path is a file with the names of an image adapter. Reads only the header."""
    if not is_file(path) or hub.is_address(path):
        return False
    place = location.to_location(path)
    return location.is_file(place) and find_layout(place) is not None


def find_layout(path: Location) -> Layout | None:
    """Return the layout of a file; None if it is no image adapter. Reads only the header."""
    return image_names.find_layout(safetensors.read_header(path).tensors)


@contextlib.contextmanager
def open_file(path: str | os.PathLike[str]) -> Generator[ImageFile]:
    """Open an image adapter; its tensors are read on demand.

    Raises `FormatError` if the file is not one, or `FileError` if it cannot be read.
    """
    place = location.to_location(path)
    with safetensors.open_tensors(place) as file:
        layout = image_names.find_layout(file.header.tensors)
        if layout is None:
            raise FormatError(
                f"{place}: expected the keys of an image adapter of kohya-ss, LyCORIS or diffusers, such as"
                f" lora_unet_….lora_down.weight or unet.….lora_A.weight, found {next(iter(file), 'no tensor')}"
            )
        yield read_tensors(file, layout, file.header.metadata)


def read_tensors(file: TensorSource, layout: Layout, metadata: Mapping[str, str]) -> ImageFile:
    """Return the content of an open file; its tensors are read on demand.

    Raises `FormatError` for an alpha that is no number, and for metadata of diffusers that contradicts the tensors.
    """
    scales = [name for name, key in layout.keys.items() if key.endswith(".dora_scale") and layout.method == "LORA"]
    if not all(_outputs(file, layout, name) for name in scales):  # one magnitude for each input, or a damaged one
        layout = dataclasses.replace(layout, method=image_names.LYCORIS, keys={key: key for key in file}, alphas={})
    tensors = _rename(file, layout)
    config, method = image_configs.infer_config(tensors, layout, file, metadata)
    if method != layout.method:  # PEFT's configuration cannot describe these tensors: they only pass through
        layout = dataclasses.replace(layout, method=method, keys={key: key for key in file}, alphas={})
        tensors = rename(file, layout.keys)
    return ImageFile(PeftTensors(config, tensors, file.source), layout, metadata)


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


def write_file(
    tensors: PeftTensors, path: str | os.PathLike[str], style: str = KOHYA, layout: Layout | None = None,
    metadata: Mapping[str, str] | None = None, progress: Any = None,
) -> int:  # fmt: skip
    """Write an image adapter as one file, durably and atomically; return the number of its tensors.

    Args:
        tensors: the modules have the names of a pipeline's models: unet.…, text_encoder.…
        path: the file.
        style: "kohya-ss" or "diffusers".
        layout: the names of the file that the adapter came from; its modules keep them.
        metadata: strings for the header.
        progress: called with the number of bytes written since its last call.

    Raises `MismatchError` for tensors and settings that the style has no form for.
    """
    require_floats(tensors.config, as_source(tensors.tensors).specs, os.fspath(path))
    specs, get, alphas = file_tensors(tensors, style, layout)
    header = dict(metadata or {"format": "pt"})
    stated = header.pop(image_configs.METADATA, None) if tensors.config.peft_type == "LORA" else None
    if alphas and (stated is not None or any(rank != alpha for rank, alpha in alphas.values())):
        header[image_configs.METADATA] = image_configs.diffusers_metadata(alphas, bool(tensors.config.get("use_dora")))
    safetensors.write(path, specs, get, header, progress=progress)
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
    config = tensors.config
    if config.peft_type not in ("LORA", "LOHA", "LOKR"):
        return {key: key for key in tensors.tensors}, {}, {}
    modules = {key: image_names.split_key(key) for key in tensors.tensors}
    others = [key for key, (_, name) in modules.items() if not name]
    specs = as_source(tensors.tensors).specs
    wrong: list[str] = []  # the scale of a file is alpha divided by the rank of its tensors
    for key, (module, name) in modules.items():
        rank, found = image_configs.find_settings(config, module)[0], list(specs[key].shape)
        if name == "lora_A.weight" and found[:1] != [rank]:
            wrong.append(f"{module}: {rank}, the tensor is {found}")
    raise_listed(MismatchError, f"{tensors.source}: the configuration has other ranks than the tensors:", wrong)
    kohya = image_names.kohya_keys(dict.fromkeys(module for module, _ in modules.values()))
    known = {} if layout is None else layout.keys
    alphas: dict[str, tuple[str, float]] = {}
    names: dict[str, str] = {}
    for key, (module, name) in modules.items():
        ending = image_names.kohya_ending(config.peft_type, name)
        if key in known:
            names[key] = known[key]
        elif style == KOHYA and ending is not None:
            names[key] = f"{kohya[module]}.{ending}"
        elif style == DIFFUSERS and config.peft_type == "LORA":
            names[key] = key.removeprefix(PEFT_PREFIX)
        else:
            others.append(key)
    pairs = {module: image_configs.find_settings(config, module) for module, _ in modules.values()}
    rooted = bool(config.get("use_rslora"))  # a file's scale is alpha / rank, PEFT's is then alpha / √rank
    settings = {module: (rank, alpha * math.sqrt(rank) if rooted else alpha) for module, (rank, alpha) in pairs.items()}
    in_header = style == DIFFUSERS and not (layout is not None and layout.alphas)
    for module, (rank, alpha) in {} if in_header else settings.items():
        stored = None if layout is None else layout.alphas.get(module)
        if stored is not None or rank != alpha or (style == KOHYA and layout is None):
            end = f"{kohya[module] if style == KOHYA else module}.{image_names.ALPHA}"
            alphas[module] = (stored or end, alpha)
    problem = f"{tensors.source}: cannot write one file of {style}, which has no name for:"
    raise_listed(MismatchError, problem, others, _NAMED)
    if layout is None and image_names.find_layout(names.values()) is None:
        strange = {modules[key][0]: None for key, name in names.items() if image_names.find_layout([name]) is None}
        raise_listed(
            MismatchError,
            f"{tensors.source}: cannot write one file of {style}: these modules are in no model of a pipeline (unet,"
            " text_encoder, transformer …):",
            list(strange),
            "\nName a PEFT folder as its model, and convert the folder above it. The flattened names of an unknown"
            " model have only kohya-ss' form",
        )
    return names, alphas, settings if in_header else {}


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
        values[field] = image_configs.anchored(own, targets)
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
            ranks[f"{model}.{module}"], alphas[f"{model}.{module}"] = image_configs.find_settings(part.config, module)
            origins[f"{PEFT_PREFIX}{model}.{key.removeprefix(PEFT_PREFIX)}"] = (tensors, key)
    (r, rank_pattern), (alpha, alpha_pattern) = image_configs.split_common(ranks), image_configs.split_common(alphas)
    values = first | {
        "r": r, "rank_pattern": rank_pattern, scale: alpha, "alpha_pattern": alpha_pattern,
        "target_modules": sorted(ranks), "auto_mapping": None, "base_model_name_or_path": None,
    }  # fmt: skip
    return PeftTensors(Config.from_dict(values), View(source, origins), source)
