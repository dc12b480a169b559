"""Export an adapter to a file with which another program computes what PEFT computes.

PEFT folder ──plain_form──► one rank, scales in B ──► PEFT folder │ GGUF adapter │ mlx-lm's folder
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Generator
from typing import Any

from jaxadapt.adapters.adapter import PeftTensors
from jaxadapt.configs import lora
from jaxadapt.core.errors import ConfigError, FileError, raise_listed, warn
from jaxadapt.core.progress import Progress, Report, reporter
from jaxadapt.export import conversion, gguf_model, nearest_lora, untying
from jaxadapt.export.programs import PROGRAMS, Program
from jaxadapt.merging.plain_form import plain_form
from jaxadapt.persistence import consumers, folder, formats, peft
from jaxadapt.persistence.formats import Wanted
from jaxadapt.storage import atomic, location
from jaxadapt.storage.strided import float_dtype

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
    >>> adapter = jaxadapt.init(config, params, key=jax.random.key(0))
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
    facts = gguf_model.read_base(base) if chosen.style == "gguf" and base is not None else None
    tied = facts.tied if facts else _read_tied(base)
    with reporter(progress) as report, _open(source, report) as tensors:
        error: dict[str, float] = {}
        if rank is not None:
            tensors, error = nearest_lora.nearest_lora(tensors, rank, base)
        plain = _plain(tensors, chosen, base, first, dtype)
        _check_reader(plain, chosen, tied)
        config: Any = plain.config.replace(inference_mode=True)
        plain = dataclasses.replace(plain, config=config)
        if facts is not None:
            count = gguf_model.write_adapter(plain, path, facts, dtype, report)
        else:
            wanted = Wanted(chosen.style, tied=tied, ahead=True)
            count = formats.writer(chosen.style).write(plain, location.to_location(path), wanted, report)
    return Exported(os.fspath(path), chosen.name, chosen.version, config.r, count, error)


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
        yield peft.to_peft(source)


def _read_tied(base: Path | None) -> bool | None:
    """Return True if the base ties its head to the embedding; None without a configuration that states it."""
    if base is None:
        return None
    place = location.to_location(base)
    if place.suffix == ".gguf":
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
        start = nearest_lora.initial_adapter(tensors, base)
    if start is not None and dtype in ("float16", "bfloat16"):
        warn(
            f"{tensors.source}: in {dtype} the result loses accuracy, because it is the small difference of two large"
            " products. Leave dtype= (`--dtype`) out, and reduce the rank before rounding (`jaxadapt resize`)"
        )
    plain = plain_form(tensors, start, keep=keeps)
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
