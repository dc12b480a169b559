"""The same adapter in another file format: PEFT's folder, PyTorch's .bin, Orbax, or one file of an image adapter.

    source ──open_source──► {part: PeftTensors} ──with_dtype──► _WRITERS[format]

A source is an adapter's folder or address, a folder of such folders, an Orbax checkpoint, mlx-lm's folder, or an image
adapter in one file. One tensor is in memory at a time (all of a `.bin` file and of an Orbax checkpoint).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxadapt import methods
from jaxadapt.adapters.adapter import Adapter, PeftTensors
from jaxadapt.core import paths
from jaxadapt.core.errors import AdapterError, ConfigError, FileError, MismatchError
from jaxadapt.core.progress import Progress, Report, byte_counter, reporter
from jaxadapt.keymaps import pytorch
from jaxadapt.keymaps.keymap import KeyMap
from jaxadapt.persistence import folder, image_files, orbax_folder
from jaxadapt.persistence.image_names import DIFFUSERS, KOHYA, Layout
from jaxadapt.storage import atomic, hub, location, orbax
from jaxadapt.storage.location import Location
from jaxadapt.storage.source import as_source, cast
from jaxadapt.storage.strided import float_dtype

FOLDERS, FILES = ("safetensors", "bin", "orbax"), (KOHYA, DIFFUSERS)
FORMATS = (*FOLDERS, *FILES)
"""The formats of a target: folders, and single files."""


@dataclasses.dataclass(frozen=True)
class Written:
    """One adapter that was written: its path, method, number of tensors, and the rank and alpha of a LoRA."""

    path: str
    method: str
    tensors: int
    rank: int | None
    lora_alpha: float | None

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Source:
    """An open source.

    Attributes:
        parts: {subfolder, or "" for the source itself: its adapter}. An image adapter is one part.
        layout: the names of an image adapter's file.
        metadata: the strings in that file's header.
    """

    parts: Mapping[str, PeftTensors]
    layout: Layout | None = None
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict[str, str])


@atomic.cleans("target")
def convert_format(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    format: str | None = None,  # noqa: A002 (as in `save`)
    dtype: str | None = None,
    progress: Progress = None,
) -> list[Written]:
    """Write an adapter of any method again in another format, dtype, or both.

    Args:
        source: an adapter's folder or address; a folder whose subfolders are adapters, which become subfolders of the
            target; an Orbax checkpoint of jaxadapt; mlx-lm's folder, or its adapters.safetensors; an image adapter in
            one file (.safetensors) of kohya-ss, LyCORIS or diffusers, which becomes one PEFT folder for each model of
            the pipeline (unet/, text_encoder/, …).
        target: the folder to write, or a file whose name ends in .safetensors.
        format: "safetensors", "bin" or "orbax" for a folder; "kohya-ss" or "diffusers" for a file. Default:
            "safetensors" for a folder, and for a file the names of the source.
        dtype: the dtype of the floating-point tensors, such as "bfloat16" or "float8_e4m3fn". Default: their own.
            Values are rounded to the nearest; 8 bits keep 2 to 3 digits in base 2.
        progress: as in `jaxadapt.write`.

    Raises:
        AdapterError: the format has no form for the adapter, or a value overflows the dtype. A single adapter is then
            not written.

    >>> import tempfile, numpy as np, jaxadapt
    >>> tensors = {"base_model.model.q.lora_A.weight": np.ones((2, 4), "float32"),
    ...            "base_model.model.q.lora_B.weight": np.ones((6, 2), "float32")}
    >>> adapter = jaxadapt.PeftTensors(jaxadapt.LoraConfig(r=2, target_modules=["q"]), tensors)
    >>> with tempfile.TemporaryDirectory() as tmp:
    ...     jaxadapt.write(adapter, f"{tmp}/a")
    ...     done = convert_format(f"{tmp}/a", f"{tmp}/b", dtype="bfloat16")
    ...     jaxadapt.inspect(f"{tmp}/b").dtypes
    ('BF16',)
    """
    is_single = image_files.is_file(target)
    if format is not None and (format not in FORMATS or (format in FILES) != is_single):
        raise ConfigError(
            f"--format {format}: expected {', '.join(FOLDERS)} with a folder as the target, or {' or '.join(FILES)}"
            " with a file whose name ends in .safetensors"
        )
    refuse_same(source, target)
    with reporter(progress) as report, open_source(source, report) as opened:
        parts = {name: with_dtype(tensors, dtype) for name, tensors in opened.parts.items()}
        if is_single:
            whole = parts[""] if "" in parts else image_files.join_models(parts, os.fspath(source))
            return [_write_single(whole, target, format, opened, report)]
        if opened.layout is not None:
            parts = image_files.split_models(parts[""])
        place = location.to_location(target)
        return [
            _write_folder(tensors, place / name if name else place, format or "safetensors", report)
            for name, tensors in parts.items()
        ]


def refuse_same(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Raise `FileError` for a target that would replace the source, or that is an address of the Hub."""
    if hub.is_address(target):
        raise FileError(f"{target}: expected a local folder or file; upload it with jaxadapt push")
    if not hub.is_address(source) and location.is_same(*map(location.to_location, (source, target))):
        raise FileError(f"{os.fspath(target)}: the target is the source; choose another name")


