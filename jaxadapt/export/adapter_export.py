"""Export an adapter to a file with which another program computes what PEFT computes.

    PEFT folder ──plain_lora──► one rank, scales in B ──► PEFT folder │ GGUF adapter │ mlx-lm's folder

An adapter of another method becomes the nearest plain LoRA, and a start that changed the base is undone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Generator
from typing import Any

import jax
import numpy as np

from jaxadapt.adapters.peft_tensors import PeftTensors
from jaxadapt.arrays.tensor_source import as_source, float_dtype
from jaxadapt.configs import lora
from jaxadapt.core import paths
from jaxadapt.core.errors import ConfigError, FileError, raise_listed, warn
from jaxadapt.core.progress import Progress, Report, reporter
from jaxadapt.export import conversion, untying
from jaxadapt.initializers.kinds import init_kind
from jaxadapt.initializers.start_adapter import start
from jaxadapt.keymaps import pytorch
from jaxadapt.keymaps.keymap import PEFT_PREFIX, KeyMap
from jaxadapt.merging import combination
from jaxadapt.merging.pairs import plain_lora
from jaxadapt.models.carriers import DEFAULT
from jaxadapt.persistence import consumers, folder, formats, load_adapter, save_adapter
from jaxadapt.persistence.consumers import PROGRAMS, Program
from jaxadapt.persistence.formats import Wanted
from jaxadapt.storage import atomic, hf_model, location

Path = str | os.PathLike[str]


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


@atomic.cleans("path")
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
        base: the base model: its folder, its config.json or, for "gguf", a GGUF file. Needed for "gguf" (its
            configuration only), for `rank`, and to export PiSSA and OLoRA without `first` (its weights).
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
    chosen = _find_program(program, path)
    for place in (source, first):
        if isinstance(place, str | os.PathLike):
            conversion.refuse_same(place, path)
    dtype = None if dtype is None else float_dtype(dtype).name
    if dtype not in (None, "float32", "float16", "bfloat16"):
        raise ConfigError(f"dtype: expected 'float32', 'float16' or 'bfloat16', found {dtype!r}")
    if chosen.style == "gguf" and base is None:
        raise ConfigError(
            "a GGUF adapter needs the configuration of its base model: pass base= (`--base`), the model's folder, its"
            " config.json or a .gguf file"
        )
    from jaxadapt.export import gguf_model  # for llama.cpp alone

    facts = gguf_model.read_base(base) if chosen.style == "gguf" and base is not None else None
    tied = facts.tied if facts else _read_tied(base)
    with reporter(progress) as report, _open(source, report) as tensors:
        tensors, error = (tensors, {}) if rank is None else nearest_lora(tensors, rank, base)
        plain = _plain(tensors, chosen, base, first, dtype)
        _check_reader(plain, chosen, tied)
        plain = dataclasses.replace(plain, config=plain.config.replace(inference_mode=True))
        if facts is not None:
            count = gguf_model.write_adapter(plain, path, facts, dtype, report)
        else:
            wanted = Wanted(chosen.style, tied=tied, ahead=True)
            count = formats.writer(chosen.style).write(plain, location.to_location(path), wanted, report)
    return Exported(os.fspath(path), chosen.name, chosen.version, plain.config.get("r"), count, error)


def _find_program(name: str, path: Path) -> Program:
    if name not in PROGRAMS:
        raise ConfigError(f"program: expected one of {', '.join(PROGRAMS)}, found {name!r}")
    program = PROGRAMS[name]
    suffix = location.to_location(path).suffix
    if (suffix == ".gguf") != (program.style == "gguf"):
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


def _read_tied(base: Path | None) -> bool | None:
    """Return True if the base ties its head to the embedding; None without a configuration that states it."""
    if base is None or (place := location.to_location(base)).suffix == ".gguf":
        return None
    return untying.read_tied(place if place.name == "config.json" else place / "config.json")


def _plain(
    tensors: PeftTensors, program: Program, base: Path | None, first: Path | None, dtype: str | None
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
    plain = plain_lora(tensors, start, keep=keeps)
    return conversion.with_dtype(plain, dtype)


def _check_reader(plain: PeftTensors, program: Program, tied: bool | None) -> None:
    """Raise `ConfigError` if a program that reads PEFT's folders refuses or misreads the plain form."""
    if program.style != "safetensors":
        return
    for reader in consumers.judge_readers(plain.config, plain.tensors, tied):
        if reader.name != program.reader or reader.verdict == consumers.RIGHT:
            continue
        if reader.verdict == consumers.UNKNOWN:
            warn(
                f"{plain.source}: no test has run {reader.name} ({reader.version}) with {'; '.join(reader.reasons)};"
                " compare its outputs with PEFT's"
            )
            continue
        words = consumers.WORDS[reader.verdict]
        raise_listed(
            ConfigError,
            f"{plain.source}: {reader.name} ({reader.version}) {words}; {reader.remedy or 'there is no other form'}:",
            reader.reasons,
        )


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
        return combination.resize_plain(tensors, rank)
    if base is None:
        raise ConfigError(
            f"{tensors.source}: the change of the weights depends on the base here; pass the base model's folder"
            " (base=, `--base FOLDER`)"
        )
    keymap, params = _read_adapted_weights(tensors, base)
    reduced = combination.to_lora(load_adapter.from_peft(tensors, params, keymap=keymap), rank, params=params)
    encoded = dataclasses.replace(
        load_adapter.to_peft(reduced.adapter), source=tensors.source, fingerprint=tensors.fingerprint
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
    kind = init_kind(config)
    if kind.from_run or config.init_lora_weights == "loftq":
        raise ConfigError(
            f"{tensors.source}: init_lora_weights={config.init_lora_weights!r} cannot be repeated from the base: it"
            f" depends on {kind.from_run or 'the rounding of the quantized base'}. Pass the initial adapter"
            " (first=, `--first FOLDER`)"
        )
    keymap, params = _read_adapted_weights(tensors, base)
    with jax.default_matmul_precision("highest"):
        first = start(params, config, keymap=keymap, dtype="float32").adapter
    return dataclasses.replace(load_adapter.to_peft(first), config=config, source=f"the start of {tensors.source}")


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
