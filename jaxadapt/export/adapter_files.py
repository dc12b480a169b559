"""Changes of adapter files without a model: another rank, other names, a plain LoRA of a start, one adapter taken out.

Each function reads an adapter, changes it and writes another; the source stays as it is. Image adapters in one file
are written as one file again if the target's name ends in .safetensors.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from jaxadapt import configs
from jaxadapt.adapters.adapter import Adapter
from jaxadapt.adapters.peft_tensors import PeftTensors
from jaxadapt.configs import Config, lora_variants, matching
from jaxadapt.core import paths
from jaxadapt.core.errors import ConfigError, FileError, MismatchError
from jaxadapt.core.progress import Progress, reporter
from jaxadapt.export import file_formats
from jaxadapt.initializers import original_base
from jaxadapt.keymaps.keymap import PEFT_PREFIX
from jaxadapt.merging import rank_reduction
from jaxadapt.persistence import folder, peft, repair_folder, verify_folder
from jaxadapt.persistence.verification import base_checks, key_names
from jaxadapt.persistence.verification.stored_adapter import open_stored
from jaxadapt.storage.source import as_source, rename

Path = str | os.PathLike[str]


def _kept(result: PeftTensors, source: PeftTensors) -> PeftTensors:
    """Return a result with the fields of the source's configuration that name its base and task."""
    names = ("base_model_name_or_path", "revision", "task_type", "auto_mapping")
    fields = {name: source.config.get(name) for name in names}
    config = result.config.replace(inference_mode=True, **fields)
    return dataclasses.replace(result, config=config, source=source.source)


def resize_files(
    adapter: Path, r: int, out: Path, *, dtype: str | None = None, progress: Progress = None
) -> dict[str, float]:
    """Write a LoRA adapter with another rank; return {module: the error ‖ΔW − ΔW'‖ / ‖ΔW‖}.

    Args:
        adapter: the adapter's folder, address or file.
        r: the rank of every module; as in `jaxadapt.merging.resize_rank`.
        out: the folder or file to write.
        dtype: the dtype of the file, as in `file_formats.convert_format`; by default that of the adapter.
        progress: as in `jaxadapt.read` and `jaxadapt.write`.

    Raises `ConfigError` for an adapter that is not a plain LoRA.
    """
    with reporter(progress) as report:
        tensors = folder.read(adapter, progress=report)
        if tensors.config.get("target_parameters"):
            raise ConfigError(
                f"{tensors.source}: cannot resize the files of an adapter with target_parameters, because they do not"
                " contain the layout of these parameters; load it into its model and use jaxadapt.merging.resize_rank"
            )
        lora_variants.require_original_base(tensors.config, tensors.source)
        reduced, error = rank_reduction.resize_rank(file_formats.with_pytorch_names(tensors), r)
        file_formats.write_like(_kept(peft.to_peft(reduced), tensors), out, adapter, dtype, report)
        return error


def undo_start(trained: Path, first: Path, out: Path, *, progress: Progress = None) -> PeftTensors:
    """Write a trained adapter that changed its base when it started (PiSSA, OLoRA, …) as a plain LoRA for the original.

    Args:
        trained: the trained adapter.
        first: the adapter that was saved before the training.
        out: the folder to write.
        progress: as in `jaxadapt.read` and `jaxadapt.write`.

    Raises what `jaxadapt.initializers.for_original_base` raises.
    """
    with reporter(progress) as report:
        new, old = (folder.read(path, progress=report) for path in (trained, first))
        if not lora_variants.changes_base(new.config):
            raise ConfigError(f"{new.source}: its initialization did not change the base; nothing to undo")
        plain = original_base.for_original_base(_on_changed_base(new), _on_changed_base(old))
        result = _kept(peft.to_peft(plain), new)
        folder.write(result, out, progress=report)
        return result


def _on_changed_base(tensors: PeftTensors) -> Adapter:
    """Return the adapter of a base that its start changed, which a model's own base is not."""
    config: Any = tensors.config
    plain = dataclasses.replace(tensors, config=config.with_default_init())
    return dataclasses.replace(file_formats.with_pytorch_names(plain), config=tensors.config)


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
    with reporter(progress) as report, folder.open_adapter(adapter, report) as tensors:
        splits = {key: key_names.split_key(key, tensors.config.peft_type) for key in tensors.tensors}
        modules = list(dict.fromkeys(s[0] for s in splits.values() if s is not None and s[0]))
        if base is not None:
            names = base_checks.names_in_base(modules, base_checks.base_shapes(base))
            if names is None:
                raise MismatchError(
                    f"{tensors.source}: these modules have no counterpart in {base}:\n" + paths.bullets(modules)
                )
        else:
            names = {name: new + name.removeprefix(old or "") for name in modules if name.startswith(old or "")}
        changed = {name: to for name, to in names.items() if name != to}
        if not changed:
            raise MismatchError(f"{tensors.source}: no module name begins with {old!r}; nothing to rename")
        result = _renamed(tensors, changed, [names.get(m, m) for m in modules], (old or "", new))
        file_formats.write_like(result, out, adapter, None, report)
        return changed


