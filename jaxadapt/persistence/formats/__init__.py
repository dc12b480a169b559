"""The file formats of adapters: one file each, and one row of `persistence.FORMATS`.

A format recognizes the content of a path, opens it as `PeftTensors`, and writes `PeftTensors`. `look` turns a path into
a `Place` once; the formats decide by the names in it, and other files ask the formats. Each problem of the files is
a `Finding`: `read` raises its error, and `verify` returns it. The findings about files that hold no adapter of PEFT
(adapters of other libraries, whole models, checkpoints of a run) stand here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from jaxadapt.adapters import peft_tensors
from jaxadapt.arrays.tensor_source import Kinds
from jaxadapt.configs.base import Config
from jaxadapt.configs.validation import mlx_keys
from jaxadapt.core import paths
from jaxadapt.core.errors import AdapterError, ConfigError, FileError, Report, no_report
from jaxadapt.persistence import FORMATS, run_folder
from jaxadapt.storage import hf_model, location
from jaxadapt.storage.local_files import file_error

if TYPE_CHECKING:
    from jaxadapt.adapters.adapter import Adapter, Site
    from jaxadapt.models.planning import BaseParams
    from jaxadapt.persistence.rules import Options

    ReadAdapter = Callable[
        ["Place", BaseParams, Adapter | None, str, Options, Report], tuple[Adapter, Sequence[Site], bool | None]
    ]

OPAQUE = "LYCORIS"
"""The type of tensors that PEFT has no method for: they pass through under the names of their own program."""
ModuleKeys = dict[str, dict[str, str]]
_FOLDER = f"a folder that contains {location.CONFIG} and {location.WEIGHTS[0]}"


class Place(NamedTuple):
    """A path and its content.

    Attributes:
        path: the path as given, for messages.
        at: its location; for an address of the Hub, the folder in the cache.
        names: the names in the folder; None for a file.
    """

    path: str | os.PathLike[str]
    at: location.Location
    names: frozenset[str] | None


@dataclasses.dataclass(frozen=True)
class Opened:
    """An open adapter.

    Attributes:
        tensors: its content under PEFT's names, read on demand.
        weights: the file of its tensors, or the folder of them.
        form: the words for its format.
        style: the style of a single file, which a new file keeps; "" for a folder.
        names: the names in a single file, which a new file of this style keeps.
        metadata: the strings in the header of a single file.
        split: returns one adapter for each model, if a file may change several.
    """

    tensors: peft_tensors.PeftTensors
    weights: location.Location
    form: str = "PEFT"
    style: str = ""
    names: Any = None
    metadata: dict[str, str] = dataclasses.field(default_factory=dict[str, str])
    split: Callable[[peft_tensors.PeftTensors], dict[str, peft_tensors.PeftTensors]] | None = None


@dataclasses.dataclass(frozen=True)
class Wanted:
    """The choices for a file to write.

    Attributes:
        style: one of the styles in the format's row.
        origin: the open adapter from which the tensors come, whose names may be kept.
        tied: True if the base ties its head to the token embedding; None if that is unknown.
        ahead: True for tensors that a thread may read and compute while others are written.
    """

    style: str
    origin: Opened | None = None
    tied: bool | None = None
    ahead: bool = False


@dataclasses.dataclass(frozen=True)
class Format:
    """A file format.

    Attributes:
        recognizes: tells if a place holds this format, by its names or by a header.
        open: opens a place.
        write: writes tensors to a location and returns their number.
        read_config: reads only the configuration; None to open the place for it.
        join: makes one adapter of one for each model, for a file that may change several.
        write_adapter: writes an adapter in its model's layout, for a format that keeps it; every process calls it.
        read_adapter: reads an adapter into the layout of a base, for a format that keeps a model's layout. Takes the
            adapter attached under the name, if there is one, which may identify the leaves to read; returns the
            adapter, its sites and its `change_base`, as in `PeftTensors`.
        describe: returns the finding of `verify` about an open file, or about one that `open` refused.
    """

    recognizes: Callable[[Place], bool]
    open: Callable[[Place], contextlib.AbstractContextManager[Opened]]
    write: Callable[[peft_tensors.PeftTensors, location.Location, Wanted, Report], int]
    read_config: Callable[[Place], Config] | None = None
    write_adapter: Callable[[Adapter, location.Location, Report], None] | None = None
    read_adapter: ReadAdapter | None = None
    describe: Callable[[str, Opened | AdapterError], Finding] | None = None
    join: Callable[[Mapping[str, peft_tensors.PeftTensors], str], peft_tensors.PeftTensors] | None = None


def look(path: str | os.PathLike[str] | Place, report: Report = no_report, name: str | None = None) -> Place:
    """Return the content of a path; fetch an adapter on the Hub first, of the subfolder `name` if it holds one.

    Raises `FileError` if nothing can be read.
    """
    if isinstance(path, Place):
        return path
    if location.is_hub_address(path):
        from jaxadapt.storage import hub  # imports the client of the Hub

        at: location.Location = hub.fetch_folder(str(path), name, report)
    else:
        at = location.to_location(path)
    try:
        return Place(path, at, frozenset(entry.name for entry in at.iterdir()))
    except NotADirectoryError:
        return Place(path, at, None)
    except FileNotFoundError as error:
        why = error.strerror if isinstance(at, location.Address) else "no such folder"
        hint = f"; for the Hub's repository give {location.HUB}{path}"
        raise FileError(
            f"{at}: {why}; expected {_FOLDER}{hint if location.could_be_repository(str(path)) else ''}"
        ) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise file_error("read", str(at), error) from error


def module_keys(file: Iterable[str], pattern: re.Pattern[str], expected: str) -> tuple[ModuleKeys, list[str]]:
    """Return `{module: {tensor: key}}` of keys, and a problem for each key that the pattern does not match.

    Args:
        file: the keys.
        pattern: its two groups are the module and the tensor.
        expected: the words for such a key.
    """
    matches = {key: pattern.fullmatch(key) for key in file}
    problems = [f"{key}: expected {expected}" for key, match in matches.items() if match is None]
    return paths.nest((match[1], match[2], key) for key, match in matches.items() if match is not None), problems


def read_text(path: location.Location, error: type[AdapterError] = ConfigError) -> str:
    """Read a UTF-8 file, such as a configuration. Raises `error` if it is not UTF-8."""
    try:
        return location.read_text_bytes(path).decode("utf-8")
    except UnicodeDecodeError as problem:
        place = f"{problem.reason} at byte {problem.start}"
        raise error(f"{path}: not UTF-8 text ({place}); save it as UTF-8") from problem


def load_format(name: str) -> Format:
    """Import the format of one row of `FORMATS`."""
    return importlib.import_module(f"{__name__}.{name}").FORMAT


def find(place: Place) -> Format | None:
    """Return the format of a place; None if no format recognizes it."""
    names = place.names if place.names is not None else [place.at.name]
    known = (module for module, row in FORMATS.items() if any(name.endswith(row.ends) for name in names))
    return next((found for found in map(load_format, known) if found.recognizes(place)), None)


def open_place(place: Place) -> contextlib.AbstractContextManager[Opened]:
    """Open an adapter. Raises `FileError` if no format recognizes the place, and what its format raises."""
    return (find(place) or load_format("peft_folder")).open(place)  # its error names the missing files


def writer(style: str) -> Format:
    """Return the format that writes a style, one of those in the rows."""
    return load_format(next(m for m, row in FORMATS.items() if style in (*row.folders, *row.files, *row.exports)))


def require_style(path: str | os.PathLike[str], style: str, allowed: Collection[str], where: str = "") -> None:
    """Raise `FileError` if a style, the argument `format` of a function, is not one of those allowed."""
    if style not in allowed:
        names = " or ".join(map(repr, allowed))
        raise FileError(f"{os.fspath(path)}: format: expected {names}{where}, found {style!r}")


# ---------------------------------------------------------------- findings


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
        problem: the error that `read` raises, if the files cannot be opened.
    """

    severity: str
    code: str
    subjects: tuple[str, ...]
    found: str
    expected: str = ""
    remedy: str = ""
    fix: Fix | None = dataclasses.field(default=None, repr=False, compare=False)
    problem: AdapterError | None = dataclasses.field(default=None, repr=False, compare=False)

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


