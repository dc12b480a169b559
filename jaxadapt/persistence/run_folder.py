"""What lies in the folder of a training run: its steps, their metrics, which is best. Names and headers only, no JAX.

step-000000100.safetensors     the JSON of everything that is no array is in its header
"""

from __future__ import annotations

import json
import math
import operator
import os
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxadapt.core.errors import ConfigError, FileError, FormatError
from jaxadapt.storage import location, safetensors
from jaxadapt.storage.local_files import file_error
from jaxadapt.storage.location import Place

NAME = re.compile(r"step-(\d{9,18})\.safetensors")
META = "jaxadapt_step"
SCHEMA = 1


class Said(NamedTuple):
    """What a step says for itself.

    Args:
        metrics: as given to `save`.
        objective: `{"minimize": metric}` or `{"maximize": metric}`, as its manager was told; empty if it was not.
    """

    metrics: dict[str, float]
    objective: dict[str, str]


class RunFolder:
    """The steps of one run, as they lie in its folder.

    Args:
        folder: a path, or an address of an object store.
        minimize, maximize: the metric that says which step is best; one of the two.

    Raises `ConfigError` if both are given.
    """

    def __init__(
        self, folder: str | os.PathLike[str], *, minimize: str | None = None, maximize: str | None = None
    ) -> None:
        if minimize is not None and maximize is not None:
            raise ConfigError(f"minimize={minimize!r} and maximize={maximize!r}: give one of the two")
        self.folder = location.absolute(location.to_location(folder))
        if isinstance(self.folder, location.Address):
            self.folder.store()  # a package that is missing shows here, not in the background
        self.minimize, self.maximize = minimize, maximize
        self._said: dict[tuple[Place, object], Said] = {}

    @property
    def steps(self) -> list[int]:
        """The steps that can be restored, ascending."""
        return list(self._found())

    @property
    def latest(self) -> int | None:
        """The last step; None if there is none."""
        return max(self.steps, default=None)

    @property
    def objective(self) -> dict[str, str]:
        """Which step is best: `{"minimize": metric}` or `{"maximize": metric}`; empty if nobody has said it.

        As given, or else as it was given to the `CheckpointManager` that saved the steps: the newest that says it.
        """
        return self._objective(self._found())

    @property
    def best(self) -> int | None:
        """The step with the best metric (of equals the later one), by `objective`; None if no step has it.

        Raises `ConfigError` if neither `minimize` nor `maximize` was given, now or when the steps were saved.
        """
        found = self._found()
        if not self._objective(found):
            raise ConfigError("which step is best? Give minimize= or maximize=, the name of a metric")
        return next(iter(self._ranked(found)), None)

    def metrics(self, step: int) -> dict[str, float]:
        """The metrics saved with a step. Raises `FileError` if there is no such step."""
        number = step_number(step)
        return dict(self._said_of(number, self._path(number)).metrics)

    def _found(self) -> dict[int, Place]:
        """The steps that count, ascending."""
        return list_steps(self.folder)

    @property
    def _own_objective(self) -> dict[str, str]:
        """What this object was told is best."""
        given = {"minimize": self.minimize, "maximize": self.maximize}
        return {mode: metric for mode, metric in given.items() if metric is not None}

    def _objective(self, found: Mapping[int, Place]) -> dict[str, str]:
        if self._own_objective:
            return self._own_objective
        said = (self._said_if_there(step, path) for step, path in sorted(found.items(), reverse=True))
        return next((one.objective for one in said if one is not None and one.objective), {})

    def _said_of(self, step: int, path: Place) -> Said:
        try:
            key = (path, location.content_version(path))
        except OSError as error:
            raise file_error("read", str(path), error) from error
        if key not in self._said:
            held = read_document(path, safetensors.read_header(path))
            self._said[key] = Said(held["metrics"], held.get("objective", {}))
        return self._said[key]

    def _said_if_there(self, step: int, path: Place) -> Said | None:
        """None if the step was deleted since it was listed: a save does so in another thread."""
        try:
            return self._said_of(step, path)
        except FileError:
            if path.exists():
                raise
            return None

    def _ranked(self, found: Mapping[int, Place]) -> list[int]:
        """Those of these steps that have the metric, best first."""
        ((mode, name),) = self._objective(found).items()
        sign = 1 if mode == "minimize" else -1
        values: dict[int, float] = {}
        for step, path in found.items():
            said = self._said_if_there(step, path)
            value = math.nan if said is None else said.metrics.get(name, math.nan)
            if not math.isnan(value):
                values[step] = sign * value
        return sorted(values, key=lambda step: (values[step], -step))

    def _path(self, step: int) -> Place:
        found = self._found()
        if step in found:
            return found[step]
        # On a network's file system the listing may be a minute old, which other processes have filled since.
        if location.exists(step_path(self.folder, step)):
            return step_path(self.folder, step)
        raise FileError(f"{self.folder}: there is no step {step}; found {list(found) or 'none'}")


def step_number(step: Any) -> int:
    """A step as an int, whatever integer it is. Raises `ConfigError` if it is none."""
    try:
        number = operator.index(step)
    except TypeError:
        raise ConfigError(
            f"step: expected an integer, found {type(step).__name__}; it is save(step, model) and restore(model, step)"
        ) from None
    if not 0 <= number < 10**18:
        raise ConfigError(f"step: expected 0 or more, found {number}")
    return number


def step_path(folder: Place, step: int) -> Place:
    """Where a step goes. Padded, so that names sort as numbers do."""
    return folder / f"step-{step:0>9}.safetensors"


def list_steps(folder: Place) -> dict[int, Place]:
    """`{step: path}` of the steps that are there, whole, in ascending order."""
    try:
        names = [entry.name for entry in folder.iterdir()]
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise file_error("read", str(folder), error) from error
    found: dict[int, Place] = {}
    for name in names:
        match = NAME.fullmatch(name)
        if match:
            found[int(match[1])] = folder / name
    return dict(sorted(found.items()))


def read_document(path: Place, header: safetensors.Header) -> dict[str, Any]:
    """What the header of a step says besides its arrays. Raises `FormatError`."""
    try:
        held = json.loads(header.metadata.get(META, "null"))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: the metadata {META!r} of its header is damaged: {error}") from error
    if not isinstance(held, dict):
        raise FormatError(f"{path}: not a training checkpoint of this library: it holds no {META!r}")
    if held.get("schema") != SCHEMA:
        raise FormatError(
            f"{path}: expected schema {SCHEMA}, found {held.get('schema')!r}; a newer version of this"
            " library wrote it, or it is damaged"
        )
    objective = held.get("objective", {})  # which steps of older versions do not say
    known = objective == {} or (isinstance(objective, dict) and list(objective) in (["minimize"], ["maximize"]))
    if not isinstance(held.get("metrics"), dict) or not isinstance(held.get("odd"), dict) or not known:
        raise FormatError(f"{path}: the metadata {META!r} of its header is damaged")
    return held
