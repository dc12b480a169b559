"""Save an adapter as a folder.

model / variables ──extract──► Adapter ──encode──► PeftTensors ──peft_folder.write_folder──► files

The adapter of a tree is extracted once, then encoded as `PeftTensors`. If arrays are spread over processes, each
process writes the regions that it owns into one file.
`regions.assign_owners` assigns the regions, `regions.file_regions` maps them to the file, `storage.sharded_write`
writes them.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from jax.experimental import multihost_utils

from jaxadapt.adapters import experts, selection, sites
from jaxadapt.adapters.adapter import SHARED_NODE, Adapter, Site, make_file_plan, name_donated_arrays, repeats_heads
from jaxadapt.adapters.peft_tensors import PeftTensors, may_have_experts
from jaxadapt.arrays import regions as array_regions
from jaxadapt.arrays.layout import FileLayout
from jaxadapt.arrays.tensor_source import cast, float_dtype
from jaxadapt.configs import lora
from jaxadapt.configs.base import Config
from jaxadapt.core.errors import LOGGER, AttachError, FileError, MismatchError, Progress, Report, bullets, reporter
from jaxadapt.keymaps import families
from jaxadapt.keymaps import plan as plans
from jaxadapt.keymaps.keymap import KeyMap, warn_unproved
from jaxadapt.methods.base import METHODS, get_method
from jaxadapt.models.carriers import DEFAULT, Carrier, lora_carrier
from jaxadapt.models.foreign import tree as foreign
from jaxadapt.persistence import fingerprint, formats
from jaxadapt.persistence.formats import peft_folder
from jaxadapt.storage import location, sharded_write

# ---------------------------------------------------------------- multihost


def is_distributed(leaves: Iterable[Any]) -> bool:
    """Return True if some of these arrays are partly in other processes."""
    return jax.process_count() > 1 and not all(map(is_local, leaves))


def is_spread(tensors: PeftTensors) -> bool:
    """Return True if some arrays of an adapter are partly in other processes."""
    return isinstance(tensors.tensors, plans.Encoded) and is_distributed(tensors.tensors.leaves.values())


def write_shared(
    tensors: PeftTensors, target: location.Location, dtype: Any, shared: bool | None, timeout: float, report: Report
) -> None:
    """Write an adapter folder as `folder.write` does; all processes call this.

    Args:
        tensors: an adapter whose tensors are `Encoded`.
        dtype: the dtype of the floating-point tensors; None: their own.
        shared: True if all processes see the folder; None: detect it. If not, process 0 writes everything.
        timeout: in seconds, for each answer of another process.
        report: called with ("save", bytes, bytes in all) for the bytes that this process writes.

    Raises:
        FileError: in all processes, if one of them failed, died, or did not call. The old adapter then remains.
    """
    encoded: plans.Encoded = tensors.tensors  # pyright: ignore[reportAssignmentType]
    group = sharded_write.Group(target, timeout)
    stored = encoded if dtype is None else cast(encoded, dtype)
    tensors = dataclasses.replace(tensors, tensors=stored)

    def size(values: Iterable[Any]) -> int:
        return sum(x.size * (dtype or x.dtype).itemsize for x in values)

    def parts(file_is_shared: bool) -> tuple[int, Iterator[sharded_write.TensorPart]]:
        if file_is_shared:
            owned = owned_regions(encoded.leaves, group.index)
            return size(x for each in owned.values() for x in each.values()), _owned_parts(encoded, owned, dtype)
        total = size(encoded.leaves.values()) if group.index == 0 else 0
        return total, _gathered_parts(encoded, group.index, dtype)

    def commit(put: sharded_write.Put) -> None:
        peft_folder.write_folder(
            tensors, target, formats.Wanted("safetensors"), None, lambda writer, _, metadata: put(writer, metadata)
        )

    # The arrays that each process has in full must agree, since process 0 writes its own.
    alike = {"the configuration": sharded_write.digest(tensors.config.to_json())}
    with name_donated_arrays(encoded.leaves):
        alike |= {p: sharded_write.digest(np.asarray(x)) for p, x in encoded.leaves.items() if is_local(x)}
    sharded_write.write(
        target / location.WEIGHTS[0], stored.kinds, parts, group, commit, shared=shared, alike=alike, report=report
    )


def run_on_leader(task: str, work: Callable[[], Any], timeout: float) -> Any:
    """Run `work` on process 0 and return its JSON result in all processes. Collective.

    It starts once every process has called, so no process is still reading a file that it deletes. Raises `FileError`
    in all processes if it failed, or if a process did not answer for `timeout` seconds.
    """
    return combine_values(task, None, lambda _: work(), timeout)


def combine_values(task: str, value: Any, combine: Callable[[list[Any]], Any], timeout: float) -> Any:
    """Return `combine` of the JSON values of all processes, which process 0 computes. Collective.

    Raises `FileError` in all processes if `combine` failed, or if a process did not answer for `timeout` seconds.
    """
    group = sharded_write.Group(task, timeout, ("combined",))
    if group.index > 0:
        group.send("value", value)
        return group.receive("combined")
    with group.announce_failure():
        others = group.receive_all("value")
        combined = combine([value, *(others[process] for process in sorted(others))])
    group.send("combined", combined)
    return combined


def is_local(leaf: Any) -> bool:
    """Return True if this process has all of an array; other processes then have their own array, or none."""
    # A traced array has no devices yet, so JAX does not know if it is addressable.
    return not isinstance(leaf, jax.Array) or isinstance(leaf, Tracer) or leaf.is_fully_addressable


def owned_regions(leaves: Mapping[str, Any], process: int) -> dict[str, dict[array_regions.Region, np.ndarray]]:
    """Return {path: {box: values}} of the regions that this process writes, as `regions.to_host` copies them."""
    with name_donated_arrays(leaves):
        owned: dict[str, dict[array_regions.Region, Any]] = {}
        for path, owners in array_regions.assign_owners(leaves).items():
            leaf = leaves[path]
            shards = {array_regions.full_region(leaf.shape): leaf} if is_local(leaf) else array_regions.shards_of(leaf)
            owned[path] = {box: shard for box, shard in shards.items() if owners[box] == process}
        return array_regions.to_host({path: parts for path, parts in owned.items() if parts})


def join_regions(
    regions: Mapping[array_regions.Region, np.ndarray], layout: FileLayout | array_regions.Shape
) -> Iterator[tuple[array_regions.Region, np.ndarray]]:
    """Join regions into fewer and larger ones by `cover_regions`, without a copy where one region suffices."""
    for outer, members in cover_regions(tuple(regions), layout, next((x.itemsize for x in regions.values()), 1)):
        if len(members) == 1:
            yield outer, regions[outer]
            continue
        joined = np.empty(array_regions.region_shape(outer), regions[members[0][0]].dtype)
        for box, index in members:
            joined[index] = regions[box]
        yield outer, joined


_LARGE = 16 << 10
"""Regions of at least this many bytes are written without joining them, as in `storage.local_files`."""


@functools.lru_cache(maxsize=1024)
def cover_regions(
    parts: tuple[array_regions.Region, ...], layout: FileLayout | array_regions.Shape, itemsize: int
) -> list[tuple[array_regions.Region, list[tuple[array_regions.Region, tuple[slice, ...]]]]]:
    """Merge neighboring array_regions; return [(merged box, [(box, its slices in the merged box)])].

    Large array_regions that are contiguous in the file stay separate.

    Args:
        layout: the array's layout in the file: over several tensors, or as one tensor of this shape.
    """
    separate = all(itemsize * array_regions.region_size(box) >= _LARGE and _is_one_run(box, layout) for box in parts)
    merged = {box: [box] for box in parts} if separate else array_regions.merge_neighbors(parts)
    return [
        (outer, [(box, array_regions.relative_slices(box, outer)) for box in members])
        for outer, members in merged.items()
    ]


def _is_one_run(box: array_regions.Region, layout: FileLayout | array_regions.Shape) -> bool:
    """Return True if a region of an array is one run of bytes in the file."""
    if not isinstance(layout, FileLayout):
        return array_regions.is_contiguous(layout, box)
    in_file = array_regions.file_regions(layout, box)
    return len(in_file) == 1 and array_regions.is_contiguous(in_file[0].shape, in_file[0].tensor_region)


def gather_array(leaf: Any) -> np.ndarray:
    """Gather an array in every process. Collective."""
    has_all = is_local(leaf) or leaf.is_fully_replicated
    return np.asarray(leaf if has_all else multihost_utils.process_allgather(leaf, tiled=True))


def _owned_parts(
    encoded: plans.Encoded, owned: dict[str, dict[array_regions.Region, np.ndarray]], dtype: Any = None
) -> Iterator[sharded_write.TensorPart]:
    """Yield this process's parts of a shared file, in file order; remove them from `owned` to free memory."""
    left = collections.Counter(e.path for e in encoded.plan.entries)  # a tied leaf has several entries
    for entry in sorted(encoded.plan.entries, key=lambda e: e.keys[0]):
        left[entry.path] -= 1
        regions = owned.get(entry.path, {}) if left[entry.path] else owned.pop(entry.path, {})
        for box, values in join_regions(regions, entry.form):
            yield from _parts(entry, box, values, dtype)


