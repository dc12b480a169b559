"""Convert adapter files between formats, dtypes, families and libraries, and rename their modules, without a model.

path ──formats.look──► Place ──open──► PeftTensors ──with_dtype, other names──► PeftTensors ──write──► path

One side may be a tree: the LoRA leaves of another JAX library in a safetensors file, under their dotted paths
(`save_file({".".join(path): leaf, …})`). The other is then PEFT's folder. One tensor is in memory at a time (all of a
`.bin` file and of an Orbax checkpoint).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Generator, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxadapt.adapters import experts
from jaxadapt.adapters.peft_tensors import PeftTensors, may_have_experts, split_key
from jaxadapt.arrays import regions
from jaxadapt.arrays.tensor_source import as_source, cast, common_dtype, float_dtype, rename
from jaxadapt.configs import matching
from jaxadapt.configs.base import Config
from jaxadapt.configs.frozen import find_pattern_value
from jaxadapt.configs.lora import LoraConfig
from jaxadapt.core import paths
from jaxadapt.core.errors import (
    ConfigError,
    FileError,
    FormatError,
    KeyMapError,
    MismatchError,
    Progress,
    Report,
    raise_listed,
    repeated,
    reporter,
)
from jaxadapt.keymaps import families
from jaxadapt.keymaps.keymap import PEFT_PREFIX, KeyMap
from jaxadapt.merging.pairs import lora_pairs
from jaxadapt.models.foreign import DIALECTS, Dialect, dialect_of, get_dialect, like_pattern, survey
from jaxadapt.models.foreign import tree as foreign
from jaxadapt.persistence import FILES, FOLDERS, folder, formats, verify_folder
from jaxadapt.storage import atomic, location, safetensors


class Written(NamedTuple):
    """One adapter that was written.

    Attributes:
        path: its folder or file.
        method: its PEFT type.
        tensors: the number of its tensors.
        dialect: the LoRA layout of a tree, whose model must be built with the rank and alpha; None for other files.
        rank, lora_alpha: those of a LoRA.
    """

    path: str
    method: str
    tensors: int
    dialect: str | None
    rank: int | None
    lora_alpha: float | None


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
    with atomic.clean_target(target), reporter(progress) as report:
        place = location.to_location(target)
        is_single = place.suffix == ".safetensors"
        if format is not None:
            where = " for a file whose name ends in .safetensors" if is_single else " for a folder"
            formats.require_style(place, format, FILES if is_single else FOLDERS, where)
        refuse_same(target, source)
        with _open_parts(source, report) as opened:
            origin = next(iter(opened.values()))
            style = format or (origin.style if is_single else "safetensors")
            if not style:
                raise ConfigError(
                    "the names in the target file are not decided: pass --format kohya-ss or --format diffusers, or"
                    " --to for the tree of a JAX library"
                )
            parts = {name: with_dtype(each.tensors, dtype) for name, each in opened.items()}
            join = formats.writer(style).join
            if join is not None and "" not in parts:
                parts = {"": join(parts, os.fspath(source))}
            return _write_parts(parts, place, origin, style, report)


def refuse_same(target: str | os.PathLike[str], *sources: str | os.PathLike[str]) -> None:
    """Raise `FileError` for a target that would replace a source."""
    places = [location.to_location(source) for source in sources if not location.is_hub_address(source)]
    if any(location.is_same(place, location.to_location(target)) for place in places):
        raise FileError(f"{os.fspath(target)}: the target is the source; choose another name")


ALLOW = "allow_nan=True (jaxadapt {} --allow-nan) accepts them"
"""The way out of an error about a NaN or an infinity; {} is the command."""


def refuse_nan(adapters: Sequence[PeftTensors], command: str) -> None:
    """Raise `MismatchError` if one of the adapters to `command` holds a NaN or an infinity."""
    names = [f"{each.source}: {key}" for each in adapters for key in regions.names_not_finite(each.tensors)]
    if names:
        raise MismatchError(regions.not_finite_message(names, ALLOW.format(command)))


@contextlib.contextmanager
def _open_parts(path: str | os.PathLike[str], report: Report) -> Generator[dict[str, formats.Opened]]:
    """Open an adapter, as {"": it}, or the adapters of a folder by the names of their subfolders."""
    place = formats.look(path, report)
    places = {"": place}
    if place.names is not None and location.CONFIG not in place.names and formats.find(place) is None:
        inner = ((name, place.at / name) for name in sorted(place.names))
        found = {name: formats.look(at) for name, at in inner if location.is_dir(at)}
        places = {name: each for name, each in found.items() if formats.find(each) is not None} or places
    with contextlib.ExitStack() as stack:
        yield {name: stack.enter_context(formats.open_place(each)) for name, each in places.items()}


def with_dtype(tensors: PeftTensors, dtype: str | None) -> PeftTensors:
    """Return the tensors in another dtype, cast when they are read."""
    if dtype is None:
        return tensors
    return dataclasses.replace(tensors, tensors=cast(tensors.tensors, float_dtype(dtype)))


def write_like(
    tensors: PeftTensors, target: str | os.PathLike[str], origin: formats.Opened, dtype: str | None, report: Report
) -> None:
    """Write the result of a command: a folder, or a file with the names of the image adapter it came from.

    Args:
        tensors: the result.
        target: a folder, or a file whose name ends in .safetensors.
        origin: the first adapter that the command read.
        dtype: as in `convert_format`.
        report: the progress.
    """
    place = location.to_location(target)
    is_single = place.suffix == ".safetensors"
    if is_single and not origin.style:
        raise FileError(f"{os.fspath(target)}: expected a folder; only an image adapter is one file")
    _write_parts({"": with_dtype(tensors, dtype)}, place, origin, origin.style if is_single else "safetensors", report)


def _write_parts(
    parts: Mapping[str, PeftTensors], place: location.Location, origin: formats.Opened, style: str, report: Report
) -> list[Written]:
    """Write adapters by the names of their subfolders; a file that changes several models becomes several folders."""
    chosen = formats.writer(style)
    if origin.split is not None and style not in FILES:
        parts = origin.split(parts[""])
    done: list[Written] = []
    for name, tensors in parts.items():
        target = place / name if name else place
        number = chosen.write(tensors, target, formats.Wanted(style, origin), report)
        alpha = tensors.config.get("lora_alpha")
        alpha = None if alpha is None else float(alpha)
        done.append(Written(os.fspath(target), tensors.config.peft_type, number, None, tensors.config.get("r"), alpha))
    return done


def convert_several(
    sources: Sequence[str | os.PathLike[str]], target: str | os.PathLike[str], **options: Any
) -> list[Written]:
    """Convert each source into the folder `target`, under its own name; see `convert_format`.

    Raises `FileError` before anything is written if two sources have one name.
    """
    place = location.to_location(target)
    names = list(map(_last_name, sources))
    if twice := repeated(names):
        raise FileError(
            f"{os.fspath(target)}: several sources have the name {', '.join(twice)}; convert them one by one"
        )
    ending = ".safetensors" if options.get("format") in FILES else ""
    done: list[Written] = []
    for source, name in zip(sources, names, strict=True):
        done += convert_format(source, place / (name.removesuffix(".safetensors") + ending), **options)
    return done


def _last_name(source: str | os.PathLike[str]) -> str:
    """Return the last part of a path or an address; that of the folder itself for "." and "..".

    >>> _last_name("runs/../fr/"), _last_name("hf://org/de")
    ('fr', 'de')
    """
    text = os.fspath(source)
    path = text.rstrip("/") if location.is_address(source) else os.path.abspath(text)  # noqa: PTH100 (keeps links)
    return path.rpartition("/")[2]


@dataclasses.dataclass(frozen=True)
class TreeOptions:
    """The options of `convert` for trees.

    Attributes:
        from_keymap: the family of a source tree (default: recognized by its paths), or the spelling of a source folder.
        to_keymap: the family of a target tree, or another spelling for a target folder.
        dialect: the LoRA layout of a target tree. Default: the one of the family's library.
        lora_alpha: the alpha of a source tree whose file does not contain it.
        like: a safetensors file with the base weights of the target tree, or else of the source tree. Only the shapes
            in its header are read.
        sizes: in place of `like`, the sizes of ambiguous axes by their letters in the family's entries.
        on_shared: as in `jaxadapt.models.LoraTree`; the rank grows as needed.
    """

    from_keymap: KeyMap | str | None = None
    to_keymap: KeyMap | str | None = None
    dialect: str | None = None
    lora_alpha: float | None = None
    like: str | os.PathLike[str] | None = None
    sizes: Mapping[str, int] = dataclasses.field(default_factory=dict[str, int])
    on_shared: str | None = None

    def refuse(self, source: object) -> None:
        """Raise `ConfigError` for options that need a tree, where neither side is one."""
        names = {
            "--from": self.from_keymap, "--to": self.to_keymap, "--dialect": self.dialect,
            "--on-shared": self.on_shared, "--lora-alpha": self.lora_alpha,
        }  # fmt: skip
        given = [name for name, value in names.items() if value is not None]
        if given == ["--lora-alpha"]:
            raise ConfigError(f"{source}: --lora-alpha is for a source tree; the folder of an adapter contains alpha")
        if given:
            raise ConfigError(
                f"{', '.join(given)}: --dialect and --on-shared need a tree (a file ending in .safetensors), and --from"
                " and --to a tree or a folder of PEFT's"
            )


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    options: TreeOptions | None = None,
    *,
    format: str | None = None,  # noqa: A002 (as in `save`)
    dtype: str | None = None,
    progress: Progress = None,
) -> Written:
    """Convert an adapter from a PEFT folder or a tree (`*.safetensors`) to a PEFT folder or a tree.

    An Orbax checkpoint written by `save` and mlx-lm's folder are read like a folder. Without a tree, only the format
    changes: `convert_format`.

    Args:
        source: the PEFT folder, Orbax checkpoint, mlx-lm folder or tree to read.
        target: the PEFT folder or tree to write.
        options: what the files of a tree do not tell.
        format: "bin" writes a folder with PyTorch's adapter_model.bin; "orbax" an Orbax checkpoint with PyTorch's names
            in place of a folder, which any model can load; "kohya-ss" and "diffusers" the file of an image adapter.
        dtype: as in `convert_format`.
        progress: as in `read` and `write`, for folders.

    Raises:
        AdapterError: the conversion is impossible, and nothing is written. The message names the options of
            `jaxadapt convert`.
    """
    with atomic.clean_target(target):
        options = options or TreeOptions()
        is_adapter = _is_adapter_file(source)
        from_tree = location.to_location(source).suffix == ".safetensors" and not is_adapter
        to_tree = location.to_location(target).suffix == ".safetensors" and not is_adapter and format not in FILES
        if not from_tree and not to_tree:
            if options.like is not None or options.sizes:
                raise ConfigError("--like and --axis need a tree (a file ending in .safetensors) as source or target")
            if is_adapter or (options.from_keymap is None and options.to_keymap is None):
                options.refuse(source)
                done = convert_format(source, target, format=format, dtype=dtype, progress=progress)
                return done[0]._replace(path=str(target), tensors=sum(part.tensors for part in done))
        if dtype is not None:
            raise ConfigError("--dtype cannot be combined with --from or --to; convert the result again with --dtype")
        return _convert_layout(source, target, options, from_tree, to_tree, format or "safetensors", progress)


def _is_adapter_file(path: str | os.PathLike[str]) -> bool:
    """Return True for one file with an adapter of a format, in place of a tree."""
    place = location.to_location(path)
    is_single = place.suffix == ".safetensors" and location.is_file(place)
    return is_single and formats.find(formats.Place(path, place, None)) is not None


def _convert_layout(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    options: TreeOptions,
    from_tree: bool,
    to_tree: bool,
    style: str,
    progress: Progress,
) -> Written:
    """Convert from a tree, to a tree, or a folder to other names."""
    where = f" for a tree, or a folder as the target for {' and '.join(FOLDERS[1:])}" if to_tree else ""
    formats.require_style(target, style, FOLDERS[:1] if to_tree else FOLDERS, where)
    if from_tree:
        tensors = _read_tree(location.to_location(source), options, None if to_tree else options.like)
    else:
        TreeOptions(lora_alpha=options.lora_alpha).refuse(source)
        tensors = folder.read(source, progress=progress)
    if to_tree:
        return _write_tree(tensors, target, options)
    tensors = _under_other_names(tensors, options, from_tree)
    reason = "only LoRA's names follow --from and --to; `jaxadapt rename` renames the modules of every method"
    config = _require_lora(tensors.config, "other names", reason).replace(inference_mode=True)
    with reporter(progress) as report:
        tensors = dataclasses.replace(tensors, config=config)
        number = formats.writer(style).write(tensors, location.to_location(target), formats.Wanted(style), report)
    return Written(os.fspath(target), config.peft_type, number, None, config.r, config.lora_alpha)


def _under_other_names(tensors: PeftTensors, options: TreeOptions, from_tree: bool) -> PeftTensors:
    """Return the adapter of a folder under the names of another spelling of its family, if one is wanted."""
    needs_tree = ConfigError("--dialect and --on-shared need a tree (a file ending in .safetensors)")
    if options.dialect is not None:
        raise needs_tree
    if options.to_keymap is None and (from_tree or options.on_shared is None):
        return tensors
    if from_tree or options.from_keymap is None or options.to_keymap is None:
        raise ConfigError("--to needs a tree (.safetensors) as target; to rename a folder's modules, add --from")
    source, target = families.resolve_keymap(options.from_keymap, {}), families.resolve_keymap(options.to_keymap, {})
    if target.per_expert and not source.per_expert:
        return PeftTensors(*experts.split_experts(tensors.config, tensors.tensors, target), tensors.source)
    if source.per_expert != target.per_expert:
        return experts.fuse_experts(tensors, source, options.on_shared, parts=False)
    if options.on_shared is not None:
        raise needs_tree
    modules, copied = _named_modules(tensors)
    names = survey.respell_modules(source, target, [*modules, *copied])
    return _under_new_names(tensors, modules, {name: to for name, to in names.items() if name != to})


# ---------------------------------------------------------------- names


def rename_files(
    adapter: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    old: str = "",
    new: str = "",
    base: Any = None,
    progress: Progress = None,
) -> dict[str, str]:
    """Write an adapter with other module names; return {old name: new name} of the modules that changed.

    Args:
        adapter: the adapter's folder or address.
        out: the folder to write.
        old, new: the beginning of the names to replace, and its replacement; "" adds or removes a beginning.
        base: in their place a base model, as in `jaxadapt.verify`, whose names the modules get.
        progress: as in `jaxadapt.write`.

    Raises `MismatchError` if no name changes, two names become equal, or the base has no such modules.
    """
    refuse_same(out, adapter)
    with reporter(progress) as report, formats.open_place(formats.look(adapter, report)) as origin:
        tensors = origin.tensors
        modules, copied = _named_modules(tensors)
        if base is not None:
            names = _names_in_base(tensors, modules, copied, base)
            why = f"the names are those of {base} already"
        else:
            names = {name: new + name.removeprefix(old) for name in modules | copied if name.startswith(old)}
            why = f"no other module name begins with {old!r}"
        changed = {name: to for name, to in names.items() if name != to}
        if not changed:
            raise MismatchError(f"{tensors.source}: {why}; nothing to rename")
        write_like(_under_new_names(tensors, modules, changed, (old, new)), out, origin, None, report)
        return changed


def _under_new_names(
    tensors: PeftTensors, modules: Iterable[str], changed: Mapping[str, str], beginning: tuple[str, str] = ("", "")
) -> PeftTensors:
    """Return an adapter with other module names, in its keys and in its configuration.

    Args:
        tensors: the adapter.
        modules: the adapted modules.
        changed: {module: another name}, also of modules with a copy of their parameters.
        beginning: the beginning of names to replace in the configuration, and its replacement.
    """
    prefixed = {PEFT_PREFIX + name: PEFT_PREFIX + to for name, to in changed.items()}
    groups = paths.group((_rename(key, prefixed), key) for key in tensors.tensors)
    raise_listed(
        MismatchError,
        f"{tensors.source}: several tensors would get one name; choose another beginning:",
        [f"{' and '.join(own)} would be called {to}" for to, own in groups.items() if len(own) > 1],
    )
    keys = {to: own[0] for to, own in groups.items()}
    config = _renamed_config(tensors, changed, {name: changed.get(name, name) for name in modules}, beginning)
    return PeftTensors(config, rename(as_source(tensors.tensors), keys), tensors.source)


def _named_modules(tensors: PeftTensors) -> tuple[dict[str, None], dict[str, None]]:
    """Return the adapted modules of a file, and those with a copy of their parameters, in the order of the keys."""
    modules, copied = dict[str, None](), dict[str, None]()
    for key in tensors.tensors:
        split = split_key(key, tensors.config.peft_type)
        name = key.removeprefix(PEFT_PREFIX).rpartition(".")[0] if split is None else split[0]
        if key.startswith(PEFT_PREFIX) and name:  # others belong to the whole adapter
            (copied if split is None else modules)[name.replace(".base_layer", "")] = None
    return modules, {name: None for name in copied if name not in modules}


def _names_in_base(tensors: PeftTensors, modules: Iterable[str], copied: Iterable[str], base: Any) -> dict[str, str]:
    """Return {module: its name in the base}. Raises `MismatchError` if one is not there."""
    shapes, wanted = verify_folder.base_shapes(base), [*modules, *copied]
    in_files = [name for name in wanted if name.rpartition(".")[2] != "lm_head"]  # a tied head is in no file
    for each in (wanted, in_files):
        if (names := verify_folder.names_in_base(each, shapes)) is not None:
            return names
    raise MismatchError(f"{tensors.source}: these modules have no counterpart in {base}:\n" + paths.bullets(in_files))


def _rename(name: str, changed: Mapping[str, str]) -> str:
    """Return a name with the longest module that it begins with renamed."""
    module = name
    while module and module not in changed:
        module = module.rpartition(".")[0]
    return changed[module] + name.removeprefix(module) if module else name


def _renamed_config(
    tensors: PeftTensors,
    changed: Mapping[str, str],
    modules: Mapping[str, str],
    beginning: tuple[str, str],
) -> Config:
    """Rename the modules that a configuration names in full. Where it then selects others, name all of them.

    Args:
        tensors: the adapter.
        changed: {module: another name}.
        modules: {adapted module: its name}, also of those that keep it.
        beginning: the beginning to replace, and its replacement.
    """
    config, values = tensors.config, _renamed_fields(tensors.config, changed, beginning)
    targets = {name: to for name, to in modules.items() if matching.is_target(config, name)}
    renamed = Config.from_dict(values)
    keeps = all(matching.is_target(renamed, to) for to in targets.values())
    names_all = bool(targets) and (not keeps or _excludes_old_names(config, values))
    if names_all:
        narrowing = ("exclude_modules", "layers_to_transform", "layers_pattern")
        values |= {name: None for name in narrowing if name in values} | {"target_modules": sorted(targets.values())}
    if config.get("feedforward_modules") is not None:
        inputs = {to for name, to in targets.items() if matching.is_feedforward(config, name)}
        if names_all or inputs != {to for to in targets.values() if matching.is_feedforward(renamed, to)}:
            values |= {"target_modules": sorted(targets.values()), "feedforward_modules": sorted(inputs)}
    for field in ("rank_pattern", "alpha_pattern"):
        wanted = _pattern_values(config, field, modules)
        if wanted != _pattern_values(renamed, field, modules.values()):
            values[field] = {to: x for to, x in zip(modules.values(), wanted, strict=True) if x is not None}
    result = Config.from_dict(values)
    lost = [to for to in targets.values() if not matching.is_target(result, to)]
    lost += _lost_beside_targets(config, result, modules, changed)
    raise_listed(MismatchError, f"{tensors.source}: no configuration selects these modules by their new names:", lost)
    return result


def _lost_beside_targets(
    config: Config, renamed: Config, modules: Mapping[str, str], changed: Mapping[str, str]
) -> list[str]:
    """Return the copied modules that `modules_to_save` lacks after the renaming, and the patterns that say less."""
    saved = {name: to for name, to in changed.items() if matching.is_saved(config, name)}
    return [to for to in saved.values() if not matching.is_saved(renamed, to)] + [
        f"those of {field}"
        for field in ("rank_pattern", "alpha_pattern")
        if _pattern_values(config, field, modules) != _pattern_values(renamed, field, modules.values())
    ]


def _excludes_old_names(config: Config, values: Mapping[str, Any]) -> bool:
    """Return True if `exclude_modules` of the renamed fields may have old names, those of modules without tensors."""
    excluded, kept = (each.get("exclude_modules") or () for each in (config, values))
    return isinstance(excluded, str) or any("." in name and name in kept for name in excluded)


def _renamed_fields(config: Config, changed: Mapping[str, str], beginning: tuple[str, str]) -> dict[str, Any]:
    """Return the fields of a configuration with the names in them renamed; the arguments are `_renamed_config`'s."""
    values, (old, new) = config.to_dict(), beginning

    def one(name: Any) -> Any:
        if not isinstance(name, str):
            return name
        renamed = _rename(name, changed)
        return new + name.removeprefix(old) if renamed == name and old and name.startswith(old) else renamed

    for field in _NAMING & values.keys():
        if isinstance(values[field], list):
            values[field] = [one(name) for name in values[field]]
        elif isinstance(values[field], dict):
            values[field] = {one(name): value for name, value in values[field].items()}
    return values


