"""The folder of a training run: its steps, their metrics and the best step. Reads names and headers only, without JAX.

step-000000100.safetensors     its header contains, as JSON, all values that are not arrays
"""

from __future__ import annotations

import json
import math
import operator
import os
import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxadapt.core.errors import ConfigError, FileError, FormatError, raise_as, warn
from jaxadapt.storage import location, safetensors
from jaxadapt.storage.local_files import file_error

NAME = re.compile(r"step-(\d{9,18})\.safetensors")
META = "jaxadapt_step"
CRC = "jaxadapt_crc32"
"""The CRCs in a step's header, each of 8 hexadecimal digits: of the header (`head_crc`), and of each array by name."""
SCHEMA = 1


class StepRecord(NamedTuple):
    """The number of a step, with the metrics and the objective stored in it.

    Args:
        step: the number.
        metrics: as given to `save`.
        objective: `{"minimize": metric}` or `{"maximize": metric}`, as given to its manager; empty if none was given.
        best: the number and the metric of the best step when this one was saved; None without an objective.
    """

    step: int
    metrics: dict[str, float]
    objective: dict[str, str]
    best: tuple[int, float] | None


class RunFolder:
    """The steps in the folder of one run.

    Args:
        folder: a path, or an address of an object store.
        minimize, maximize: the metric that selects the best step; only one of the two.

    Raises `ConfigError` if both are given.
    """

    def __init__(
        self, folder: str | os.PathLike[str], *, minimize: str | None = None, maximize: str | None = None
    ) -> None:
        if minimize is not None and maximize is not None:
            raise ConfigError(f"minimize={minimize!r} and maximize={maximize!r}: give only one of the two")
        self.folder: location.Location = location.absolute(location.to_location(folder))
        if isinstance(self.folder, location.Address):
            self.folder.store()  # a missing package raises here, not in the background
        given = {"minimize": minimize, "maximize": maximize}
        self._own_objective = {mode: metric for mode, metric in given.items() if metric is not None}
        self._said: dict[tuple[location.Location, object], StepRecord] = {}

    @property
    def steps(self) -> list[int]:
        """The steps that can be restored, ascending."""
        return list(self._list_steps())

    @property
    def latest(self) -> int | None:
        """The last step; None if there is none."""
        return max(self.steps, default=None)

    @property
    def objective(self) -> dict[str, str]:
        """The criterion for the best step: `{"minimize": metric}` or `{"maximize": metric}`; empty if unknown.

        By default the objective of the `CheckpointManager` that saved the steps, from the newest step that stores it.
        """
        return self._find_objective(self._list_steps())

    @property
    def best(self) -> int | None:
        """The step with the best metric by `objective` (the later of equals); None if no step has the metric.

        Warns if a better step was saved and is deleted. Raises `ConfigError` if neither `minimize` nor `maximize` was
        given, now or when the steps were saved.
        """
        paths = self._list_steps()
        if not (objective := self._find_objective(paths)):
            raise ConfigError(
                "best: no objective is known; pass the name of a metric as minimize= (--minimize) or maximize="
            )
        ranked = self._rank_steps(paths)
        best = next((step for step in ranked if step in paths), None)
        first = next(iter(ranked), None)
        if first is not None and first != best:
            (metric,) = objective.values()
            warn(
                f"{self.folder}: the best step that was saved, {first} ({metric} {ranked[first]:g}), is deleted; the"
                f" best of those left is {best}. With keep=, keep_best=1 keeps the best step"
            )
        return best

    def find_step(self, step: int | str | None, problem: str = "") -> int:
        """Return the number of a step: a number, "best", "latest" or None, which is the latest too.

        Raises `FileError`, which begins with `problem`, if there is no such step; `ConfigError` for any other value.
        """
        number = self.best if step == "best" else self.latest if step in (None, "latest") else step_number(step)
        if number is None:
            found = (
                f"no step has the metric {', '.join(self.objective.values())!r}"
                if step == "best" and self.steps
                else "no checkpoint found"
            )
            raise FileError(f"{self.folder}: {problem}{found}")
        return number

    def metrics(self, step: int) -> dict[str, float]:
        """Return the metrics saved with a step. Raises `FileError` if there is no such step."""
        number = step_number(step)
        return dict(self._read_record(number, self._path(number)).metrics)

    def _list_steps(self) -> dict[int, location.Location]:
        """Return {step: path} of the steps that count, ascending."""
        return list_steps(self.folder)

    def _find_objective(self, paths: Mapping[int, location.Location]) -> dict[str, str]:
        """Return the objective: this object's own, else that of the newest step that stores one."""
        if self._own_objective:
            return self._own_objective
        records = (self._read_record_if_present(step, path) for step, path in sorted(paths.items(), reverse=True))
        return next((record.objective for record in records if record is not None and record.objective), {})

    def _read_record(self, step: int, path: location.Location) -> StepRecord:
        """Read a step's metrics and objective from its header, once for each version of the file."""
        key = (path, location.content_version(path))
        if key not in self._said:
            document = read_document(path, safetensors.read_header(path))
            best = document.get("best")
            self._said[key] = StepRecord(
                step, document["metrics"], document.get("objective", {}), None if best is None else (best[0], best[1])
            )
        return self._said[key]

    def _read_record_if_present(self, step: int, path: location.Location) -> StepRecord | None:
        """Call `_read_record`; return None if a save in another thread has deleted the step since it was listed."""
        try:
            return self._read_record(step, path)
        except FileError:
            if location.exists(path):
                raise
            return None

    def _rank_steps(self, paths: Mapping[int, location.Location]) -> dict[int, float]:
        """Return `{step: metric}`, best first, of the given steps and of the best ones that they record."""
        objective = self._find_objective(paths)
        ((mode, name),) = objective.items()
        found = ((step, self._read_record_if_present(step, path)) for step, path in paths.items())
        records = {step: record for step, record in found if record is not None}
        values = {step: record.metrics.get(name, math.nan) for step, record in records.items()}
        recorded = dict(r.best for r in records.values() if r.best is not None and r.objective == objective)
        return _rank_values(recorded | values, mode)

    def _path(self, step: int) -> location.Location:
        paths = self._list_steps()
        if step in paths:
            return paths[step]
        # On a network file system the listing may be a minute old and lack new steps of other processes.
        if location.exists(step_path(self.folder, step)):
            return step_path(self.folder, step)
        raise FileError(f"{self.folder}: there is no step {step}; found {list(paths) or 'none'}")


