"""One step of a training run: its state as named arrays and plain values, its file, and the way back into a model.

    model, opt_state, rng, data ──take_snapshot──► {"adapter/default/q.kernel.lora_A": array, "opt_state/0/count": …}
                                ◄───fill_parts───

An adapter's arrays are named by their dotted paths, so that Linen and NNX use the same names. Every other part is a
pytree (an NNX object is replaced by its state) whose leaves are named by key paths.

The file is one safetensors file, written durably and atomically. If several processes share the arrays, each writes its
own part of the file. Object stores do not support this: there process 0 gathers all arrays and uploads one object.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import json
import math
import urllib.parse
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxadapt.adapters.adapter import Adapter, Recipe
from jaxadapt.arrays import regions
from jaxadapt.arrays.tensor_source import NAMES, numpy_dtype
from jaxadapt.core import paths
from jaxadapt.core.errors import (
    AttachError,
    FormatError,
    MismatchError,
    Report,
    byte_counter,
    no_report,
    raise_as,
    raise_listed,
)
from jaxadapt.models.carriers import DEFAULT, Carrier, Object, carrier, lora_carrier
from jaxadapt.persistence import run_folder, save_adapter
from jaxadapt.storage import atomic, local_files, location, safetensors, sharded_write

# ---------------------------------------------------------------- snapshot


PARTS = ("opt_state", "rng", "data")


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """The content of one checkpoint: arrays by name, and everything else as JSON.

    Attributes:
        arrays: arrays on the device; typed random keys as their key data. Of a stored step, (shape, dtype name).
        recipes: `{adapter name: Recipe.to_text()}`.
        guest: for a tree with LoRA leaves of another library, which are saved unchanged: its dialect, base shapes and
            scales.
        values: leaves that are not arrays, `{name: [type, JSON value]}`.
        keys: `{name: implementation}` of the arrays that are random keys.
        hosts: the names of the arrays that were numpy arrays.
        plain: `{part: structure}`; the structure is `[kind, …]` for a part of dicts, lists and tuples only, which can
            be rebuilt without an example, and None for other parts.
    """

    arrays: dict[str, Any]
    recipes: dict[str, str]
    guest: dict[str, Any]
    values: dict[str, Any]
    keys: dict[str, str]
    hosts: list[str]
    plain: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class StoredStep(Snapshot):
    """A step in its file, whose arrays are not read yet.

    Attributes:
        path: the file.
        metrics: the metrics given to `save`.
        byte_dtypes: the dtypes of arrays that are stored as bytes, because safetensors has no type for them.
        crcs: the CRC-32 of each array by name; empty for a step of older versions.
    """

    path: location.Location
    metrics: dict[str, float]
    byte_dtypes: dict[str, str]
    crcs: dict[str, int]


# ---------------------------------------------------------------- taking


def take_snapshot(model: Any, parts: Mapping[str, Any]) -> Snapshot:
    """Collect the training state of a model and of `parts`.

    Args:
        model: an NNX model or state, Linen variables, a tree of another library, or an `Adapter`.
        parts: `{part: value}`, each a pytree, an NNX object or None.

    Raises:
        AttachError: leaves cannot be saved; the message lists all of them.
    """
    held, problems = lora_carrier(model), list[str]()
    tree = held.foreign
    adapters = {name: held.extract(name) for name in adapter_names(held)} if tree is None else {}
    given = {part: value for part, value in parts.items() if value is not None}
    snapshot = Snapshot(
        arrays={},
        recipes={name: adapter.recipe.to_text() for name, adapter in adapters.items()},
        guest={}
        if tree is None
        else {
            "dialect": tree.dialect.name,
            "base": {path: list(shape) for path, shape in tree.base.items()},
            "stored": {leaf: float(number) for leaf, number in tree.stored.items()},
        },
        values={},
        keys={},
        hosts=[],
        plain={part: _plain_structure(value) for part, value in given.items()},
    )
    leaves = _name_leaves(tree.leaves if tree is not None else {}, adapters, {"model": held.rest(), **given})
    for name, leaf in leaves.items():
        _add_leaf(snapshot, name, leaf, problems)
    raise_listed(AttachError, "cannot save these values:", problems)
    return snapshot


def adapter_names(held: Carrier) -> list[str]:
    """Return the names of all adapters of a tree; ["default"] if there are no names."""
    return sorted(held.names()) or [DEFAULT]


def flatten(tree: Any) -> tuple[list[tuple[str, Any]], Any]:
    """Return `[(path, leaf)]` and the structure. Segments of paths are escaped, so that all paths differ."""
    pytree = carrier(tree).pytree()
    with raise_as(AttachError, "JAX cannot flatten this tree", ValueError):  # a dict has keys of several types
        leaves, structure = jax.tree_util.tree_flatten_with_path(pytree)
    named = [
        ("/".join(_quote(jax.tree_util.keystr((entry,), simple=True)) for entry in path), leaf) for path, leaf in leaves
    ]
    return named, structure


@functools.lru_cache(4096)  # an adapter has thousands of leaves but few names, and the training loop waits
def _quote(text: str) -> str:
    return urllib.parse.quote(text, safe=" ()[]',:")


def name_prefix(name: str) -> str:
    """Return the prefix of the names of one adapter's arrays."""
    return f"adapter/{_quote(name)}/"


