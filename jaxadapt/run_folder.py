"""What lies in the folder of a training run: its steps, their metrics, which is best. Names and headers only, no JAX.

step-000000100.safetensors     the JSON of everything that is no array is in its header
"""

from __future__ import annotations

import json
import math
import operator
import os
import re
from typing import Any

from jaxadapt.codecs import places, safetensors
from jaxadapt.codecs.files import file_error
from jaxadapt.codecs.places import Place
from jaxadapt.errors import ConfigError, FileError, FormatError

NAME = re.compile(r"step-(\d{9,18})\.safetensors")
META = "jaxadapt_step"
SCHEMA = 1


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
        self.folder = places.absolute(places.at(folder))
        if isinstance(self.folder, places.Address):
            self.folder.store()  # a package that is missing shows here, not in the background
        self.minimize, self.maximize = minimize, maximize
        self._metrics: dict[tuple[Place, object], dict[str, float]] = {}

    @property
    def steps(self) -> list[int]:
        """The steps that can be restored, ascending."""
        return list(steps(self.folder))

    @property
    def latest(self) -> int | None:
        """The last step; None if there is none."""
        return max(self.steps, default=None)

    @property
    def best(self) -> int | None:
        """The step with the best metric (of equals the later one); None if no step has it.

        Raises `ConfigError` if neither `minimize` nor `maximize` was given.
        """
        if self.minimize is None and self.maximize is None:
            raise ConfigError("which step is best? Give minimize= or maximize=, the name of a metric")
        return next(iter(self._ranked()), None)

    def metrics(self, step: int) -> dict[str, float]:
        """The metrics saved with a step. Raises `FileError` if there is no such step."""
        return dict(self._metrics_of(self._path(step_number(step))))

    def _metrics_of(self, path: Place) -> dict[str, float]:
        key = (path, places.version(path))
        if key not in self._metrics:
            self._metrics[key] = document(path, safetensors.read_header(path))["metrics"]
        return self._metrics[key]

    def _ranked(self) -> list[int]:
        """The steps that have the metric, best first."""
        name, sign = (self.minimize, 1) if self.minimize is not None else (self.maximize, -1)
        values: dict[int, float] = {}
        for step, path in steps(self.folder).items():
            value = self._metrics_of(path).get(str(name), math.nan)
            if not math.isnan(value):
                values[step] = sign * value
        return sorted(values, key=lambda step: (values[step], -step))

    def _path(self, step: int) -> Place:
        found = steps(self.folder)
        if step in found:
            return found[step]
        # On a network's file system the listing may be a minute old, which other processes have filled since.
        if places.exists(place(self.folder, step)):
            return place(self.folder, step)
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


def place(folder: Place, step: int) -> Place:
    """Where a step goes. Padded, so that names sort as numbers do."""
    return folder / f"step-{step:0>9}.safetensors"


def steps(folder: Place) -> dict[int, Place]:
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


def document(path: Place, header: safetensors.Header) -> dict[str, Any]:
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
    if not isinstance(held.get("metrics"), dict) or not isinstance(held.get("odd"), dict):
        raise FormatError(f"{path}: the metadata {META!r} of its header is damaged")
    return held