_NAMING = frozenset({
    "target_modules", "exclude_modules", "feedforward_modules", "modules_to_save", "target_parameters", "rank_pattern",
    "alpha_pattern", "block_size_pattern", "lambda_pattern", "n_frequency_pattern", "trainable_token_indices",
})  # fmt: skip
"""Fields that name modules: lists, or dicts by name."""


def _pattern_values(config: Config, field: str, names: Iterable[str]) -> list[Any]:
    """Return the value of `rank_pattern` or `alpha_pattern` for each name; None for one that no pattern matches."""
    return [find_pattern_value(config.get(field) or {}, name, None) for name in names]


# ---------------------------------------------------------------- trees


NOTE = "jaxadapt_tree"
"""The metadata key for the scale of a tree, which its leaves do not contain."""


def _read_tree(path: location.Location, options: TreeOptions, like: str | os.PathLike[str] | None) -> PeftTensors:
    """Read a tree under PEFT's names.

    Args:
        path: the file.
        options: the keymap and alpha of the tree, and the sizes of its axes.
        like: the file with the shapes of the base.
    """
    leaves = _with_dotted_paths(safetensors.read(path), path)
    alpha = options.lora_alpha if options.lora_alpha is not None else _noted_alpha(path)
    if not any(map(like_pattern().search, leaves)):
        known = ", ".join(DIALECTS)
        raise FileError(
            f"{path}: expected a tree with LoRA parameters of a known dialect ({known}), found no such name"
        )
    tree = foreign.find_lora(foreign.LoraTree(leaves, lora_alpha=alpha, on_shared=options.on_shared))
    if tree is None:
        raise FileError(f"{path}: {foreign.describe_unknown(leaves).strip()}")
    tree = dataclasses.replace(tree, base={**tree.base, **_base_shapes(like, tree.dialect)}, sizes=options.sizes)
    tensors, _ = foreign.read_tree(tree, options.from_keymap)
    return dataclasses.replace(tensors, source=str(path))