def _gathered_parts(encoded: plans.Encoded, process: int, dtype: Any = None) -> Iterator[sharded_write.TensorPart]:
    """Yield all parts in process 0, one leaf after the other; yield nothing in the others, which only send."""
    for entry in sorted(encoded.plan.entries, key=lambda e: e.keys[0]):
        with name_donated_arrays(encoded.leaves):
            value = gather_array(encoded.leaves[entry.path])
        if process == 0:
            yield from _parts(entry, array_regions.full_region(entry.shape), value, dtype)


def _parts(
    entry: plans.PlanEntry, box: array_regions.Region, values: np.ndarray, dtype: Any
) -> Iterator[sharded_write.TensorPart]:
    """Yield the file parts of one region of a leaf."""
    for piece in array_regions.file_regions(entry.form, box):
        tile = piece.encode(values[array_regions.relative_slices(piece.region, box)])
        keys = entry.keys_of(piece.number)
        tile = tile if dtype is None else cast({keys[0]: tile}, dtype)[keys[0]]
        for key in keys:
            yield sharded_write.TensorPart(key, piece.shape, piece.tensor_region, tile)


# ---------------------------------------------------------------- encode


def take_adapter(held: Carrier, name: str, keymap: KeyMap | str | None, *, in_memory: bool) -> Adapter:
    """Take the adapter out of a tree, with the target names of the given keymap.

    Raises `AttachError` for parameters without values; `in_memory` is as in `encode_tree`.
    """
    adapter, config = held.extract(name, keymap), held.given.config
    adapter = adapter if config is None else dataclasses.replace(adapter, config=config)
    require_values(adapter.flat(), traced=in_memory, elsewhere=not in_memory)
    if keymap in (None, "auto"):
        return adapter
    new = families.resolve_keymap(keymap, {})
    config = selection.rename_targets(adapter.config, sites.sites_of(adapter), new)
    return dataclasses.replace(adapter, config=config, keymap=new)


