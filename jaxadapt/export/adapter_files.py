"""Changes of adapter files without a model: another rank, other names, a plain LoRA of a start, one adapter taken out.

Each function reads an adapter, changes it and writes another; the source stays as it is. Image adapters in one file
are written as one file again if the target's name ends in .safetensors.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from jaxadapt.adapters import peft_tensors
from jaxadapt.arrays import finite
from jaxadapt.arrays.tensor_source import as_source, rename
from jaxadapt.configs import lora, matching
from jaxadapt.configs.base import Config, loads
from jaxadapt.configs.frozen import find_pattern_value
from jaxadapt.core import paths
from jaxadapt.core.errors import ConfigError, FileError, MismatchError, raise_listed
from jaxadapt.core.progress import Progress, reporter
from jaxadapt.export import conversion
from jaxadapt.initializers import start_adapter
from jaxadapt.keymaps.keymap import PEFT_PREFIX
from jaxadapt.merging import combination
from jaxadapt.merging.pairs import as_start
from jaxadapt.persistence import folder, formats, load_adapter, tensor_checks, verify_folder
from jaxadapt.persistence.formats.peft_folder import StoredAdapter
from jaxadapt.persistence.reading import check_config, left_out_by_peft, open_stored
from jaxadapt.storage import location

Path = str | os.PathLike[str]


def _kept(result: peft_tensors.PeftTensors, source: peft_tensors.PeftTensors) -> peft_tensors.PeftTensors:
    """Return a result with the fingerprint of the source's base, and the fields that name the base and the task."""
    names = ("base_model_name_or_path", "revision", "task_type", "auto_mapping")
    fields = {name: source.config.get(name) for name in names}
    config = result.config.replace(inference_mode=True, **fields)
    return dataclasses.replace(result, config=config, source=source.source, fingerprint=source.fingerprint)


def resize_files(
    adapter: Path, r: int, out: Path, *, dtype: str | None = None, progress: Progress = None
) -> dict[str, float]:
    """Write a LoRA adapter with another rank; return {module: the error ‖ΔW − ΔW'‖ / ‖ΔW‖}.

    Args:
        adapter: the adapter's folder, address or file.
        r: the rank of every module; as in `jaxadapt.merging.resize_rank`.
        out: the folder or file to write.
        dtype: the dtype of the file, as in `conversion.convert_format`; by default that of the adapter.
        progress: as in `jaxadapt.read` and `jaxadapt.write`.

    Raises `ConfigError` for an adapter that is not a plain LoRA, `FileError` if `out` has an adapter already.
    """
    conversion.refuse_same(adapter, out)
    place = location.to_location(out)
    if location.is_file(place) or location.exists(place / location.CONFIG):
        raise FileError(f"{place}: has an adapter already; choose another path, or delete the old adapter")
    with reporter(progress) as report, formats.open_place(formats.look(adapter, report)) as origin:
        tensors = folder.in_memory(origin.tensors, report)
        if tensors.config.get("target_parameters"):
            raise ConfigError(
                f"{tensors.source}: cannot resize the files of an adapter with target_parameters, because they do not"
                " contain the layout of these parameters; load it into its model and use jaxadapt.merging.resize_rank"
            )
        lora.require_original_base(tensors.config, tensors.source)
        if reasons := lora.reasons_not_a_product(tensors.config):
            raise ConfigError(
                f"{tensors.source}: cannot change the rank of an adapter that is more than a plain LoRA:"
                f" {', '.join(reasons)}. If it changes weights only, `jaxadapt export ADAPTER --rank R --base BASE`"
                " writes the nearest LoRA; else merge it (`jaxadapt merge`)"
            )
        _refuse_not_finite(tensors, "resize a finite adapter, such as an earlier step")
        resized, error = combination.resize_plain(tensors, r)
        result = _kept(resized, tensors)
        _refuse_not_finite(result, f"at rank {r} its changes overflow float32; scale the adapter down")
        conversion.write_like(result, out, origin, dtype, report)
        return error


def _refuse_not_finite(tensors: peft_tensors.PeftTensors, way_out: str) -> None:
    if names := finite.names_not_finite(tensors.tensors):
        raise MismatchError(f"{tensors.source}: {finite.not_finite_message(names, way_out)}")


