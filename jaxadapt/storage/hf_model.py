"""A model's folder in the layout of Hugging Face: `model.safetensors`, or several shards and their index; config.json.

One rename replaces an old set of files by the new one: the rename of the single file, or of the index. The files of the
old set are deleted after that. The other files of the folder are the configuration and the tokenizer.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from jaxadapt.arrays.tensor_source import TensorSource, as_source, combine, numpy_dtype
from jaxadapt.core.errors import FileError, FormatError, raise_as, raise_listed
from jaxadapt.core.lazy import np
from jaxadapt.storage import atomic, local_files, location, safetensors, torch_bin

SINGLE_FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
BIN, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"

Specs = Mapping[str, "tuple[Any, Sequence[int]]"]


def read_index(path: location.Location) -> dict[str, str]:
    """Return `{key: file name}` of an index."""
    data = location.read_json(path, safetensors.MAX_HEADER)
    weight_map: Any = cast("dict[str, Any]", data).get("weight_map") if isinstance(data, dict) else None
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise FormatError(f"{path}: expected an object weight_map of file names, found {str(weight_map)[:80]}")
    names = cast("dict[str, str]", weight_map)
    outside = sorted({name for name in names.values() if Path(name).name != name or name in ("", ".", "..")})
    raise_listed(FormatError, f"{path}: expected names of files beside it, found:", outside)
    return names


@contextlib.contextmanager
def open_model(path: location.Location) -> Generator[TensorSource]:
    """Open the weights of a model's folder, or of one file, for reading.

    The folder is searched in transformers' order: model.safetensors, its index, pytorch_model.bin, its index.

    Raises:
        FileError: there are no weights, or a file of the index is missing.
        FormatError: a file is damaged, or index and files disagree.
    """
    with contextlib.ExitStack() as stack:

        def open_part(file: location.Location) -> TensorSource:
            if file.suffix == ".bin":
                # From a store, the whole file is fetched by each of the two passes.
                return torch_bin.open_tensors(file) if isinstance(file, Path) else as_source(torch_bin.read(file))
            return stack.enter_context(safetensors.TensorFile(file))

        main = main_file(path)
        if main == path or main.suffix != ".json":
            yield combine(str(main), [open_part(main)])
            return
        index = read_index(main)
        names = dict.fromkeys(index.values())
        raise_listed(
            FileError,
            f"{path}: {main.name} names files that do not exist; fetch them again:",
            [name for name in names if not location.exists(path / name)],
        )
        parts = {name: open_part(path / name) for name in names}
        raise_listed(FormatError, f"{main}: index and files disagree; fetch them again:", _disagreements(index, parts))
        yield combine(str(path), list(parts.values()))


def main_file(path: location.Location) -> location.Location:
    """Return the file of a model's weights, or their index, in a folder; the path itself if it is a file."""
    candidates = [path / name for name in (SINGLE_FILE, INDEX, BIN, BIN_INDEX)] if location.is_dir(path) else [path]
    found = next(filter(location.exists, candidates), None)
    if found is None:
        raise FileError(
            f"{path}: no such file, and no folder with {SINGLE_FILE}, {INDEX} or {BIN}; check the path, or download a"
            " model of the Hub with `hf download ORG/NAME --local-dir FOLDER`"
        )
    return found


def read_shapes(path: location.Location) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a model's folder, or of one file: of weights, or of shapes (.json). Reads no tensor."""
    if path.suffix == ".json":
        return read_json_shapes(path)
    main = main_file(path)
    if main != path:
        files = dict.fromkeys(read_index(main).values()) if main.suffix == ".json" else (main.name,)
        return {key: shape for file in files for key, shape in read_shapes(path / file).items()}
    if path.suffix == ".safetensors":
        return {key: info.shape for key, info in safetensors.read_header(path).tensors.items()}
    return {key: shape for key, (_, shape) in torch_bin.keys_and_shapes(path).items()}


def read_json_shapes(path: location.Location) -> dict[str, tuple[int, ...]]:
    """Return the shapes that a JSON object {name: shape} states."""
    document: Any = location.read_json(path, safetensors.MAX_HEADER)
    shapes = cast("dict[str, Any]", document if isinstance(document, dict) else {"the whole file": None})
    raise_listed(
        FormatError,
        f"{path}: expected a JSON object of shapes such as {{name: [2, 3]}}, found no list of integers at:",
        [name for name, shape in shapes.items() if safetensors.naturals(shape) is None],
    )
    return {name: tuple(shape) for name, shape in shapes.items()}


