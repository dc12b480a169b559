"""Verify an adapter's files: their problems and main facts, as values.

path ──open_stored──► StoredAdapter ──checks of configuration, keys, tensors, values, base──► findings
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxadapt.adapters import key_names
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

if TYPE_CHECKING:
    import numpy as np


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
    name = base if isinstance(base, str | os.PathLike) else "the base"
    with reporter(progress) as report, open_stored(path, report) as stored:
        findings = list(stored.findings)
        if stored.is_adapter:
            family = base_checks.base_family(base, known_base)
            findings += _check_content(stored, known_base, os.fspath(name), family, report)
        if isinstance(base, str | os.PathLike) and stored.base and not isinstance(known_base, KeyMap):
            findings += base_checks.check_identity(stored.base, known_base or {}, base)
    return sorted(findings, key=lambda found: SEVERITIES.index(found.severity))


def _check_content(stored: StoredAdapter, base: Any, base_name: str, family: str, report: Report) -> list[Finding]:
    checked = config_checks.check_config(stored)
    config = checked.config
    if stored.specs is None:
        return [*checked.findings, *([] if config is None else [_describe_method(config, None)])]
    passes = config is not None and config.peft_type == LYCORIS  # the names of its own program are right
    foreign = None if passes else stored_adapter.foreign_library(stored.specs, config is not None)
    if foreign is None and (config is None or key_names.is_known_method(config.peft_type)):
        foreign = stored_adapter.not_an_adapter(stored.specs, stored.source)
    if foreign is not None:
        others = [f for f in checked.findings if f.code not in ("configuration-missing", foreign.code)]
        return [*others, foreign]
    if not stored.specs:
        return list(checked.findings)
    kind = config.peft_type if config is not None else guess_method(stored.specs)
    names = key_names.normalize_keys(stored.specs, kind, own_names=passes)
    findings = [*checked.findings, *_check_names(names, stored, has_config=config is not None)]
    keys = readable_keys(names)
    shapes = {name: stored.specs[key][1] for name, key in keys.items()}
    total = sum(_nbytes(stored.specs[key]) for key in keys.values())
    progress = byte_counter(report, "verify", total)

    def get(key: str) -> Any:
        value = stored.get(key)
        progress(value.nbytes)
        return value

    if config is None:
        findings.append(_describe_tensors(kind, shapes))
        return [*findings, *tensor_checks.check_empty(shapes), *tensor_checks.check_values(keys, shapes, get, None)]
    if not names.has_several:
        findings += tensor_checks.check_tensors(without_base(shapes, names, config), config, family)
        if base is not None:
            findings += base_checks.check_base(shapes, config, base, base_name)
    findings += tensor_checks.check_dtypes({name: stored.specs[key][0] for name, key in keys.items()}, config)
    findings += tensor_checks.check_values(keys, shapes, get, config)
    return [*findings, _describe_method(config, shapes), *_describe_scales(shapes, config)]


def _nbytes(spec: tuple[str, tuple[int, ...]]) -> int:
    return math.prod(spec[1]) * BITS.get(spec[0], 128) // 8  # C128, which only .bin files have


def guess_method(specs: Specs) -> str:
    """Return the method that the tensor names of a file without a configuration show; "" if none."""
    if any("lora_A" in key.split(".") or "lora_embedding_A" in key for key in specs):
        return "LORA"
    return "PROMPT_TUNING" if "prompt_embeddings" in specs else ""


def readable_keys(names: key_names.Names) -> dict[str, str]:
    """Return {PEFT's name: the first key of the file that has it}."""
    keys: dict[str, str] = {}
    for key, name in names.normal.items():
        if name is not None:
            keys.setdefault(name, key)
    return keys


def without_base(shapes: tensor_checks.Shapes, names: key_names.Names, config: Config) -> dict[str, tuple[int, ...]]:
    """Leave out the base's weights of a complete PEFT model's state dict, which PEFT does not save.

    A file of an adapter is returned as it is.
    """
    if not names.adapters:
        return dict(shapes)
    return {key: shape for key, shape in shapes.items() if tensor_checks.is_saved_by_peft(key, config)}


# ---------------------------------------------------------------- keys


_FAULTS: Mapping[str, tuple[str, str, str]] = {
    "wrappers": (
        "contain the names of modules that wrap others ({wrappers})",
        "the model's own names. With others, PEFT loads an adapter without effect",
        "wrapper-names",
    ),
    "no-prefix": (
        "lack the prefix base_model.model., which some exporters leave out",
        "base_model.model.<module>.<tensor>. Without the prefix, PEFT loads an adapter without effect",
        "prefix",
    ),
    "double-prefix": (
        "have the prefix base_model.model. more than once: a PEFT model was wrapped in a PEFT model",
        "the prefix once. With two, PEFT loads an adapter without effect",
        "prefix",
    ),
    "no-weight": (
        "end in lora_A or lora_B without .weight, as loralib names them",
        "lora_A.weight and lora_B.weight. With other names, PEFT loads an adapter without effect",
        "tensor-names",
    ),
}  # fmt: skip


def _check_names(names: key_names.Names, stored: StoredAdapter, *, has_config: bool) -> list[Finding]:
    """Return the findings about the keys."""
    if names.models:
        several = ", ".join(f"{name}.{PEFT_PREFIX}".lstrip(".") for name in names.models)
        text = f"the keys are those of several PEFT models: {several}"
        remedy = "keep the keys of one of them in the file"
        return [error("several-adapters", names.models, text, "one adapter in a file", remedy)]
    findings: list[Finding] = []
    mend = "jaxadapt repair renames them" if has_config else "add the configuration; jaxadapt repair then renames them"
    for fault, (found, expected, code) in _FAULTS.items():
        keys = names.faults.get(fault, ())
        if keys:
            found = found.format(wrappers=", ".join(key_names.wrappers_in(keys)))
            text = f"{len(keys)} of {len(names.normal)} keys {found}, such as {keys[0]}"
            findings.append(error(code, keys, text, expected, mend, repairable=has_config))
    if len(names.adapters) > 1:
        findings.append(
            error(
                "several-adapters",
                names.adapters,
                f"the keys contain the names of several adapters: {', '.join(names.adapters)}",
                "one adapter in a file",
                f"save one in PyTorch: model.save_pretrained(folder, selected_adapters=[{names.adapters[0]!r}])",
            )
        )
    elif names.adapters:
        keys = names.faults["adapter-name"]
        findings.append(
            warning(
                "adapter-name",
                keys,
                f"{len(keys)} keys contain the adapter's name {names.adapters[0]!r}, such as"
                f" {keys[0]}: the state dict of a complete PEFT model",
                "keys without it. PEFT accepts the name, other programs do not",
                mend,
                repairable=has_config,
            )
        )
    if names.duplicates and not names.has_several:
        equal = has_config and all(are_equal(keys, stored) for keys in names.duplicates.values())
        name, keys = next(iter(names.duplicates.items()))
        findings.append(
            error(
                "duplicate",
                names.duplicates,
                f"{len(names.duplicates)} tensors are stored twice: {name} as"
                f" {' and '.join(keys)}, with {'equal' if equal else 'different'} values",
                "each tensor once",
                "jaxadapt repair keeps one" if equal else "remove the wrong one of each",
                repairable=equal,
            )
        )
    return findings


def are_equal(keys: Sequence[str], stored: StoredAdapter) -> bool:
    """Return True if tensors have equal shapes, dtypes and bytes."""
    specs = stored.specs or {}
    if len({specs[key] for key in keys}) > 1:
        return False
    first = stored.get(keys[0]).tobytes()
    return all(stored.get(key).tobytes() == first for key in keys[1:])


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


class StoredTensors(Mapping[str, Any]):
    """Tensors of a file under PEFT's names, read on demand."""

    def __init__(self, keys: Mapping[str, str], get: Callable[[str], np.ndarray]) -> None:
        """Wrap `get`, which returns the tensor of a key; `keys` maps PEFT's names to the file's keys."""
        self._keys, self._get = keys, get

    def __getitem__(self, name: str) -> Any:
        return self._get(self._keys[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, name: object) -> bool:
        return name in self._keys  # Mapping.__contains__ would read the tensor


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
        with _open_plan(path, report) as plan:
            if plan is None:
                raise MismatchError(_refusal(path))
            if not plan.done:
                return Repaired(None, (), _remaining(path))
            _require_free(target, path)
            if not _is_same(target, path):
                folder.write(plan.tensors, target, progress=report)
                return Repaired(os.fspath(target), plan.done, _remaining(target))
            tensors = dataclasses.replace(plan.tensors, tensors=dict(plan.tensors.tensors))  # the file is replaced
        folder.write(tensors, target, progress=report)
    return Repaired(os.fspath(target), plan.done, _remaining(target))


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
    names = (folder.CONFIG, folder.WEIGHTS, folder.WEIGHTS_BIN)
    if not _is_same(target, path) and any(location.exists(place / name) for name in names):
        raise FileError(
            f"{os.fspath(target)}: cannot write the repaired adapter here: the folder contains an adapter; choose"
            " another folder with out="
        )


def _remaining(path: str | os.PathLike[str]) -> tuple[Finding, ...]:
    return tuple(f for f in verify(path) if f.severity != "note")


def _refusal(path: str | os.PathLike[str]) -> str:
    problems = [f for f in verify(path) if f.severity != "note"]
    lines = [f"{f.found}; {f.remedy}" for f in problems]
    return f"{os.fspath(path)}: cannot be repaired with certainty:\n" + paths.bullets(lines)


# ---------------------------------------------------------------- the plan


@dataclasses.dataclass(frozen=True)
class _Plan:
    tensors: PeftTensors
    done: tuple[str, ...]


@contextlib.contextmanager
def _open_plan(path: str | os.PathLike[str], report: Report) -> Generator[_Plan | None]:
    """Open an adapter with every certain repair; None if it is unreadable or no adapter."""
    with open_stored(path, report) as stored:
        yield _plan(stored)


def _plan(stored: StoredAdapter) -> _Plan | None:
    checked = config_checks.check_config(stored)
    config, specs = checked.config, stored.specs
    if not stored.is_adapter or config is None or not specs:
        return None
    if stored_adapter.foreign_library(specs, True) or stored_adapter.not_an_adapter(specs, stored.source):
        return None
    names = key_names.normalize_keys(specs, config.peft_type)
    if names.has_several or any(not are_equal(keys, stored) for keys in names.duplicates.values()):
        return None
    keys = readable_keys(names)
    if key_names.normalize_keys(keys, config.peft_type).faults:
        return None  # keys with two readings, such as a module that is called lora_A
    shapes = {name: specs[key][1] for name, key in keys.items()}
    kept = without_base(shapes, names, config)
    keys = {name: key for name, key in keys.items() if name in kept}
    done = [*checked.repairs, *_describe(names)]
    dropped = len(shapes) - len(kept) + sum(name is None for name in names.normal.values())
    if dropped:
        done.append(f"{dropped} tensors of the base left out, which PEFT does not save")
    return _Plan(PeftTensors(config, StoredTensors(keys, stored.get), stored.source, stored.base), tuple(done))


_DONE = {
    "wrappers": "{} keys: the names of wrapping modules removed",
    "adapter-name": "{} keys: the adapter's name removed",
    "no-prefix": "{} keys: the prefix base_model.model. added",
    "double-prefix": "{} keys: the repeated prefix base_model.model. removed",
    "no-weight": "{} keys: .weight added",
}


def _describe(names: key_names.Names) -> list[str]:
    done = [text.format(len(names.faults[fault])) for fault, text in _DONE.items() if fault in names.faults]
    if names.duplicates:
        done.append(f"{len(names.duplicates)} tensors that were stored twice with equal values kept once")
    return done


@contextlib.contextmanager
def open_repaired(path: str | os.PathLike[str]) -> Generator[PeftTensors]:
    """Open an adapter like `folder.open_adapter`, with every certain repair, and warn of each.

    A file that no repair helps raises the error that `open_adapter` raises.
    """
    with contextlib.ExitStack() as stack:
        try:
            plan = stack.enter_context(_open_plan(path, no_report))
        except (FileError, FormatError):
            plan = None
        if plan is None or not plan.done:
            yield stack.enter_context(folder.open_adapter(path))
            return
        warn(f"{os.fspath(path)}: repaired while reading; the files are unchanged:\n" + paths.bullets(plan.done))
        yield plan.tensors