def _renamed(
    tensors: PeftTensors, changed: Mapping[str, str], modules: list[str], beginning: tuple[str, str]
) -> PeftTensors:
    keys: dict[str, str] = {}
    for key in tensors.tensors:
        name = key.removeprefix(PEFT_PREFIX)
        module = next((m for m in _prefixes(name) if m in changed), None)
        renamed = f"{PEFT_PREFIX}{changed[module]}{name[len(module) :]}" if module is not None else key
        if module is None and beginning[0] and name.startswith(beginning[0]):  # a fully trained module
            renamed = f"{PEFT_PREFIX}{beginning[1]}{name.removeprefix(beginning[0])}"
        if renamed in keys:
            raise MismatchError(f"{tensors.source}: {key} and {keys[renamed]} would both be called {renamed}")
        keys[renamed] = key
    source = rename(as_source(tensors.tensors), keys)
    return PeftTensors(_renamed_config(tensors.config, changed, modules, beginning), source, tensors.source)


def _prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(len(parts), 0, -1)]


def _renamed_config(
    config: Config, changed: Mapping[str, str], modules: list[str], beginning: tuple[str, str]
) -> Config:
    """Rename the modules that a configuration names in full; if it then misses one, name all of them."""
    old, new = beginning

    def one(name: Any) -> Any:
        if not isinstance(name, str) or name in changed:
            return changed.get(name, name)
        return new + name.removeprefix(old) if old and name.startswith(old) else name

    values = config.to_dict()
    for field in ("target_modules", "exclude_modules", "modules_to_save"):
        if isinstance(values.get(field), list):
            values[field] = [one(name) for name in values[field]]
    for field in ("rank_pattern", "alpha_pattern"):
        if values.get(field):
            values[field] = {one(name): value for name, value in values[field].items()}
    renamed = Config.from_dict(values)
    if renamed.get("target_modules") is not None and not all(matching.is_target(renamed, name) for name in modules):
        renamed = renamed.with_targets(sorted(modules))
    return renamed


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
) -> PeftTensors:
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
    from jaxadapt.storage import location, orbax

    settings = None if config is None else folder.read_config(config)
    with reporter(progress) as report:
        if orbax.is_checkpoint(checkpoint):
            tensors = _from_orbax(checkpoint, name, settings, keymap, lora_alpha)
            folder.write(tensors, out, progress=report)
            return tensors
        if not location.is_file(location.to_location(checkpoint)):
            raise FileError(f"{os.fspath(checkpoint)}: expected a file of weights or an Orbax checkpoint")
        with open_stored(checkpoint, report) as stored:
            if stored.specs is None:
                raise FileError("; ".join(found.found for found in stored.findings))
            if settings is None and stored.text is not None:
                settings = configs.loads(stored.text, os.fspath(checkpoint))
            settings = settings or stored.header
            if settings is None:
                raise ConfigError(
                    f"{os.fspath(checkpoint)}: the file does not contain the adapter's configuration; pass --config,"
                    " an adapter_config.json or the folder of one"
                )
            tensors = _from_state_dict(stored, settings, name)
            folder.write(tensors, out, progress=report)
            return tensors


def _from_state_dict(stored: Any, config: Config, name: str) -> PeftTensors:
    names = key_names.normalize_keys(stored.specs, config.peft_type)
    if names.adapters and name not in names.adapters:
        raise MismatchError(
            f"{stored.source}: no adapter is called {name!r}; choose one with --name: {', '.join(names.adapters)}"
        )
    keys: dict[str, str] = {}
    for key, found in key_names.adapter_keys(stored.specs, config.peft_type, name).items():
        keys.setdefault(found, key)
    shapes = {new: stored.specs[key][1] for new, key in keys.items()}
    kept = verify_folder.without_base(shapes, names, config)
    keys = {new: key for new, key in keys.items() if new in kept}
    if not keys:
        raise MismatchError(f"{stored.source}: expected tensors of {config.peft_type}, found none")
    return PeftTensors(config, repair_folder.StoredTensors(keys, stored.get), stored.source)


def _from_orbax(
    path: Path, name: str, config: Config | None, keymap: str | None, lora_alpha: float | None
) -> PeftTensors:
    import jax
    import numpy as np

    from jaxadapt.models.attachment import init
    from jaxadapt.models.foreign import tree as foreign
    from jaxadapt.persistence import orbax_folder
    from jaxadapt.storage import orbax

    if orbax_folder.read_recipe(path) is not None:
        with folder.open_adapter(path) as tensors:
            return tensors
    leaves = orbax.leaf_specs(path)
    for item, specs in leaves.items():  # another library's LoRA
        names = {key: orbax.parameter_path(key) for key in specs}
        abstract = {dotted: jax.ShapeDtypeStruct(*specs[key]) for key, dotted in names.items()}
        if (tree := foreign.find_lora(abstract)) is not None:
            wanted = [key for key, dotted in names.items() if dotted in tree.leaves]
            arrays = orbax.load(path, item, dict.fromkeys(wanted))
            values = {names[key]: np.asarray(x) for key, x in arrays.items()}
            filled = dataclasses.replace(tree, leaves=values)
            tensors, _ = foreign.tree_to_peft(filled, config, keymap, lora_alpha, None, "concat")
            return dataclasses.replace(tensors, config=tensors.config.replace(inference_mode=True))
    if config is None:
        raise ConfigError(f"{os.fspath(path)}: the checkpoint has no configuration of an adapter; pass --config")
    own = {orbax.parameter_path(k): s for specs in leaves.values() for k, s in specs.items() if "opt_state" not in k}
    base = {p: jax.ShapeDtypeStruct(*s) for p, s in own.items() if f".{name}." not in f".{p}."}
    like = init(config, paths.unflatten(base), keymap=keymap)
    adapter = orbax_folder.read(path, orbax_folder.find_adapter(path, like, name))
    return peft.to_peft(dataclasses.replace(adapter, config=config.replace(inference_mode=True)))
