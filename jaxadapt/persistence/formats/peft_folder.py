"""PEFT's folder of an adapter ↔ `PeftTensors`.

adapter_config.json          the configuration
adapter_model.safetensors    the tensors; jaxadapt repeats the configuration in the header, because two files
                             cannot be replaced at the same instant
README.md                    the model card, rewritten at each save until a person edits it

If the JSON and the header's copy differ, `resolve_config` decides which belongs to the tensors.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any, cast

from jaxadapt.adapters import peft_tensors
from jaxadapt.arrays.tensor_source import Kinds, TensorSource, as_source, is_float
from jaxadapt.configs import matching
from jaxadapt.configs.base import Config, loads, unique_keys
from jaxadapt.configs.lora import LoraConfig
from jaxadapt.configs.validation import mlx_keys
from jaxadapt.core.errors import (
    LOGGER,
    AttachError,
    ConfigError,
    FileError,
    FormatError,
    MismatchError,
    Progress,
    Report,
    bullets,
    byte_counter,
    raise_as,
    raise_listed,
    reporter,
    warn,
)
from jaxadapt.keymaps.keymap import PEFT_PREFIX
from jaxadapt.persistence import consumers, fingerprint, formats
from jaxadapt.persistence.formats import Finding, Format, Opened, Place, Wanted, error, read_text, warning
from jaxadapt.storage import atomic, location, safetensors, torch_bin

# ---------------------------------------------------------------- the configuration and its copy


META = "jaxadapt"
"""The header's metadata key for its copy of the configuration."""


_WAITS = (0.0, 0.0, 0.001, 0.01, 0.05, 0.2)
"""Seconds before each retry if the two files differ: a concurrent save renames one right after the other."""


def resolve_config(path: location.Location, header: safetensors.Header | None, weights: location.Location) -> Config:
    """Return the configuration that belongs to the tensors.

    If the JSON at `path` equals jaxadapt's copy in the header, that is it. If the JSON is the one that the save was
    replacing, the save was interrupted between its two files, and the header wins. Otherwise a person edited the JSON,
    and it wins unless the tensors contradict it. A warning reports each difference. Before that both files are read
    again: if another process is saving, the header wins without a warning. If there is no JSON at all, the header wins.

    Args:
        header: as read from `weights`, which may have been replaced since.
    """
    raw = None if header is None else header.metadata.get(META)
    if raw is not None and not location.exists(path):
        warn(
            f"{path} is missing; using the copy of the configuration in the weights' header. PEFT refuses such a"
            " folder: write the file again with jaxadapt.repair or `jaxadapt repair`"
        )
        return parse_copy(raw, weights)[0]
    text = read_text(path)
    if header is None or raw is None or _has_text(raw, text):
        return loads(text, str(path))
    stored, replaces = parse_copy(raw, weights)
    config = None if replaces == hashlib.sha256(text.encode()).hexdigest() else loads(text, str(path))
    if config is not None and not config.changed_keys(stored):
        return config
    # Without an interrupted save there is none to wait for: no save leaves such a pair of files.
    for wait in _WAITS if config is None else _WAITS[:2]:
        time.sleep(wait)
        current = safetensors.read_header(weights).metadata.get(META)
        if current is None or parse_copy(current, weights)[0].changed_keys(stored) or read_text(path) != text:
            return stored  # a save has finished meanwhile
    if config is None:
        warn(
            f"{path}: a save was interrupted after the weights and before this file; using the configuration"
            " in the weights' header. To repair the file, save again, or write(read(…)).",
        )
        return stored
    changed = config.changed_keys(stored)
    contradiction = _contradiction(config, stored, {k: t.shape for k, t in header.tensors.items()})
    if contradiction:
        warn(
            f"{path} was edited after the weights were written ({', '.join(changed)}), and the tensors"
            f" contradict it ({contradiction}); using the configuration in the weights' header",
        )
        return stored
    warn(
        f"{path} was edited after the weights were written ({', '.join(changed)}); using the edited file",
    )
    return config


