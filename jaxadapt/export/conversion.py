"""Convert adapter files between families, spellings and libraries, without a model.

Every conversion is from or to a PEFT folder. The other side may be a tree: a safetensors file of the LoRA leaves of
another library under their dotted paths, `save_file({".".join(path): leaf, …})`.

The same adapter in another file format: PEFT's folder, PyTorch's .bin, Orbax, or one file of an image adapter.

    source ──open_source──► {part: PeftTensors} ──with_dtype──► _WRITERS[format]

A source is an adapter's folder or address, a folder of such folders, an Orbax checkpoint, mlx-lm's folder, or an image
adapter in one file. One tensor is in memory at a time (all of a `.bin` file and of an Orbax checkpoint).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxadapt.adapters import experts
from jaxadapt.adapters.adapter import Adapter, PeftTensors
from jaxadapt.configs import matching
from jaxadapt.configs.base import Config
from jaxadapt.configs.lora import LoraConfig
from jaxadapt.core import paths
from jaxadapt.core.errors import (
    AdapterError,
    ConfigError,
    FileError,
    FormatError,
    KeyMapError,
    MismatchError,
    raise_listed,
)
from jaxadapt.core.progress import Progress, Report, byte_counter, reporter
from jaxadapt.keymaps import families, pytorch
from jaxadapt.keymaps.keymap import PEFT_PREFIX, KeyMap
from jaxadapt.methods.registry import file_sizes
from jaxadapt.models.foreign import blank, dialects
from jaxadapt.models.foreign import tree as foreign
from jaxadapt.models.foreign.dialect import Dialect, is_like
from jaxadapt.persistence import folder
from jaxadapt.persistence.formats import image_files, mlx_files, orbax_folder
from jaxadapt.persistence.formats.image_names import DIFFUSERS, KOHYA, Layout
from jaxadapt.storage import atomic, hub, location, orbax, safetensors
from jaxadapt.storage.location import Location
from jaxadapt.storage.source import as_source, cast
from jaxadapt.storage.strided import float_dtype

# ---------------------------------------------------------------- file formats


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
    sizes = functools.partial(file_sizes, tensors.config)
    return peft.from_peft(tensors, base, keymap=pytorch.state_dict_keymap(weights, shapes, tensors.source, sizes))


def base_keymap(
    tensors: PeftTensors, base: Mapping[str, tuple[int, ...]], tied: tuple[tuple[str, str], ...] = ()
) -> KeyMap:
    """Return the keymap for an adapter of a model in files, from the shapes of its parameters; see `pytorch`."""
    shapes, sizes = as_source(tensors.tensors).shapes, functools.partial(file_sizes, tensors.config)
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


# ---------------------------------------------------------------- conversion


NOTE = "jaxadapt_tree"
"""The metadata key for the scale of a tree, which its leaves do not contain."""


@dataclasses.dataclass(frozen=True)
class ConvertedFile:
    """A converted adapter. A tree's model must be built with its rank and alpha."""

    path: str
    tensors: int
    dialect: str | None
    rank: int | None
    lora_alpha: float | None

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@atomic.cleans("target")
def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    from_keymap: KeyMap | str | None = None,
    to_keymap: KeyMap | str | None = None,
    dialect: str | None = None,
    lora_alpha: float | None = None,
    like: str | os.PathLike[str] | None = None,
    sizes: Mapping[str, int] | None = None,
    on_shared: str | None = None,
    format: str | None = None,  # noqa: A002 (as in `save`)
    dtype: str | None = None,
    progress: Progress = None,
) -> ConvertedFile:
    """Convert an adapter from a PEFT folder or a tree (`*.safetensors`) to a PEFT folder or a tree.

    An Orbax checkpoint written by `save` and mlx-lm's folder are read like a folder. Without a tree, only the format
    changes: `file_formats.convert_format`.

    Args:
        source: the PEFT folder, Orbax checkpoint, mlx-lm folder or tree to read.
        target: the PEFT folder or tree to write.
        from_keymap: the family of a source tree (default: recognized by its paths), or the spelling of a source folder.
        to_keymap: the family of a target tree, or another spelling for a target folder.
        dialect: the LoRA layout of a target tree. Default: the one of the family's library.
        lora_alpha: the alpha of a source tree whose file does not contain it.
        like: a safetensors file with the base weights of the target tree, or else of the source tree. Only the shapes
            in its header are read.
        sizes: in place of `like`, the sizes of ambiguous axes by their letters in the family's entries.
        on_shared: as in `load`; the rank grows as needed.
        format: "bin" writes a folder with PyTorch's adapter_model.bin; "orbax" an Orbax checkpoint with PyTorch's names
            in place of a folder, which any model can load; "kohya-ss" and "diffusers" the file of an image adapter.
        dtype: as in `convert_format`.
        progress: as in `read` and `write`, for folders.

    Raises:
        AdapterError: the conversion is impossible, and nothing is written. The message names the options of
            `jaxadapt convert`.
    """
    trees = [location.to_location(path).suffix == ".safetensors" for path in (source, target)]
    if not any(trees) and (like is not None or sizes):
        raise ConfigError("--like and --axis need a tree (a file ending in .safetensors) as source or target")
    keymaps_given = from_keymap is not None or to_keymap is not None
    is_adapter = trees[0] and (image_files.is_image_file(source) or mlx_files.is_file(source))
    if is_adapter or (not keymaps_given and not trees[0] and (not trees[1] or format in FILES)):
        given = {"--from": from_keymap, "--to": to_keymap, "--dialect": dialect, "--on-shared": on_shared}
        _refuse_tree_options(given | {"--lora-alpha": lora_alpha}, source)
        (done, *more) = convert_format(source, target, format=format, dtype=dtype, progress=progress)
        return ConvertedFile(str(target), sum(part.tensors for part in (done, *more)), None, done.rank, done.lora_alpha)
    if dtype is not None:
        raise ConfigError("--dtype cannot be combined with --from or --to; convert the result again with --dtype")
    format = format or "safetensors"  # noqa: A001
    if format not in FOLDERS or (trees[1] and format != "safetensors"):
        raise ConfigError(f"--format {format}: expected safetensors, or bin or orbax with a folder as the target")
    tensors = _read(source, from_keymap, lora_alpha, None if trees[1] else like, sizes or {}, progress, on_shared)
    if not trees[1]:
        respell = from_keymap is not None and to_keymap is not None and not trees[0]
        keymaps = [families.resolve_keymap(keymap, {}) for keymap in (from_keymap, to_keymap)] if respell else []
        converts_experts = respell and keymaps[0].per_expert != keymaps[1].per_expert
        if dialect is not None or (on_shared is not None and not trees[0] and not converts_experts):
            raise ConfigError("--dialect and --on-shared need a tree (a file ending in .safetensors)")
        if converts_experts and keymaps[1].per_expert:
            tensors = PeftTensors(*experts.split_experts(tensors.config, tensors.tensors, keymaps[1]), tensors.source)
        elif converts_experts:
            tensors = experts.fuse_experts(tensors, keymaps[0], on_shared, parts=False)
        elif respell:
            tensors = _respell(tensors, *keymaps)
        elif to_keymap is not None:
            raise ConfigError("--to needs a tree (.safetensors) as target; to rename a folder's modules, add --from")
        config = _require_lora(tensors.config, "a folder").replace(inference_mode=True)
        tensors = dataclasses.replace(tensors, config=config)
        if format == "orbax":
            orbax_folder.write(with_pytorch_names(tensors), target, alone=True)
        else:
            folder.write(tensors, target, format=format, progress=progress)
        return ConvertedFile(str(target), len(tensors.tensors), None, config.r, config.lora_alpha)
    if to_keymap is None:
        raise ConfigError("a target tree needs its family: pass --to, for example --to tunix:qwen3")
    keymap = families.resolve_keymap(to_keymap, {})
    return _write_tree(tensors, location.to_location(target), keymap, dialect, like, sizes or {}, on_shared)