def _disagreements(index: Mapping[str, str], parts: Mapping[str, TensorSource]) -> list[str]:
    """Return the differences between an index and the files, which `parts` has by name."""
    wrong = [f"{key} is not in {name}" for key, name in index.items() if key not in parts[name]]
    held = [(key, name) for name, part in parts.items() for key in part]
    wrong += [f"{key} of {name} is not in the index" for key, name in held if key not in index]
    return wrong + [f"{key} is also in {name}" for key, name in held if index.get(key, name) != name]


# Quantization formats, by the suffix of a tensor that accompanies a quantized weight.
_QUANTIZED_SUFFIXES = {
    ".nested_absmax": "bitsandbytes in 4 bits, with double quantization",
    ".quant_state.bitsandbytes__nf4": "bitsandbytes in 4 bits",
    ".quant_state.bitsandbytes__fp4": "bitsandbytes in 4 bits",
    ".SCB": "bitsandbytes in 8 bits",
    ".qweight": "GPTQ or AWQ",
    ".weight_scale_inv": "blocks of 8 bits",
    ".weight_scale": "a scale for each weight or row",
}


def refuse_packed(tensors: TensorSource) -> None:
    """Raise `FormatError` if the weights are quantized: their codes must not be taken for weights."""
    for suffix, name in _QUANTIZED_SUFFIXES.items():
        raise_listed(
            FormatError,
            f"{tensors.source}: its weights are quantized ({name}), and only dense weights can be read:",
            [key for key in tensors.specs if key.endswith(suffix)],
            "\nDequantize them first (transformers: model.dequantize(), save_pretrained) and read the result."
            " jaxadapt.models.quantize quantizes the result again; its nf4 values equal those of bitsandbytes",
        )