def _has_text(raw: str, text: str) -> bool:
    """Return True if a header's copy has the text of the JSON; False for a damaged copy, which `parse_copy` reports.

    Texts tell 1, 1.0 and true apart, and the order of patterns.

    >>> _has_text('{"config": {"r": 1}}', '{\\n  "r": 1\\n}'), _has_text('{"config": {"r": 1}}', '{\\n  "r": true\\n}')
    (True, False)
    """
    try:
        return json.dumps(json.loads(raw)["config"], indent=2) == text
    except (ValueError, KeyError, TypeError, RecursionError):
        return False


def parse_copy(raw: str, weights: location.Location) -> tuple[Config, object]:
    """Parse a header's copy: return the configuration, and the digest of the JSON that its save replaces."""
    with raise_as(
        FormatError, f"{weights}: the metadata {META!r} of its header is damaged",
        ValueError, KeyError, TypeError, AttributeError, ConfigError, RecursionError,
        advice="; save or fetch it again",
    ):  # fmt: skip
        document = json.loads(raw)
        return Config.from_dict(document["config"], "its configuration"), document.get("replaces")


def _contradiction(edited: Config, stored: Config, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """Return why the tensors contradict an edited configuration; None if they do not."""
    if edited.peft_type != stored.peft_type:
        return f"their type is {stored.peft_type}"
    modules = {key: module for key in shapes if (module := tensor_module(stored, key)) is not None}
    for key, module in modules.items():
        if not matching.is_target(edited, module):
            return f"it does not target {key}"
        rank = edited.rank_of(module) if isinstance(edited, LoraConfig) and key.endswith(".lora_A.weight") else None
        if rank is not None and shapes[key][:1] != (rank,):
            return f"{key} has rank {shapes[key][0]}, not {rank}"
    return None


def tensor_module(config: Config, key: str) -> str | None:
    """Return the module of a tensor: the longest prefix of its key that the configuration targets; else None.

    >>> tensor_module(LoraConfig(target_modules=["q"]), "base_model.model.h.0.q.lora_A.weight")
    'h.0.q'
    """
    parts = key.removeprefix(PEFT_PREFIX).split(".")
    for end in range(len(parts) - 1, 0, -1):
        name = ".".join(parts[:end])
        if matching.is_target(config, name):
            return name
    return None


WEIGHTS, WEIGHTS_BIN = location.WEIGHTS
_NOTHING = "0" * 64  # digest of no JSON: the save replaced none, or is complete


# ---------------------------------------------------------------- reading


def recognizes(place: Place) -> bool:
    """Return True for a folder with a file of PEFT's weights."""
    return place.names is not None and not place.names.isdisjoint(location.WEIGHTS)


def parse_json(text: str) -> dict[str, Any] | None:
    """Return the JSON object of a text; None if it is no object or has a key twice."""
    try:
        values: object = json.loads(text, object_pairs_hook=unique_keys)
    except (ValueError, ConfigError, RecursionError):
        return None
    return cast("dict[str, Any]", values) if isinstance(values, dict) else None


def is_mlx_config(text: str) -> bool:
    """Return True if the text of an adapter_config.json is mlx-lm's, whose file has the same name.

    >>> is_mlx_config('{"lora_parameters": {"rank": 8, "scale": 20.0}}'), is_mlx_config('{"peft_type": "LORA"}')
    (True, False)
    """
    return bool(mlx_keys(parse_json(text) or {}))


@dataclasses.dataclass(frozen=True)
class StoredAdapter:
    """Adapter files, as far as they can be read.

    Attributes:
        source: the path, for messages.
        text: returns the text of adapter_config.json; None if there is none.
        tensors: the tensors, read on demand; None if they cannot be read.
        header: the header of a safetensors file; None for others.
        weights: the file of the tensors; None if there is none.
        findings: the problems of the files themselves.
    """

    source: str
    text: Callable[[], str] | None = None
    tensors: TensorSource | None = None
    header: safetensors.Header | None = None
    weights: location.Location | None = None
    findings: tuple[Finding, ...] = ()

    @property
    def specs(self) -> Kinds:
        """{key: (dtype, shape)}; empty if the tensors cannot be read."""
        return {} if self.tensors is None else self.tensors.kinds

    @property
    def fingerprint(self) -> fingerprint.Fingerprint | None:
        """The fingerprint of the base in the header; None without one, or for a damaged one."""
        try:
            document = {} if self.header is None else json.loads(self.header.metadata.get(META, "{}"))
            return fingerprint.parse(document.get(fingerprint.FIELD))
        except (ValueError, AttributeError, RecursionError):
            return None


def open_files(place: Place, stack: contextlib.ExitStack) -> StoredAdapter:
    """Open the files of a folder, or one file of weights, as far as they can be read. Problems become findings.

    A tensor of a `.safetensors` file is read on demand, those of a `.bin` file all at once.
    """
    if place.names is None:
        config, weights = place.at.parent / location.CONFIG, place.at
        has_config = weights.name in location.WEIGHTS and location.exists(config)
    else:
        config, weights = place.at / location.CONFIG, place.at / (WEIGHTS if WEIGHTS in place.names else WEIGHTS_BIN)
        has_config = location.CONFIG in place.names
    text = functools.partial(read_text, config) if has_config else None
    stored, found = StoredAdapter(os.fspath(place.path), text, weights=weights), list[Finding]()
    if place.names is not None and place.names.isdisjoint(location.WEIGHTS):
        return dataclasses.replace(stored, findings=(formats.missing_files(place),))
    try:
        if weights.suffix == ".safetensors":
            file = stack.enter_context(safetensors.TensorFile(weights))
            stored = dataclasses.replace(stored, tensors=file, header=file.header)
        else:
            stored = dataclasses.replace(stored, tensors=torch_bin.open_tensors(weights))
    except FileError as problem:
        found.append(error(
            "unreadable", (weights.name,), str(problem), "a complete file of tensors", "fetch or save it again",
            problem=problem,
        ))  # fmt: skip
    is_damaged_file = place.names is None and stored.tensors is None
    if text is None and not has_copy(stored.header) and not is_damaged_file:
        found.insert(0, formats.missing_config(weights, stored.specs))
    if stored.tensors is not None and not stored.tensors:
        problem = MismatchError(f"{weights}: no tensors in the file; expected those of an adapter")
        found.append(error(
            "no-tensors", (weights.name,), str(problem), "an adapter's tensors", "save the adapter again",
            problem=problem,
        ))  # fmt: skip
    if place.names is not None and place.names.issuperset(location.WEIGHTS):
        found.append(warning(
            "two-files", location.WEIGHTS, "the folder holds two files of weights", f"one; readers take {WEIGHTS}",
            f"delete {WEIGHTS_BIN} if it is older",
        ))  # fmt: skip
    return dataclasses.replace(stored, findings=tuple(found))


def has_copy(header: safetensors.Header | None) -> bool:
    """Return True if a header has jaxadapt's copy of the configuration."""
    return header is not None and META in header.metadata


def other_format(place: Place, header: safetensors.Header | None) -> Format | None:
    """Return the format of files that have PEFT's names but not its keys, Tinker's; None for PEFT's."""
    if header is None or has_copy(header):
        return None
    from jaxadapt.persistence.formats import tinker_files  # few folders need it

    folder = place.at.parent if place.names is None else place.at
    return tinker_files.FORMAT if tinker_files.is_named_like(header.tensors, folder / location.CONFIG) else None


def read_config(place: Place) -> Config:
    """Read the configuration that belongs to the tensors of a folder, or the one in a file of its own."""
    if place.names is None:
        return loads(read_text(place.at), str(place.at))
    header = safetensors.read_header(place.at / WEIGHTS) if WEIGHTS in place.names else None
    if (other := other_format(place, header)) is not None:
        with other.open(place) as opened:
            return opened.tensors.config
    weights = place.at / (WEIGHTS_BIN if header is None else WEIGHTS)
    if location.CONFIG not in place.names and not has_copy(header):
        formats.refuse(formats.missing_config(weights, {}) if recognizes(place) else formats.missing_files(place))
    return resolve_config(place.at / location.CONFIG, header, weights)


@contextlib.contextmanager
def open_folder(place: Place) -> Generator[Opened]:
    """Open a folder, and raise the error of the first finding that has one.

    Raises `FileError`, `FormatError` or `ConfigError`, naming the file, and `MismatchError` for a file without tensors.
    """
    with contextlib.ExitStack() as stack:
        if place.names is None:
            formats.refuse(formats.missing_files(place))
        stored = open_files(place, stack)
        for found in stored.findings:
            if found.problem is not None:
                formats.refuse(found)
        assert stored.weights is not None
        assert stored.tensors is not None
        if (other := other_format(place, stored.header)) is not None:
            yield stack.enter_context(other.open(place))
            return
        config = resolve_config(place.at / location.CONFIG, stored.header, stored.weights)
        tensors = peft_tensors.PeftTensors(config, stored.tensors, stored.source, stored.fingerprint)
        yield Opened(peft_tensors.without_names(tensors), stored.weights)


# ---------------------------------------------------------------- writing


Put = Callable[[atomic.Writer, Mapping[str, Any], Mapping[str, str]], safetensors.Header]
"""Writes the file of tensors, from `(writer, {key: (dtype, shape)}, metadata)`."""


def write_folder(
    tensors: peft_tensors.PeftTensors,
    path: str | os.PathLike[str],
    wanted: Wanted,
    progress: Progress,
    put: Put | None = None,
) -> int:
    """Write an adapter folder as `folder.write` does; return the number of its tensors.

    Args:
        put: writes the file of tensors, if given.
    """
    if not isinstance(tensors, peft_tensors.PeftTensors):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise AttachError(
            f"write: expected PeftTensors (from read or to_peft), found {type(tensors).__name__};"
            " write models, variables and Adapters with jaxadapt.save"
        )
    folder = location.to_location(path)
    kinds = _file_kinds(tensors, folder)
    with atomic.open_folder(folder), reporter(progress) as report:
        _replace(tensors, kinds, folder, wanted, report, put)
    return len(kinds)


def _replace(
    tensors: peft_tensors.PeftTensors,
    kinds: Kinds,
    folder: location.Location,
    wanted: Wanted,
    report: Report,
    put: Put | None,
) -> None:
    """Write the files of a locked folder."""
    as_bin = wanted.style == "bin"
    config, weights = folder / location.CONFIG, folder / (WEIGHTS_BIN if as_bin else WEIGHTS)
    adapter_config = with_integral_alpha(tensors.config)
    text, old_text = adapter_config.to_json(), _replaced_text(folder, as_bin)
    replaces = _NOTHING if old_text is None or old_text == text else hashlib.sha256(old_text.encode()).hexdigest()
    base = {} if tensors.fingerprint is None else {fingerprint.FIELD: dict(tensors.fingerprint)}
    document = {"config": json.loads(text), "replaces": replaces, "schema": 1, **base}
    metadata = {"format": "pt", META: json.dumps(document)}
    # Both files are on the disk before the weights are renamed into place, and the JSON right after them: a full disk
    # shows before anything changes. An equal JSON stays, as in all saves of a run but the first.
    with atomic.replacing_all([weights] if old_text == text else [weights, config]) as (writer, *others):
        for other in others:
            other.write(memoryview(text.encode()))
        if put is not None:
            size = put(writer, kinds, metadata).size
        else:
            total = sum(math.prod(shape) * safetensors.BITS[dtype] // 8 for dtype, shape in kinds.values())
            count = byte_counter(report, "save", total)
            get = functools.partial(_value, as_source(tensors.tensors))
            size = (
                torch_bin.write_to(writer, kinds, get, count)
                if as_bin
                else safetensors.write_to(writer, kinds, get, metadata, progress=count, ahead=wanted.ahead).size
            )
    if replaces != _NOTHING and not as_bin:
        _blank_digest(weights, replaces)
    stale = folder / WEIGHTS_BIN
    with contextlib.suppress(FileError):  # the adapter is in place, and readers prefer it to this file
        if not as_bin and location.exists(stale):
            warn(f"{stale} is an older adapter beside the one just written; readers use {WEIGHTS}. Delete it")
    _write_card(folder / location.CARD, adapter_config, kinds, size)
    LOGGER.info("%s: %d tensors written, %s", folder, len(kinds), consumers.size_text(size))


def _file_kinds(tensors: peft_tensors.PeftTensors, folder: location.Location) -> Kinds:
    """Return the dtypes and shapes of the file. Raises `MismatchError` for tensors that PEFT's file cannot hold."""
    arrays = tensors.tensors
    if not isinstance(arrays, TensorSource):
        from jaxadapt.adapters.adapter import is_array

        raise_listed(
            MismatchError,
            "cannot write these tensors: expected arrays, found:",
            [f"{k}: {type(v).__name__}" for k, v in arrays.items() if not is_array(v)],
        )
    source = as_source(arrays)
    if not source:
        raise MismatchError(f"{folder}: cannot write an adapter without tensors")
    if parts := [key for key in source if key.endswith("]")]:
        raise MismatchError(
            f"{folder}: cannot write parts of PyTorch's tensors, which only a model can join. Load the checkpoint into"
            f" a model and save that:\n{bullets(parts)}"
        )
    if integers := {key: spec for key, spec in source.specs.items() if not is_float(spec.dtype)}:
        peft_tensors.require_floats(tensors.config, integers, folder)
    return source.kinds


def _replaced_text(folder: location.Location, as_bin: bool) -> str | None:
    """Return the text of the configuration that a write replaces; None if there is none.

    Raises `FileError` for files that a write must not replace.
    """
    config = folder / location.CONFIG
    if as_bin and location.exists(folder / WEIGHTS):
        raise FileError(
            f"{folder}: cannot write {WEIGHTS_BIN} beside {WEIGHTS}, which readers would take instead; choose another"
            " folder, or delete that file"
        )
    if location.is_dir(config):
        raise FileError(f"{config}: expected a file, found a folder; save to another path")
    text = read_text(config) if location.exists(config) else None
    if text is not None and is_mlx_config(text):
        raise FileError(f"{config}: cannot replace mlx-lm's file of this name; choose another folder")
    return text


def with_integral_alpha(config: Config) -> Config:
    """Write an integral `lora_alpha` as an integer: readers such as Ollama's expect one. The value is the same.

    >>> with_integral_alpha(LoraConfig(lora_alpha=16.0)).lora_alpha
    16
    """
    alpha = config.get("lora_alpha")
    if isinstance(config, LoraConfig) and isinstance(alpha, float) and alpha.is_integer():
        return config.replace(lora_alpha=int(alpha))
    return config


def _write_card(path: location.Location, config: Config, tensors: Kinds, nbytes: int) -> None:
    """Write the model card unless a person edited it. Warn if that fails, since the adapter is in place."""
    try:
        new = consumers.card_text(config, tensors, nbytes, consumers.Card())
        if isinstance(path, Path) and path.is_symlink():
            return  # a person made it
        old = read_text(path) if location.exists(path) else None
        text = new if old is None else consumers.refresh_card(old, new)
        if text != old:
            atomic.write_bytes(path, text.encode())
    except Exception as error:  # any error: the adapter itself is complete
        warn(f"the adapter in {path.parent} is saved, but not its model card: {str(error) or repr(error)}")


def _value(tensors: TensorSource, key: str) -> Any:
    """Return one tensor on the host. Raises `AttachError` if it was donated since the save began."""
    try:
        return tensors.read_into(key, None)
    except RuntimeError as error:  # JAX has no class for this error
        if "deleted" not in str(error):
            raise
        raise AttachError(
            f"{key}: the array was donated to a jitted function, and so deleted, during the save. Save before the step"
            " that donates it, or save a copy (jax.tree.map(jnp.copy, adapter))"
        ) from error


def _blank_digest(weights: location.Location, replaces: str) -> None:
    """Overwrite the digest of the replaced JSON with zeros, so that equal content gives equal bytes.

    Overwrites 64 digits in place. The JSON equals the header's by then, so a crash or a failure here is harmless. An
    object of a store cannot be changed in place and is written again.
    """
    with contextlib.suppress(OSError, FileError):
        end = safetensors.read_header(weights).data_start
        if isinstance(weights, location.Address):
            data = weights.read_bytes()
            if replaces.encode() in data[:end]:
                atomic.write_bytes(weights, data[:end].replace(replaces.encode(), _NOTHING.encode(), 1) + data[end:])
            return
        with weights.open("r+b") as file:
            start = file.read(end).find(replaces.encode())
            if start >= 0:
                file.seek(start)
                file.write(_NOTHING.encode())


FORMAT = Format(recognizes, open_folder, write_folder, read_config)
