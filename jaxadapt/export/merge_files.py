"""Merge and combine adapters as files, with PyTorch's names and without a model."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxadapt.adapters.peft_tensors import PeftTensors
from jaxadapt.arrays import finite
from jaxadapt.arrays.tensor_source import TensorSource, as_source, dtype_name, float_dtype, is_float, numpy_dtype
from jaxadapt.configs import lora
from jaxadapt.core import paths
from jaxadapt.core.errors import ConfigError, FileError, MismatchError, warn
from jaxadapt.core.progress import LOGGER, Progress, byte_counter, reporter
from jaxadapt.export import base_files, conversion, untying
from jaxadapt.keymaps.keymap import PEFT_PREFIX, KeyMap
from jaxadapt.merging import base_merge, combination
from jaxadapt.persistence import fingerprint, folder, formats, load_adapter, verify_folder
from jaxadapt.storage import atomic, hf_model, location
from jaxadapt.storage.location import Location

_ALLOW = "allow_nan=True (jaxadapt {} --allow-nan) accepts them"


@atomic.cleans("out")
def merge_folder(
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    dtype: Any = None,
    max_shard_size: int = base_files.SHARD,
    allow_nan: bool = False,
    progress: Progress = None,
) -> int:
    """Merge an adapter into the model of a Hugging Face folder and write the result to another folder.

    Warns if the adapter was trained on another base, as far as the fingerprint in its file tells.

    One tensor is in memory at a time, besides the base weights that the adapter's file contains. If the output head
    and the token embedding are tied (`tie_word_embeddings`) and the adapter changes only one of them, the head gets a
    separate tensor and config.json unties them.

    Args:
        base: the model's folder, or its file of weights.
        adapter: the adapter's folder or address.
        out: the folder to write to; configuration and tokenizer are copied into it.
        dtype: the dtype of the tensors, also recorded in config.json. Default: the base's. Sums are computed in float32
            and rounded once.
        max_shard_size: the largest size of one file, in bytes.
        allow_nan: accept a NaN or an infinity in the adapter, the base and the result.
        progress: None, True (bars on a terminal or in a notebook) or a function of ("merge", bytes done, total bytes),
            also called while the adapter is read.

    Returns:
        The number of changed weights.

    Raises:
        AdapterError: something does not fit. Then nothing is written.
    """
    source, target = location.to_location(base), location.to_location(out)
    base_folder = source.parent if location.is_file(source) else source
    if target.suffix == ".gguf":
        raise FileError(
            f"{target}: cannot write the merged model here: a .gguf file is written only for a base that is one; merge"
            " into a folder, and convert that with llama.cpp's converter"
        )
    if location.is_same(base_folder, target):
        raise FileError(f"{target}: cannot write the merged model here: this is the base model; choose another folder")
    if location.exists(target / location.CONFIG):
        raise FileError(
            f"{target}: cannot write the merged model here: the folder contains an adapter, which transformers would"
            " load instead; choose another folder"
        )
    with reporter(progress) as report, hf_model.open_model(source) as base_tensors:
        hf_model.refuse_packed(base_tensors)
        tensors = folder.read(adapter, progress=report)
        if not allow_nan:
            refuse_nan([tensors], "merge")
        warn_of_another_base(base_tensors, tensors)
        plan = plan_merge(base_tensors, base_folder / "config.json", tensors)
        base_tensors, specs = plan.base_tensors, plan.specs
        file_dtype = None if dtype is None else float_dtype(dtype)
        file_specs = {
            key: (dtype_name(file_dtype if file_dtype is not None and is_float(spec.dtype) else spec.dtype), spec.shape)
            for key, spec in specs.items()
        }
        total = sum(math.prod(s) * numpy_dtype(d).itemsize for d, s in file_specs.values())
        count = byte_counter(report, "merge", total)

        def get(key: str) -> Any:
            value = plan.value(key, unrounded=file_dtype is not None)
            with np.errstate(over="ignore"):  # an overflow to infinity raises an error with the tensor's name
                value = value.astype(numpy_dtype(file_specs[key][0]), copy=False)
            count(value.nbytes)
            return value

        def not_finite_error(keys: list[str]) -> MismatchError:
            names = [f"{key}{'' if finite.is_finite(base_tensors[key]) else ', of the base'}" for key in keys]
            return MismatchError(
                f"{target}: in the merged model {finite.not_finite_message(names, _ALLOW.format('merge'))}"
            )

        read = get if allow_nan else finite.check_while_reading(get, len(file_specs), not_finite_error)
        config_dtype = None if file_dtype is None else file_dtype.name
        other_files = base_files.read_other_files(source, config_dtype, plan.is_untied)
        atomic.make_folder(target)
        hf_model.write_model(target, file_specs, read, max_shard_size)
        for name, data in other_files.items():
            atomic.write_bytes(target / name, data)
    LOGGER.info("%s: %d of %d tensors changed, %d bytes", target, plan.count, len(file_specs), total)
    return plan.count


@dataclasses.dataclass(frozen=True)
class MergePlan:
    """The tensors of a model's files and those that an adapter changes.

    Attributes:
        base_tensors: the model's tensors, with a separate head if the adapter needs one.
        specs: their shapes and dtypes.
        changed: the changed tensors by key.
        count: the number of changed weights.
        is_untied: True if the head has a separate tensor that the model's files lack.
    """

    base_tensors: TensorSource
    specs: dict[str, jax.ShapeDtypeStruct]
    changed: Mapping[str, base_merge.ChangedLeaf]
    count: int
    is_untied: bool

    def value(self, key: str, *, unrounded: bool) -> Any:
        """Return a tensor of the merged model; a changed one in float32 if `unrounded`."""
        value = self.base_tensors[key]
        if key not in self.changed:
            return value
        return np.asarray(self.changed[key].with_base(value).value(unrounded=unrounded))


def plan_merge(
    base_tensors: TensorSource, config: Location, tensors: PeftTensors, tied: bool | None = None
) -> MergePlan:
    """Plan the merge of an adapter into a model's files.

    Args:
        base_tensors: the model's tensors, with PyTorch's names and layouts.
        config: its config.json, which may be missing.
        tensors: the adapter.
        tied: True if the head is tied to the embedding. Default: as `config` states.

    Raises:
        AdapterError: the adapter does not fit.
    """
    advice = "call jaxadapt.export.export_base(model, folder, adapter), which merges it into a model in memory"
    _require_modules(tensors, "merge", advice)
    if tensors.config.get("layer_replication"):
        raise ConfigError(
            f"{tensors.source}: cannot merge an adapter that repeats layers of its base (layer_replication),"
            f" because the folder of the base contains each layer once; {advice}"
        )
    untied = untying.untie_base(base_tensors, config, tensors, tied)
    tensors = dataclasses.replace(tensors, config=untying.resolve_untied_config(tensors.config, untied))
    specs = {key: jax.ShapeDtypeStruct(spec.shape, spec.dtype) for key, spec in untied.tensors.specs.items()}
    keymap = load_adapter.base_keymap(tensors, untied.tensors.shapes, untied.tied)
    params = paths.unflatten(specs | _repeated_weights(tensors, untied.tensors, keymap))
    loaded = load_adapter.from_peft(tensors, params, keymap=keymap)
    changed = base_merge.plan_merge(specs, loaded)
    return MergePlan(untied.tensors, specs, changed, len(loaded.sites), untied.is_untied)


def combine_folders(
    adapters: Sequence[str | os.PathLike[str]],
    weights: Sequence[float],
    out: str | os.PathLike[str],
    *,
    resize: int | None = None,
    dtype: str | None = None,
    allow_nan: bool = False,
    progress: Progress = None,
    **options: Any,
) -> PeftTensors:
    """Combine several adapters of the same base into one, LoRA or IA3, and write it.

    Args:
        adapters: folders or addresses, or image adapters in one file each.
        weights: one factor for each adapter.
        out: the folder to write to; for image adapters also a file, with the names of the first one.
        resize: the rank of the result. Default: decided by the method.
        dtype: the dtype of the file, as in `conversion.convert_format`.
        allow_nan: accept a NaN or an infinity in the adapters.
        progress: as in `merge_folder`, for reading and writing.
        options: as in `jaxadapt.combine`: method, svd_rank, density, majority_sign_method, key.
    """
    with reporter(progress) as report, contextlib.ExitStack() as stack:
        opened = [stack.enter_context(formats.open_place(formats.look(path, report))) for path in adapters]
        tensors = [folder.in_memory(each.tensors, report) for each in opened]
        if not allow_nan:
            refuse_nan(tensors, "combine")
        combined = _replace_base(_combine_tensors(tensors, weights, resize, options), tensors)
        if not allow_nan:
            refuse_nan([dataclasses.replace(combined, source=f"{os.fspath(out)}, the result")], "combine")
        conversion.refuse_same(adapters[0], out)
        conversion.write_like(combined, out, opened[0], dtype, report)
        return combined


def _combine_tensors(
    tensors: Sequence[PeftTensors],
    weights: Sequence[float],
    resize: int | None,
    options: dict[str, Any],
) -> PeftTensors:
    for adapter in tensors:
        _require_modules(adapter, "combine", "use jaxadapt.combine with adapters of a model, or from_peft(…, base)")
    if combination.summed_type(adapter.config for adapter in tensors) is not None and resize is not None:
        raise ConfigError("cannot change the rank of the result: these adapters have no rank; leave the rank out")
    for adapter in tensors:
        lora.require_original_base(adapter.config, adapter.source)
    combined = combination.combine_plain(tensors, weights, combination.Options(**options))
    return combined if resize is None else combination.resize_plain(combined, resize)[0]


def _replace_base(combined: PeftTensors, adapters: Sequence[PeftTensors]) -> PeftTensors:
    """Return the combined adapter with the base of all adapters; warn if they name several, and then name none."""
    base = {adapter.config.base_model_name_or_path for adapter in adapters}
    if len(base - {None}) > 1:
        names = [f"{adapter.source}: {adapter.config.base_model_name_or_path}" for adapter in adapters]
        warn("combining adapters whose configurations name different base models:\n" + paths.bullets(names))
    name = base.pop() if len(base) == 1 else None
    config = combined.config.replace(inference_mode=True, base_model_name_or_path=name)
    return dataclasses.replace(combined, config=config, fingerprint=_common_fingerprint(adapters))


def _common_fingerprint(adapters: Sequence[PeftTensors]) -> fingerprint.Fingerprint | None:
    """Return the fingerprint of the base of all adapters, if all have one; warn if these are of several bases."""
    first, *others = adapters
    common = dict(first.fingerprint or {})
    for other in others:
        shared = {key: value for key, value in common.items() if key in (other.fingerprint or {})}
        if different := fingerprint.differences(shared, other.fingerprint or {}):
            warn(
                f"{first.source} and {other.source} were trained on different base models: {len(different)} of"
                f" {len(shared)} compared weights differ, such as {different[0]}. The combined adapter may be wrong on"
                " both"
            )
            return None
        common |= other.fingerprint or {}
    return common if all(adapter.fingerprint for adapter in adapters) else None


def warn_of_another_base(base: TensorSource, tensors: PeftTensors) -> None:
    """Warn if an adapter was trained on another base, as far as the fingerprint in its file tells. Reads 8 weights."""
    stored = tensors.fingerprint or {}
    names = verify_folder.weight_names(stored, base.shapes) or {}
    parts = [fingerprint.of_file(as_source({name: base[name]}), {key: name}) for key, name in names.items()]
    if parts and None not in parts:
        fingerprint.check(
            stored, {k: x for part in parts for k, x in (part or {}).items()}, tensors.source, strict=False
        )


def refuse_nan(adapters: Sequence[PeftTensors], command: str) -> None:
    names = [f"{adapter.source}: {key}" for adapter in adapters for key in finite.names_not_finite(adapter.tensors)]
    if names:
        raise MismatchError(finite.not_finite_message(names, _ALLOW.format(command)))


def _require_modules(tensors: PeftTensors, verb: str, advice: str) -> None:
    if tensors.config.get("target_parameters"):
        raise ConfigError(
            f"{tensors.source}: cannot {verb} the files of an adapter with target_parameters, because they do not"
            f" contain the layout of these parameters in the model; {advice}"
        )


def _repeated_weights(tensors: PeftTensors, base: TensorSource, keymap: KeyMap) -> dict[str, Any]:
    """Return the base weights that the adapter's file also contains, such as its token embedding and head."""
    names = {key.removeprefix(PEFT_PREFIX).replace(".base_layer.", ".") for key in tensors.tensors}
    return {key: base[key] for key in base if (match := keymap.match(key)) and ".".join(match.parameter({})) in names}