def _choose_file_names(folder: location.Location, count: int) -> list[str]:
    """Return `count` unused file names: the old set must stay intact until the new one is complete."""
    if count == 1:
        return [SINGLE_FILE]
    stems = itertools.chain(["model"], (f"model-{generation}" for generation in itertools.count(2)))
    sets = ([f"{stem}-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)] for stem in stems)
    return next(names for names in sets if not any(location.exists(folder / name) for name in names))


def write_model(
    folder: location.Location,
    specs: Specs,
    get: Callable[[str], np.ndarray],
    limit: int,
    progress: Callable[[int], None],
) -> None:
    """Write a model's weights, durably and atomically, holding one tensor at a time.

    Args:
        folder: an existing folder; its other files are kept.
        specs: (safetensors dtype name, shape) by key.
        get: returns the array of a key. Called once a key, file by file.
        limit: the largest size of a file in bytes. A larger model becomes several files and an index.
        progress: called with the number of bytes written since its last call.

    Raises:
        FileError, MismatchError: as in `safetensors.write`. The old weights are then still in place.
    """
    sizes = {key: math.prod(shape) * numpy_dtype(dtype).itemsize for key, (dtype, shape) in specs.items()}
    groups = local_files.split_by_size(specs, sizes.__getitem__, limit)
    names = _choose_file_names(folder, len(groups))
    replaced = _current_files(folder)
    index = [folder / INDEX] if len(groups) > 1 else []
    with atomic.replacing_all([*(folder / name for name in names), *index]) as writers:  # the index last
        for writer, keys in zip(writers, groups, strict=False):
            safetensors.write_to(writer, {key: specs[key] for key in keys}, get, {"format": "pt"}, progress=progress)
        if index:
            weight_map = {key: name for name, keys in zip(names, groups, strict=True) for key in keys}
            data = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
            writers[-1].write(f"{json.dumps(data, indent=2, sort_keys=True)}\n".encode())
    # Delete old files: transformers prefers a single file to an index, and other readers take every file.
    new = {*names, INDEX} if len(names) > 1 else set(names)
    remaining: list[str] = []
    for name in sorted(replaced - new):
        try:
            (folder / name).unlink(missing_ok=True)
        except (OSError, FileError) as error:
            remaining.append(f"{name} ({error})")
    raise_listed(
        FileError,
        f"{folder}: the new weights are in place, but these files of the old ones could not be deleted, and readers may"
        " take them instead; delete them yourself:",
        remaining,
    )


def _current_files(folder: location.Location) -> set[str]:
    """Return the names of the folder's current weight files, which a new set replaces."""
    names = {name for name in (SINGLE_FILE, INDEX) if location.is_file(folder / name)}
    return names | set(read_index(folder / INDEX).values()) if INDEX in names else names


# ---------------------------------------------------------------- configuration and other files


CONFIG = "config.json"

_COPIED_SUFFIXES = (".json", ".txt", ".model", ".jinja")
"""Suffixes of a model's other files: configuration, tokenizer, chat template."""

TIE_FIELD = "tie_word_embeddings"
"""The field of config.json that ties the head to the embedding."""

TIE_DEFAULTS: Mapping[str, bool] = {
    **dict.fromkeys(
        "bert bloom cohere cohere2 falcon gemma gemma2 gemma3 gemma3_text gemma3n gemma3n_text gemma4 gemma4_text gpt2"
        " gpt_bigcode gpt_neo opt paligemma roberta smollm3 starcoder2 whisper xlm-roberta".split(),
        True,
    ),
    **dict.fromkeys(
        "deepseek_v2 deepseek_v3 glm glm4 glm4_moe gpt_neox gpt_oss gptj granite llama llama4 llama4_text llava"
        " minimax_m2 mistral mixtral nemotron nemotron_h olmo olmo2 olmo3 olmoe phi phi3 phimoe qwen2 qwen2_5_vl"
        " qwen2_moe qwen2_vl qwen3 qwen3_moe qwen3_next qwen3_vl stablelm".split(),
        False,
    ),
}
"""The default of the field by model type."""


def read_model_config(path: location.Location) -> dict[str, Any] | None:
    """Read the fields of a config.json, or of the one in a folder; return None if the file does not exist."""
    path = path if path.name == CONFIG else path / CONFIG
    try:
        document = location.read_json(path)
    except FileError as error:  # not `location.exists`: a part of the path may be a file
        if isinstance(error.__cause__, FileNotFoundError):
            return None
        raise
    if not isinstance(document, dict):
        raise FormatError(f"{path}: expected a JSON object, found {type(document).__name__}")
    return cast("dict[str, Any]", document)


def is_tied(config: Mapping[str, Any]) -> bool | None:
    """Return True if a config.json ties the head to the token embedding, None if it is ambiguous.

    transformers 5 reads the field beside `text_config`, transformers 4 the field in it. Without the field, both use the
    default of the model type.

    >>> is_tied({"model_type": "gpt2"}), is_tied({"model_type": "gpt2", "tie_word_embeddings": False})
    (True, False)
    """
    text, outer = config.get("text_config"), _tie_field(config)
    if outer is None:
        outer = TIE_DEFAULTS.get(str(config.get("model_type")))
    inner = _tie_field(cast("Mapping[str, Any]", text)) if isinstance(text, Mapping) else None
    return outer if inner is None or inner == outer else None


def _tie_field(config: Mapping[str, Any]) -> bool | None:
    value = config.get(TIE_FIELD)
    return value if isinstance(value, bool) else None


def text_fields(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the fields of the text model, which a model with images has in `text_config`."""
    text: Any = config.get("text_config")
    return text if isinstance(text, Mapping) else config


def untie_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a config.json with the head untied from the embedding."""
    text: Any = config.get("text_config")
    inner = {"text_config": {**text, TIE_FIELD: False}} if isinstance(text, Mapping) else {}
    return {**config, **inner, TIE_FIELD: False}


def read_tied(base: location.Location | None) -> bool | None:
    """Return what `is_tied` says of the config.json of a base; None without such a file, and for a GGUF file."""
    config = None if base is None or base.suffix == ".gguf" else read_model_config(base)
    return None if config is None else is_tied(config)


def read_other_files(source: location.Location, dtype: str | None, untie: bool) -> dict[str, bytes]:
    """Read the model's other files; change its configuration to `dtype`, and `untie` its head, if given."""
    is_folder = location.is_dir(source)
    with local_files.read_errors(source):
        members = sorted(source.iterdir(), key=str) if is_folder else []
    copied = [
        path
        for path in members
        if path.suffix in _COPIED_SUFFIXES
        and not path.name.endswith(".index.json")
        and path.name != location.CONFIG
        and location.is_file(path)
    ]
    config = (source if is_folder else source.parent) / CONFIG
    if untie and read_model_config(config) is not None and config not in copied:
        copied.append(config)  # also if the base is a single file
    files: dict[str, bytes] = {}
    for path in copied:
        with local_files.read_errors(path):
            files[path.name] = path.read_bytes()
    if CONFIG in files and (untie or dtype is not None):
        files[CONFIG] = _change_config(config, files[CONFIG], dtype, untie)
    return files


def _change_config(path: location.Location, config: bytes, dtype: str | None, untie: bool) -> bytes:
    """Set the dtype in a config.json, because transformers loads a model in this dtype, and untie the head."""

    def replace_dtype(fields: dict[str, Any]) -> dict[str, Any]:
        return {k: dtype if k in ("dtype", "torch_dtype") and isinstance(v, str) else v for k, v in fields.items()}

    expected = f"{path}: cannot set the dtype {dtype}: expected a JSON file, but reading failed"
    with raise_as(FormatError, expected, ValueError):
        fields = json.loads(config, object_hook=None if dtype is None else replace_dtype)
    return json.dumps(untie_config(fields) if untie else fields, indent=2).encode() + b"\n"
