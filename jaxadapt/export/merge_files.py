"""Adapters and models as files: merged and combined under PyTorch's names, by any model's arithmetic, with no model."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeGuard

import jax
import numpy as np

from jaxadapt.adapters.adapter import Adapter, PeftTensors
from jaxadapt.arrays import finite
from jaxadapt.configs import lora_variants
from jaxadapt.core import paths
from jaxadapt.core.errors import ConfigError, FileError, FormatError, MismatchError, warn
from jaxadapt.core.progress import LOGGER, Progress, Report, byte_counter, reporter
from jaxadapt.export import base_weights, untying
from jaxadapt.keymaps import pytorch
from jaxadapt.keymaps.keymap import PEFT_PREFIX, KeyMap
from jaxadapt.merging import base_merge, combination, rank_reduction
from jaxadapt.persistence import folder, peft
from jaxadapt.storage import atomic, hf_model, location
from jaxadapt.storage.dtypes import dtype_name, numpy_dtype
from jaxadapt.storage.local_files import file_error
from jaxadapt.storage.location import Place

_BESIDE = (".json", ".txt", ".model", ".jinja")
"""What belongs to a model besides its weights: configuration, tokenizer, chat template."""

_ALLOW = "allow_nan=True (jaxadapt {} --allow-nan) takes them all the same"


def merge_folder(
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    dtype: Any = None,
    max_shard_size: int = base_weights.SHARD,
    allow_nan: bool = False,
    progress: Progress = None,
) -> int:
    """Write the model of a Hugging Face folder with an adapter merged into its weights.

    Args:
        base: the model's folder.
        adapter: its folder, or an address of the Hub.
        out: another folder; configuration and tokenizer are copied into it.
        dtype: of the tensors, and said in config.json; those of the base by default. The sum is made in float32 and
            rounded once.
        allow_nan: merge also where a tensor of the adapter, the base or the result holds a NaN or an infinity.
        progress: None, True (bars on a terminal or in a notebook) or a function of ("merge", bytes done, bytes in all);
            also of the adapter that is read.

    Where the head is the table of tokens itself (`tie_word_embeddings`), and the adapter changes one of them alone, the
    head gets a tensor of its own, and config.json says so.

    One tensor is held at a time, beside what the adapter repeats of the base. Returns how many weights it changed.
    Raises `AdapterError`, and then nothing is written, unless everything fits.
    """
    source, target = location.to_location(base), location.to_location(out)
    home = source.parent if location.is_file(source) else source
    if home == target or (_local(home) and _local(target) and _same(home, target)):
        raise FileError(f"{target}: is the base model itself; choose another folder")
    if location.exists(target / folder.CONFIG):
        raise FileError(f"{target}: holds an adapter, which transformers would open instead; choose another folder")
    with reporter(progress) as report, hf_model.open_model(source) as held:
        hf_model.refuse_packed(held)
        tensors = folder.read(adapter, progress=report)
        if not allow_nan:
            _refuse_nan([tensors], "merge")
        way_out = "jaxadapt.export.export_base(model, folder, adapter) writes a model with it merged"
        _need_modules(tensors, way_out)
        if tensors.config.get("layer_replication"):
            raise ConfigError(
                f"{tensors.source}: is for a model that repeats layers of its base (layer_replication), and the folder"
                f" of the base holds each once; {way_out}"
            )
        ready = untying.untie_base(held, home / "config.json", tensors)
        held = ready.tensors
        tensors = dataclasses.replace(tensors, config=untying.resolve_untied_config(tensors.config, ready))
        specs = {key: jax.ShapeDtypeStruct(spec.shape, spec.dtype) for key, spec in held.specs.items()}
        shapes = {key: spec.shape for key, spec in specs.items()}
        turned = bool(tensors.config.get("fan_in_fan_out"))
        table = pytorch.state_dict_keymap(shapes, _shapes(tensors), tensors.source, turned, ready.tied)
        inside = _adapter(tensors, specs | _repeated(tensors, held, table), table)
        changed = base_merge.plan_merge(specs, inside)
        kind = None if dtype is None else np.dtype(dtype)
        written = {
            key: (dtype_name(kind if kind is not None and _floats(spec) else spec.dtype), spec.shape)
            for key, spec in specs.items()
        }
        total = sum(math.prod(s) * numpy_dtype(d).itemsize for d, s in written.values())
        more = byte_counter(report, "merge", total)

        def get(key: str) -> Any:
            value = held[key]
            if key in changed:
                value = np.asarray(changed[key].with_base(value).value(unrounded=kind is not None))
            with np.errstate(over="ignore"):  # what becomes an infinity is refused by name
                value = value.astype(numpy_dtype(written[key][0]), copy=False)
            more(value.nbytes)
            return value

        def lost(keys: list[str]) -> MismatchError:
            named = [f"{key}{'' if finite.is_finite(held[key]) else ', of the base'}" for key in keys]
            return MismatchError(
                f"{target}: of the merged model {finite.not_finite_message(named, _ALLOW.format('merge'))}"
            )

        look = get if allow_nan else finite.check_while_reading(get, len(written), lost)
        beside = _beside(source, None if kind is None else kind.name, ready.apart)
        folder.make_folder(target)
        hf_model.write_model(target, written, look, max_shard_size)
        for name, data in beside.items():
            atomic.write_bytes(target / name, data)
    LOGGER.info("%s: %d of %d tensors changed, %d bytes", target, len(inside.sites), len(written), total)
    return len(inside.sites)


def combine_folders(
    adapters: Sequence[str | os.PathLike[str]],
    weights: Sequence[float],
    out: str | os.PathLike[str],
    *,
    resize: int | None = None,
    allow_nan: bool = False,
    progress: Progress = None,
    **options: Any,
) -> PeftTensors:
    """Write one LoRA adapter out of several of the same base.

    Args:
        adapters: folders, or addresses of the Hub.
        options: as in `jaxadapt.combine`: method, svd_rank, density, majority_sign_method, key.
        resize: a rank for the result.
        allow_nan: combine also adapters of which a tensor holds a NaN or an infinity.
        progress: as in `merge_folder`, of what is read and written.
    """
    with reporter(progress) as report:
        tensors = [folder.read(path, progress=report) for path in adapters]
        if not allow_nan:
            _refuse_nan(tensors, "combine")
        return _combined(tensors, weights, out, resize, options, report)


def _combined(
    tensors: Sequence[PeftTensors],
    weights: Sequence[float],
    out: str | os.PathLike[str],
    resize: int | None,
    options: dict[str, Any],
    report: Report,
) -> PeftTensors:
    for held in tensors:
        _need_modules(held, "jaxadapt.combine does it with adapters of a model, or from from_peft(…, base)")
    more = [f"{held.source}: {why}" for held in tensors for why in lora_variants.reasons_not_a_product(held.config)]
    if more:
        raise ConfigError("only plain LoRA is combined, and these are not or more:\n" + paths.bullets(more))
    shapes = {key: shape for held in tensors for key, shape in pytorch.weight_shapes(_shapes(held)).items()}
    specs = {key: jax.ShapeDtypeStruct(shape, "float32") for key, shape in shapes.items()}
    # One table for all: what one adapter leaves out is no weight that it lacks.
    together = {key: shape for held in tensors for key, shape in _shapes(held).items()}
    table = pytorch.state_dict_keymap(shapes, together, " and ".join(held.source for held in tensors))
    made = combination.combine([_adapter(held, specs, table) for held in tensors], weights, **options)
    if resize is not None:
        made = rank_reduction.resize_rank(made, resize).adapter
    base = {held.config.base_model_name_or_path for held in tensors}
    if len(base - {None}) > 1:
        named = [f"{held.source}: {held.config.base_model_name_or_path}" for held in tensors]
        warn("these adapters name different base models, and are combined as if it were one:\n" + paths.bullets(named))
    encoded = peft.to_peft(made)
    config = encoded.config.replace(inference_mode=True, base_model_name_or_path=base.pop() if len(base) == 1 else None)
    encoded = dataclasses.replace(encoded, config=config)
    folder.write(encoded, out, progress=report)
    return encoded


def _refuse_nan(adapters: Sequence[PeftTensors], command: str) -> None:
    lost = [f"{held.source}: {key}" for held in adapters for key in finite.names_not_finite(held.tensors)]
    if lost:
        raise MismatchError(finite.not_finite_message(lost, _ALLOW.format(command)))


def _need_modules(tensors: PeftTensors, way_out: str) -> None:
    if tensors.config.get("target_parameters"):
        raise ConfigError(
            f"{tensors.source}: adapts parameters by their names (target_parameters), and its file does not say how"
            f" they lie in the model; {way_out}"
        )


def _shapes(tensors: PeftTensors) -> dict[str, tuple[int, ...]]:
    return {key: tuple(x.shape) for key, x in tensors.tensors.items()}


def _floats(spec: Any) -> bool:
    return jax.numpy.issubdtype(spec.dtype, jax.numpy.floating)


def _repeated(tensors: PeftTensors, held: hf_model.ModelTensors, table: KeyMap) -> dict[str, Any]:
    """The values of what the adapter's file holds of the base as well: its table of tokens, its head."""
    names = {key.removeprefix(PEFT_PREFIX).replace(".base_layer.", ".") for key in tensors.tensors}
    return {key: held[key] for key in held if (site := table.match(key)) and ".".join(site.parameter({})) in names}