def undo_start(trained: Path, first: Path, out: Path, *, progress: Progress = None) -> peft_tensors.PeftTensors:
    """Write a trained adapter that changed its base when it started (PiSSA, OLoRA, …) as a plain LoRA for the original.

    Args:
        trained: the trained adapter.
        first: the adapter that was saved before the training.
        out: the folder to write.
        progress: as in `jaxadapt.read` and `jaxadapt.write`.

    Raises what `jaxadapt.initializers.for_original_base` raises.
    """
    conversion.refuse_same(trained, out)
    conversion.refuse_same(first, out)
    with reporter(progress) as report:
        new, old = (folder.read(path, progress=report) for path in (trained, first))
        if not lora.changes_base(new.config):
            raise ConfigError(f"{new.source}: its initialization did not change the base; nothing to undo")
        result = _kept(start_adapter.convert_start(new, as_start(old, new.config)), new)
        folder.write(result, out, progress=report)
        return result


# ---------------------------------------------------------------- names


def rename_files(
    adapter: Path, out: Path, *, old: str | None = None, new: str = "", base: Any = None, progress: Progress = None
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
    conversion.refuse_same(adapter, out)
    with reporter(progress) as report, formats.open_place(formats.look(adapter, report)) as origin:
        tensors = origin.tensors
        modules, copied = _named_modules(tensors)
        if base is not None:
            names = _names_in_base(tensors, modules, copied, base)
        else:
            begins = [name for name in modules | copied if name.startswith(old or "")]
            names = {name: new + name.removeprefix(old or "") for name in begins}
        changed = {name: to for name, to in names.items() if name != to}
        if not changed:
            why = (
                f"no other module name begins with {old!r}"
                if base is None
                else f"the names are those of {base} already"
            )
            raise MismatchError(f"{tensors.source}: {why}; nothing to rename")
        result = _renamed(tensors, changed, {name: names.get(name, name) for name in modules}, (old or "", new))
        conversion.write_like(result, out, origin, None, report)
        return changed


def _named_modules(tensors: peft_tensors.PeftTensors) -> tuple[dict[str, None], dict[str, None]]:
    """Return the adapted modules of a file, and those with a copy of their parameters, in the order of the keys."""
    modules, copied = dict[str, None](), dict[str, None]()
    for key in tensors.tensors:
        split = peft_tensors.split_key(key, tensors.config.peft_type)
        name = key.removeprefix(PEFT_PREFIX).rpartition(".")[0] if split is None else split[0]
        if key.startswith(PEFT_PREFIX) and name:  # others belong to the whole adapter
            (copied if split is None else modules)[name.replace(".base_layer", "")] = None
    return modules, {name: None for name in copied if name not in modules}


def _names_in_base(
    tensors: peft_tensors.PeftTensors, modules: Iterable[str], copied: Iterable[str], base: Any
) -> dict[str, str]:
    """Return {module: its name in the base}. Raises `MismatchError` if one is not there."""
    shapes, wanted = verify_folder.base_shapes(base), [*modules, *copied]
    names = verify_folder.names_in_base(wanted, shapes)
    if names is None:  # a tied head is in no file
        wanted = [name for name in wanted if name.rpartition(".")[2] != "lm_head"]
        names = verify_folder.names_in_base(wanted, shapes)
    if names is None:
        raise MismatchError(f"{tensors.source}: these modules have no counterpart in {base}:\n" + paths.bullets(wanted))
    return names


def _renamed(
    tensors: peft_tensors.PeftTensors,
    changed: Mapping[str, str],
    modules: Mapping[str, str],
    beginning: tuple[str, str],
) -> peft_tensors.PeftTensors:
    keys: dict[str, str] = {}
    for key in tensors.tensors:
        name = key.removeprefix(PEFT_PREFIX)
        renamed = f"{PEFT_PREFIX}{_rename(name, changed)}" if key.startswith(PEFT_PREFIX) else key
        if renamed in keys:
            raise MismatchError(f"{tensors.source}: {key} and {keys[renamed]} would both be called {renamed}")
        keys[renamed] = key
    source = rename(as_source(tensors.tensors), keys)
    return peft_tensors.PeftTensors(_renamed_config(tensors, changed, modules, beginning), source, tensors.source)


def _rename(name: str, changed: Mapping[str, str]) -> str:
    """Return a name with the longest module that it begins with renamed."""
    parts = name.split(".")
    heads = (".".join(parts[:i]) for i in range(len(parts), 0, -1))
    module = next((head for head in heads if head in changed), None)
    return name if module is None else changed[module] + name[len(module) :]


def _renamed_config(
    tensors: peft_tensors.PeftTensors,
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
    config = tensors.config

    values = _renamed_fields(config, changed, beginning)
    targets = {name: to for name, to in modules.items() if matching.is_target(config, name)}
    renamed = Config.from_dict(values)
    is_narrower = not all(matching.is_target(renamed, to) for to in targets.values())
    if is_narrower:
        values |= {
            name: None for name in ("exclude_modules", "layers_to_transform", "layers_pattern") if name in values
        }
        values["target_modules"] = sorted(targets.values())
    if config.get("feedforward_modules") is not None:
        inputs = {to for name, to in targets.items() if matching.is_feedforward(config, name)}
        if is_narrower or inputs != {to for to in targets.values() if matching.is_feedforward(renamed, to)}:
            values |= {"target_modules": sorted(targets.values()), "feedforward_modules": sorted(inputs)}
    for field in ("rank_pattern", "alpha_pattern"):
        wanted = _pattern_values(config, field, modules)
        if wanted != _pattern_values(renamed, field, modules.values()):
            found = zip(modules.values(), wanted, strict=True)
            values[field] = {to: value for to, value in found if value is not None}
    result = Config.from_dict(values)
    lost = [to for to in targets.values() if not matching.is_target(result, to)]
    for field in ("rank_pattern", "alpha_pattern"):
        if _pattern_values(config, field, modules) != _pattern_values(result, field, modules.values()):
            lost.append(f"those of {field}")
    raise_listed(MismatchError, f"{tensors.source}: no configuration selects these modules by their new names:", lost)
    return result


def _renamed_fields(config: Config, changed: Mapping[str, str], beginning: tuple[str, str]) -> dict[str, Any]:
    """Return the fields of a configuration with the names in them renamed; the arguments are `_renamed_config`'s."""
    values, (old, new) = config.to_dict(), beginning

    def one(name: Any) -> Any:
        if not isinstance(name, str):
            return name
        renamed = _rename(name, changed)
        return new + name.removeprefix(old) if renamed == name and old and name.startswith(old) else renamed

    for field in ("target_modules", "exclude_modules", "feedforward_modules", "modules_to_save", "target_parameters"):
        if isinstance(values.get(field), list):
            values[field] = [one(name) for name in values[field]]
    for field in ("rank_pattern", "alpha_pattern", "trainable_token_indices"):
        if isinstance(values.get(field), dict):
            values[field] = {one(name): value for name, value in values[field].items()}
    return values


def _pattern_values(config: Config, field: str, names: Iterable[str]) -> list[Any]:
    """Return the value of `rank_pattern` or `alpha_pattern` for each name; None for one that no pattern matches."""
    return [find_pattern_value(config.get(field) or {}, name, None) for name in names]


# ---------------------------------------------------------------- one adapter out of a larger file


def extract_files(
    checkpoint: Path,
    out: Path,
    *,
    name: str = "default",
    config: Path | None = None,
    keymap: str | None = None,
    lora_alpha: float | None = None,
    progress: Progress = None,
) -> peft_tensors.PeftTensors:
    """Write one adapter out of a checkpoint as PEFT's folder.

    Args:
        checkpoint: a file (.safetensors, .bin) with the state dict of a complete PEFT model, which may hold several
            adapters; an Orbax checkpoint of a training run, with a model that jaxadapt adapted or with another
            library's LoRA.
        out: the folder to write.
        name: the adapter's name.
        config: the folder of an adapter, or an adapter_config.json, with the configuration; needed unless the
            checkpoint contains it.
        keymap: the family of an Orbax checkpoint's model. Default: recognized.
        lora_alpha: the alpha of another library's LoRA, in place of `config`.
        progress: as in `jaxadapt.write`.

    Raises `AdapterError` if the checkpoint has no such adapter.
    """
    from jaxadapt.storage import orbax

    settings = None if config is None else folder.read_config(config)
    with reporter(progress) as report:
        if orbax.is_checkpoint(checkpoint):
            tensors = _from_orbax(checkpoint, name, settings, keymap, lora_alpha)
            folder.write(tensors, out, progress=report)
            return tensors
        if not location.is_file(location.to_location(checkpoint)):
            raise FileError(f"{os.fspath(checkpoint)}: expected a file of weights or an Orbax checkpoint")
        with open_stored(checkpoint, report) as stored:
            if stored.tensors is None:
                raise FileError("; ".join(found.found for found in stored.findings))
            if any(found.code == "image-file" for found in stored.findings):
                raise FileError(
                    f"{os.fspath(checkpoint)}: the file is one image adapter; `jaxadapt convert` writes PEFT's folders"
                )
            if settings is None and stored.text is not None:
                settings = loads(stored.text(), os.fspath(checkpoint))
            settings = settings or check_config(stored)[0]
            if settings is None:
                raise ConfigError(
                    f"{os.fspath(checkpoint)}: the file does not contain the adapter's configuration; pass --config,"
                    " an adapter_config.json or the folder of one"
                )
            tensors = _from_state_dict(stored, settings, name)
            folder.write(tensors, out, progress=report)
            return tensors


def _from_state_dict(stored: StoredAdapter, config: Config, name: str) -> peft_tensors.PeftTensors:
    assert stored.tensors is not None
    names = peft_tensors.normalize_keys(stored.specs, config.peft_type)
    if names.models:
        raise MismatchError(
            f"{stored.source}: expected the state dict of one PEFT model, found those of {', '.join(names.models)};"
            " keep the keys of one of them in the file"
        )
    if names.adapters and name not in names.adapters:
        raise MismatchError(
            f"{stored.source}: no adapter is called {name!r}; choose one with --name: {', '.join(names.adapters)}"
        )
    left_out = left_out_by_peft(names, config)
    tensors = rename(stored.tensors, {new: key for new, key in names.keys_of(name).items() if key not in left_out})
    wrong = [found.found for found in tensor_checks.check_tensors(tensors.shapes, config) if found.code == "rank"]
    raise_listed(MismatchError, f"{stored.source}: the configuration is not that of these tensors:", wrong)
    if not _has_tensors(tensors, config):
        raise MismatchError(
            f"{stored.source}: expected tensors of {config.peft_type}, found none among {len(stored.specs)} tensors: a"
            " whole model or a part of one has no adapter to extract; pass the file with the adapter's tensors"
        )
    return peft_tensors.PeftTensors(config, tensors, stored.source)


def _has_tensors(keys: Collection[str], config: Config) -> bool:
    """Return True if keys are those of the configuration's method, as far as it is known."""
    is_known = peft_tensors.is_known_method(config.peft_type)
    return any(not is_known or peft_tensors.split_key(key, config.peft_type) is not None for key in keys)


def _from_orbax(
    path: Path, name: str, config: Config | None, keymap: str | None, lora_alpha: float | None
) -> peft_tensors.PeftTensors:
    import jax
    import numpy as np

    from jaxadapt.models.attachment import init
    from jaxadapt.models.foreign import tree as foreign
    from jaxadapt.persistence.formats import orbax_folder
    from jaxadapt.storage import orbax

    if orbax_folder.read_recipe(path) is not None:
        with folder.open_adapter(path) as tensors:
            return tensors
    leaves = orbax.leaf_specs(path)
    for item, specs in leaves.items():  # another library's LoRA
        names = {key: orbax.parameter_path(key) for key in specs}
        abstract = {dotted: jax.ShapeDtypeStruct(*specs[key]) for key, dotted in names.items()}
        given = foreign.LoraTree(abstract, config=config, lora_alpha=lora_alpha, on_shared="concat")
        tree = foreign.find_lora(given)
        if tree is not None:
            wanted = [key for key, dotted in names.items() if dotted in tree.leaves]
            arrays = orbax.load(path, item, dict.fromkeys(wanted))
            values = {names[key]: np.asarray(x) for key, x in arrays.items()}
            tensors, _ = foreign.read_tree(dataclasses.replace(tree, leaves=values), keymap)
            return dataclasses.replace(tensors, config=tensors.config.replace(inference_mode=True))
    if config is None:
        raise ConfigError(f"{os.fspath(path)}: the checkpoint has no configuration of an adapter; pass --config")
    own = {orbax.parameter_path(k): s for specs in leaves.values() for k, s in specs.items() if "opt_state" not in k}
    base = {p: jax.ShapeDtypeStruct(*s) for p, s in own.items() if f".{name}." not in f".{p}."}
    like = init(paths.unflatten(base), config, keymap=keymap)
    adapter = orbax_folder.read(path, orbax_folder.find_adapter(path, like, name))
    return load_adapter.to_peft(dataclasses.replace(adapter, config=config.replace(inference_mode=True)))