def make_record(
    step: int, metrics: Mapping[str, Any], objective: dict[str, str], best: Sequence[Any] | None
) -> StepRecord:
    """Return the record of a new step; `best` is the number and the metric of the best step before it.

    Warns of metrics without the one that decides. Raises `ConfigError` for a metric that is no number.
    """
    floats: dict[str, float] = {}
    for name, value in metrics.items():
        with raise_as(ConfigError, f"metrics: {name}: expected a number", TypeError, ValueError, OverflowError):
            floats[str(name)] = float(value)
    values = {} if best is None else {int(best[0]): float(best[1])}
    for mode, metric in objective.items():
        if floats and metric not in floats:
            warn(f"metrics: step {step} has {', '.join(floats)}, and not {metric}, which decides what step is best")
        values = _rank_values({**values, step: floats.get(metric, math.nan)}, mode)
    return StepRecord(step, floats, objective, next(iter(values.items()), None))


def _rank_values(values: Mapping[int, float], mode: str) -> dict[int, float]:
    """Return the values of steps without NaNs, the best first and the later of equals first."""
    sign = 1 if mode == "minimize" else -1
    known = {step: value for step, value in values.items() if not math.isnan(value)}
    return dict(sorted(known.items(), key=lambda item: (sign * item[1], -item[0])))


