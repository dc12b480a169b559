"""Verify the files of an adapter, and repair them.

path ──reading──► Reading ──checks of tensors, values, base──► findings
                  Reading ──fixes of its findings──► PeftTensors ──write──► a copy

`repair` applies the fixes in order, and verifies the result.
"""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path
from typing import Any

from jaxadapt.adapters import key_names
from jaxadapt.configs import Config
from jaxadapt.core import paths
from jaxadapt.core.errors import FileError, MismatchError
from jaxadapt.core.progress import Progress, Report, byte_counter, reporter
from jaxadapt.keymaps.keymap import KeyMap
from jaxadapt.persistence import base_checks, folder, tensor_checks
from jaxadapt.persistence.findings import SEVERITIES, Finding, count, note
from jaxadapt.persistence.formats.peft_folder import StoredAdapter
from jaxadapt.persistence.reading import Reading, apply_fixes, guess_method, open_stored, read_stored
from jaxadapt.storage import hub, location
from jaxadapt.storage.safetensors import BITS

# ---------------------------------------------------------------- verify


def verify(path: str | os.PathLike[str], base: Any = None, *, progress: Progress = None) -> list[Finding]:
    """Check the files of an adapter and return every problem and the main facts as values.

    Reads also damaged files and those of other libraries that are easily taken for PEFT's. One tensor is in memory at a
    time (all of a `.bin` file), and torch is not needed.

    Args:
        path: the adapter's folder; one of its files; an address of an object store or of the Hub.
        base: the base model, to check names and sizes: its Hugging Face folder or a file of its weights (only names,
            shapes and the few values of the adapter's fingerprint are read), a .json file {key: shape}, a mapping
            {key: shape or array} of PyTorch's parameters, or the name of a family ("llama").
        progress: None, True (a bar on a terminal or in a notebook) or a function of ("verify", bytes done, bytes in
            all).

    Returns:
        The findings, errors first. A sound adapter has only notes: its method, ranks and scales.

    Raises `FileError` if the path, or the base, cannot be read at all.

    >>> import tempfile, jax, jaxadapt
    >>> base = {"q": {"kernel": jax.numpy.ones((4, 6))}}
    >>> config = jaxadapt.LoraConfig(r=2, target_modules=["q"])
    >>> adapter = jaxadapt.init(base, config, key=jax.random.key(0))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     jaxadapt.save(adapter, folder)
    ...     findings = verify(folder, {"q.weight": (6, 5)})
    >>> [(finding.severity, finding.code) for finding in findings]
    [('error', 'shape'), ('warning', 'untrained'), ('note', 'method'), ('note', 'scale')]
    >>> findings[0].subjects
    ('q: [6, 4] by its tensors, [6, 5] in the base',)
    """
    known_base = None if base is None else base_checks.base_shapes(base)
    name = os.fspath(base) if isinstance(base, str | os.PathLike) else "the base"
    with reporter(progress) as report, open_stored(path, report) as stored:
        reading = read_stored(stored)
        found = [*reading.findings, *_check_content(stored, reading, base, known_base, name, report)]
        if isinstance(base, str | os.PathLike) and stored.fingerprint and not isinstance(known_base, KeyMap):
            found += base_checks.check_identity(stored.fingerprint, known_base or {}, base)
    return sorted(found, key=lambda each: SEVERITIES.index(each.severity))


