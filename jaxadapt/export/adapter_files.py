"""Changes of adapter files without a model: another rank, a plain LoRA of a start, one adapter of several, one out of a
larger file, and the form that another program reads.

    PEFT folder ──plain_lora──► one rank, scales in B ──► PEFT folder │ GGUF adapter │ mlx-lm's folder

Each function reads an adapter, changes it and writes another; the source stays as it is. Image adapters in one file
are written as one file again if the target's name ends in .safetensors. An export computes what PEFT computes: an
adapter of another method becomes the nearest plain LoRA, and a start that changed the base is undone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Generator, Iterable, Sequence
from typing import Any

import jax
import numpy as np

from jaxadapt.adapters.peft_tensors import PeftTensors, is_known_method, normalize_keys, split_key
from jaxadapt.arrays import regions
from jaxadapt.arrays.tensor_source import as_source, float_dtype, rename
from jaxadapt.configs import lora
from jaxadapt.configs.base import Config, loads
from jaxadapt.core import paths
from jaxadapt.core.errors import (
    ConfigError,
    FileError,
    MismatchError,
    Progress,
    Report,
    raise_listed,
    reporter,
    warn,
)
from jaxadapt.export import conversion, expert_files, gguf_files
from jaxadapt.initializers import kinds, start_adapter
from jaxadapt.keymaps import pytorch
from jaxadapt.keymaps.keymap import PEFT_PREFIX, KeyMap
from jaxadapt.merging import combination, pairs
from jaxadapt.models.carriers import DEFAULT
from jaxadapt.persistence import (
    consumers,
    fingerprint,
    folder,
    formats,
    load_adapter,
    reading,
    save_adapter,
    tensor_checks,
)
from jaxadapt.persistence.formats.peft_folder import StoredAdapter
from jaxadapt.storage import atomic, hf_model, location, orbax

# ---------------------------------------------------------------- other ranks


Path = str | os.PathLike[str]


def _kept(result: PeftTensors, source: PeftTensors) -> PeftTensors:
    """Return a result with the fingerprint of the source's base, and the fields that name the base and the task."""
    names = ("base_model_name_or_path", "revision", "task_type", "auto_mapping")
    config = result.config.replace(inference_mode=True, **{name: source.config.get(name) for name in names})
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
    conversion.refuse_same(out, adapter)
    place = location.to_location(out)
    if location.is_file(place) or location.exists(place / location.CONFIG):
        raise FileError(f"{place}: has an adapter already; choose another path, or delete the old adapter")
    with reporter(progress) as report, formats.open_place(formats.look(adapter, report)) as origin:
        tensors = folder.in_memory(origin.tensors, report)
        lora.require_original_base(tensors.config, tensors.source)
        if reasons := lora.reasons_not_a_product(tensors.config):
            raise ConfigError(
                f"{tensors.source}: cannot change the rank of an adapter that is more than a plain LoRA:"
                f" {', '.join(reasons)}. If it changes weights only, `jaxadapt export ADAPTER --rank R --base BASE`"
                " writes the nearest LoRA; else merge it (`jaxadapt merge`)"
            )
        label = f"{tensors.source}: "
        regions.require_finite(tensors.tensors, "resize a finite adapter, such as an earlier step", label)
        resized, error = combination.resize_rank(tensors, r)
        regions.require_finite(
            resized.tensors, f"at rank {r} its changes overflow float32; scale the adapter down", label
        )
        conversion.write_like(_kept(resized, tensors), out, origin, dtype, report)
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
    conversion.refuse_same(out, trained, first)
    with reporter(progress) as report:
        new, old = (folder.read(path, progress=report) for path in (trained, first))
        result = _kept(start_adapter.convert_start(new, pairs.as_start(old, new.config)), new)
        folder.write(result, out, progress=report)
        return result


# ---------------------------------------------------------------- combine


