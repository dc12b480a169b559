"""A tolerant reader of adapter files: it opens also what `read` refuses, and keeps the reason as a finding.

Recognition of files that are no PEFT adapter: other libraries' adapters, whole models, checkpoints of a run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
from collections.abc import Collection, Generator, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from jaxadapt.adapters import key_names
from jaxadapt.configs.base import Config, mlx_keys
from jaxadapt.core.errors import AdapterError, ConfigError, FileError
from jaxadapt.core.progress import Report, no_report
from jaxadapt.persistence import fingerprint, formats, reconcile, run_folder
from jaxadapt.persistence.formats import Format, Place, peft_folder
from jaxadapt.storage import hf_model, hub, location, safetensors, torch_bin
from jaxadapt.storage.location import Location
from jaxadapt.storage.source import TensorSource, as_source, dtypes_and_shapes

if TYPE_CHECKING:
    pass

CONFIG = hub.CONFIG
WEIGHTS, WEIGHTS_BIN = hub.WEIGHTS

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


EXPECTED = "adapter_config.json and adapter_model.safetensors of PEFT"
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
        "training-run", (name,), f"{name} is a training checkpoint of jaxadapt, in the model's own layout", EXPECTED,
        f"run: jaxadapt checkpoints {folder} --step {name.removeprefix('step-').partition('.')[0].lstrip('0') or '0'}"
        " --export OUT",
    )  # fmt: skip


def by_name(names: Sequence[str]) -> Finding | None:
    """Return a finding for the file names of other libraries."""
    if "adapters.safetensors" in names or "adapters.npz" in names:
        return error(
            "other-library", names, "the weights are mlx-lm's (adapters.safetensors)", EXPECTED,
            _MLX,
        )  # fmt: skip
    if any(name.startswith("pytorch_lora_weights.") for name in names):
        return error(
            "other-library", names, "the weights are diffusers' (pytorch_lora_weights)", EXPECTED,
            _LIBRARIES["diffusers"][1],
        )  # fmt: skip
    return None


def other_folder(source: str, names: Sequence[str], adapters: Sequence[str]) -> Finding:
    """Return the finding for a folder without a PEFT adapter: what it holds instead, and where the adapter may be."""
    steps = [name for name in names if run_folder.NAME.fullmatch(name)]
    if steps:
        return error(
            "training-run", steps, f"a training run: {count(steps, 'checkpoint')}, no exported adapter",
            EXPECTED, f"run: jaxadapt checkpoints {source} --step latest --export OUT",
        )  # fmt: skip
    if adapters:
        return error(
            "subfolders", adapters, f"no adapter here, but in these subfolders: {', '.join(adapters)}", EXPECTED,
            "pass one of them",
        )  # fmt: skip
    found = by_name(names)
    if found is not None:
        return found
    model = [name for name in names if name in _MODEL_FILES]
    if model:
        return error(
            "whole-model", model, f"the folder of a whole model ({', '.join(model)})", EXPECTED,
            "pass the adapter's folder, and this one as --base",
        )  # fmt: skip
    listed = ", ".join(names[:8]) + (", …" if len(names) > 8 else "")
    return error("no-adapter", (), f"no adapter: found {listed or 'an empty folder'}", EXPECTED, "check the path")


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
    place = formats.look(path, report)
    with contextlib.ExitStack() as stack:
        yield _open(place, stack)


def _open(place: Place, stack: contextlib.ExitStack) -> StoredAdapter:
    source, at = os.fspath(place.path), place.at
    if place.names is None and at.suffix == ".json":
        return StoredAdapter(source, reconcile.read_text(at), None, None)
    if place.names is None and run_folder.NAME.fullmatch(at.name):
        return _not_an_adapter(source, training_step(at.parent, at.name))
    found = None if place.names is None and at.name == WEIGHTS else formats.find(place)
    if found is not None and found is not peft_folder.FORMAT:
        return _open_other(found, place, stack)
    if place.names is not None:
        return _open_folder(place, place.names, stack)
    beside = at.parent / CONFIG
    config = beside if at.name in hub.WEIGHTS and location.exists(beside) else None
    return _open_weights(source, config, at, [], stack)


def _open_other(found: Format, place: Place, stack: contextlib.ExitStack) -> StoredAdapter:
    """Open files of another format than PEFT's, under PEFT's names; the format may make a finding of a refusal."""
    source = os.fspath(place.path)
    try:
        opened = stack.enter_context(found.open(place))
    except AdapterError as problem:
        if found.describe is None:
            raise
        return _not_an_adapter(source, found.describe(source, problem))
    tensors = as_source(opened.tensors.tensors)
    findings = () if found.describe is None else (found.describe(source, opened),)
    return StoredAdapter(source, opened.tensors.config.to_json(), None, dtypes_and_shapes(tensors), tensors, findings)


def _open_folder(place: Place, present: Collection[str], stack: contextlib.ExitStack) -> StoredAdapter:
    source, names = os.fspath(place.path), sorted(present)
    weights = next((name for name in hub.WEIGHTS if name in names), None)
    config = place.at / CONFIG if CONFIG in names else None
    if weights is None and config is None:
        inner = [name for name in names[:64] if location.exists(place.at / name / CONFIG)]
        return _not_an_adapter(source, other_folder(source, names, inner))
    findings: list[Finding] = []
    if weights is None:
        others = [n for n in names if n.endswith((".safetensors", ".bin", ".pt", ".npz"))]
        found = by_name(others) or error(
            "no-weights", (), f"no {WEIGHTS} and no {WEIGHTS_BIN}; found {', '.join(names[:8])}",
            "a file of weights beside the configuration", "fetch or copy the weights as well",
        )  # fmt: skip
        text = None if config is None else _read_text(config, findings)
        return StoredAdapter(source, text, None, None, findings=(*findings, found))
    if WEIGHTS_BIN in names and weights == WEIGHTS:
        findings.append(
            warning(
                "two-files", hub.WEIGHTS, "the folder holds two files of weights", f"one; readers take {WEIGHTS}",
                f"delete {WEIGHTS_BIN} if it is older",
            )
        )  # fmt: skip
    return _open_weights(source, config, place.at / weights, findings, stack)


def _not_an_adapter(source: str, found: Finding) -> StoredAdapter:
    return StoredAdapter(source, None, None, None, findings=(found,), is_adapter=False)


def _read_text(config: Location, findings: list[Finding]) -> str | None:
    try:
        return reconcile.read_text(config)
    except (ConfigError, FileError) as problem:
        findings.append(error("configuration", (CONFIG,), str(problem), "a JSON object in UTF-8", "save it as UTF-8"))
        return None


def _open_weights(
    source: str, config: Location | None, weights: Location, findings: list[Finding], stack: contextlib.ExitStack
) -> StoredAdapter:
    text = None if config is None else _read_text(config, findings)
    header: Config | None = None
    specs: Specs | None = None
    base: fingerprint.Fingerprint | None = None
    tensors = _NO_TENSORS
    try:
        if weights.suffix == ".safetensors":
            tensors = file = stack.enter_context(safetensors.open_tensors(weights))
            header = _header_config(file.header, weights, findings)
            base = reconcile.stored_fingerprint(file.header)
        else:
            tensors = torch_bin.open_tensors(weights)
        specs = dtypes_and_shapes(tensors)
    except FileError as problem:
        findings.append(
            error("unreadable", (weights.name,), str(problem), "a complete file of tensors", "fetch or save it again")
        )
    if specs is not None and not specs:
        findings.append(
            error("no-tensors", (weights.name,), "the file of weights is empty", "an adapter's tensors",
                          "save the adapter again")
        )  # fmt: skip
    return StoredAdapter(source, text, header, specs, tensors, tuple(findings), base=base)


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
