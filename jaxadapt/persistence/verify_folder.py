"""Verify and repair an adapter's files.

path ──open_stored──► StoredAdapter ──read_stored──► Reading ──checks of tensors, values, base──► findings
                                                     Reading ──fixes of its findings──► PeftTensors ──write──► a copy

A finding with one possible remedy carries it as its fix. `repair` applies the fixes in order, and verifies the result.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from collections.abc import Collection, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxadapt.adapters import key_names
from jaxadapt.adapters.key_names import NormalKeys
from jaxadapt.adapters.peft_tensors import PeftTensors
from jaxadapt.configs import Config
from jaxadapt.core import paths
from jaxadapt.core.errors import FileError, FormatError, MismatchError, warn
from jaxadapt.core.progress import Progress, Report, byte_counter, no_report, reporter
from jaxadapt.keymaps.keymap import PEFT_PREFIX, KeyMap
from jaxadapt.persistence import base_checks, config_checks, folder, stored_adapter, tensor_checks
from jaxadapt.persistence.formats.image_names import LYCORIS
from jaxadapt.persistence.stored_adapter import (
    SEVERITIES,
    Finding,
    Fix,
    Specs,
    StoredAdapter,
    count,
    error,
    note,
    open_stored,
    warning,
)
from jaxadapt.storage import hub, location
from jaxadapt.storage.safetensors import BITS
from jaxadapt.storage.source import rename


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
    >>> adapter = jaxadapt.init(config, base, key=jax.random.key(0))
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
        findings = [*reading.findings, *_check_content(stored, reading, base, known_base, name, report)]
        if isinstance(base, str | os.PathLike) and stored.base and not isinstance(known_base, KeyMap):
            findings += base_checks.check_identity(stored.base, known_base or {}, base)
    return sorted(findings, key=lambda found: SEVERITIES.index(found.severity))


def _check_content(
    stored: StoredAdapter, reading: Reading, base: Any, known_base: Any, base_name: str, report: Report
) -> list[Finding]:
    """Check the tensors, by their names in PEFT, and describe the adapter."""
    specs, config, keys = stored.specs or {}, reading.config, reading.keys
    if not keys:
        return [] if config is None or stored.specs is not None else [_describe_method(config, None)]
    shapes = {name: specs[key][1] for name, key in keys.items()}
    dtypes = {name: specs[key][0] for name, key in keys.items()}
    sizes = [math.prod(shapes[name]) * BITS.get(dtype, 128) // 8 for name, dtype in dtypes.items()]  # C128 of .bin
    progress = byte_counter(report, "verify", sum(sizes))

    def get(key: str) -> Any:
        value = stored.tensors[key]
        progress(value.nbytes)
        return value

    if config is None:
        findings = [_describe_tensors(guess_method(specs), shapes), *tensor_checks.check_empty(shapes)]
        return [*findings, *tensor_checks.check_values(keys, shapes, get, None)]
    findings: list[Finding] = []
    if not reading.has_several:
        findings += tensor_checks.check_tensors(shapes, config, base_checks.base_family(base, known_base))
        if known_base is not None:
            findings += base_checks.check_base(shapes, config, known_base, base_name)
    findings += tensor_checks.check_dtypes(dtypes, config)
    findings += tensor_checks.check_values(keys, shapes, get, config)
    return [*findings, _describe_method(config, shapes), *_describe_scales(shapes, config)]


def guess_method(specs: Specs) -> str:
    """Return the method that the tensor names of a file without a configuration show; "" if none."""
    if any("lora_A" in key.split(".") or "lora_embedding_A" in key for key in specs):
        return "LORA"
    return "PROMPT_TUNING" if "prompt_embeddings" in specs else ""


# ---------------------------------------------------------------- reading


@dataclasses.dataclass(frozen=True)
class Reading:
    """Adapter files under PEFT's names, read with the fixes of the findings.

    Attributes:
        findings: the findings about the files, the configuration and the keys.
        config: the configuration; None if it cannot be read, even with fixes.
        keys: {PEFT's name: key of the file}; empty if the tensors are not those of an adapter.
        has_several: True for the tensors of several adapters.
    """

    findings: tuple[Finding, ...]
    config: Config | None = None
    keys: Mapping[str, str] = dataclasses.field(default_factory=dict[str, str])
    has_several: bool = False


def read_stored(stored: StoredAdapter) -> Reading:
    """Read the configuration and the keys of adapter files, with findings in place of errors."""
    if not stored.is_adapter:
        return Reading(stored.findings)
    config, about_config = config_checks.check_config(stored)
    findings = (*stored.findings, *about_config)
    if not stored.specs:
        return Reading(findings, config)
    passes = config is not None and config.peft_type == LYCORIS  # the names of its own program are right
    foreign = None if passes else stored_adapter.foreign_library(stored.specs, config is not None)
    if foreign is None and (config is None or key_names.is_known_method(config.peft_type)):
        foreign = stored_adapter.not_an_adapter(stored.specs, stored.source)
    if foreign is not None:
        others = [f for f in findings if f.code not in ("configuration-missing", foreign.code)]
        return Reading((*others, foreign), config)
    kind = guess_method(stored.specs) if config is None else config.peft_type
    names = NormalKeys({key: key for key in stored.specs}) if passes else key_names.normalize_keys(stored.specs, kind)
    left_out = left_out_by_peft(names, config)
    findings += tuple(_check_names(names, stored, left_out, has_config=config is not None))
    keys = {name: key for name, key in names.keys_of().items() if key not in left_out}
    return Reading(findings, config, keys, names.has_several)


def left_out_by_peft(names: NormalKeys, config: Config | None) -> set[str]:
    """Return the keys of a complete PEFT model's state dict that PEFT does not save, such as the base's weights."""
    if config is None or not names.owners:
        return set()
    return {
        key for key, name in names.names.items() if name is None or not tensor_checks.is_saved_by_peft(name, config)
    }


def _check_names(
    names: NormalKeys, stored: StoredAdapter, left_out: Collection[str], *, has_config: bool
) -> list[Finding]:
    """Return the findings about the keys."""
    if names.models:
        several = ", ".join(f"{name}.{PEFT_PREFIX}".lstrip(".") for name in names.models)
        text = f"the keys are those of several PEFT models: {several}"
        remedy = "keep the keys of one of them in the file"
        return [error("several-adapters", names.models, text, "one adapter in a file", remedy)]
    findings: list[Finding] = []
    mend = "jaxadapt repair renames them" if has_config else "add the configuration; jaxadapt repair then renames them"
    for rule, changed in names.steps:
        is_name = rule is key_names.ADAPTER_NAME
        if is_name and names.has_several:
            text = f"the keys contain the names of several adapters: {', '.join(names.adapters)}"
            remedy = f"save one in PyTorch: model.save_pretrained(folder, selected_adapters=[{names.adapters[0]!r}])"
            findings.append(error("several-adapters", names.adapters, text, "one adapter in a file", remedy))
            continue
        keys = [key for key, name in changed.items() if name is not None]
        done = [f"{len(keys)} keys: {rule.done}"]
        if is_name and left_out:
            done.append(f"{len(left_out)} tensors of the base left out, which PEFT does not save")
        changed = {**changed, **dict.fromkeys(left_out)}
        fix = Fix(tuple(done), names=changed) if has_config and not names.has_several else None
        found = rule.found.format(wrappers=", ".join(key_names.wrappers_in(keys)), adapter="".join(names.adapters))
        text = f"{len(keys)} of {len(names.names)} keys {found}, such as {keys[0]}"
        findings.append((warning if is_name else error)(rule.code, keys, text, rule.expected, mend, fix))
    duplicates = key_names.find_duplicates({k: name for k, name in names.names.items() if k not in left_out})
    if duplicates and not names.has_several:
        findings.append(_duplicate(duplicates, stored, has_config=has_config))
    return findings


def _duplicate(duplicates: Mapping[str, Sequence[str]], stored: StoredAdapter, *, has_config: bool) -> Finding:
    equal = has_config and all(_are_equal(keys, stored) for keys in duplicates.values())
    name, keys = next(iter(duplicates.items()))
    again = {key: None for keys in duplicates.values() for key in keys[1:]}
    done = f"{len(duplicates)} tensors that were stored twice with equal values kept once"
    return error(
        "duplicate",
        duplicates,
        f"{len(duplicates)} tensors are stored twice: {name} as {' and '.join(keys)}, with"
        f" {'equal' if equal else 'different'} values",
        "each tensor once",
        "jaxadapt repair keeps one" if equal else "remove the wrong one of each",
        Fix((done,), names=again) if equal else None,
    )


def _are_equal(keys: Sequence[str], stored: StoredAdapter) -> bool:
    """Return True if tensors have equal shapes, dtypes and bytes."""
    specs = stored.specs or {}
    first = stored.tensors[keys[0]].tobytes()
    return len({specs[key] for key in keys}) == 1 and all(stored.tensors[key].tobytes() == first for key in keys[1:])


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
            tensors, done = _apply_fixes(stored)
            if tensors is None:
                lines = [f"{found.found}; {found.remedy}" for found in _problems(path)]
                raise MismatchError(f"{os.fspath(path)}: cannot be repaired with certainty:\n" + paths.bullets(lines))
            if not done:
                return Repaired(None, (), _problems(path))
            _require_free(target, path)
            is_same = _is_same(target, path)
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


def _require_free(target: str | os.PathLike[str], path: str | os.PathLike[str]) -> None:
    """Raise `FileError` if another adapter is in the folder to write to."""
    place = location.to_location(target)
    names = (hub.CONFIG, *hub.WEIGHTS)
    if not _is_same(target, path) and any(location.exists(place / name) for name in names):
        raise FileError(
            f"{os.fspath(target)}: cannot write the repaired adapter here: the folder contains an adapter; choose"
            " another folder with out="
        )


def _problems(path: str | os.PathLike[str]) -> tuple[Finding, ...]:
    return tuple(found for found in verify(path) if found.severity != "note")


def _apply_fixes(stored: StoredAdapter) -> tuple[PeftTensors | None, tuple[str, ...]]:
    """Return the adapter with the fixes of all findings, and a sentence for each; None if it has no certain reading."""
    reading = read_stored(stored)
    fixes = [found.fix for found in reading.findings if found.fix is not None]
    uncertain = any(found.code == "duplicate" and found.fix is None for found in reading.findings)
    if reading.config is None or not reading.keys or reading.has_several or uncertain:
        return None, ()
    names: dict[str, str | None] = {key: key for key in stored.specs or {}}
    for fix in fixes:
        names |= fix.names
    keys = {name: key for key, name in names.items() if name is not None}
    if key_names.normalize_keys(keys, reading.config.peft_type).steps:
        return None, ()  # keys with two readings, such as a module that is called lora_A
    tensors = PeftTensors(reading.config, rename(stored.tensors, keys), stored.source, stored.base)
    return tensors, tuple(sentence for fix in fixes for sentence in fix.done)


@contextlib.contextmanager
def open_repaired(path: str | os.PathLike[str]) -> Generator[PeftTensors]:
    """Open an adapter like `folder.open_adapter`, with every certain repair, and warn of each.

    A file that no repair helps raises the error that `open_adapter` raises.
    """
    with contextlib.ExitStack() as stack:
        tensors, done = None, ()
        with contextlib.suppress(FileError, FormatError):
            tensors, done = _apply_fixes(stack.enter_context(open_stored(path, no_report)))
        if tensors is None or not done:
            yield stack.enter_context(folder.open_adapter(path))
            return
        warn(f"{os.fspath(path)}: repaired while reading; the files are unchanged:\n" + paths.bullets(done))
        yield tensors