def encode_tree(
    tree: Any,
    name: str,
    keymap: KeyMap | str | None,
    *,
    in_memory: bool,
    save_embedding_layers: bool | str = False,
    timeout: float = 300,
) -> PeftTensors:
    """Return the tensors that PEFT's file holds for the adapter of a tree.

    Args:
        tree: anything `extract` takes.
        in_memory: True for `to_peft`, which accepts traced arrays. False for `save`, which accepts arrays that are
            partly in other processes.
        timeout: in seconds, for each answer of another process.

    With `in_memory=False` and an adapter that is spread over several processes, all of them call this.

    Raises `AttachError`, `ConfigError`, `KeyMapError` or `MismatchError`.
    """
    held = lora_carrier(tree)
    if held.foreign is not None:
        require_values(held.foreign.leaves, traced=in_memory, elsewhere=not in_memory)
        tensors, known = foreign.read_tree(held.foreign, keymap)
        sites.may_need_embeddings(tensors.config, save_embedding_layers)  # raises for an unknown value
        if isinstance(tensors.tensors, plans.Encoded):
            encoded = _repeat_for_heads(tensors.tensors, tensors.config, known.own_keymap, None)
            tensors = dataclasses.replace(tensors, tensors=encoded)
        return dataclasses.replace(
            tensors,
            fingerprint=_fingerprint(
                None if in_memory else lambda _, arrays=held.foreign.arrays: arrays,
                tensors.config,
                known.own_keymap,
                {module: site.match.leaf for module, site in known.site_of.items()},
                False,
                timeout,
            ),
        )
    adapter = take_adapter(held, name, keymap, in_memory=in_memory)
    if adapter.shared and (stored := get_method(adapter.config).stored(adapter.config, adapter.shared)):
        adapter = dataclasses.replace(adapter, params={**adapter.params, SHARED_NODE: stored})
    leaves = adapter.flat()
    adapter_sites = sites.sites_of(adapter)
    encoded = _encode(leaves, adapter_sites, adapter.keymap)
    has_embeddings = sites.may_need_embeddings(adapter.config, save_embedding_layers)
    ties_heads = bool(adapter.keymap.tied) and METHODS[adapter.config.peft_type].ties_heads
    base = held.leaves() if held.has_base and (has_embeddings or ties_heads) else None
    if has_embeddings:
        encoded = sites.add_embeddings(
            encoded, adapter.config, adapter.keymap, adapter_sites, base, save_embedding_layers
        )
    if adapter.keymap.tied:
        encoded = _repeat_for_heads(encoded, adapter.config, adapter.keymap, base)
    file_config, tensors = _split_or_join(encoded, adapter.config, adapter.keymap, adapter_sites, held.given.on_shared)
    found = _fingerprint(
        held.leaves if held.has_base and not in_memory else None,
        adapter.config,
        adapter.keymap,
        adapter_sites,
        is_distributed(leaves.values()),
        timeout,
    )
    return PeftTensors(file_config, tensors, "this adapter", found)