@contextlib.contextmanager
def open_source(path: str | os.PathLike[str], report: Report) -> Generator[Source]:
    """Open what a path holds; see `convert_format`."""
    if image_files.is_image_file(path):
        with image_files.open_file(path) as file:
            yield Source({"": file.tensors}, file.layout, file.metadata)
        return
    with contextlib.ExitStack() as stack:
        names = [""] if hub.is_address(path) else _subfolders(location.to_location(path))
        opened = {name: stack.enter_context(folder.open_adapter(_joined(path, name), report)) for name in names}
        yield Source(opened)


def _joined(path: str | os.PathLike[str], name: str) -> Any:
    return location.to_location(path) / name if name else path


def _subfolders(place: Location) -> list[str]:
    """Return [""] for an adapter's folder, or the names of the subfolders that are adapters."""
    if orbax.is_checkpoint(place) or not location.is_dir(place):
        return [""]
    names = (folder.CONFIG, folder.WEIGHTS, folder.WEIGHTS_BIN)
    if any(location.exists(place / name) for name in names):
        return [""]
    inner = sorted(p.name for p in place.iterdir() if location.exists(p / folder.CONFIG) or orbax.is_checkpoint(p))
    return inner or [""]


# ---------------------------------------------------------------- dtype


def with_dtype(tensors: PeftTensors, dtype: str | None) -> PeftTensors:
    """Return the tensors in another dtype, cast when they are read."""
    if dtype is None:
        return tensors
    return dataclasses.replace(tensors, tensors=cast(tensors.tensors, float_dtype(dtype)))


# ---------------------------------------------------------------- writing


def _write_single(
    tensors: PeftTensors, target: str | os.PathLike[str], style: str | None, opened: Source, report: Report
) -> Written:
    layout = opened.layout
    if style is None and layout is None:
        raise ConfigError(
            "the names in the target file are not decided: pass --format kohya-ss or --format diffusers, or --to for"
            " the tree of a JAX library"
        )
    keeps = layout is not None and style in (None, layout.style)
    source = as_source(tensors.tensors)
    count = byte_counter(report, "save", sum(map(source.nbytes, source)))
    number = image_files.write_file(
        tensors, target, style or (layout.style if layout is not None else KOHYA), layout if keeps else None,
        opened.metadata, count,
    )  # fmt: skip
    return _written(tensors, target, number)


def _write_folder(tensors: PeftTensors, target: Location, format: str, report: Report) -> Written:  # noqa: A002
    _WRITERS[format](tensors, target, report)
    return _written(tensors, target, len(tensors.tensors))


def write_like(
    tensors: PeftTensors,
    target: str | os.PathLike[str],
    source: str | os.PathLike[str],
    dtype: str | None,
    report: Report,
) -> None:
    """Write the result of a command: a folder, or a file with the names of the image adapter it came from.

    Args:
        tensors: the result.
        target: a folder, or a file whose name ends in .safetensors.
        source: the first adapter that the command read.
        dtype: as in `convert_format`.
        report: the progress.
    """
    refuse_same(source, target)
    tensors = with_dtype(tensors, dtype)
    is_image, is_single = image_files.is_image_file(source), image_files.is_file(target)
    if is_single and not is_image:
        raise FileError(f"{os.fspath(target)}: expected a folder; only an image adapter is one file")
    if is_single:
        with image_files.open_file(source) as file:
            _write_single(tensors, target, None, Source({}, file.layout, file.metadata), report)
        return
    place = location.to_location(target)
    parts = image_files.split_models(tensors) if is_image else {"": tensors}
    for name, part in parts.items():
        folder.write(part, place / name if name else place, progress=report)