def step_number(step: Any) -> int:
    """Return a step as an int. Raises `ConfigError` if it is not a nonnegative integer."""
    with raise_as(
        ConfigError, "step: expected an integer, or 'best' or 'latest' to restore", TypeError,
        advice="; call save(step, model) or restore(model, step)",
    ):  # fmt: skip
        number = operator.index(step)
    if not 0 <= number < 10**18:
        raise ConfigError(f"step: expected 0 or more, found {number}")
    return number


def step_path(folder: location.Location, step: int) -> location.Location:
    """Return a step's path. The number is padded, so that names sort like numbers."""
    return folder / f"step-{step:0>9}.safetensors"


def number_in(name: str) -> int | None:
    """Return the step of a file's name; None if the file is no step."""
    match = NAME.fullmatch(name)
    return None if match is None else int(match[1])


def list_steps(folder: location.Location) -> dict[int, location.Location]:
    """Return {step: path} of the complete steps in a folder, ascending."""
    try:
        names = [entry.name for entry in folder.iterdir()]
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise file_error("read", str(folder), error) from error
    return dict(sorted({n: folder / name for name in names if (n := number_in(name)) is not None}.items()))


def head_crc(document: str, layout: Mapping[str, tuple[str, Sequence[int]]]) -> str:
    """Return the CRC-32 of a step's document and of its arrays' names, dtypes and shapes, in hexadecimal digits."""
    lines = [f"{name} {dtype} {list(shape)}" for name, (dtype, shape) in sorted(layout.items())]
    return f"{zlib.crc32(chr(10).join([document, *lines]).encode()):08x}"


def check_document(path: location.Location, header: safetensors.Header, document: Mapping[str, Any]) -> dict[str, int]:
    """Return the CRC of each array of a step by name; none of a step of older versions, which stored none.

    Raises `FormatError` if the header is not the one that was written, or if the step has another number.
    """
    stored = header.metadata.get(CRC)
    if stored is None and "step" not in document:
        return {}
    layout = {name: (info.dtype, info.shape) for name, info in header.tensors.items()}
    expected = head_crc(header.metadata[META], layout)
    if stored is None or stored[:8] != expected or not re.fullmatch(rf"([0-9a-f]{{8}}){{{len(layout) + 1}}}", stored):
        raise FormatError(f"{path}: its header is damaged (CRC-32); restore another step")
    if document.get("step") != number_in(path.name):
        raise FormatError(
            f"{path}: contains step {document.get('step')}, so the file was renamed or replaced; restore another step"
        )
    return array_crcs(header)


def array_crcs(header: safetensors.Header) -> dict[str, int]:
    """Return the CRC of each array that a step's header contains, by name."""
    stored = header.metadata.get(CRC, "")
    found = [int(stored[i : i + 8], 16) for i in range(8, len(stored), 8)]
    return dict(zip(sorted(header.tensors), found, strict=False))


def read_document(path: location.Location, header: safetensors.Header) -> dict[str, Any]:
    """Return the JSON document in a step's header, which stores all but the arrays. Raises `FormatError`."""
    with raise_as(FormatError, f"{path}: the metadata {META!r} of its header is damaged", ValueError, RecursionError):
        document = json.loads(header.metadata.get(META, "null"))
    if not isinstance(document, dict):
        raise FormatError(f"{path}: not a training checkpoint of jaxadapt: no {META!r} in its header")
    if document.get("schema") != SCHEMA:
        raise FormatError(
            f"{path}: expected schema {SCHEMA}, found {document.get('schema')!r}; a newer version of"
            " jaxadapt wrote it, or it is damaged"
        )
    # Older versions stored neither an objective nor the best step.
    match document.get("metrics"), document.get("odd"), document.get("objective", {}), document.get("best"):
        case dict(), dict(), dict(objective), None | [int(), int() | float()] if list(objective) in (
            [],
            ["minimize"],
            ["maximize"],
        ):
            return document
        case _:
            raise FormatError(f"{path}: the metadata {META!r} of its header is damaged")