def _noted_alpha(path: location.Location) -> float | None:
    try:
        alpha = json.loads(safetensors.read_header(path).metadata.get(NOTE, "{}")).get("lora_alpha")
    except (ValueError, AttributeError):
        return None
    return alpha if isinstance(alpha, int | float) and not isinstance(alpha, bool) else None


def _with_dotted_paths(leaves: Mapping[str, Any], source: Any) -> dict[str, Any]:
    """Replace slashes in paths by dots; raise `FormatError` if two paths become equal."""
    raise_listed(
        FormatError,
        f"{source}: two parameters have the same path if slashes are read as dots:",
        repeated(path.replace("/", ".") for path in leaves),
    )
    return {path.replace("/", "."): leaf for path, leaf in leaves.items()}


def _require_lora(config: Config, target: str, reason: str) -> LoraConfig:
    if not isinstance(config, LoraConfig):
        raise ConfigError(f"cannot convert {config.peft_type} to {target}: {reason}")
    return config


def _write_tree(tensors: PeftTensors, path: str | os.PathLike[str], options: TreeOptions) -> Written:
    """Write a tree of a model family."""
    if options.to_keymap is None:
        raise ConfigError("a target tree needs its family: pass --to, for example --to tunix:qwen3")
    keymap = families.resolve_keymap(options.to_keymap, {})
    config = _require_lora(tensors.config, "a tree", "trees of other libraries support LoRA only")
    dialect = _target_dialect(keymap, options.dialect)
    known_shapes = _base_shapes(options.like, dialect)
    leaves = known_shapes or [w.leaf.replace("{l}", "0") for w in keymap.weights]
    keymap = keymap.spelling_for([key.removeprefix(PEFT_PREFIX) for key in tensors.tensors], leaves)
    layer_keymap, layer_tensors = _per_expert(keymap, tensors, options.on_shared)
    pairs = _lora_pairs(layer_tensors)
    shapes = {m: (tuple(a.shape), tuple(b.shape)) for m, (a, b) in pairs.items()}
    adapted = survey.find_adapted_leaves(layer_keymap, shapes, known_shapes)

    def blank_tree(rank: int, alpha: float | None = None) -> foreign.ForeignTree:
        arrays: dict[str, tuple[int, ...]] = {}
        for leaf, names in adapted.items():
            arrays |= survey.blank_arrays(
                dialect, layer_keymap, leaf, shapes, names, rank, known_shapes.get(leaf), options.sizes
            )
        dtype = common_dtype(a.dtype for a, _ in pairs.values())
        # Broadcast scalars need no memory; their values are never read.
        leaves = {p: np.broadcast_to(np.zeros((), dtype), shape) for p, shape in arrays.items()}
        given = foreign.LoraTree(leaves, lora_alpha=alpha, on_shared=options.on_shared)
        return foreign.ForeignTree(
            given, dialect, leaves, lambda new: {**leaves, **new}, known_shapes, {}, options.sizes
        )

    rank = max(a[0] for a, _ in shapes.values())
    if options.on_shared is not None or dialect.heads:
        rank = foreign.needed_rank(blank_tree(rank), keymap, layer_tensors.tensors, pairs)
    alpha = None if dialect.unscaled else config.lora_alpha / config.r * rank
    arrays = {p: np.asarray(x) for p, x in foreign.fill_tree(blank_tree(rank, alpha), tensors, keymap).items()}
    note = {NOTE: json.dumps({"dialect": dialect.name, "keymap": keymap.name, "lora_alpha": alpha})}
    safetensors.write(
        path, {p: (x.dtype, x.shape) for p, x in arrays.items()}, arrays.__getitem__, {} if alpha is None else note
    )
    return Written(
        os.fspath(path), config.peft_type, len(arrays), dialect.name, rank, float(rank if alpha is None else alpha)
    )