def _name_leaves(
    guests: Mapping[str, Any], adapters: Mapping[str, Adapter], parts: Mapping[str, Any]
) -> dict[str, Any]:
    """Return `{name: leaf}` of a tree of another library, of adapters, and of the other parts of a training state.

    Raises `AttachError` if two leaves of a part have one path.
    """
    leaves = {f"guest/{path}": leaf for path, leaf in guests.items()}
    for name, adapter in adapters.items():
        leaves |= {name_prefix(name) + path: leaf for path, leaf in adapter.flat().items()}
    for part, tree in parts.items():
        named = [(f"{part}/{path}" if path else part, leaf) for path, leaf in flatten(tree)[0]]
        if len(dict(named)) < len(named):
            raise AttachError(f"{part}: two values have the same path; give the nodes of its pytrees distinct keys")
        leaves |= named
    return leaves


def is_key(leaf: Any) -> bool:
    """Return True if a leaf is an array of typed random keys."""
    if not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct) or isinstance(leaf.dtype, np.dtype):
        return False  # nearly all leaves have numpy dtypes, which are never keys; this avoids thousands of calls to JAX
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def is_on_device(leaf: Any) -> TypeGuard[Any]:
    """Return True if a leaf is a JAX array of numbers, concrete or abstract."""
    return isinstance(leaf, jax.Array | jax.ShapeDtypeStruct) and not is_key(leaf)


def is_committed(like: Any) -> bool:
    """Return True if an example leaf decides the devices of its value."""
    if isinstance(like, jax.ShapeDtypeStruct):
        return like.sharding is not None
    return isinstance(like, jax.Array) and bool(like.committed)


_CODECS: Mapping[type, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    bytes: (lambda leaf: base64.b64encode(leaf).decode(), base64.b64decode),
    complex: (lambda leaf: [leaf.real, leaf.imag], lambda pair: complex(*pair)),
    **{kind: (kind, kind) for kind in (bool, int, float, str)},
}
"""Of each type of leaves that are not arrays: the functions to JSON and back."""