def _fingerprint(
    base: Callable[[Collection[str]], Mapping[str, Any]] | None,
    config: Config,
    keymap: KeyMap,
    adapted: Iterable[Any] | Mapping[str, str],
    spread: bool,
    timeout: float,
) -> fingerprint.Fingerprint | None:
    """Return the fingerprint of a base, as `fingerprint.of_base`; None without one, or if the adapter changed it.

    If the adapter is spread over several processes, their values are joined. A base that is spread although its adapter
    is not has no fingerprint: only one of the processes may be saving.
    """
    if base is None or lora.changes_base(config):
        return None
    found = fingerprint.of_base(base, keymap, adapted)
    if spread:
        return combine_values("the fingerprint of the base", found, fingerprint.merge, timeout)
    return found if found is None or fingerprint.is_complete(found) else None


def require_values(leaves: Mapping[str, Any], traced: bool, elsewhere: bool = False) -> None:
    """Raise `AttachError` for parameters whose values cannot be saved.

    Args:
        traced: accept traced arrays.
        elsewhere: accept arrays that are partly in other processes.
    """

    def obstacle(leaf: Any) -> str | None:
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return "abstract: a shape only"
        if isinstance(leaf, Tracer):
            return None if traced else "traced: inside jit, grad or vmap"
        if isinstance(leaf, jax.Array) and leaf.is_deleted():
            return "deleted: it was donated to a jitted function"
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable and not elsewhere:
            return "partly in other processes: only jaxadapt.save can write it"
        return None

    if problems := [f"{path}: {reason}" for path, leaf in leaves.items() if (reason := obstacle(leaf))]:
        raise AttachError("these parameters have no values to save:\n" + bullets(problems))


def _encode(leaves: Mapping[str, Any], adapter_sites: sites.Sites, keymap: KeyMap) -> plans.Encoded:
    warn_unproved(keymap)
    sites.require_complete(leaves, adapter_sites)
    if adapter_sites.untargeted:
        raise MismatchError(
            "these modules or parameters have tensors, but target_modules (or target_parameters) of the configuration"
            " does not name them, so a reader would drop them:\n" + bullets(adapter_sites.untargeted)
        )
    host = not any(isinstance(leaf, Tracer) for leaf in leaves.values())
    if host:
        _require_zeros(adapter_sites, leaves)
    return make_file_plan(adapter_sites).encode(leaves, host)


def _require_zeros(adapter_sites: Sequence[Site], leaves: Mapping[str, Any]) -> None:
    """Raise `MismatchError` for nonzero values in layers or ranks that the configuration excludes."""
    nonzero: list[str] = []
    for entry in (e for site in adapter_sites for e in site.entries if e.form.is_partial):
        leaf = leaves[entry.path]
        used = entry.form.expand_by_tensor([1] * entry.form.count) > 0
        xp: Any = np if is_local(leaf) else jax.numpy
        if bool(xp.any(xp.where(used, 0, leaf) != 0)):
            nonzero.append(f"{entry.path} {tuple(leaf.shape)}")
    if nonzero:
        raise MismatchError(
            "these arrays have nonzero values in layers, parts or ranks that the configuration excludes"
            " (target_modules, layers_to_transform, exclude_modules, rank_pattern), and a file would lose them."
            " Training keeps them at zero: either other code wrote to them, or the configuration is not the adapter's"
            " own:\n" + bullets(nonzero)
        )