def _written(tensors: PeftTensors, target: str | os.PathLike[str], number: int) -> Written:
    rank, alpha = tensors.config.get("r"), tensors.config.get("lora_alpha")
    return Written(os.fspath(target), tensors.config.peft_type, number, rank, None if alpha is None else float(alpha))


def _write_orbax(tensors: PeftTensors, target: Location, report: Report) -> None:
    arrays = dataclasses.replace(tensors, tensors={key: np.asarray(tensors.tensors[key]) for key in tensors.tensors})
    try:
        adapter = with_pytorch_names(arrays)
    except AdapterError as error:
        raise MismatchError(
            f"{tensors.source}: only a model has places for all tensors of this adapter in an Orbax checkpoint; load it"
            f" into its model, and call jaxadapt.save(model, path, format='orbax'). {error}"
        ) from error
    orbax_folder.write(adapter, target, alone=True)
    orbax_folder.report_total(report, "save", adapter)


_WRITERS: Mapping[str, Callable[[PeftTensors, Location, Report], None]] = {
    "safetensors": lambda tensors, target, report: folder.write(tensors, target, progress=report),
    "bin": lambda tensors, target, report: folder.write(tensors, target, format="bin", progress=report),
    "orbax": _write_orbax,
}


def with_pytorch_names(tensors: PeftTensors) -> Adapter:
    """Return the adapter for a model whose parameters have PyTorch's names and layouts."""
    import jax

    from jaxadapt.persistence import peft  # imports Flax, which the rest of this file does not need

    shapes = as_source(tensors.tensors).shapes
    weights = pytorch.weight_shapes(shapes)
    base = paths.unflatten({leaf: jax.ShapeDtypeStruct(shape, "float32") for leaf, shape in weights.items()})
    sizes = functools.partial(methods.file_sizes, tensors.config)
    return peft.from_peft(tensors, base, keymap=pytorch.state_dict_keymap(weights, shapes, tensors.source, sizes))


def base_keymap(
    tensors: PeftTensors, base: Mapping[str, tuple[int, ...]], tied: tuple[tuple[str, str], ...] = ()
) -> KeyMap:
    """Return the keymap for an adapter of a model in files, from the shapes of its parameters; see `pytorch`."""
    shapes, sizes = as_source(tensors.tensors).shapes, functools.partial(methods.file_sizes, tensors.config)
    turned = bool(tensors.config.get("fan_in_fan_out"))
    return pytorch.state_dict_keymap(base, shapes, tensors.source, sizes, turned, tied)


def convert_several(
    sources: Sequence[str | os.PathLike[str]], target: str | os.PathLike[str], **options: Any
) -> list[Written]:
    """Convert each source into the folder `target`, under its own name; see `convert_format`.

    Raises `FileError` before anything is written if two sources have one name.
    """
    place = location.to_location(target)
    names = list(map(_last_name, sources))
    twice = paths.repeated(names)
    if twice:
        raise FileError(f"{os.fspath(target)}: several sources are called {', '.join(twice)}; convert them one by one")
    single = options.get("format") in FILES
    done: list[Written] = []
    for source, name in zip(sources, names, strict=True):
        stem = name.removesuffix(".safetensors")
        done += convert_format(source, place / (f"{stem}.safetensors" if single else stem), **options)
    return done


def _last_name(source: str | os.PathLike[str]) -> str:
    """Return the last part of a path or an address; that of the folder itself for "." and "..".

    >>> _last_name("runs/../fr/"), _last_name("hf://org/de")
    ('fr', 'de')
    """
    text = os.fspath(source)
    is_remote = location.is_address(source)
    return (text.rstrip("/") if is_remote else os.path.abspath(text)).rpartition("/")[2]  # noqa: PTH100 (keeps links)
