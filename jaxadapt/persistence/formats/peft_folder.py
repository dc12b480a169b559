"""PEFT's folder of an adapter ↔ `PeftTensors`.

adapter_config.json          the configuration
adapter_model.safetensors    the tensors; jaxadapt repeats the configuration in the header, because two files
                             cannot be replaced at the same instant
README.md                    the model card, rewritten at each save until a person edits it
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import os
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any, cast

from jaxadapt.adapters import peft_tensors
from jaxadapt.adapters.peft_tensors import PeftTensors, require_floats
from jaxadapt.configs.base import Config, mlx_keys
from jaxadapt.configs.lora import LoraConfig
from jaxadapt.core.errors import AttachError, FileError, MismatchError, raise_listed, warn
from jaxadapt.core.progress import LOGGER, Progress, Report, byte_counter, reporter
from jaxadapt.persistence import card, findings, reconcile
from jaxadapt.persistence.findings import Finding, error, warning
from jaxadapt.persistence.fingerprint import FIELD, Fingerprint
from jaxadapt.persistence.formats import Format, Opened, Place, read_text
from jaxadapt.storage import atomic, hub, location, safetensors, torch_bin, torch_bin_write
from jaxadapt.storage.location import Location
from jaxadapt.storage.source import Kinds, TensorSource, dtypes_and_shapes
from jaxadapt.storage.strided import dtype_name

CONFIG = hub.CONFIG
WEIGHTS, WEIGHTS_BIN = hub.WEIGHTS
CARD = hub.CARD
_NOTHING = "0" * 64  # digest of no JSON: the save replaced none, or is complete


# ---------------------------------------------------------------- reading


def recognises(place: Place) -> bool:
    """Return True for a folder with a file of PEFT's weights."""
    return place.names is not None and not place.names.isdisjoint(hub.WEIGHTS)


def missing(place: Place) -> Finding:
    """Return the finding for a place without PEFT's weights; its error is raised by `read`."""
    adapters, names = list[str](), place.names
    if names is None:
        text = f"expected a folder that contains {CONFIG} and {WEIGHTS}, found a file; pass its folder"
        return error("no-adapter", (), text, "a folder", "", problem=FileError(f"{place.at}: {text}"))
    with contextlib.suppress(FileError):
        adapters = [name for name in sorted(names)[:64] if location.exists(place.at / name / CONFIG)]
    return findings.missing_files(place.at, names, adapters)


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
    weights: Location | None = None
    findings: tuple[Finding, ...] = ()

    @property
    def specs(self) -> Kinds:
        """{key: (dtype, shape)}; empty if the tensors cannot be read."""
        return {} if self.tensors is None else dtypes_and_shapes(self.tensors)

    @property
    def fingerprint(self) -> Fingerprint | None:
        """The fingerprint of the base in the header; None without one."""
        return None if self.header is None else reconcile.stored_fingerprint(self.header)


def open_files(place: Place, stack: contextlib.ExitStack) -> StoredAdapter:
    """Open the files of a folder, or one file of weights, as far as they can be read. Problems become findings.

    A tensor of a `.safetensors` file is read on demand, those of a `.bin` file all at once.
    """
    if place.names is None:
        config, weights = place.at.parent / CONFIG, place.at
        has_config = weights.name in hub.WEIGHTS and location.exists(config)
    else:
        config, weights = place.at / CONFIG, place.at / (WEIGHTS if WEIGHTS in place.names else WEIGHTS_BIN)
        has_config = CONFIG in place.names
    text = functools.partial(read_text, config) if has_config else None
    stored, found = StoredAdapter(os.fspath(place.path), text, weights=weights), list[Finding]()
    if place.names is not None and place.names.isdisjoint(hub.WEIGHTS):
        return dataclasses.replace(stored, findings=(missing(place),))
    try:
        if weights.suffix == ".safetensors":
            file = stack.enter_context(safetensors.open_tensors(weights))
            stored = dataclasses.replace(stored, tensors=file, header=file.header)
        else:
            stored = dataclasses.replace(stored, tensors=torch_bin.open_tensors(weights))
    except FileError as problem:
        expected, remedy = "a complete file of tensors", "fetch or save it again"
        found.append(error("unreadable", (weights.name,), str(problem), expected, remedy, problem=problem))
    is_damaged_file = place.names is None and stored.tensors is None
    if text is None and not has_copy(stored.header) and not is_damaged_file:
        found.insert(0, findings.missing_config(weights, stored.specs))
    if stored.tensors is not None and not stored.tensors:
        problem = MismatchError(f"{weights}: no tensors in the file; expected those of an adapter")
        expected, remedy = "an adapter's tensors", "save the adapter again"
        found.append(error("no-tensors", (weights.name,), str(problem), expected, remedy, problem=problem))
    if place.names is not None and place.names.issuperset(hub.WEIGHTS):
        text_of_two, remedy = "the folder holds two files of weights", f"delete {WEIGHTS_BIN} if it is older"
        found.append(warning("two-files", hub.WEIGHTS, text_of_two, f"one; readers take {WEIGHTS}", remedy))
    return dataclasses.replace(stored, findings=tuple(found))


