"""Repair an adapter's files where only one original is possible."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxadapt.adapters.peft_tensors import PeftTensors
from jaxadapt.core import paths
from jaxadapt.core.errors import FileError, FormatError, MismatchError, warn
from jaxadapt.core.progress import Progress, Report, no_report, reporter
from jaxadapt.persistence import folder, verify_folder
from jaxadapt.persistence.verification import config_checks, key_names, stored_adapter
from jaxadapt.persistence.verification.finding import Finding
from jaxadapt.persistence.verification.stored_adapter import StoredAdapter, open_stored
from jaxadapt.storage import hub, location

if TYPE_CHECKING:
    import numpy as np


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
    return tuple(f for f in verify_folder.verify(path) if f.severity != "note")


def _refusal(path: str | os.PathLike[str]) -> str:
    problems = [f for f in verify_folder.verify(path) if f.severity != "note"]
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
    if names.has_several or any(not verify_folder.are_equal(keys, stored) for keys in names.duplicates.values()):
        return None
    keys = verify_folder.readable_keys(names)
    if key_names.normalize_keys(keys, config.peft_type).faults:
        return None  # keys with two readings, such as a module that is called lora_A
    shapes = {name: specs[key][1] for name, key in keys.items()}
    kept = verify_folder.without_base(shapes, names, config)
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