def _refuse_tree_options(options: Mapping[str, Any], source: Any) -> None:
    given = [name for name, value in options.items() if value is not None]
    if given == ["--lora-alpha"]:
        raise ConfigError(f"{source}: --lora-alpha is for a source tree; the folder of an adapter contains alpha")
    if given:
        raise ConfigError(
            f"{', '.join(given)}: --dialect and --on-shared need a tree (a file ending in .safetensors), and --from and"
            " --to a tree or a folder of PEFT's"
        )


def _read(
    source: str | os.PathLike[str],
    keymap: KeyMap | str | None,
    lora_alpha: float | None,
    like: Any,
    sizes: Mapping[str, int],
    progress: Progress,
    on_shared: str | None = None,
) -> PeftTensors:
    path = location.to_location(source)
    if path.suffix != ".safetensors":
        if lora_alpha is not None:
            raise ConfigError(f"{path}: --lora-alpha is for a source tree; the folder of an adapter contains alpha")
        return folder.read(source, progress=progress)
    leaves = _with_dotted_paths(safetensors.read(path), path)
    note = _read_note(path)
    if lora_alpha is None and note:
        lora_alpha = note["lora_alpha"]
    if not any(map(is_like, leaves)):
        raise FileError(f"{path}: expected a tree with LoRA leaves, found no leaf that looks like one")
    tree = foreign.find_lora(foreign.LoraTree(leaves, lora_alpha=lora_alpha, on_shared=on_shared))
    if tree is None:
        raise FileError(f"{path}: {foreign.describe_unknown(leaves).strip()}")
    tree = dataclasses.replace(tree, base={**tree.base, **_base_shapes(like, tree.dialect)}, sizes=sizes)
    tensors, _ = foreign.tree_to_peft(tree, None, keymap)
    return dataclasses.replace(tensors, source=str(path))