def _add_leaf(snapshot: Snapshot, name: str, leaf: Any, problems: list[str]) -> None:
    if isinstance(leaf, Tracer):
        problems.append(f"{name}: traced; save outside jit, grad and vmap")
    elif isinstance(leaf, jax.Array) and leaf.is_deleted():
        problems.append(f"{name}: deleted, because it was donated to a jitted function")
    elif is_key(leaf):
        snapshot.keys[name] = str(jax.random.key_impl(leaf))
        snapshot.arrays[name] = jax.random.key_data(leaf)
    elif isinstance(leaf, jax.Array):
        snapshot.arrays[name] = leaf
    elif (
        isinstance(leaf, np.ndarray | np.generic)
        and leaf.dtype.kind not in "OSUMm"
        and not issubclass(leaf.dtype.type, np.void)
    ):  # the name of the dtype describes it fully, unlike those of objects, texts, dates and records
        snapshot.arrays[name] = leaf
        snapshot.hosts.append(name)
    elif (kind := bytes if isinstance(leaf, bytes) else type(leaf)) in _CODECS:
        snapshot.values[name] = [kind.__name__, _CODECS[kind][0](leaf)]
    else:
        problems.append(f"{name}: {type(leaf).__name__}; expected arrays, numbers, strings or bytes")


def _plain_structure(tree: Any) -> Any:
    """Return the structure of a tree of dicts, lists, tuples and leaves as JSON; None if it has other nodes."""
    if type(tree) is dict:
        inner = [[k, _plain_structure(v)] for k, v in tree.items()]
        return ["dict", inner] if all(type(k) in (str, int) and v is not None for k, v in inner) else None
    if type(tree) in (list, tuple):
        inner = [_plain_structure(v) for v in tree]
        return [type(tree).__name__, inner] if None not in inner else None
    if tree is None:
        return ["none"]
    return ["leaf"] if jax.tree_util.all_leaves([tree]) and not isinstance(carrier(tree), Object) else None


# ---------------------------------------------------------------- writing


def copy_to_host(arrays: Mapping[str, Any]) -> dict[str, Callable[[], np.ndarray]]:
    """Copy the current values off the device, and return functions that assemble each array.

    They join the shards of one array at a time, in the background. `np.asarray` of a sharded array would do this in the
    training loop, and JAX would keep the second copy as long as the array lives.

    Numpy arrays are copied, because the caller may write to them.
    """
    owned = {name: leaf if isinstance(leaf, jax.Array) else np.array(leaf) for name, leaf in arrays.items()}
    on_host = regions.to_host({name: regions.shards_of(leaf) for name, leaf in owned.items()})
    return {name: functools.partial(regions.assemble, parts, arrays[name].shape) for name, parts in on_host.items()}


def write_step(
    path: location.Location,
    taken: Snapshot,
    record: run_folder.StepRecord,
    values: Mapping[str, Callable[[], np.ndarray]],
    report: Report,
) -> None:
    """Write a step as one file, durably and atomically. The functions in `values` return the arrays."""
    specs, document = _describe_file(taken, record)

    def get(name: str) -> np.ndarray:
        return _as_bytes(values[name]()) if name in document["odd"] else values[name]()

    crcs = local_files.start(lambda: {n: local_files.checksum(safetensors.little_bits(get(n))) for n in specs})
    count = byte_counter(report, "save", sum(dtype.itemsize * math.prod(shape) for dtype, shape in specs.values()))
    with atomic.open_replacement(path) as writer:
        safetensors.write_to(writer, specs, get, _make_metadata(document, specs), progress=count)
        _write_crcs(writer, crcs.result())


def _make_metadata(document: Mapping[str, Any], specs: _Specs) -> dict[str, str]:
    """Return the metadata of a step's file, with zeros for the CRCs of its arrays."""
    text = json.dumps(document)
    return {
        run_folder.META: text,
        run_folder.CRC: run_folder.head_crc(text, safetensors.named_specs(specs)) + "0" * 8 * len(specs),
    }


def _write_crcs(writer: atomic.Writer, crcs: Mapping[str, int]) -> None:
    """Write the CRCs of the arrays in place of the zeros. A header begins with the metadata, sorted by key."""
    offset = 8 + len('{"__metadata__":{"') + len(run_folder.CRC) + len('":"') + 8
    text = "".join(f"{crcs[name]:08x}" for name in sorted(crcs)).encode()
    atomic.write_at(writer.fd, memoryview(text), offset, writer.path)


