"""The file of one training step: one safetensors file on disk or in an object store, written durably and atomically.

If several processes share the arrays, each writes its own part of the file. Object stores do not support this: there
process 0 gathers all arrays and uploads one object.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxadapt.arrays import regions
from jaxadapt.arrays.tensor_source import can_hold, numpy_dtype
from jaxadapt.core.errors import FormatError, raise_listed
from jaxadapt.core.progress import Report, byte_counter, no_report
from jaxadapt.persistence import run_folder, save_adapter
from jaxadapt.persistence.run_folder import CRC, META, SCHEMA, StepRecord, head_crc
from jaxadapt.storage import atomic, local_files, safetensors, sharded_write
from jaxadapt.storage.local_files import file_error
from jaxadapt.storage.location import Address, Location
from jaxadapt.storage.sharded_write import Group, TensorPart
from jaxadapt.training.snapshot import PARTS, Snapshot, is_committed, is_key, is_on_device

# ---------------------------------------------------------------- step files


def is_multi_process(taken: Snapshot | None) -> bool:
    """Return True if several processes share the arrays, without starting a JAX backend if no array has done so."""
    has_arrays = taken is not None and any(isinstance(x, jax.Array) for x in taken.arrays.values())
    return (has_arrays or jax.distributed.is_initialized()) and jax.process_count() > 1


def is_leader() -> bool:
    """Return True in the process that does the work of all."""
    return not is_multi_process(None) or jax.process_index() == 0


# ---------------------------------------------------------------- copying to the host


def copy_to_host(arrays: Mapping[str, Any]) -> dict[str, Callable[[], np.ndarray]]:
    """Copy the current values off the device, and return functions that assemble each array.

    On the CPU, JAX arrays are views. This is safe, because JAX copies a donated array if a view of it exists
    (tests/training/test_checkpoint.py checks this). Numpy arrays are copied, because the caller may write to them.
    """
    shards: dict[str, list[tuple[Any, jax.Array]]] = {}
    for name, leaf in arrays.items():  # start all transfers before waiting for the first
        if isinstance(leaf, jax.Array):
            devices = leaf.sharding.device_set
            shards[name] = [(None, leaf)] if len(devices) == 1 else _unique_shards(leaf)
            if next(iter(devices)).platform != "cpu":
                for _, shard in shards[name]:
                    shard.copy_to_host_async()
    values: dict[str, Callable[[], np.ndarray]] = {}
    for name, leaf in arrays.items():
        if name in shards:
            on_host = [(region, np.asarray(shard)) for region, shard in shards[name]]
            values[name] = functools.partial(_assemble, leaf.shape, on_host)
        else:
            values[name] = functools.partial(np.asarray, np.array(leaf))
    return values


def _unique_shards(leaf: jax.Array) -> list[tuple[Any, jax.Array]]:
    """Return shards that cover an array, each with its region; None is the full region."""
    if leaf.is_fully_replicated:
        return [(None, leaf.addressable_data(0))]
    indices = save_adapter.addressable_indices(leaf.sharding, leaf.shape)
    return [(region, leaf.addressable_data(index)) for region, index in indices.items()]


def _assemble(shape: tuple[int, ...], shards: list[tuple[Any, np.ndarray]]) -> np.ndarray:
    if shards[0][0] is None:
        return shards[0][1]
    array = np.empty(shape, shards[0][1].dtype)
    for region, shard in shards:
        array[regions.to_slices(region)] = shard
    return array


# ---------------------------------------------------------------- writing


def write_step(
    path: Location,
    taken: Snapshot,
    record: StepRecord,
    values: Mapping[str, Callable[[], np.ndarray]],
    report: Report,
) -> None:
    """Write a step as one file, durably and atomically. The functions in `values` return the arrays."""
    specs, document = _describe_file(path, taken, record)

    def get(name: str) -> np.ndarray:
        value = values[name]()
        return _as_bytes(value) if name in document["odd"] else value

    def compute_crcs() -> dict[str, int]:
        return {name: local_files.checksum(safetensors.little_bits(get(name))) for name in specs}

    crcs = local_files.start(compute_crcs)
    count = byte_counter(report, "save", sum(dtype.itemsize * math.prod(shape) for dtype, shape in specs.values()))
    with atomic.open_replacement(path) as writer:
        safetensors.write_to(writer, specs, get, _make_metadata(document, specs), progress=count)
        _write_crcs(writer, crcs.result())


def _make_metadata(document: Mapping[str, Any], specs: _Specs) -> dict[str, str]:
    """Return the metadata of a step's file, with zeros for the CRCs of its arrays."""
    text = json.dumps(document)
    return {META: text, CRC: head_crc(text, safetensors.named_specs(specs)) + "0" * 8 * len(specs)}


def _write_crcs(writer: atomic.Writer, crcs: Mapping[str, int]) -> None:
    """Write the CRCs of the arrays in place of the zeros. A header begins with the metadata, sorted by key."""
    offset = 8 + len('{"__metadata__":{"') + len(CRC) + len('":"') + 8
    text = "".join(f"{crcs[name]:08x}" for name in sorted(crcs)).encode()
    atomic.write_at(writer.fd, memoryview(text), offset, writer.path)


_Specs = dict[str, tuple[np.dtype[Any], tuple[int, ...]]]