def _read_note(path: Location) -> dict[str, Any]:
    text = safetensors.read_header(path).metadata.get(NOTE, "{}")
    try:
        note = json.loads(text)
        alpha = note.get("lora_alpha")
    except (ValueError, AttributeError):
        return {}
    return note if isinstance(alpha, int | float) and not isinstance(alpha, bool) else {}


def _with_dotted_paths(leaves: Mapping[str, Any], source: Any) -> dict[str, Any]:
    """Replace slashes in paths by dots; raise `FormatError` if two paths become equal."""
    dotted: dict[str, Any] = {}
    duplicates: list[str] = []
    for path, leaf in leaves.items():
        name = path.replace("/", ".")
        if name in dotted:
            duplicates.append(path)
        dotted[name] = leaf
    raise_listed(FormatError, f"{source}: two leaves have the same path if slashes are read as dots:", duplicates)
    return dotted


def _require_lora(config: Config, target: str) -> LoraConfig:
    if not isinstance(config, LoraConfig):
        raise ConfigError(f"cannot convert {config.peft_type} to {target}: trees of other libraries support LoRA only")
    return config


def _respell(tensors: PeftTensors, source: KeyMap, target: KeyMap) -> PeftTensors:
    """Rename the modules of an adapter from the spelling of one keymap to that of another."""
    config = tensors.config
    pairs = _lora_pairs(tensors)
    names = blank.respell_modules(source, target, list(pairs))
    stale = [f for f in ("rank_pattern", "alpha_pattern", "exclude_modules", "layers_to_transform") if config.get(f)]
    if stale and set(names) != set(names.values()):
        raise ConfigError(
            f"{tensors.source}: cannot rename the modules, because {', '.join(stale)} of the configuration use the old"
            " names; edit the configuration first"
        )
    if not all(matching.is_target(config, m) for m in names.values()):
        config = _require_lora(config, "another spelling").replace(target_modules=sorted(names.values()))
    new = {
        f"{PEFT_PREFIX}{names[m]}.lora_{side}.weight": x
        for m, pair in pairs.items()
        for side, x in zip("AB", pair, strict=True)
    }
    return PeftTensors(config, new, tensors.source)