_Specs = dict[str, tuple[np.dtype[Any], tuple[int, ...]]]


def _describe_file(taken: Snapshot, record: run_folder.StepRecord) -> tuple[_Specs, dict[str, Any]]:
    """Return the layout of a step's file, and its document, whose "odd" has the dtypes of arrays stored as bytes."""
    specs: _Specs = {}
    byte_dtypes: dict[str, str] = {}
    for name, leaf in taken.arrays.items():
        dtype, shape = np.dtype(leaf.dtype), tuple(leaf.shape)
        if dtype.name not in NAMES:
            byte_dtypes[name] = dtype.name
            dtype, shape = np.dtype("uint8"), (*shape, dtype.itemsize)
        specs[name] = (dtype, shape)
    described = {name: value for name, value in vars(taken).items() if name != "arrays"}
    return specs, {"schema": run_folder.SCHEMA, **record._asdict(), "odd": byte_dtypes, **described}


def _as_bytes(value: np.ndarray) -> np.ndarray:
    value = value.astype(value.dtype.newbyteorder("="), copy=False)
    return np.frombuffer(value.tobytes(), np.uint8).reshape(*value.shape, value.dtype.itemsize)


def prepare_shared_write(
    path: location.Location, taken: Snapshot, record: run_folder.StepRecord, timeout: float
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
    shared = not isinstance(path, location.Address)
    owned = save_adapter.owned_regions(distributed, jax.process_index()) if shared else _gather_on_leader(distributed)
    group = sharded_write.Group(path, timeout)

    def finish(report: Report) -> None:
        specs, document = _describe_file(taken, record)
        shares: dict[str, int] = {}
        digests = {name: sharded_write.digest(value()) for name, value in local.items()} | {
            f"{part} {name}".strip(): sharded_write.digest(json.dumps(value))
            for part, values in document.items()
            for name, value in (values if isinstance(values, dict) else {"": values}).items()
        }
        if group.index == 0:
            owned.update(
                {name: {regions.full_region(taken.arrays[name].shape): value()} for name, value in local.items()}
            )

        def pieces() -> Iterator[sharded_write.TensorPart]:
            for name in sorted(owned):
                for region, values in save_adapter.join_regions(owned[name], tuple(taken.arrays[name].shape)):
                    if name in document["odd"]:
                        values = _as_bytes(values)
                        region = (*region, (0, values.shape[-1]))
                    yield sharded_write.TensorPart(name, specs[name][1], region, values)

        def compute_shares() -> dict[str, int]:
            computed: dict[str, int] = {}
            for key, shape, region, values in pieces():
                share = local_files.checksum_share(shape, safetensors.little_bits(values), region)
                computed[key] = computed.get(key, 0) ^ share
            return computed

        computing = local_files.start(compute_shares)

        def parts() -> Iterator[sharded_write.TensorPart]:
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
            path,
            specs,
            lambda _: (total, parts()),
            group,
            commit,
            shared=shared,
            alike=digests,
            report=report,
            shares=shares,
        )

    return finish


def _gather_on_leader(arrays: Mapping[str, Any]) -> dict[str, dict[regions.Region, np.ndarray]]:
    """Gather full arrays one at a time, and keep them in process 0 only."""
    gathered: dict[str, dict[regions.Region, np.ndarray]] = {}
    for name in sorted(arrays):
        value = save_adapter.gather_array(arrays[name])
        if jax.process_index() == 0:
            gathered[name] = {regions.full_region(value.shape): value}
    return gathered


# ---------------------------------------------------------------- step reading


_JOB_BYTES = 16 << 20