def _repeat_for_heads(
    encoded: plans.Encoded, config: Config, keymap: KeyMap, leaves: Iterable[str] | None
) -> plans.Encoded:
    """Add the head's tensors for tied weights: PEFT stores them under both names. `leaves` are the base's, if known."""
    if not repeats_heads(config, keymap, leaves):
        return encoded
    entries = [*encoded.plan.entries, *sites.repeat_for_heads(config, encoded.plan.entries, keymap)]
    return dataclasses.replace(encoded, plan=plans.make_plan(entries))


def _split_or_join(
    encoded: plans.Encoded, config: Config, keymap: KeyMap, adapter_sites: sites.Sites, on_shared: str | None
) -> tuple[Config, Mapping[str, Any]]:
    """Split the tensors of experts where PyTorch has one for each, and join leaves that are one tensor there."""
    keys = encoded.plan.keys
    if not plans.has_parts(keys) and not (keymap.per_expert and may_have_experts(keys)):
        return config, encoded
    if is_distributed(encoded.leaves.values()):
        raise AttachError(
            "cannot join these weights: PyTorch stores several of them in one tensor, and the arrays are partly in"
            " other processes. Gather the adapter's arrays first (they are small), with"
            " jax.experimental.multihost_utils"
        )
    if keymap.per_expert:
        return experts.split_experts(config, encoded, keymap)
    return experts.join_tensors(config, adapter_sites, encoded, on_shared)


# ---------------------------------------------------------------- to PEFT


def to_peft(
    model: Any,
    *,
    name: str = DEFAULT,
    keymap: KeyMap | str | None = None,
) -> PeftTensors:
    """Convert an adapter to PEFT's names and PyTorch's layout, in memory.

    Args:
        model: an `Adapter`, an NNX model or state, Linen variables, or another library's tree, as in `extract`;
            or a `LoraTree` of one, which has the configuration if the tree has lost it.
        keymap: needed only if the tree does not store it, or to rename by another keymap.

    Each tensor is encoded on access, as a numpy view where the layouts allow (inside jit: as a traced array).
    Raises `AttachError` or `KeyMapError`.

    >>> import jax, jaxadapt
    >>> base = {"q": {"kernel": jax.ShapeDtypeStruct((4, 6), "float32")}}
    >>> adapter = jaxadapt.init(base, jaxadapt.LoraConfig(r=2, target_modules=["q"]), key=jax.random.key(0))
    >>> {key: x.shape for key, x in to_peft(adapter).tensors.items()}
    {'base_model.model.q.lora_A.weight': (2, 4), 'base_model.model.q.lora_B.weight': (6, 2)}
    """
    if isinstance(model, PeftTensors):
        raise AttachError(
            "to_peft: expected an adapter in a model's layout, found PeftTensors, which need no conversion"
        )
    return encode_tree(model, name, keymap, in_memory=True)


# ---------------------------------------------------------------- save adapter


def adapter_folder(path: str | os.PathLike[str], name: str) -> location.Location:
    """Return the folder of the adapter called `name`: a subfolder for all but "default", as in PEFT."""
    if name == "default":
        return location.to_location(path)
    if not isinstance(name, str) or name in ("", ".", "..") or set(name) & set("/\\\0"):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise FileError(f"{path}: {name!r} cannot name a subfolder; choose a name without slashes")
    return location.to_location(path) / name


@dataclasses.dataclass(frozen=True)
class MultihostFolder:
    """A folder that several processes write together, and how they do.

    `save` takes it as it takes a path. It has an effect only for arrays that are spread over several processes.

    Args:
        path: the folder, or an address of an object store.
        shared: True if all processes see the folder, and False if they share no file system: process 0 then writes
            everything, one leaf at a time. None: detect it.
        timeout: in seconds, for each answer of another process. If a process fails, dies or does not call, the save
            ends with an error in all of them, within twice this time.

    >>> import os
    >>> os.fspath(MultihostFolder("out", shared=False))
    'out'
    """

    path: str | os.PathLike[str]
    _: dataclasses.KW_ONLY
    shared: bool | None = None
    timeout: float = 300

    def __fspath__(self) -> str:
        return os.fspath(self.path)