def _write_tree(
    tensors: PeftTensors,
    path: Location,
    keymap: KeyMap,
    name: str | None,
    like: Any,
    sizes: Mapping[str, int],
    on_shared: str | None,
) -> ConvertedFile:
    """Write a tree for the dialect `name` of the model family `keymap`."""
    config = _require_lora(tensors.config, "a tree")
    library = keymap.name.partition(":")[0]
    if name is None and library not in dialects.USED:
        raise ConfigError(
            f"the LoRA layout of a {keymap.name!r} tree is ambiguous: pass --dialect, one of"
            f" {', '.join(dialects.DIALECTS)}"
        )
    dialect = dialects.get_dialect(name or dialects.USED[library])
    if dialect.slots is not None:
        raise ConfigError(
            f"cannot write a {dialect.name} tree, because it contains several adapters; load the adapter into the model"
        )
    known_shapes = _base_shapes(like, dialect)
    leaves = known_shapes or [w.leaf.replace("{l}", "0") for w in keymap.weights]
    keymap = keymap.spelling_for([key.removeprefix(PEFT_PREFIX) for key in tensors.tensors], leaves)
    layer_keymap, layer_tensors = keymap, tensors
    if tensors.config.get("target_parameters") or experts.may_have_experts(tensors.tensors):
        layer_keymap = experts.per_expert_keymap(keymap)
        fused = experts.fuse_experts(tensors, keymap, on_shared)
        layer_tensors = PeftTensors(
            *experts.split_experts(fused.config, fused.tensors, layer_keymap, keymap), tensors.source
        )
    pairs = _lora_pairs(layer_tensors)
    shapes = {m: (tuple(a.shape), tuple(b.shape)) for m, (a, b) in pairs.items()}
    adapted = blank.find_adapted_leaves(layer_keymap, shapes, known_shapes)

    def blank_tree(rank: int, alpha: float | None = None) -> foreign.ForeignTree:
        arrays: dict[str, tuple[int, ...]] = {}
        for leaf in adapted:
            arrays |= blank.blank_arrays(dialect, leaf, shapes, rank, known_shapes.get(leaf.match.leaf), sizes)
        dtype = np.result_type(*(a.dtype for a, _ in pairs.values()))
        # Broadcast scalars need no memory; their values are never read.
        leaves = {p: np.broadcast_to(np.zeros((), dtype), shape) for p, shape in arrays.items()}
        given = foreign.LoraTree(leaves, lora_alpha=alpha, on_shared=on_shared)
        return foreign.ForeignTree(given, dialect, leaves, lambda new: {**leaves, **new}, known_shapes, {}, sizes)

    rank = max(a[0] for a, _ in shapes.values())
    if on_shared is not None or dialect.heads:
        rank = foreign.needed_rank(blank_tree(rank), keymap, layer_tensors.tensors, pairs)
    scale = config.lora_alpha / config.r
    alpha = None if dialect.unscaled else scale * rank
    tree = foreign.fill_tree(blank_tree(rank, alpha), config, tensors.tensors, keymap=keymap, source=tensors.source)
    arrays = {p: np.asarray(x) for p, x in tree.items()}
    note = {NOTE: json.dumps({"dialect": dialect.name, "keymap": keymap.name, "lora_alpha": alpha})}
    specs = {p: (x.dtype, x.shape) for p, x in arrays.items()}
    safetensors.write(path, specs, arrays.__getitem__, {} if alpha is None else note)
    return ConvertedFile(str(path), len(arrays), dialect.name, rank, float(rank if alpha is None else alpha))


def _lora_pairs(tensors: PeftTensors) -> dict[str, tuple[Any, Any]]:
    """Return `{module: (A, B)}`; raise `KeyMapError` for all other tensors."""
    pairs: dict[str, dict[str, Any]] = {}
    unsupported: list[str] = []
    for key, x in tensors.tensors.items():
        module, separator, suffix = key.removeprefix(PEFT_PREFIX).rpartition(".lora_")
        if separator and suffix in ("A.weight", "B.weight"):
            pairs.setdefault(module, {})[suffix[0]] = x
        else:
            unsupported.append(key)
    incomplete = [m for m, pair in pairs.items() if len(pair) != 2]
    if unsupported or incomplete:
        problems = [*unsupported, *(f"{m}: A or B is missing" for m in incomplete)]
        raise KeyMapError(
            f"{tensors.source}: cannot convert these tensors; a tree holds only pairs of LoRA's A and B:\n"
            + paths.bullets(problems)
        )
    return {m: (pair["A"], pair["B"]) for m, pair in pairs.items()}


def _base_shapes(like: Any, dialect: Dialect) -> dict[str, tuple[int, ...]]:
    """Return `{base leaf: shape}` from the header of a safetensors file."""
    if like is None:
        return {}
    header = safetensors.read_header(like).tensors
    leaves = _with_dotted_paths({path: info.shape for path, info in header.items()}, like)
    return {dialect.base(p): tuple(shape) for p, shape in leaves.items() if not is_like(p)}