def read_stored_step(path: location.Location) -> StoredStep:
    """Read and check the header of a step. Raise `FileError` or `FormatError` if this fails."""
    header = safetensors.read_header(path)
    specs = {k: (t.shape, numpy_dtype(t.dtype).name) for k, t in header.tensors.items()}
    document = run_folder.read_document(path, header)
    crcs = run_folder.check_document(path, header, document)
    for name, dtype in document["odd"].items():
        specs[name] = (specs[name][0][:-1], dtype)
    kinds = {f.name: list if f.name == "hosts" else dict for f in dataclasses.fields(Snapshot) if f.name != "arrays"}
    if wrong := [name for name, kind in kinds.items() if not isinstance(document.get(name), kind)]:
        raise FormatError(f"{path}: not a checkpoint of jaxadapt: {', '.join(wrong)} missing or damaged")
    return StoredStep(
        specs,
        *(document[name] for name in kinds),
        path=path,
        metrics=document["metrics"],
        byte_dtypes=document["odd"],
        crcs=crcs,
    )


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


def _read_file(
    file: safetensors.TensorFile, step: StoredStep, examples: Mapping[str, Any], count: Callable[[int], None]
) -> dict[str, Any]:
    committed = {name: like for name, like in examples.items() if is_committed(like) and not is_key(like)}
    sharded = {name: like for name, like in committed.items() if len(like.sharding.device_set) > 1}
    whole = (name for name in examples if name not in sharded or name in step.byte_dtypes)
    host: dict[str, Any] = file.read_many(whole, count)
    damaged = _find_damaged(host, step.crcs)
    for name, dtype in step.byte_dtypes.items():
        if name in host:
            host[name] = np.frombuffer(host[name].tobytes(), jnp.dtype(dtype)).reshape(step.arrays[name][0])
    names = [name for name in host if is_on_device(examples[name]) and name not in sharded]
    shardings = [committed[name].sharding if name in committed else None for name in names]
    on_device = jax.device_put([host[n] for n in names], shardings) if names else []
    arrays: dict[str, Any] = {**host, **dict(zip(names, on_device, strict=True))}
    for name, like in sharded.items():
        if name in host:  # stored as bytes, so it was read whole
            arrays[name], _ = _read_shards(like, host[name].__getitem__)
            continue
        arrays[name], crc = _read_shards(like, functools.partial(file.read_slice, name))
        damaged += [name] if name in step.crcs and crc not in (None, step.crcs[name]) else []
        count(file.nbytes(name))
    raise_listed(
        FormatError,
        f"{step.path}: these arrays are not the ones that were saved, since their CRC-32 differs. The file is damaged;"
        " restore another step:",
        damaged,
    )
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


# ---------------------------------------------------------------- restore


def fill_parts(model: Any, parts: Mapping[str, Any], stored: StoredStep, report: Report) -> dict[str, Any]:
    """Return `{"model": …, part: …}` with the stored values. Nothing is changed unless everything fits.

    Args:
        model: the target, as in `CheckpointManager.restore`.
        parts: `{part: example}` to fill.
        stored: the step.
        report: as in `read_step_arrays`.

    Raises:
        FileError, FormatError: the file cannot be read, or is damaged.
        MismatchError: values are missing, unexpected or of another shape or dtype, or an adapter has another
            configuration; the message lists all problems.
    """
    held = lora_carrier(model)
    others = held.rest()
    given = {part: example for part in PARTS if (example := parts.get(part)) is not None}
    guests, adapters, problems = _find_targets(held, stored)
    examples = _name_leaves(guests, adapters, {"model": others, **given})
    rebuilt = [part for part in PARTS if part in stored.plain.keys() - given.keys()]
    examples |= {name: None for name in [*stored.arrays, *stored.values] if name.partition("/")[0] in rebuilt}
    problems += [f"{part}: none was saved" for part in given if part not in stored.plain] + [
        f"{part}: saved with nodes other than dicts, lists and tuples; give {part}= an example to fill, or restore only"
        " the model with model_only=True"
        for part in rebuilt
        if stored.plain[part] is None
    ]
    hosts = set(stored.hosts)
    raise_listed(
        MismatchError,
        f"{stored.path}: does not fit the target (missing: not in the checkpoint; unexpected: not in the target):",
        [*problems, *_find_mismatches(examples, stored), *_unsupported_dtypes(examples, hosts, stored)],
        limit=16,
    )

    arrays = read_step_arrays(stored, {n: leaf for n, leaf in examples.items() if n in stored.arrays}, report)
    values = {name: arrays[name] if name in arrays else _decode(name, stored.values[name]) for name in examples}
    values = {
        n: jnp.asarray(v) if examples[n] is None and n in arrays and n not in hosts else v for n, v in values.items()
    }
    values |= {n: _wrap_keys(values[n], stored.keys[n], examples[n]) for n in values.keys() & stored.keys.keys()}
    return {
        # First, because they may be damaged: the model and given parts are filled in place.
        **{part: _rebuild(part, stored.plain[part], values) for part in rebuilt},
        "model": _fill_model(held, others, stored, values),
        **{part: _fill_example(part, example, values) for part, example in given.items()},
    }