def _check_content(
    stored: StoredAdapter, reading: Reading, base: Any, known_base: Any, base_name: str, report: Report
) -> list[Finding]:
    """Check the tensors, by their names in PEFT, and describe the adapter."""
    specs, tensors, config, keys = stored.specs, stored.tensors, reading.config, reading.keys
    if tensors is None or not keys:
        return [] if config is None or tensors is not None else [_describe_method(config, None)]
    shapes = {name: specs[key][1] for name, key in keys.items()}
    dtypes = {name: specs[key][0] for name, key in keys.items()}
    sizes = [math.prod(shapes[name]) * BITS.get(dtype, 128) // 8 for name, dtype in dtypes.items()]  # C128 of .bin
    progress = byte_counter(report, "verify", sum(sizes))

    def get(key: str) -> Any:
        value = tensors[key]
        progress(value.nbytes)
        return value

    if config is None:
        found = [_describe_tensors(guess_method(specs), shapes), *tensor_checks.check_empty(shapes)]
        return [*found, *tensor_checks.check_values(keys, shapes, get, None)]
    found: list[Finding] = []
    if not reading.has_several:
        found += tensor_checks.check_tensors(shapes, config, base_checks.base_family(base, known_base))
        if known_base is not None:
            found += base_checks.check_base(shapes, config, known_base, base_name)
    found += tensor_checks.check_dtypes(dtypes, config)
    found += tensor_checks.check_values(keys, shapes, get, config)
    return [*found, _describe_method(config, shapes), *_describe_scales(shapes, config)]


# ---------------------------------------------------------------- facts


def _describe_method(config: Config, shapes: tensor_checks.Shapes | None) -> Finding:
    base = f" for {config.base_model_name_or_path}" if config.base_model_name_or_path else ""
    if shapes is None:
        return note("method", (config.peft_type,), f"the configuration of a {config.peft_type} adapter{base}")
    modules, _ = tensor_checks.split_modules(shapes, config)
    number = len([module for module in modules if module and module != "base_model"])
    text = f", {count(number, 'adapted module')}" if number else ""
    return note("method", (config.peft_type,), f"{config.peft_type} adapter{base}, {count(shapes, 'tensor')}{text}")


def _describe_tensors(kind: str, shapes: tensor_checks.Shapes) -> Finding:
    """Describe the tensors of a file without a configuration."""
    splits = [split for key in shapes if (split := key_names.split_key(key, kind)) is not None]
    ranks = sorted({shape[0] for key, shape in shapes.items() if shape and "lora_A" in key.split(".")})
    text = f", {len({module for module, _ in splits})} modules" if kind == "LORA" else ""
    text += f", rank {', '.join(map(str, ranks))}" if ranks else ""
    return note("method", (kind,), f"{len(shapes)} tensors of {kind or 'an unknown method'}{text}")


def _describe_scales(shapes: tensor_checks.Shapes, config: Config) -> list[Finding]:
    """Return one note for each pair of rank and scale."""
    modules, _ = tensor_checks.split_modules(shapes, config)
    groups: dict[tuple[int, float], list[str]] = {}
    for module, setting in tensor_checks.module_settings(modules, config).items():
        groups.setdefault(setting, []).append(module)
    notes: list[Finding] = []
    for (rank, scale), members in sorted(groups.items()):
        ends = ", ".join(sorted({name.rpartition(".")[2] for name in members}))
        text = f"rank {rank} and scale {scale:.6g} in {count(members, 'module')} ({ends})"
        notes.append(note("scale", members, text))
    return notes


# ---------------------------------------------------------------- repair


@dataclasses.dataclass(frozen=True)
class Repaired:
    """The result of `repair`.

    Attributes:
        path: the folder written; None if there was nothing to repair, and nothing was written.
        done: a sentence for each repair.
        remaining: the errors and warnings that cannot be repaired with certainty.
    """

    path: str | None
    done: tuple[str, ...]
    remaining: tuple[Finding, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {"path": self.path, "done": list(self.done), "remaining": [f.to_dict() for f in self.remaining]}


_NAMES = (hub.CONFIG, *hub.WEIGHTS)


def repair(
    path: str | os.PathLike[str], out: str | os.PathLike[str] | None = None, *, progress: Progress = None
) -> Repaired:
    """Write a repaired copy of an adapter's folder, if something in it can be repaired with certainty.

    Repairs the findings of `verify` that are `repairable`: keys with the names of wrappers (_orig_mod., module.), of
    the adapter (.default.), or without PEFT's prefix; tensors stored twice with equal values; values of the
    configuration with one possible meaning (peft_type "lora", r 4.0 or "4"), trailing commas and a byte order mark; a
    configuration that is lost but for the copy in the weights' header. The values of tensors never change. One tensor
    is in memory at a time (all of a `.bin` file).

    Args:
        path: the adapter's folder or file of weights, or an address.
        out: the folder to write to; by default the name of `path` with "-repaired" added. It must not contain an
            adapter, except that `out` equal to `path` replaces the adapter.
        progress: None, True (a bar on a terminal or in a notebook) or a function of ("save", bytes done, bytes in all).

    Returns:
        The folder, a sentence for each repair, and the problems that remain.

    Raises `FileError` if the path cannot be read or `out` cannot be written, and `MismatchError` if the path holds no
    adapter that can be repaired.

    >>> import tempfile, numpy as np, jaxadapt
    >>> a, b = np.ones((2, 4), "float32"), np.ones((6, 2), "float32")
    >>> tensors = {"q.lora_A.weight": a, "q.lora_B.weight": b}
    >>> config = jaxadapt.LoraConfig(r=2, target_modules=["q"])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     jaxadapt.write(jaxadapt.PeftTensors(config, tensors), f"{folder}/found")
    ...     result = repair(f"{folder}/found")
    ...     keys = sorted(jaxadapt.read(f"{folder}/found-repaired").tensors)
    >>> result.done, keys[0]
    (('2 keys: the prefix base_model.model. added',), 'base_model.model.q.lora_A.weight')
    """
    target = _default_target(path) if out is None else out
    if hub.is_address(target):
        raise FileError(f"{target}: expected a local folder; pass out=, then upload it with jaxadapt.push")
    with reporter(progress) as report:
        with open_stored(path, report) as stored:
            tensors, done = apply_fixes(stored)
            if tensors is None:
                lines = [f"{found.found}; {found.remedy}" for found in _problems(path)]
                raise MismatchError(f"{os.fspath(path)}: cannot be repaired with certainty:\n" + paths.bullets(lines))
            if not done:
                return Repaired(None, (), _problems(path))
            is_same = _is_same(target, path)
            if not is_same and any(location.exists(location.to_location(target) / name) for name in _NAMES):
                raise FileError(
                    f"{os.fspath(target)}: cannot write the repaired adapter here: the folder contains an adapter;"
                    " choose another folder with out="
                )
            if is_same:  # the file is replaced
                tensors = dataclasses.replace(tensors, tensors=dict(tensors.tensors))
            else:
                folder.write(tensors, target, progress=report)
        if is_same:
            folder.write(tensors, target, progress=report)
    return Repaired(os.fspath(target), done, _problems(target))


def _default_target(path: str | os.PathLike[str]) -> str:
    if hub.is_address(path):
        raise FileError(f"{os.fspath(path)}: pass out=, the folder to write the repaired adapter to")
    place = location.to_location(path)
    folder_path = place.parent if location.is_file(place) else place
    if isinstance(folder_path, Path) and folder_path.name in ("", ".."):  # "." and ".." have no name to add to
        folder_path = folder_path.resolve()
    return f"{os.fspath(folder_path).rstrip('/')}-repaired"


def _is_same(target: str | os.PathLike[str], path: str | os.PathLike[str]) -> bool:
    one, other = location.absolute(location.to_location(target)), location.absolute(location.to_location(path))
    return one in (other, other.parent if location.is_file(other) else other)


def _problems(path: str | os.PathLike[str]) -> tuple[Finding, ...]:
    return tuple(found for found in verify(path) if found.severity != "note")