def such_as(items: Collection[str], noun: str) -> str:
    """Return the number of items with their noun, and the first of them.

    >>> such_as(["q", "k"], "module")
    '2 modules, such as q'
    """
    return f"{count(items, noun)}, such as {first(items)}"


def first(items: Iterable[str]) -> str:
    """Return the first of some texts; "" without one."""
    return next(iter(items), "")


def with_subjects(*findings: Finding) -> list[Finding]:
    """Return the findings that concern something; a check without a subject has found nothing."""
    return [finding for finding in findings if finding.subjects]


def error(
    code: str,
    subjects: Iterable[str],
    found: str,
    expected: str,
    remedy: str,
    fix: Fix | None = None,
    problem: AdapterError | None = None,
) -> Finding:
    """Return a finding of severity "error"."""
    return Finding("error", code, tuple(subjects), found, expected, remedy, fix, problem)


def warning(
    code: str, subjects: Iterable[str], found: str, expected: str, remedy: str, fix: Fix | None = None
) -> Finding:
    """Return a finding of severity "warning"."""
    return Finding("warning", code, tuple(subjects), found, expected, remedy, fix)


def note(code: str, subjects: Iterable[str], found: str, remedy: str = "") -> Finding:
    """Return a finding of severity "note"."""
    return Finding("note", code, tuple(subjects), found, "", remedy)


# ---------------------------------------------------------------- files that hold no adapter of PEFT