def _find_targets(held: Carrier, stored: Snapshot) -> tuple[Mapping[str, Any], dict[str, Adapter], list[str]]:
    """Return the target's LoRA leaves and adapters that were saved, and what keeps them from being filled."""
    tree, adapters = held.foreign, dict[str, Adapter]()
    dialect, stored_dialect = tree.dialect.name if tree else None, stored.guest.get("dialect")
    guests = tree.leaves if tree is not None and dialect == stored_dialect else {}
    problems = (
        []
        if dialect == stored_dialect
        else [f"{_describe_lora(stored_dialect)} saved, the target has {_describe_lora(dialect)}"]
    )
    numbers = {} if tree is None else tree.stored  # of the tree's structure, so that only arrays can be put back
    problems += [
        f"{leaf}: the alpha or scale {saved:g} is saved, the target has {numbers[leaf]:g}"
        for leaf, saved in stored.guest.get("stored", {}).items()
        if numbers.get(leaf, saved) != saved
    ] + [
        f"the target's adapter {name!r} is not saved, and would keep its values: delete it first, or attach it after"
        " the restore"
        for name in sorted(held.names())
        if name not in stored.recipes and not stored.guest
    ]
    for name, text in stored.recipes.items():
        if name not in adapter_names(held):
            problems.append(f"the adapter {name!r} is saved; the target has {adapter_names(held)}: attach it first")
            continue
        adapters[name] = held.extract(name)
        if adapters[name].config != (saved := Recipe.from_text(text).config):
            problems.append(
                f"the adapter {name!r} has another configuration; attach it with the checkpoint's:"
                f" {adapters[name].config.differences(saved, 'saved')}"
            )
    return guests, adapters, problems


def _unsupported_dtypes(examples: Mapping[str, Any], hosts: Collection[str], stored: StoredStep) -> Iterable[str]:
    """Yield a description of every array for a device whose dtype JAX lacks without `jax_enable_x64`."""
    for name, leaf in examples.items():
        on_device = name in stored.arrays and (name not in hosts if leaf is None else is_on_device(leaf))
        if on_device and jax.dtypes.canonicalize_dtype(dtype := jnp.dtype(stored.arrays[name][1])) != dtype:
            yield f"{name}: {dtype.name} saved, which JAX supports only with jax_enable_x64"


def _describe_lora(dialect: str | None) -> str:
    return f"{dialect} LoRA parameters" if dialect else "an adapter of jaxadapt"


