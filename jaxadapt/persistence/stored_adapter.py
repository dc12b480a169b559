"""A tolerant reader of adapter files: it opens also what `read` refuses, and keeps the reason as a finding.

Recognition of files that are no PEFT adapter: other libraries' adapters, whole models, checkpoints of a run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import re
from collections.abc import Collection, Generator, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from jaxadapt.adapters import key_names
from jaxadapt.adapters.peft_tensors import PeftTensors
from jaxadapt.configs.base import Config, mlx_keys
from jaxadapt.core.errors import AdapterError, ConfigError, FileError
from jaxadapt.core.progress import Report, no_report
from jaxadapt.persistence import fingerprint, folder, reconcile, run_folder
from jaxadapt.persistence.formats import image_files, image_names, mlx_files
from jaxadapt.persistence.formats.image_names import Layout
from jaxadapt.storage import hf_model, hub, location, orbax, safetensors, torch_bin
from jaxadapt.storage.local_files import file_error
from jaxadapt.storage.location import Location
from jaxadapt.storage.source import TensorSource, TensorSpec, as_source

if TYPE_CHECKING:
    pass


SEVERITIES = ("error", "warning", "note")
"""From bad to harmless: readers refuse or misread the file; the file is suspicious; a fact about a sound file."""


class Fix(NamedTuple):
    """The one possible remedy of a finding.

    Attributes:
        done: a sentence for each change.
        names: {key of the file: PEFT's name}, of the keys that change; None for a tensor to leave out.
        config: the configuration to write; None if the finding is not about it.
    """

    done: tuple[str, ...]
    names: Mapping[str, str | None]
    config: Config | None = None


@dataclasses.dataclass(frozen=True)
class Finding:
    """One finding of `verify`. All problems of one kind are one finding.

    Attributes:
        severity: "error" if readers refuse the adapter, lose a part of it or compute something else; "warning" if the
            adapter loads but something is suspicious; "note" for a fact about a sound adapter.
        code: the kind of the finding, one word for programs, such as "missing" or "not-finite".
        subjects: the tensors, modules, fields or files concerned, in the file's order.
        found: a sentence about the file.
        expected: what a sound file has; "" for a note.
        remedy: what to do; "" if there is nothing to do.
        fix: the change that `repair` makes, if only one original is possible.
    """

    severity: str
    code: str
    subjects: tuple[str, ...]
    found: str
    expected: str = ""
    remedy: str = ""
    fix: Fix | None = dataclasses.field(default=None, repr=False, compare=False)

    @property
    def repairable(self) -> bool:
        """True if `repair` corrects it."""
        return self.fix is not None

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        names = ("severity", "code", "subjects", "found", "expected", "remedy", "repairable")
        return {name: getattr(self, name) for name in names} | {"subjects": list(self.subjects)}


def count(items: int | Collection[object], noun: str) -> str:
    """Return a number with its noun.

    >>> count(1, "module"), count(["a", "b"], "module")
    ('1 module', '2 modules')
    """
    number = items if isinstance(items, int) else len(items)
    return f"{number} {noun}{'' if number == 1 else 's'}"


def error(
    code: str, subjects: Iterable[str], found: str, expected: str, remedy: str, fix: Fix | None = None
) -> Finding:
    """Return a finding of severity "error"."""
    return Finding("error", code, tuple(subjects), found, expected, remedy, fix)


def warning(
    code: str, subjects: Iterable[str], found: str, expected: str, remedy: str, fix: Fix | None = None
) -> Finding:
    """Return a finding of severity "warning"."""
    return Finding("warning", code, tuple(subjects), found, expected, remedy, fix)


def note(code: str, subjects: Iterable[str], found: str, remedy: str = "") -> Finding:
    """Return a finding of severity "note"."""
    return Finding("note", code, tuple(subjects), found, "", remedy)


# ---------------------------------------------------------------- foreign files


_EXPECTED = "adapter_config.json and adapter_model.safetensors of PEFT"
_MODEL_FILES = (hf_model.SINGLE_FILE, hf_model.INDEX, hf_model.BIN, hf_model.BIN_INDEX)

# {library: (pattern of its keys, remedy)}. The first one with a matching key applies.
_MLX = (
    "name the weights adapters.safetensors, with mlx-lm's own adapter_config.json beside them; jaxadapt convert FOLDER"
    " OUT then writes PEFT's folder"
)
_IMAGE = (
    "give the file a name of its own, without a configuration beside it: diffusers (pipe.load_lora_weights) and"
    " jaxadapt then read it, and jaxadapt convert writes PEFT's folders"
)
_FUSE = "correct what the message names; otherwise fuse the adapter into its base with mlx_lm.fuse"
_LIBRARIES: Mapping[str, tuple[re.Pattern[str], str]] = {
    "mlx-lm": (
        re.compile(r".+\.(lora_[ab]|switch_mlp\..+\.lora_[ab])"),
        _MLX,
    ),
    "kohya-ss": (
        re.compile(
            r"(lora_(unet|te\d?|transformer|prior)_|lycoris_).+\.(lora_(down|up|mid)\.weight|alpha|hada_.*|lokr_.*)"
        ),
        _IMAGE,
    ),
    "diffusers": (
        re.compile(
            r"(unet|text_encoder(_2)?|transformer|prior|denoiser)\..+\.(lora_[AB](\.[^.]+)?\.weight"
            r"|lora(_linear_layer)?\.(down|up)\.weight)|.+\.processor\..+_lora\.(down|up)\.weight"
        ),
        _IMAGE,
    ),
    "an image trainer": (
        re.compile(r".+\.lora_(down|up)(\.weight)?"),
        "rename lora_down to lora_A and lora_up to lora_B with the program that wrote it, and add the configuration",
    ),
}  # fmt: skip


def foreign_library(keys: Collection[str], has_config: bool) -> Finding | None:
    """Return a finding if most keys are those of another library's adapter format.

    With a configuration of PEFT, names such as "transformer.h.0.q.lora_A.weight" are PEFT's without their prefix, and
    not diffusers'.
    """
    for library, (pattern, remedy) in _LIBRARIES.items():
        if library == "diffusers" and has_config:
            continue
        matching = [key for key in keys if pattern.fullmatch(key)]
        if 2 * len(matching) > len(keys):
            return error(
                "other-library", matching, f"the tensors are named as {library} names them, such as {matching[0]}",
                "PEFT's names, such as base_model.model.<module>.lora_A.weight", remedy,
            )  # fmt: skip
    return None


def image_file(layout: Layout) -> Finding:
    """Return the finding for the one file of an image adapter, which is sound."""
    models = ", ".join(layout.models)
    if layout.method == image_names.LYCORIS:
        types = image_names.lycoris_types(layout.keys)
        text = f"a file of {layout.style} whose method PEFT does not have ({types}); it passes through as it is"
    elif layout.unknown:
        text = f"a file of {layout.style} with modules of an unknown model, whose names stay flattened"
    else:
        text = f"a file of {layout.style} for {models}"
    return note("image-file", layout.unknown, text)


def mlx_folder(source: str, problem: AdapterError | None) -> Finding:
    """Return the finding for mlx-lm's folder: how to convert it, or why it cannot be."""
    if problem is not None:
        return error("other-library", (), str(problem), "an adapter of mlx-lm that PEFT has a form for", _FUSE)
    return error(
        "other-library", (), "the folder is mlx-lm's, which PEFT and vLLM do not read; jaxadapt does", _EXPECTED,
        f"run: jaxadapt convert {source} OUT",
    )  # fmt: skip


def not_an_adapter(keys: Collection[str], source: str) -> Finding | None:
    """Return a finding if no tensor belongs to an adapter."""
    if not keys or key_names.has_adapter_tensors(keys):
        return None
    text = f"none of the {len(keys)} tensors belongs to an adapter of PEFT, such as {next(iter(keys))}"
    if not any(key.endswith(".weight") for key in keys):
        return error("no-adapter", (), text, "an adapter's tensors", "check the path")
    return error(
        "whole-model", (), f"{text}: these seem to be the weights of a whole model", "an adapter's tensors",
        f"if {source} is a complete model, load it as one",
    )  # fmt: skip


def foreign_config(values: Mapping[str, Any]) -> Finding | None:
    """Return a finding if a JSON object is another library's configuration."""
    if "peft_type" in values:
        return None
    if mlx := mlx_keys(values):
        return error(
            "other-library", mlx, f"adapter_config.json is mlx-lm's (no peft_type, but {', '.join(mlx)})",
            "a configuration with peft_type", _MLX,
        )  # fmt: skip
    if "architectures" in values or "model_type" in values:
        return error(
            "whole-model", (), "the configuration is that of a whole model (architectures, model_type)",
            "a configuration with peft_type", "pass the adapter's folder",
        )  # fmt: skip
    return None


def training_step(folder: Location, name: str) -> Finding:
    """Return the finding for a checkpoint of a run."""
    return error(
        "training-run", (name,), f"{name} is a training checkpoint of jaxadapt, in the model's own layout", _EXPECTED,
        f"run: jaxadapt checkpoints {folder} --step {name.removeprefix('step-').partition('.')[0].lstrip('0') or '0'}"
        " --export OUT",
    )  # fmt: skip


def by_name(names: Sequence[str]) -> Finding | None:
    """Return a finding for the file names of other libraries."""
    if "adapters.safetensors" in names or "adapters.npz" in names:
        return error(
            "other-library", names, "the weights are mlx-lm's (adapters.safetensors)", _EXPECTED,
            _MLX,
        )  # fmt: skip
    if any(name.startswith("pytorch_lora_weights.") for name in names):
        return error(
            "other-library", names, "the weights are diffusers' (pytorch_lora_weights)", _EXPECTED,
            _LIBRARIES["diffusers"][1],
        )  # fmt: skip
    return None


def other_folder(source: str, names: Sequence[str], adapters: Sequence[str]) -> Finding:
    """Return the finding for a folder without a PEFT adapter: what it holds instead, and where the adapter may be."""
    steps = [name for name in names if run_folder.NAME.fullmatch(name)]
    if steps:
        return error(
            "training-run", steps, f"a training run: {count(steps, 'checkpoint')}, no exported adapter",
            _EXPECTED, f"run: jaxadapt checkpoints {source} --step latest --export OUT",
        )  # fmt: skip
    if adapters:
        return error(
            "subfolders", adapters, f"no adapter here, but in these subfolders: {', '.join(adapters)}", _EXPECTED,
            "pass one of them",
        )  # fmt: skip
    found = by_name(names)
    if found is not None:
        return found
    model = [name for name in names if name in _MODEL_FILES]
    if model:
        return error(
            "whole-model", model, f"the folder of a whole model ({', '.join(model)})", _EXPECTED,
            "pass the adapter's folder, and this one as --base",
        )  # fmt: skip
    listed = ", ".join(names[:8]) + (", …" if len(names) > 8 else "")
    return error("no-adapter", (), f"no adapter: found {listed or 'an empty folder'}", _EXPECTED, "check the path")


# ---------------------------------------------------------------- stored adapter


_NO_TENSORS = as_source({})
Specs = Mapping[str, tuple[str, tuple[int, ...]]]
"""{key: (dtype, shape)}, with safetensors' names of dtypes."""


@dataclasses.dataclass(frozen=True)
class StoredAdapter:
    """The content of adapter files, as far as they can be read.

    Attributes:
        source: the path, for messages.
        text: the text of adapter_config.json; None if there is none.
        header: jaxadapt's copy of the configuration in the header of the weights; None if there is none.
        specs: dtypes and shapes by key; None if the weights cannot be read.
        tensors: the tensors, read on demand; empty if the weights cannot be read.
        findings: the facts about the files themselves.
        is_adapter: False if the path holds something else, which the findings name.
        base: the fingerprint of the base in the header; None without one.
    """

    source: str
    text: str | None
    header: Config | None
    specs: Specs | None
    tensors: TensorSource = dataclasses.field(default_factory=lambda: _NO_TENSORS)
    findings: tuple[Finding, ...] = ()
    is_adapter: bool = True
    base: fingerprint.Fingerprint | None = None


@contextlib.contextmanager
def open_stored(path: str | os.PathLike[str], report: Report = no_report) -> Generator[StoredAdapter]:
    """Open an adapter's folder or file without the demands of `read`. Tensors are read on demand, one at a time.

    Raises `FileError` if nothing at the path can be read at all.
    """
    is_remote = isinstance(path, str) and hub.is_address(path)
    place = hub.fetch_folder(str(path), report=report) if is_remote else location.to_location(path)
    source = os.fspath(path)
    if not is_remote and orbax.is_checkpoint(place):
        with folder.open_adapter(source) as adapter:
            yield _under_pefts_names(adapter, source)
    elif location.is_file(place):
        with _open_file(place, source) as stored:
            yield stored
    else:
        with _open_folder(place, source) as stored:
            yield stored


@contextlib.contextmanager
def _open_file(place: Location, source: str) -> Generator[StoredAdapter]:
    """Open one file: a configuration, or weights with the configuration beside them."""
    if place.suffix == ".json":
        yield StoredAdapter(source, reconcile.read_text(place), None, None)
        return
    if run_folder.NAME.fullmatch(place.name):
        yield _not_an_adapter(source, training_step(place.parent, place.name))
        return
    if mlx_files.is_file(place):
        with _open_mlx(place.parent / folder.CONFIG, place, source) as stored:
            yield stored
        return
    if place.name != folder.WEIGHTS and image_files.is_image_file(place):
        with _open_image_file(place, source) as stored:
            yield stored
        return
    beside = place.parent / folder.CONFIG
    config = beside if place.name in (folder.WEIGHTS, folder.WEIGHTS_BIN) and location.exists(beside) else None
    with _open_weights(source, config, place, ()) as stored:
        yield stored


@contextlib.contextmanager
def _open_image_file(place: Location, source: str) -> Generator[StoredAdapter]:
    """Open the one file of an image adapter under PEFT's names."""
    with image_files.open_file(place) as file:
        yield _under_pefts_names(file.tensors, source, image_file(file.layout))


def _under_pefts_names(adapter: PeftTensors, source: str, *found: Finding) -> StoredAdapter:
    from jaxadapt.storage.strided import dtype_name

    tensors = as_source(adapter.tensors)
    specs = {key: (dtype_name(spec.dtype), tuple(spec.shape)) for key, spec in tensors.specs.items()}
    text = adapter.config.to_json()
    return StoredAdapter(source, text, None, specs, tensors, found)


@contextlib.contextmanager
def _open_mlx(config: Location, weights: Location, source: str) -> Generator[StoredAdapter]:
    """Open mlx-lm's files under PEFT's names; a file that PEFT has no form for is a finding."""
    with contextlib.ExitStack() as stack:
        try:
            adapter = stack.enter_context(mlx_files.open_files(config, weights, source))
        except AdapterError as problem:
            yield _not_an_adapter(source, mlx_folder(source, problem))
            return
        yield _under_pefts_names(adapter, source, mlx_folder(source, None))


@contextlib.contextmanager
def _open_folder(place: Location, source: str) -> Generator[StoredAdapter]:
    try:
        names = sorted(entry.name for entry in place.iterdir())
    except FileNotFoundError:
        raise FileError(f"{source}: no such file or folder; pass the folder of an adapter") from None
    except (OSError, ValueError) as problem:
        raise file_error("read", source, problem) from problem
    weights = next((name for name in (folder.WEIGHTS, folder.WEIGHTS_BIN) if name in names), None)
    if weights is None and folder.CONFIG not in names:
        inner = [name for name in names[:64] if location.exists(place / name / folder.CONFIG)]
        yield _not_an_adapter(source, other_folder(source, names, inner))
        return
    config = place / folder.CONFIG if folder.CONFIG in names else None
    if weights is None and config is not None and mlx_files.WEIGHTS in names:
        with _open_mlx(config, place / mlx_files.WEIGHTS, source) as stored:
            yield stored
        return
    findings: list[Finding] = []
    if folder.WEIGHTS in names and folder.WEIGHTS_BIN in names:
        findings.append(
            warning(
                "two-files",
                (folder.WEIGHTS, folder.WEIGHTS_BIN),
                "the folder holds two files of weights",
                f"one; readers take {folder.WEIGHTS}",
                f"delete {folder.WEIGHTS_BIN} if it is older",
            )
        )
    if weights is None:
        others = [n for n in names if n.endswith((".safetensors", ".bin", ".pt", ".npz"))]
        found = by_name(others) or error(
            "no-weights", (), f"no {folder.WEIGHTS} and no {folder.WEIGHTS_BIN}; found {', '.join(names[:8])}",
            "a file of weights beside the configuration", "fetch or copy the weights as well",
        )  # fmt: skip
        text = None if config is None else _read_text(config, findings)
        yield StoredAdapter(source, text, None, None, findings=(*findings, found))
        return
    with _open_weights(source, config, place / weights, findings) as stored:
        yield stored


def _not_an_adapter(source: str, found: Finding) -> StoredAdapter:
    return StoredAdapter(source, None, None, None, findings=(found,), is_adapter=False)


def _read_text(config: Location, findings: list[Finding]) -> str | None:
    try:
        return reconcile.read_text(config)
    except (ConfigError, FileError) as problem:
        findings.append(
            error("configuration", (folder.CONFIG,), str(problem), "a JSON object in UTF-8", "save it as UTF-8")
        )
        return None


@contextlib.contextmanager
def _open_weights(
    source: str, config: Location | None, weights: Location, before: list[Finding] | tuple[Finding, ...]
) -> Generator[StoredAdapter]:
    findings = list(before)
    text = None if config is None else _read_text(config, findings)
    with contextlib.ExitStack() as stack:
        header: Config | None = None
        specs: Specs | None = None
        base: fingerprint.Fingerprint | None = None
        tensors = _NO_TENSORS
        try:
            if weights.suffix == ".safetensors":
                file = stack.enter_context(safetensors.open_tensors(weights))
                specs = {key: (info.dtype, info.shape) for key, info in file.header.tensors.items()}
                tensors = file
                header = _header_config(file.header, weights, findings)
                base = reconcile.stored_fingerprint(file.header)
            else:
                specs = torch_bin.keys_and_shapes(weights)
                tensors = _LazyBin(weights)
        except FileError as problem:
            findings.append(
                error(
                    "unreadable", (weights.name,), str(problem), "a complete file of tensors", "fetch or save it again"
                )
            )
        if specs is not None and not specs:
            findings.append(
                error("no-tensors", (weights.name,), "the file of weights is empty", "an adapter's tensors",
                              "save the adapter again")
            )  # fmt: skip
        yield StoredAdapter(source, text, header, specs, tensors, tuple(findings), base=base)


class _LazyBin(TensorSource):
    """The tensors of a `.bin` file, all read on the first access: its storages are not addressable one by one."""

    def __init__(self, path: Location) -> None:
        self._path = path

    @functools.cached_property
    def _tensors(self) -> TensorSource:
        return as_source(torch_bin.read(self._path))

    @functools.cached_property
    def specs(self) -> Mapping[str, TensorSpec]:
        return self._tensors.specs

    def read(self, key: str) -> Any:
        return self._tensors[key]


def _header_config(header: safetensors.Header, weights: Location, findings: list[Finding]) -> Config | None:
    """Return jaxadapt's copy of the configuration, if the header has one that can be read."""
    raw = header.metadata.get(reconcile.META)
    if raw is None:
        return None
    try:
        return reconcile.parse_copy(raw, weights)[0]
    except AdapterError as problem:
        findings.append(
            warning("header", (weights.name,), str(problem), "a copy of the configuration", "save it again")
        )
        return None


def parse_json(text: str) -> dict[str, Any] | None:
    """Return the JSON object of a text; None if it is no object or has a key twice."""
    try:
        values: object = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError):
        return None
    return cast("dict[str, Any]", values) if isinstance(values, dict) else None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a key twice")
    return values