def _describe_file(path: Location, taken: Snapshot, record: StepRecord) -> tuple[_Specs, dict[str, Any]]:
    """Return the layout of a step's file, and its document, whose "odd" has the dtypes of arrays stored as bytes."""
    specs: _Specs = {}
    byte_dtypes: dict[str, str] = {}
    for name, leaf in taken.arrays.items():
        dtype, shape = np.dtype(leaf.dtype), tuple(leaf.shape)
        if not can_hold(dtype):
            byte_dtypes[name] = dtype.name
            dtype, shape = np.dtype("uint8"), (*shape, dtype.itemsize)
        specs[name] = (dtype, shape)
    head = {"schema": SCHEMA, "step": run_folder.number_in(path.name), **record._asdict()}
    return specs, {**head, "odd": byte_dtypes, **taken.to_json()}


def _as_bytes(value: np.ndarray) -> np.ndarray:
    value = value.astype(value.dtype.newbyteorder("="), copy=False)
    return np.frombuffer(value.tobytes(), np.uint8).reshape(*value.shape, value.dtype.itemsize)


def prepare_shared_write(
    path: Location, taken: Snapshot, record: StepRecord, timeout: float
) -> Callable[[Report], None]:
    """Copy this process's part of a step off the device, and return a function that writes it with the others.

    Every process must call this, in the same order as its other saves, and then call the result, in any thread:
    processes communicate without the devices. For an object store, which does not support partial writes, process 0
    gathers all arrays here and writes them.

    The result raises:
        FileError: a process failed, died or sees another file system. All processes raise it.
        MismatchError: values that every process holds differ between processes.
    """
    local = copy_to_host({name: leaf for name, leaf in taken.arrays.items() if save_adapter.is_local(leaf)})
    distributed = {name: leaf for name, leaf in taken.arrays.items() if name not in local}
    shared = not isinstance(path, Address)
    owned = save_adapter.owned_regions(distributed, jax.process_index()) if shared else _gather_on_leader(distributed)
    group = Group(path, timeout)

    def finish(report: Report) -> None:
        specs, document = _describe_file(path, taken, record)
        shares: dict[str, int] = {}
        digests = {name: sharded_write.digest(value()) for name, value in local.items()} | _json_digests(document)
        digests["step"] = path.name
        if group.index == 0:
            owned.update({name: {regions.full_region(value().shape): value()} for name, value in local.items()})

        def pieces() -> Iterator[TensorPart]:
            for name in sorted(owned):
                for region, values in save_adapter.join_regions(owned[name], tuple(taken.arrays[name].shape)):
                    if name in document["odd"]:
                        values = _as_bytes(values)
                        region = (*region, (0, values.shape[-1]))
                    yield TensorPart(name, specs[name][1], region, values)

        def compute_shares() -> dict[str, int]:
            computed: dict[str, int] = {}
            for key, shape, region, values in pieces():
                share = local_files.checksum_share(shape, safetensors.little_bits(values), region)
                computed[key] = computed.get(key, 0) ^ share
            return computed

        computing = local_files.start(compute_shares)

        def parts() -> Iterator[TensorPart]:
            yield from pieces()
            shares.update(computing.result())

        def commit(put: sharded_write.Put) -> None:
            with atomic.open_replacement(path) as writer:
                put(writer, _make_metadata(document, specs))
                nbytes = {name: dtype.itemsize * math.prod(shape) for name, (dtype, shape) in specs.items()}
                _write_crcs(
                    writer, {name: local_files.join_shares([shares.get(name, 0)], n) for name, n in nbytes.items()}
                )

        total = sum(x.nbytes for arrays in owned.values() for x in arrays.values())
        sharded_write.write(
            path, specs, lambda _: (total, parts()), group, commit, shared=shared, alike=digests, report=report,
            shares=shares,
        )  # fmt: skip

    return finish


def _gather_on_leader(arrays: Mapping[str, Any]) -> dict[str, dict[regions.Region, np.ndarray]]:
    """Gather full arrays one at a time, and keep them in process 0 only."""
    gathered: dict[str, dict[regions.Region, np.ndarray]] = {}
    for name in sorted(arrays):
        value = save_adapter.gather_array(arrays[name])
        if jax.process_index() == 0:
            gathered[name] = {regions.full_region(value.shape): value}
    return gathered


def _json_digests(document: Mapping[str, Any]) -> dict[str, str]:
    """Return a digest of each value of the document, by name."""
    items = {part: values if isinstance(values, dict) else {"": values} for part, values in document.items()}
    return {
        f"{part} {name}".strip(): sharded_write.digest(json.dumps(value))
        for part, values in items.items()
        for name, value in values.items()
    }


def remove_step(path: Location) -> None:
    """Remove a step. Raise `FileError` if this fails."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise file_error("delete", str(path), error) from error


# ---------------------------------------------------------------- step reading


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
    return StoredStep(path, document["metrics"], Snapshot.from_json(document, str(path)), specs, document["odd"], crcs)


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
        with safetensors.TensorFile(step.path) as file:
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
        return [n for n in names if n in crcs and local_files.checksum(safetensors.little_bits(arrays[n])) != crcs[n]]

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
    shares = [local_files.checksum_share(shape, safetensors.little_bits(x), region) for region, x in shards.items()]
    return array, local_files.join_shares(shares, sum(x.nbytes for x in shards.values()))