def _find_mismatches(examples: Mapping[str, Any], stored: StoredStep) -> Iterable[str]:
    """Yield a description of every value that is missing, unexpected or of another type, shape or dtype."""
    expected = dict.fromkeys(examples, paths.Spec())
    saved = dict.fromkeys(stored.values, paths.Spec()) | {n: paths.Spec(*x) for n, x in stored.arrays.items()}
    for name, leaf in examples.items():
        if leaf is None or name not in saved:
            continue
        kind = stored.keys.get(name, "") if name in stored.arrays else stored.values[name][0]
        is_array = isinstance(leaf, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct)
        if is_array != (name in stored.arrays):
            yield f"{name}: expected {type(leaf).__name__}, found {kind or 'an array'}"
        elif is_key(leaf) != (name in stored.keys):
            yield f"{name}: expected {'a random key' if is_key(leaf) else 'an array'}, found {kind or 'an array'}"
        elif is_key(leaf):  # the file has further axes, for the data of each key
            expected[name] = paths.Spec((*leaf.shape, *(saved[name].shape or ())[len(leaf.shape) :]))
        elif is_array:
            expected[name] = paths.Spec(tuple(leaf.shape), np.dtype(leaf.dtype).name)
    yield from map(str, paths.compare(expected, saved))


def _wrap_keys(data: Any, implementation: str, like: Any) -> jax.Array:
    keys = jax.random.wrap_key_data(jnp.asarray(data), impl=implementation)
    return jax.device_put(keys, like.sharding) if is_committed(like) else keys


def with_weak_type(value: Any, like: Any) -> Any:
    """Return the value with the example's weak type, which affects the dtype of further arithmetic."""
    if is_on_device(like) and like.weak_type and isinstance(value, jax.Array):
        return jnp.full(value.shape, {"f": 0.0, "i": 0, "c": 0j}[value.dtype.kind]).at[...].set(value)
    return value


def _fill_example(part: str, example: Any, values: Mapping[str, Any]) -> Any:
    flat, structure = flatten(example)
    leaves = [with_weak_type(values[f"{part}/{path}" if path else part], leaf) for path, leaf in flat]
    return carrier(example).fill(jax.tree.unflatten(structure, leaves))


def _fill_model(held: Carrier, others: Any, stored: Snapshot, values: Mapping[str, Any]) -> Any:
    for name, text in stored.recipes.items():
        prefix = name_prefix(name)
        flat = {n.removeprefix(prefix): v for n, v in values.items() if n.startswith(prefix)}
        recipe = Recipe.from_text(text)
        filled = held.inject(Adapter(recipe.config, paths.unflatten(flat), recipe.keymap), name)
        # An `Adapter` also takes the saved fields that equality ignores, such as base_model_name_or_path.
        held = carrier(dataclasses.replace(filled, config=recipe.config) if isinstance(filled, Adapter) else filled)
    if held.foreign is not None:
        filled = held.foreign.put({n.removeprefix("guest/"): v for n, v in values.items() if n.startswith("guest/")})
        held = carrier(filled)
    return held.with_rest(_fill_example("model", others, values))


def _rebuild(part: str, plain: Any, values: Mapping[str, Any]) -> Any:
    """Build a tree from its stored structure and the values by path."""
    with raise_as(FormatError, f"{part}: its stored structure is damaged", ValueError, KeyError, TypeError):
        # The value at a dict's one key "" has the part's own name.
        return _build_node(plain, part, {f"{part}/": values[part], **values} if part in values else values)


def _build_node(node: Any, path: str, values: Mapping[str, Any]) -> Any:
    kind, *inner = node
    match kind:
        case "dict":
            return {k: _build_node(v, f"{path}/{_quote(str(k))}", values) for k, v in inner[0]}
        case "list" | "tuple":
            items = [_build_node(v, f"{path}/{i}", values) for i, v in enumerate(inner[0])]
            return tuple(items) if kind == "tuple" else items
        case "none":
            return None
        case _:
            return values[path]


_DECODERS = {kind.__name__: decode for kind, (_, decode) in _CODECS.items()}


def _decode(name: str, stored: Any) -> Any:
    try:
        kind, value = stored
        return _DECODERS[kind](value)
    except (ValueError, KeyError, TypeError) as error:
        raise FormatError(f"{name}: expected a saved value [type, value], found {stored!r}") from error