def _per_expert(keymap: KeyMap, tensors: PeftTensors, on_shared: str | None) -> tuple[KeyMap, PeftTensors]:
    """Return a keymap and an adapter with one entry and one pair for each expert, if the adapter has experts."""
    if not tensors.config.get("target_parameters") and not may_have_experts(tensors.tensors):
        return keymap, tensors
    single, fused = experts.per_expert_keymap(keymap), experts.fuse_experts(tensors, keymap, on_shared)
    return single, PeftTensors(*experts.split_experts(fused.config, fused.tensors, single, keymap), tensors.source)


def _target_dialect(keymap: KeyMap, name: str | None) -> Dialect:
    """Return the LoRA layout of a tree to write: the named one, or that of the family's library."""
    dialect = dialect_of(keymap.name.partition(":")[0]) if name is None else get_dialect(name)
    if dialect is None:
        raise ConfigError(
            f"the LoRA layout of a {keymap.name!r} tree is ambiguous: pass --dialect, one of {', '.join(DIALECTS)}"
        )
    if dialect.has_slots:
        raise ConfigError(
            f"cannot write a {dialect.name} tree, because it contains several adapters; load the adapter into the model"
        )
    return dialect


def _lora_pairs(tensors: PeftTensors) -> dict[str, tuple[Any, Any]]:
    """Return `{module: (A, B)}`; raise `KeyMapError` for all other tensors."""
    pairs = lora_pairs(tensors.tensors)
    known = {key for keys in pairs.values() for key in keys if key.endswith(".weight")}
    raise_listed(
        KeyMapError,
        f"{tensors.source}: cannot convert these tensors; a tree holds only pairs of LoRA's A and B:",
        [key for key in tensors.tensors if key not in known]
        + [f"{module}: A or B is missing" for module, keys in pairs.items() if "" in keys],
    )
    return {module: (tensors.tensors[keys.a], tensors.tensors[keys.b]) for module, keys in pairs.items()}


def _base_shapes(like: Any, dialect: Dialect) -> dict[str, tuple[int, ...]]:
    """Return `{base leaf: shape}` from the header of a safetensors file."""
    if like is None:
        return {}
    leaves = _with_dotted_paths(
        {path: info.shape for path, info in safetensors.read_header(like).tensors.items()}, like
    )
    is_like = like_pattern().search
    return {dialect.base(p): tuple(shape) for p, shape in leaves.items() if not is_like(p)}