def _adapter(tensors: PeftTensors, specs: dict[str, Any], table: Any) -> Adapter:
    lora_variants.require_original_base(tensors.config, tensors.source)
    return peft.from_peft(tensors, paths.unflatten(specs), keymap=table)


def _local(place: Place) -> TypeGuard[Path]:
    """Whether it is on this machine, and there."""
    return isinstance(place, Path) and location.exists(place)


def _same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError as error:
        raise file_error("read", str(other), error) from error


def _content(path: Place) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise file_error("read", str(path), error) from error


def _beside(source: Place, dtype: str | None, apart: bool) -> dict[str, bytes]:
    """What else lies in the model's folder; its configuration with a `dtype`, and with a head that is `apart`."""
    out: dict[str, bytes] = {}
    inside = location.is_dir(source)
    try:
        present = sorted(source.iterdir(), key=str) if inside else []
    except OSError as error:
        raise file_error("read", str(source), error) from error
    for path in present:
        name = path.name
        wanted = path.suffix in _BESIDE and not name.endswith(".index.json") and name != folder.CONFIG
        if wanted and location.is_file(path):
            out[name] = _content(path)
    path = (source if inside else source.parent) / "config.json"
    if apart and untying.read_model_config(path) is not None:
        out[path.name] = _content(path)  # also where the base is a file alone
    if path.name in out and dtype is not None:
        out[path.name] = _saying(path, out[path.name], dtype)
    if path.name in out and apart:
        out[path.name] = json.dumps(untying.untie_config(json.loads(out[path.name])), indent=2).encode() + b"\n"
    return out


def _saying(path: Place, config: bytes, dtype: str) -> bytes:
    """config.json with this dtype: transformers opens a model in the one that it finds there."""

    def said(fields: dict[str, Any]) -> dict[str, Any]:
        return {k: dtype if k in ("dtype", "torch_dtype") and isinstance(v, str) else v for k, v in fields.items()}

    try:
        return json.dumps(json.loads(config, object_hook=said), indent=2).encode() + b"\n"
    except ValueError as error:
        raise FormatError(f"{path}: expected JSON, in which to say the dtype {dtype}; found none ({error})") from error