EXPECTED = "adapter_config.json and adapter_model.safetensors of PEFT"
_MLX = (
    "name the weights adapters.safetensors, with mlx-lm's own adapter_config.json beside them; jaxadapt convert FOLDER"
    " OUT then writes PEFT's folder"
)
_IMAGE = (
    "give the file a name of its own, without a configuration beside it: diffusers (pipe.load_lora_weights) and"
    " jaxadapt then read it, and jaxadapt convert writes PEFT's folders"
)
# {library: (pattern of its keys, remedy)}. The first one with a matching key applies.
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


def missing_files(place: Place) -> Finding:
    """Return the finding for a place without PEFT's weights; it names the files there, and the remedy."""
    at, names, adapters = place.at, place.names, list[str]()
    if names is None:
        text = f"expected {_FOLDER}, found a file; pass its folder"
        return error("no-adapter", (), text, "a folder", "", problem=FileError(f"{at}: {text}"))
    present, has_config = sorted(names), location.CONFIG in names
    with contextlib.suppress(FileError):
        adapters = [name for name in present[:64] if location.exists(at / name / location.CONFIG)]
    steps = list(filter(run_folder.NAME.fullmatch, present))
    of_models = {hf_model.SINGLE_FILE, hf_model.INDEX, hf_model.BIN, hf_model.BIN_INDEX}
    model = [] if has_config else sorted(names & of_models)
    mlx = sorted({location.MLX_WEIGHTS, "adapters.npz"}.intersection(present))
    diffusers = [name for name in present if name.startswith("pytorch_lora_weights.")]
    rows = (
        ("training-run", steps,
         f"; it contains training checkpoints: `jaxadapt checkpoints {at}` lists and exports them",
         f"run: jaxadapt checkpoints {at} --step latest --export OUT"),
        ("subfolders", adapters, f"; these subfolders contain adapters: {', '.join(adapters)}", "pass one of them"),
        ("other-library", mlx, f"; {', '.join(mlx)} is mlx-lm's", _MLX),
        ("other-library", diffusers, f"; {', '.join(diffusers)} is diffusers'", _IMAGE),
        ("whole-model", model, "; it is the folder of a whole model",
         "pass the adapter's folder, and this one as --base"),
        ("no-weights", [location.CONFIG] * has_config, "", "fetch or copy the weights as well"),
    )  # fmt: skip
    code, subjects, hint, remedy = next((row for row in rows if row[1]), ("no-adapter", [], "", "check the path"))
    absent = [
        *([] if has_config else [location.CONFIG]),
        *([] if location.MLX_WEIGHTS in names else [location.WEIGHTS[0]]),
    ]
    files = ", ".join(present[:8]) + (", …" if len(present) > 8 else "")
    found = f"no {' and no '.join(absent)}; found {files or 'an empty folder'}{hint}"
    return error(code, subjects, found, EXPECTED, remedy, problem=FileError(f"{at}: {found}; {remedy}"))


def refuse(found: Finding) -> NoReturn:
    """Raise the error of a finding."""
    raise found.problem or FileError(found.found)


def missing_config(weights: location.Location, tensors: Kinds) -> Finding:
    """Return the finding for weights without a configuration, and without a copy of it."""
    found = f"no {location.CONFIG} beside {weights.name}"
    ranks = sorted({shape[0] for key, (_, shape) in tensors.items() if "lora_A" in key.split(".") and shape})
    remedy = "copy it from where the adapter was trained, or write one"
    remedy += f" (the tensors show rank {', '.join(map(str, ranks))})" if ranks else ""
    return error(
        "configuration-missing", (location.CONFIG,), found,
        f"{location.CONFIG}: the tensors do not contain the scale or the method's settings", remedy,
        problem=FileError(f"{weights.parent}: {found}; {remedy}"),
    )  # fmt: skip


def foreign_config(values: Mapping[str, Any]) -> Finding | None:
    """Return a finding if a JSON object is another library's configuration."""
    expected = "a configuration with peft_type"
    if "peft_type" in values:
        return None
    if mlx := mlx_keys(values):
        text = f"adapter_config.json is mlx-lm's (no peft_type, but {', '.join(mlx)})"
        return error("other-library", mlx, text, expected, _MLX)
    if "architectures" in values or "model_type" in values:
        text = "the configuration is that of a whole model (architectures, model_type)"
        return error("whole-model", (), text, expected, "pass the adapter's folder")
    return None


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
    if not keys or peft_tensors.has_adapter_tensors(keys):
        return None
    text = f"none of the {len(keys)} tensors belongs to an adapter of PEFT, such as {next(iter(keys))}"
    if not any(key.endswith(".weight") for key in keys):
        return error("no-adapter", (), text, "an adapter's tensors", "check the path")
    return error(
        "whole-model", (), f"{text}: these seem to be the weights of a whole model", "an adapter's tensors",
        f"if {source} is a complete model, load it as one",
    )  # fmt: skip