def save(
    model: Any,
    path: str | os.PathLike[str] | MultihostFolder,
    *,
    name: str = DEFAULT,
    keymap: KeyMap | str | None = None,
    base_model: str | None = None,
    dtype: Any = None,
    save_embedding_layers: bool | str = "auto",
    format: str = "safetensors",  # noqa: A002 (the field's usual name)
    progress: Progress = None,
) -> None:
    """Write an adapter, without its base model, as a folder that PEFT reads.

    For anything created by jaxadapt, `save(tree, path)` is enough: NNX models and states, Linen variables and
    `Adapter`s, also after jitted updates. An adapter not called "default" goes to the subfolder of its name, as in
    PEFT.

    LoRA parameters of another library (Qwix, `nnx.LoRA`, gemma, …) are recognized by their paths; rank and
    `target_modules` follow from the tree. Wrap it in a `LoraTree` if it does not store its alpha or has lost its
    configuration. The same value says what happens to different As where PyTorch has one A for several of our weights.

    Args:
        path: the folder, or an address of an object store. If the arrays are spread over several processes, all of them
            call `save`, and each writes its own bytes to the one file; a `MultihostFolder` says how.
        keymap: names the tensors by another keymap than the one the model was adapted with.
        base_model: written as `base_model_name_or_path`; never looked up.
        dtype: the floating-point dtype of the tensors in the file, such as "bfloat16" or "bf16"; by default their dtype
            in memory. A dtype in which finite values become infinite or NaN is an error.
        save_embedding_layers: also write the base's token embedding and head, as PEFT does. "auto" writes them if they
            are adapted under the names "embed_tokens" or "lm_head" and the tree has their values; True always (for a
            resized vocabulary); False never.
        format: "bin" writes PyTorch's `adapter_model.bin`, for programs that read no safetensors; several processes
            cannot write it. "orbax" writes an Orbax checkpoint instead: the parameters in the model's layout and the
            configuration, in one commit, to a path that does not exist yet. With several processes all of them call
            `save`.
        progress: None, True (a bar on a terminal or in a notebook) or a function of ("save", bytes done, bytes in all).
            With several processes each counts the bytes that it writes. An Orbax checkpoint is reported once, when it
            is written.

    The write is durable and atomic. Raises `AdapterError` with the problem and a remedy; the old adapter then remains
    complete, unless the error says that the new one is in place. If the model card cannot be written, a warning says
    so.

    >>> import tempfile, jax, jaxadapt
    >>> base = {"q": {"kernel": jax.numpy.ones((4, 6))}}
    >>> config = jaxadapt.LoraConfig(r=2, target_modules=["q"])
    >>> adapter = jaxadapt.init(base, config, key=jax.random.key(0))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save({"params": base, **adapter.collection}, folder)
    ...     sorted(jaxadapt.inspect(folder).tensors)
    ['base_model.model.q.lora_A.weight', 'base_model.model.q.lora_B.weight']
    """
    place = path if isinstance(path, MultihostFolder) else MultihostFolder(path)
    if format not in (styles := ("safetensors", "bin", "orbax")):
        formats.require_style(place.path, format, styles)
    if isinstance(model, PeftTensors):
        raise AttachError(
            "save: expected an adapter in a model's layout, found PeftTensors; write them with"
            " jaxadapt.write(tensors, path)"
        )
    dtype = None if dtype is None else float_dtype(dtype)
    named = {} if base_model is None else {"base_model_name_or_path": base_model}
    target = adapter_folder(place.path, name)
    if format == "orbax":
        held = lora_carrier(model)
        if held.foreign is not None and held.foreign.given.lora_alpha is not None:
            raise AttachError("lora_alpha: format='orbax' saves only adapters of jaxadapt, which store their own alpha")
        adapter = take_adapter(held, name, keymap, in_memory=False)
        adapter = dataclasses.replace(adapter, config=adapter.config.replace(inference_mode=True, **named))
        if dtype is not None:
            with name_donated_arrays(adapter.flat()):
                adapter = array_regions.cast_tree(adapter, dtype, "this adapter")
        write = formats.writer("orbax").write_adapter
        assert write is not None
        with reporter(progress) as report:
            write(adapter, target, report)
        LOGGER.info("%s: an Orbax checkpoint of %d arrays written", target, len(adapter.flat()))
        return
    tensors = encode_tree(
        model, name, keymap, in_memory=False, save_embedding_layers=save_embedding_layers, timeout=place.timeout
    )
    tensors = dataclasses.replace(tensors, config=tensors.config.replace(inference_mode=True, **named))
    spread = is_spread(tensors)
    if spread and format == "bin":
        raise FileError(f"{target}: format 'bin': several processes cannot write it; convert the folder afterwards")
    if spread:
        with reporter(progress) as report:
            write_shared(tensors, target, dtype, place.shared, place.timeout, report)
    else:
        tensors = tensors if dtype is None else dataclasses.replace(tensors, tensors=cast(tensors.tensors, dtype))
        peft_folder.write_folder(tensors, target, formats.Wanted(format), progress)