def combine_folders(
    adapters: Sequence[Path],
    weights: Sequence[float],
    out: Path,
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
        progress: as in `jaxadapt.read` and `jaxadapt.write`.
        options: as in `jaxadapt.combine`: method, svd_rank, density, majority_sign_method, key.
    """
    with reporter(progress) as report, contextlib.ExitStack() as stack:
        opened = [stack.enter_context(formats.open_place(formats.look(path, report))) for path in adapters]
        tensors = [folder.in_memory(each.tensors, report) for each in opened]
        if not allow_nan:
            conversion.refuse_nan(tensors, "combine")
        if combination.summed_type(each.config for each in tensors) is not None and resize is not None:
            raise ConfigError("cannot change the rank of the result: these adapters have no rank; leave the rank out")
        for each in tensors:
            lora.require_original_base(each.config, each.source)
        combined = combination.combine(tensors, weights, **options)
        if resize is not None:
            combined, _ = combination.resize_rank(combined, resize)
        combined = _replace_base(combined, tensors)
        if not allow_nan:
            conversion.refuse_nan([dataclasses.replace(combined, source=f"{os.fspath(out)}, the result")], "combine")
        conversion.refuse_same(out, *adapters)
        conversion.write_like(combined, out, opened[0], dtype, report)
        return combined


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
    settings = None if config is None else folder.read_config(config)
    with reporter(progress) as report, contextlib.ExitStack() as stack:
        place = formats.look(checkpoint, report)
        if place.names is not None and orbax.is_checkpoint(place.at, place.names):
            tensors = _from_orbax(checkpoint, name, settings, keymap, lora_alpha)
        elif place.names is None:
            stored = reading.open_stored(place, stack, report)
            if any(found.code == "image-file" for found in stored.findings):
                raise FileError(
                    f"{stored.source}: the file is one image adapter; `jaxadapt convert` writes PEFT's folders"
                )
            tensors = _from_state_dict(stored, settings, name)
        else:
            raise FileError(f"{os.fspath(checkpoint)}: expected a file of weights or an Orbax checkpoint")
        conversion.refuse_same(location.to_location(out) / location.WEIGHTS[0], checkpoint)
        folder.write(tensors, out, progress=report)
        return tensors


def _from_state_dict(stored: StoredAdapter, config: Config | None, name: str) -> PeftTensors:
    if stored.tensors is None:
        raise FileError(
            "; ".join(
                [
                    f"{stored.source}: expected a file of weights or an Orbax checkpoint",
                    *(found.found for found in stored.findings),
                ]
            )
        )
    if config is None and stored.text is not None:
        config = loads(stored.text(), stored.source)
    config = config or reading.check_config(stored)[0]
    if config is None:
        raise ConfigError(
            f"{stored.source}: the file does not contain the adapter's configuration; pass --config, an"
            " adapter_config.json or the folder of one"
        )
    names = normalize_keys(stored.specs, config.peft_type)
    if names.models:
        raise MismatchError(
            f"{stored.source}: expected the state dict of one PEFT model, found those of {', '.join(names.models)};"
            " keep the keys of one of them in the file"
        )
    if names.adapters and name not in names.adapters:
        raise MismatchError(
            f"{stored.source}: there is no adapter {name!r}; choose one with --name: {', '.join(names.adapters)}"
        )
    left_out = reading.left_out_by_peft(names, config)
    tensors = rename(stored.tensors, {new: key for new, key in names.keys_of(name).items() if key not in left_out})
    raise_listed(
        MismatchError,
        f"{stored.source}: the configuration is not that of these tensors:",
        [found.found for found in tensor_checks.check_tensors(tensors.shapes, config) if found.code == "rank"],
    )
    if not _has_tensors(tensors, config):
        raise MismatchError(
            f"{stored.source}: expected tensors of {config.peft_type}, found none among {len(stored.specs)} tensors: a"
            " whole model or a part of one has no adapter to extract; pass the file with the adapter's tensors"
        )
    return PeftTensors(config, tensors, stored.source)


def _has_tensors(keys: Iterable[str], config: Config) -> bool:
    """Return True if keys are those of the configuration's method, as far as it is known."""
    is_known = is_known_method(config.peft_type)
    return any(not is_known or split_key(key, config.peft_type) is not None for key in keys)


def _from_orbax(
    path: Path, name: str, config: Config | None, keymap: str | None, lora_alpha: float | None
) -> PeftTensors:
    from jaxadapt.models.attachment import init
    from jaxadapt.models.foreign import tree as foreign
    from jaxadapt.persistence.formats import orbax_folder

    if orbax_folder.read_recipe(path) is not None:
        with folder.open_adapter(path) as tensors:
            return tensors
    leaves = orbax.leaf_specs(path)
    for item, specs in leaves.items():  # another library's LoRA
        names = {key: orbax.parameter_path(key) for key in specs}
        abstract = {dotted: jax.ShapeDtypeStruct(*specs[key]) for key, dotted in names.items()}
        tree = foreign.find_lora(foreign.LoraTree(abstract, config=config, lora_alpha=lora_alpha, on_shared="concat"))
        if tree is not None:
            arrays = orbax.load(path, item, {key: None for key, dotted in names.items() if dotted in tree.leaves})
            values = {names[key]: np.asarray(x) for key, x in arrays.items()}
            tensors, _ = foreign.read_tree(dataclasses.replace(tree, leaves=values), keymap)
            return dataclasses.replace(tensors, config=tensors.config.replace(inference_mode=True))
    if config is None:
        raise ConfigError(f"{os.fspath(path)}: the checkpoint has no configuration of an adapter; pass --config")
    own = {orbax.parameter_path(k): s for specs in leaves.values() for k, s in specs.items() if "opt_state" not in k}
    base = {p: jax.ShapeDtypeStruct(*s) for p, s in own.items() if f".{name}." not in f".{p}."}
    like = init(paths.unflatten(base), config, keymap=keymap)
    adapter = orbax_folder.read(path, orbax_folder.find_adapter(path, like, name))
    return save_adapter.to_peft(dataclasses.replace(adapter, config=config.replace(inference_mode=True)))


# ---------------------------------------------------------------- other programs


@dataclasses.dataclass(frozen=True)
class Exported:
    """An exported adapter.

    Attributes:
        path: the file or folder.
        program: the program it is for.
        version: the version with which the form was measured, or in whose source it was read.
        rank: the rank of all modules.
        tensors: the number of tensors.
        error: `{module: ‖ΔW − ΔW'‖ / ‖ΔW‖}` if the adapter was approximated at a rank; else empty.
    """

    path: str
    program: str
    version: str
    rank: int
    tensors: int
    error: dict[str, float] = dataclasses.field(default_factory=dict[str, float])

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return dataclasses.asdict(self)


def export_adapter(
    source: Any,
    path: Path,
    program: str = "plain",
    *,
    base: Path | None = None,
    first: Path | None = None,
    rank: int | None = None,
    dtype: str | None = None,
    progress: Progress = None,
) -> Exported:
    """Write an adapter to a file with which another program computes PEFT's results.

    "plain", "transformers", "vllm", "sglang", "tgi" and "tensorrt-llm" are PEFT's folder in its plain form: one rank,
    `lora_alpha` equal to it, the scales in B, no patterns and no variants. "gguf" is an adapter file for llama.cpp and
    Ollama; it needs `jaxadapt[gguf]` and `base`. "mlx" is mlx-lm's folder, for LoRA and DoRA.

    Few tensors are in memory at a time: the next two are read while one is written.

    Args:
        source: an adapter's folder or address, `PeftTensors`, or a model, variables or an `Adapter` as in `to_peft`.
        path: the folder to write, or the GGUF file.
        program: one of these names.
        base: the base model: its folder, its config.json or, for "gguf", a GGUF file. Needed for "gguf" and for experts
            in "mlx" and "vllm" (its configuration only), for `rank`, and to export PiSSA and OLoRA without `first` (its
            weights).
        first: the folder of the initial adapter, for one whose initialization changed the base (PiSSA, OLoRA, CorDA,
            LoRA-GA). The result is for the original base and has twice the rank.
        rank: approximate the change of the weights by the nearest LoRA of this rank, for methods that are no LoRA
            (DoRA, IA3, LoHa, …). `error` of the result states the loss.
        dtype: "float32", "float16" or "bfloat16". Default: the file's, but float32 for a B of 16 bits whose product
            with the scale would be rounded, and for "gguf", because llama.cpp rounds activations to the dtype of A.
        progress: None, True (a bar on a terminal or in a notebook) or a function of ("save" or "export", bytes done,
            total bytes).

    Raises:
        ConfigError, MismatchError: the program has no form for this adapter. The message says what helps: to merge the
            adapter, or to approximate it at a rank. Nothing is written.
        FileError, FormatError: a file cannot be read or written.

    >>> import tempfile, jax, jaxadapt
    >>> params = {"q": {"kernel": jax.numpy.ones((4, 6))}}
    >>> config = jaxadapt.LoraConfig(r=2, lora_alpha=8, target_modules=["q"], use_rslora=True)
    >>> adapter = jaxadapt.init(params, config, key=jax.random.key(0))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     export_adapter(adapter, folder, "vllm").rank
    ...     jaxadapt.read_config(folder).use_rslora
    2
    False
    """
    with atomic.clean_target(path), reporter(progress) as report:
        chosen = _find_program(program, path)
        conversion.refuse_same(path, *(place for place in (source, first) if isinstance(place, str | os.PathLike)))
        dtype = None if dtype is None else float_dtype(dtype).name
        if dtype not in (None, "float32", "float16", "bfloat16"):
            raise ConfigError(f"dtype: expected 'float32', 'float16' or 'bfloat16', found {dtype!r}")
        if chosen.style == "gguf" and base is None:
            raise ConfigError(
                "a GGUF adapter needs the configuration of its base model: pass base= (`--base`), the model's folder,"
                " its config.json or a .gguf file"
            )
        facts = gguf_files.read_base(base) if chosen.style == "gguf" and base is not None else None
        tied = facts.tied if facts else hf_model.read_tied(None if base is None else location.to_location(base))
        with _open(source, report) as tensors:
            tensors, stacks = expert_files.split(tensors, chosen.style, base)
            tensors, error = (tensors, {}) if rank is None else nearest_lora(tensors, rank, base)
            tensors = expert_files.to_form(tensors, chosen.name, base)
            plain = expert_files.stack_experts(_plain(tensors, chosen, base, first, dtype), stacks)
            plain = expert_files.name_shared(
                dataclasses.replace(plain, config=plain.config.replace(inference_mode=True)), chosen.name
            )
            _check_reader(expert_files.without_parameters(plain, chosen.name), chosen, tied)
            if facts is not None:
                count = gguf_files.write_adapter(plain, path, facts, dtype, report)
            else:
                count = formats.writer(chosen.style).write(
                    plain, location.to_location(path), formats.Wanted(chosen.style, tied=tied, ahead=True), report
                )
    return Exported(os.fspath(path), chosen.name, chosen.version, plain.config.get("r"), count, error)


def _find_program(name: str, path: Path) -> consumers.Program:
    if name not in consumers.PROGRAMS:
        raise ConfigError(
            f"program: expected one of {', '.join(consumers.PROGRAMS)}, found {name!r}"
            + {"tinker": ". Tinker's client (0.38.0) loads no files, only tinker:// paths of its own server"}.get(
                name, ""
            )
        )
    program = consumers.PROGRAMS[name]
    if (location.to_location(path).suffix == ".gguf") != (program.style == "gguf"):
        expected = "a file name ending in .gguf" if program.style == "gguf" else "a folder"
        raise FileError(f"{os.fspath(path)}: cannot write an adapter for {name} here: expected {expected}")
    return program


@contextlib.contextmanager
def _open(source: Any, report: Report) -> Generator[PeftTensors]:
    if isinstance(source, PeftTensors):
        yield source
    elif isinstance(source, str | os.PathLike):
        path: Path = source
        with formats.open_place(formats.look(path, report)) as opened:
            if opened.split is not None:
                raise ConfigError(
                    f"{os.fspath(path)}: an image adapter may change several models, and these programs read an adapter"
                    " of one. `jaxadapt convert` writes PEFT's folder for each; export one of them"
                )
            yield opened.tensors
    else:
        tensors = save_adapter.encode_tree(source, DEFAULT, None, in_memory=False)
        if save_adapter.is_spread(tensors):
            raise FileError("several processes cannot export an adapter; save it, and export the folder afterwards")
        yield tensors


def _plain(
    tensors: PeftTensors, program: consumers.Program, base: Path | None, first: Path | None, dtype: str | None
) -> PeftTensors:
    keeps = program.keeps
    if program.style == "safetensors" and program.reader and consumers.reads_copies(program.reader, tensors.config):
        keeps = (*keeps, "modules_to_save")
    start = None if first is None else folder.read(first)
    from_base = lora.changes_base(tensors.config) and tensors.config.get("kasa_config") is None
    if start is None and base is not None and from_base and location.is_dir(location.to_location(base)):
        start = initial_adapter(tensors, base)
    if start is not None and dtype in ("float16", "bfloat16"):
        warn(
            f"{tensors.source}: in {dtype} the result loses accuracy, because it is the small difference of two large"
            " products. Leave dtype= (`--dtype`) out, and reduce the rank before rounding (`jaxadapt resize`)"
        )
    return conversion.with_dtype(pairs.plain_lora(tensors, start, keep=keeps), dtype)


def _check_reader(plain: PeftTensors, program: consumers.Program, tied: bool | None) -> None:
    """Raise `ConfigError` if a program that reads PEFT's folders refuses or misreads the plain form."""
    readers = {reader.name: reader for reader in consumers.judge_readers(plain.config, plain.tensors, tied)}
    reader = readers.get(program.reader) if program.style == "safetensors" else None
    if reader is None or reader.verdict == consumers.RIGHT:
        return
    named = f"{reader.name} ({reader.version})"
    if reader.verdict != consumers.UNKNOWN:
        remedy = reader.remedy or "there is no other form"
        raise_listed(
            ConfigError, f"{plain.source}: {named} {consumers.WORDS[reader.verdict]}; {remedy}:", reader.reasons
        )
    warn(f"{plain.source}: no test has run {named} with {'; '.join(reader.reasons)}; compare its outputs with PEFT's")


# ---------------------------------------------------------------- nearest lora and original start


def nearest_lora(
    tensors: PeftTensors, rank: int, base: str | os.PathLike[str] | None
) -> tuple[PeftTensors, dict[str, float]]:
    """Return a plain LoRA of a rank, and `{module: ‖ΔW − ΔW'‖ / ‖ΔW‖}`.

    Args:
        tensors: the adapter, of any method.
        rank: the rank of the result. For a LoRA, its largest rank or more loses nothing.
        base: the base model's folder, which methods other than LoRA need.

    Raises:
        ConfigError: the change is not one of weights alone, or the base is missing.
        MismatchError: the base has other modules.
    """
    lora.require_original_base(tensors.config, tensors.source)
    if not lora.reasons_not_a_product(tensors.config):
        return combination.resize_rank(tensors, rank)
    if base is None:
        raise ConfigError(
            f"{tensors.source}: the change of the weights depends on the base here; pass the base model's folder"
            " (base=, `--base FOLDER`)"
        )
    keymap, params = _read_adapted_weights(tensors, base)
    reduced = combination.to_lora(load_adapter.from_peft(tensors, params, keymap=keymap), rank, params=params)
    encoded = dataclasses.replace(
        save_adapter.to_peft(reduced.adapter), source=tensors.source, fingerprint=tensors.fingerprint
    )
    return encoded, {name: float(e) for name, e in reduced.error.items()}


def initial_adapter(tensors: PeftTensors, base: str | os.PathLike[str]) -> PeftTensors:
    """Return the initial adapter of a configuration whose initialization reads only the base weights, as PEFT does.

    Args:
        tensors: the trained adapter.
        base: the folder of the original base model, whose adapted weights are read.

    Raises:
        ConfigError: the initialization cannot be repeated, because it depends on data, gradients or random numbers.
        MismatchError: the base has other modules.
    """
    config = tensors.config
    assert isinstance(config, lora.LoraConfig)
    kind = kinds.init_kind(config)
    if kind.from_run or config.init_lora_weights == "loftq":
        raise ConfigError(
            f"{tensors.source}: init_lora_weights={config.init_lora_weights!r} cannot be repeated from the base: it"
            f" depends on {kind.from_run or 'the rounding of the quantized base'}. Pass the initial adapter"
            " (first=, `--first FOLDER`)"
        )
    keymap, params = _read_adapted_weights(tensors, base)
    with jax.default_matmul_precision("highest"):
        first = start_adapter.start(params, config, keymap=keymap, dtype="float32").adapter
    return dataclasses.replace(save_adapter.to_peft(first), config=config, source=f"the start of {tensors.source}")


def _read_adapted_weights(tensors: PeftTensors, base: str | os.PathLike[str]) -> tuple[KeyMap, dict[str, Any]]:
    """Return the keymap of a base model's folder, and the parameters of the modules that an adapter adapts."""
    shapes = as_source(tensors.tensors).shapes
    own = [key.removeprefix(PEFT_PREFIX) for key in shapes if key.startswith(PEFT_PREFIX)]
    modules = {*pytorch.adapted_shapes(shapes), *(name.replace(".base_layer", "").rpartition(".")[0] for name in own)}
    with hf_model.open_model(location.to_location(base)) as source:
        hf_model.refuse_packed(source)
        keymap = load_adapter.base_keymap(tensors, source.shapes)
        names = {key: ".".join(match.parameter({})) for key in source if (match := keymap.match(key)) is not None}
        # A file of tensors of the whole adapter only (UNILORA) names no module.
        read = [key for key, name in names.items() if not modules or name.rpartition(".")[0] in modules]
        return keymap, paths.unflatten({key: np.asarray(source[key]) for key in read})
