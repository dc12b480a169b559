"""Reading of one training step that `step_files` wrote."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxadapt.arrays import regions
from jaxadapt.core.errors import FormatError, raise_listed
from jaxadapt.core.progress import Report, byte_counter, no_report
from jaxadapt.persistence import run_folder
from jaxadapt.storage import checksum, local_files, safetensors
from jaxadapt.storage.location import Location
from jaxadapt.storage.strided import numpy_dtype
from jaxadapt.training.checkpoint.snapshot import PARTS, Snapshot, is_committed, is_key, is_on_device

_JOB_BYTES = 16 << 20


@dataclasses.dataclass(frozen=True)
class StoredStep:
    """A stored step without its arrays.

    Attributes:
        path: the file.
        metrics: the metrics given to `save`.
        snapshot: everything except the arrays.
        specs: `{name: (shape, dtype name)}` of the arrays.
        byte_dtypes: the dtypes of arrays that are stored as bytes, because safetensors has no type for them.
        crcs: the CRC-32 of each array by name; empty for a step of older versions.
    """

    path: Location
    metrics: dict[str, float]
    snapshot: Snapshot
    specs: dict[str, tuple[tuple[int, ...], str]]
    byte_dtypes: dict[str, str]
    crcs: dict[str, int]


def read_stored_step(path: Location) -> StoredStep:
    """Read and check the header of a step. Raise `FileError` or `FormatError` if this fails."""
    header = safetensors.read_header(path)
    specs = {k: (t.shape, numpy_dtype(t.dtype).name) for k, t in header.tensors.items()}
    document = run_folder.read_document(path, header)
    crcs = run_folder.check_document(path, header, document)
    for name, dtype in document["odd"].items():
        specs[name] = (specs[name][0][:-1], dtype)
    snapshot = Snapshot.from_json(document, str(path))
    return StoredStep(path, document["metrics"], snapshot, specs, document["odd"], crcs)


def select_model(step: StoredStep) -> StoredStep:
    """Return the step with the model only."""

    def is_model(name: str) -> bool:
        return name.partition("/")[0] not in PARTS

    snapshot = dataclasses.replace(
        step.snapshot,
        values={name: value for name, value in step.snapshot.values.items() if is_model(name)},
        keys={name: kind for name, kind in step.snapshot.keys.items() if is_model(name)},
        hosts=[name for name in step.snapshot.hosts if is_model(name)],
        plain={},
    )
    specs = {name: spec for name, spec in step.specs.items() if is_model(name)}
    return dataclasses.replace(step, snapshot=snapshot, specs=specs)


def read_step_arrays(step: StoredStep, wanted: Mapping[str, Any], report: Report = no_report) -> dict[str, Any]:
    """Read arrays of a step, each with the sharding of its example; a numpy array if the example is None.

    `report` is called with ("load", bytes read, total bytes). A sharded array is reported when the shards of this
    process are read.

    Raises:
        FileError: the file cannot be read.
        FormatError: an array is not the one that was saved, or the file was replaced meanwhile. A sharded array is
            checked if this process reads all of it.
    """
    try:
        with safetensors.open_tensors(step.path) as file:
            count = byte_counter(report, "load", sum(map(file.nbytes, wanted)))
            if run_folder.array_crcs(file.header) != step.crcs:
                raise KeyError(run_folder.CRC)
            return _read_file(file, step, wanted, count)
    except KeyError as error:
        raise FormatError(
            f"{step.path}: replaced by another save while it was read ({error}); read it again"
        ) from error


def _is_sharded(like: Any) -> bool:
    return is_committed(like) and not is_key(like) and len(like.sharding.device_set) > 1


def _read_file(
    file: safetensors.TensorFile, step: StoredStep, examples: Mapping[str, Any], count: Callable[[int], None]
) -> dict[str, Any]:
    sharded = dict.fromkeys(
        name for name, like in examples.items() if _is_sharded(like) and name not in step.byte_dtypes
    )
    host: dict[str, Any] = file.read_many((name for name in examples if name not in sharded), count)
    damaged = _find_damaged(host, step.crcs)
    for name, dtype in step.byte_dtypes.items():
        if name in host:
            shape = step.specs[name][0]
            host[name] = np.frombuffer(host[name].tobytes(), jnp.dtype(dtype)).reshape(shape)
    names = [n for n, like in examples.items() if n in host and is_on_device(like) and not _is_sharded(like)]
    shardings = [examples[n].sharding if is_committed(examples[n]) else None for n in names]
    on_device = jax.device_put([host[n] for n in names], shardings) if names else []
    arrays: dict[str, Any] = {**host, **dict(zip(names, on_device, strict=True))}
    for name in sharded:
        arrays[name], crc = _read_shards(examples[name], functools.partial(file.read_slice, name))
        damaged += [name] if name in step.crcs and crc not in (None, step.crcs[name]) else []
        count(file.nbytes(name))
    raise_listed(
        FormatError,
        f"{step.path}: these arrays are not the ones that were saved, since their CRC-32 differs. The file is damaged;"
        " restore another step:",
        damaged,
    )
    for name in host.keys() & step.byte_dtypes.keys():
        if _is_sharded(examples[name]):
            arrays[name], _ = _read_shards(examples[name], host[name].__getitem__)
    return {name: arrays[name][()] if isinstance(examples[name], np.generic) else arrays[name] for name in examples}


def _find_damaged(arrays: Mapping[str, np.ndarray], crcs: Mapping[str, int]) -> list[str]:
    """Return the names of arrays with another CRC than the stored one. Several threads compute them."""

    def find(names: list[str]) -> list[str]:
        return [n for n in names if n in crcs and checksum.checksum(safetensors.little_bits(arrays[n])) != crcs[n]]

    jobs = local_files.split_by_size(arrays, lambda name: arrays[name].nbytes, _JOB_BYTES)
    found = local_files.run_in_order((functools.partial(find, job) for job in jobs), len(jobs))
    return [name for each in found for name in each]


def _read_shards(like: Any, get: Callable[[Any], np.ndarray]) -> tuple[jax.Array, int | None]:
    """Return an array and its CRC; None if this process does not read all of it."""
    shards: dict[regions.Region, np.ndarray] = {}  # by region, so that replicas are read once
    shape = tuple(like.shape)

    def read_shard(index: Any) -> np.ndarray:
        region = regions.region_from_slices(index, shape)
        if region not in shards:
            shards[region] = get(index)
        return shards[region]

    array = jax.make_array_from_callback(shape, like.sharding, read_shard)
    if sum(x.size for x in shards.values()) != math.prod(shape):
        return array, None
    shares = [checksum.share(shape, safetensors.little_bits(x), region) for region, x in shards.items()]
    return array, checksum.join(shares, sum(x.nbytes for x in shards.values()))