def has_copy(header: safetensors.Header | None) -> bool:
    """Return True if a header has jaxadapt's copy of the configuration."""
    return header is not None and reconcile.META in header.metadata


def read_config(place: Place) -> Config:
    """Read the configuration that belongs to the tensors of a folder."""
    names = place.names or frozenset()
    header = safetensors.read_header(place.at / WEIGHTS) if WEIGHTS in names else None
    weights = place.at / (WEIGHTS_BIN if header is None else WEIGHTS)
    if CONFIG not in names and not has_copy(header):
        findings.refuse(findings.missing_config(weights, {}))
    return reconcile.resolve_config(place.at / CONFIG, header, weights)


@contextlib.contextmanager
def open_folder(place: Place) -> Generator[Opened]:
    """Open a folder, and raise the error of the first finding that has one.

    Raises `FileError`, `FormatError` or `ConfigError`, naming the file, and `MismatchError` for a file without tensors.
    """
    with contextlib.ExitStack() as stack:
        stored = StoredAdapter("", findings=(missing(place),)) if place.names is None else open_files(place, stack)
        for found in stored.findings:
            if found.problem is not None:
                findings.refuse(found)
        assert stored.weights is not None
        assert stored.tensors is not None
        config = reconcile.resolve_config(place.at / CONFIG, stored.header, stored.weights)
        tensors = PeftTensors(config, stored.tensors, stored.source, stored.fingerprint)
        yield Opened(peft_tensors.without_names(tensors), stored.weights)


# ---------------------------------------------------------------- writing


Put = Callable[[atomic.Writer, Mapping[str, Any], Mapping[str, str]], safetensors.Header]
"""Writes the file of tensors, from `(writer, {key: (dtype, shape)}, metadata)`."""


def write_with(
    tensors: PeftTensors,
    path: str | os.PathLike[str],
    put: Put | None,
    progress: Progress,
    *,
    as_bin: bool = False,
    ahead: bool = False,
) -> int:
    """Write an adapter folder as `folder.write` does; return the number of its tensors.

    Args:
        put: writes the file of tensors, if given.
        ahead: True for tensors that a thread may read and compute while others are written.
    """
    if not isinstance(tensors, PeftTensors):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise AttachError(
            f"write: expected PeftTensors (from read or to_peft), found {type(tensors).__name__};"
            " write models, variables and Adapters with jaxadapt.save"
        )
    if hub.is_address(path):
        raise FileError(f"{path}: expected a local folder; upload to the Hub with jaxadapt.push(tensors, 'org/name')")
    folder, count = location.to_location(path), len(tensors.tensors)
    if not count:
        raise MismatchError(f"{folder}: cannot write an adapter without tensors")
    made = atomic.make_folder(folder)
    try:
        with reporter(progress) as report, atomic.lock_directory(folder):
            _write(tensors, folder, put, report, as_bin, ahead)
    except BaseException:
        for new in made:  # remove the empty folders that this call created
            with contextlib.suppress(OSError):
                new.rmdir()
        raise
    return count


def _write(tensors: PeftTensors, folder: Location, put: Put | None, report: Report, as_bin: bool, ahead: bool) -> None:
    import numpy as np

    config, weights = folder / CONFIG, folder / (WEIGHTS_BIN if as_bin else WEIGHTS)
    if as_bin and location.exists(folder / WEIGHTS):
        raise FileError(
            f"{folder}: cannot write {WEIGHTS_BIN} beside {WEIGHTS}, which readers would take instead; choose another"
            " folder, or delete that file"
        )
    adapter_config = with_integral_alpha(tensors.config)
    if location.is_dir(config):
        raise FileError(f"{config}: expected a file, found a folder; save to another path")
    text = adapter_config.to_json()
    exists = location.exists(config)
    old_text = read_text(config) if exists else text
    if is_mlx_config(old_text):
        raise FileError(f"{config}: cannot replace mlx-lm's file of this name; choose another folder")
    replaces = _NOTHING if old_text == text else reconcile.text_digest(old_text)
    document = {"config": adapter_config.to_dict(), "replaces": replaces, "schema": 1}
    if tensors.fingerprint is not None:
        document[FIELD] = dict(tensors.fingerprint)
    specs = {k: (np.dtype(v.dtype), tuple(v.shape)) for k, v in array_specs(tensors.tensors).items()}
    parts = [key for key in specs if key.endswith("]")]
    raise_listed(
        MismatchError,
        f"{folder}: cannot write parts of PyTorch's tensors, which only a model can join. Load the checkpoint into"
        " a model and save that:",
        parts,
    )
    require_floats(tensors.config, array_specs(tensors.tensors), folder)
    metadata = {"format": "pt", reconcile.META: json.dumps(document)}
    # Both files are on the disk before the weights are renamed into place, and the JSON right after them: a full disk
    # shows before anything changes. An equal JSON stays, as in all saves of a run but the first.
    replaced = [weights] if exists and old_text == text else [weights, config]
    with atomic.replacing_all(replaced) as (writer, *others):
        for other in others:
            other.write(memoryview(text.encode()))
        if put is None:
            count = byte_counter(report, "save", sum(d.itemsize * math.prod(shape) for d, shape in specs.values()))
            get = functools.partial(_value, tensors.tensors)
            if as_bin:
                size = torch_bin_write.write_to(writer, specs, get, count)
            else:
                size = safetensors.write_to(writer, specs, get, metadata, progress=count, ahead=ahead).size
        else:
            size = put(writer, specs, metadata).size
    if replaces != _NOTHING and not as_bin:
        _blank_digest(weights, replaces)
    stale = folder / WEIGHTS_BIN
    with contextlib.suppress(FileError):  # the adapter is in place, and readers prefer it to this file
        if not as_bin and location.exists(stale):
            warn(f"{stale} is an older adapter beside the one just written; readers use {WEIGHTS}. Delete it")
    dtypes = tuple(sorted({dtype_name(dtype) for dtype, _ in specs.values()}))
    shapes = {key: shape for key, (_, shape) in specs.items()}
    _write_card(folder / CARD, adapter_config, card.Facts(shapes, dtypes, size))
    LOGGER.info("%s: %d tensors written, %s", folder, len(specs), card.size_text(size))


