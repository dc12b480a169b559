"""One training step read back from where `step_files` has put it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxadapt.core.errors import FormatError
from jaxadapt.core.progress import Report, byte_counter, no_report
from jaxadapt.persistence import run_folder
from jaxadapt.storage import safetensors
from jaxadapt.storage.dtypes import numpy_dtype
from jaxadapt.storage.location import Place
from jaxadapt.training.checkpoint.snapshot import PARTS, Snapshot, is_committed, is_key, is_on_device


@dataclasses.dataclass(frozen=True)
class StoredStep:
    """A step as it lies on disk, without its arrays.

    Args:
        metrics: as given to `save`.
        taken: everything but the arrays.
        specs: `{name: (shape, dtype name)}` of the arrays.
        odd: the dtypes of arrays that safetensors has no type for; they are stored as bytes.
    """

    path: Place
    metrics: dict[str, float]
    taken: Snapshot
    specs: dict[str, tuple[tuple[int, ...], str]]
    odd: dict[str, str]


def read_stored_step(path: Place) -> StoredStep:
    """What a step holds, from its header. Raises `FileError` or `FormatError`."""
    header = safetensors.read_header(path)
    specs = {k: (t.shape, numpy_dtype(t.dtype).name) for k, t in header.tensors.items()}
    document = run_folder.read_document(path, header)
    for name, dtype in document["odd"].items():
        specs[name] = (specs[name][0][:-1], dtype)
    return StoredStep(path, document["metrics"], Snapshot.from_json(document, str(path)), specs, document["odd"])


def model_alone(step: StoredStep) -> StoredStep:
    """The same step as if nothing but the model had been saved."""

    def held(name: str) -> bool:
        return name.partition("/")[0] not in PARTS

    taken = dataclasses.replace(
        step.taken,
        values={name: value for name, value in step.taken.values.items() if held(name)},
        keys={name: kind for name, kind in step.taken.keys.items() if held(name)},
        hosts=[name for name in step.taken.hosts if held(name)],
        plain={},
    )
    specs = {name: spec for name, spec in step.specs.items() if held(name)}
    return dataclasses.replace(step, taken=taken, specs=specs)


def read_step_arrays(step: StoredStep, wanted: Mapping[str, Any], report: Report = no_report) -> dict[str, Any]:
    """The arrays of a step: each with the sharding of its example, a numpy array where the example is None.

    `report` is told of ("load", bytes, bytes in all); of an array that is spread over devices when its part is here.

    Raises `FileError` or `FormatError`.
    """
    try:
        with safetensors.open_tensors(step.path) as file:
            more = byte_counter(report, "load", sum(map(file.nbytes, wanted)))
            return _read_file(file, step, wanted, more)
    except KeyError as error:
        raise FormatError(f"{step.path}: it was replaced while it was read ({error} is gone); read it again") from error


def _spread(like: Any) -> bool:
    return is_committed(like) and not is_key(like) and len(like.sharding.device_set) > 1


def _read_file(
    file: safetensors.TensorFile, step: StoredStep, wanted: Mapping[str, Any], more: Callable[[int], None]
) -> dict[str, Any]:
    spread = dict.fromkeys(name for name, like in wanted.items() if _spread(like) and name not in step.odd)
    host: dict[str, Any] = file.read_many((name for name in wanted if name not in spread), more)
    for name, dtype in step.odd.items():
        if name in host:
            shape = step.specs[name][0]
            host[name] = np.frombuffer(host[name].tobytes(), jnp.dtype(dtype)).reshape(shape)
    onto = [n for n, like in wanted.items() if n in host and is_on_device(like) and not _spread(like)]
    where = [wanted[n].sharding if is_committed(wanted[n]) else None for n in onto]
    placed = jax.device_put([host[n] for n in onto], where) if onto else []
    out: dict[str, Any] = {**host, **dict(zip(onto, placed, strict=True))}
    for name in spread:
        out[name] = _by_shard(wanted[name], functools.partial(file.read_slice, name))
        more(file.nbytes(name))
    for name in host.keys() & step.odd.keys():
        if _spread(wanted[name]):
            out[name] = _by_shard(wanted[name], host[name].__getitem__)
    return {name: out[name][()] if isinstance(wanted[name], np.generic) else out[name] for name in wanted}


def _by_shard(like: Any, get: Callable[[Any], np.ndarray]) -> jax.Array:
    read: dict[str, np.ndarray] = {}  # replicas are read once

    def part(index: Any) -> np.ndarray:
        key = str(index)
        if key not in read:
            read[key] = get(index)
        return read[key]

    return jax.make_array_from_callback(tuple(like.shape), like.sharding, part)