def with_integral_alpha(config: Config) -> Config:
    """Write an integral `lora_alpha` as an integer: readers such as Ollama's expect one. The value is the same.

    >>> with_integral_alpha(LoraConfig(lora_alpha=16.0)).lora_alpha
    16
    """
    alpha = config.get("lora_alpha")
    if isinstance(config, LoraConfig) and isinstance(alpha, float) and alpha.is_integer():
        return config.replace(lora_alpha=int(alpha))
    return config


def _write_card(path: Location, config: Config, facts: card.Facts) -> None:
    """Write the model card unless a person edited it. Warn if that fails, since the adapter is in place."""
    try:
        new = card.card_text(config, facts)
        if isinstance(path, Path) and path.is_symlink():
            return  # a person made it
        old = read_text(path) if location.exists(path) else None
        text = new if old is None else card.refresh_card(old, new)
        if text != old:
            atomic.write_bytes(path, text.encode())
    except Exception as error:  # any error: the adapter itself is complete
        warn(f"the adapter in {path.parent} is saved, but not its model card: {str(error) or repr(error)}")


def _value(tensors: Mapping[str, Any], key: str) -> Any:
    """Return one tensor on the host. Raises `AttachError` if it was donated since the save began."""
    import numpy as np

    try:
        return np.asarray(tensors[key])
    except RuntimeError as error:  # JAX has no class for this error
        if "deleted" not in str(error):
            raise
        raise AttachError(
            f"{key}: the array was donated to a jitted function, and so deleted, during the save. Save before the step"
            " that donates it, or save a copy (jax.tree.map(jnp.copy, adapter))"
        ) from error


def _blank_digest(weights: Location, replaces: str) -> None:
    """Overwrite the digest of the replaced JSON with zeros, so that equal content gives equal bytes.

    Overwrites 64 digits in place. The JSON equals the header's by then, so a crash or a failure here is harmless. An
    object of a store cannot be changed in place and is written again.
    """
    if isinstance(weights, location.Address):
        with contextlib.suppress(OSError, FileError):
            data = weights.read_bytes()
            start = data.find(replaces.encode(), 0, safetensors.read_header(weights).data_start)
            if start >= 0:
                atomic.write_bytes(weights, data[:start] + _NOTHING.encode() + data[start + len(replaces) :])
        return
    with contextlib.suppress(OSError, FileError), weights.open("r+b") as file:
        header = file.read(safetensors.read_header(weights).data_start)
        start = header.find(replaces.encode())
        if start >= 0:
            file.seek(start)
            file.write(_NOTHING.encode())


def array_specs(tensors: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return values with `shape` and `dtype` by key, without encoding tensors that are encoded on demand."""
    from jaxadapt.adapters.adapter import is_array

    if isinstance(tensors, TensorSource):
        return tensors.specs
    others = [f"{k}: {type(v).__name__}" for k, v in tensors.items() if not is_array(v)]
    raise_listed(MismatchError, "cannot write these tensors: expected arrays, found:", others)
    return tensors


FORMAT = Format(
    recognises,
    open_folder,
    lambda tensors, target, wanted, report: write_with(
        tensors, target, None, report, as_bin=wanted.style == "bin", ahead=wanted.ahead
    ),
    read_config,
    styles=("safetensors", "bin"),
)
