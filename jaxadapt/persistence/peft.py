"""Convert between a model's layout and PEFT's in memory: `to_peft`, `from_peft` and the decoding that `load` uses.

Load tensors of a file, or of memory, as device arrays in the model's layout.

Threads read the regions that devices need, and transpose them where the layouts differ, into memory that XLA's CPU
client accepts without a copy. The caller's thread transfers arrays as they become ready. So the data is in memory once,
and the device does not wait for the whole file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from jaxadapt.adapters import base_weights, experts, full_copies, initial_values, key_names
from jaxadapt.adapters.adapter import Adapter, PeftTensors
from jaxadapt.adapters.site import Site, Sites, all_tensors, file_entries, make_file_plan, repeated_keys, tensor_entries
from jaxadapt.arrays import finite, regions
from jaxadapt.arrays.regions import FileRegion, Region
from jaxadapt.configs import lora
from jaxadapt.configs.base import PEFT_VERSION, Config
from jaxadapt.core import paths
from jaxadapt.core.errors import AdapterError, AttachError, MismatchError, TargetError, warn
from jaxadapt.core.progress import Report, byte_counter, no_report
from jaxadapt.keymaps import plan as plans
from jaxadapt.keymaps import pytorch
from jaxadapt.keymaps.keymap import PEFT_PREFIX, KeyMap
from jaxadapt.keymaps.plan import Plan, PlanEntry, cut_parts, has_parts
from jaxadapt.methods.lora import is_newer_attention_file
from jaxadapt.methods.registry import file_sizes, get_method
from jaxadapt.models import planning
from jaxadapt.models.carriers import carrier
from jaxadapt.models.carriers.base import DEFAULT
from jaxadapt.models.foreign.tree import LoraTree
from jaxadapt.models.linen import collections
from jaxadapt.models.planning import BaseParams
from jaxadapt.persistence import save_adapter
from jaxadapt.storage import local_files
from jaxadapt.storage.source import TensorSource, as_source
from jaxadapt.storage.strided import float_dtype, is_float

# ---------------------------------------------------------------- device arrays


# Bytes of the leaves of one job: small enough to share the work between threads.
_JOB = 8 << 20


def load_arrays(
    plan: Plan,
    tensors: Mapping[str, Any],
    dtypes: Mapping[str, Any],
    dtype: Any = None,
    shardings: Mapping[str, Sharding] | None = None,
    report: Report = no_report,
    stage: str = "load",
    name: str = "the file",
    check: bool = False,
) -> dict[str, Any]:
    """Return {path: array} from {key: tensor}.

    Args:
        plan: the leaves and their tensors.
        tensors: a `TensorSource`, or arrays in memory (traced ones inside jit). They are copied, never shared.
        dtypes: the tensors' dtypes, by key.
        dtype: the arrays' dtype, one or, for a `TensorSource`, `{path: dtype}`; by default that of each leaf's tensors.
        shardings: the arrays' shardings, by path; arrays without one go to the default device. Reads from a file only
            the bytes that devices of this process need (those of replicas once), and gaps between them.
        report: called with (stage, bytes done, bytes in all) as arrays are created.
        stage: the first argument of `report`.
        name: the origin of the tensors, for messages.
        check: warn of tensors that hold NaN or infinity.

    Raises `MismatchError` if finite values are NaN or infinite in the dtype of their array. Traced arrays have no
    values to check.
    """
    shardings = {path: regions.concrete_sharding(place) for path, place in (shardings or {}).items()}
    requested = dtype if isinstance(dtype, Mapping) else dict.fromkeys((e.path for e in plan.entries), dtype)
    if not isinstance(tensors, TensorSource) and any(isinstance(x, jax.Array) for x in tensors.values()):
        leaves = plan.decode({key: x if isinstance(x, jax.Array) else jnp.array(x) for key, x in tensors.items()})
        leaves = leaves if dtype is None else finite.cast_tree(leaves, dtype, name)
        return {path: regions.move_to(x, shardings[path]) if path in shardings else x for path, x in leaves.items()}
    source = as_source(tensors)
    new_dtypes = {
        e.path: e.dtype(dtypes) if requested[e.path] is None else np.dtype(requested[e.path]) for e in plan.entries
    }
    position = {key: number for number, key in enumerate(source)}
    order = sorted(plan.entries, key=lambda e: position[e.keys[0]])  # file order
    sizes = {
        e.path: new_dtypes[e.path].itemsize
        * (regions.addressable_size(shardings[e.path], e.shape) if e.path in shardings else e.form.size)
        for e in order
    }
    count = byte_counter(report, stage, sum(sizes.values()))
    out: dict[str, Any] = {e.path: None for e in plan.entries}
    jobs = local_files.split_by_size(order, lambda e: sizes[e.path], _JOB)
    checked = {
        e.path
        for e in order
        if check or any(source.specs[key].dtype != new_dtypes[e.path] for key in e.keys[: e.form.count])
    }
    suspects: dict[str, int] = {}
    made = (_make_job(job, source, shardings, new_dtypes, checked, suspects) for job in jobs)
    ready = local_files.run_in_order(made, len(jobs))
    with contextlib.closing(ready):
        for job, arrays in zip(jobs, ready, strict=True):
            out |= _transfer(job, arrays, shardings, new_dtypes)
            count(sum(sizes[e.path] for e in job))
    found = [(e.keys[: e.form.count], new_dtypes[e.path], suspects[e.path]) for e in order if e.path in suspects]
    counts = finite.explain_not_finite(found, lambda key: source.read_into(key, None), name)
    if check:
        finite.warn_not_finite(counts, name)
    return out


_Arrays = Mapping[str, Mapping[Region, np.ndarray]]
"""`{path: {region: array}}`: the regions of each leaf that this process needs."""


def _make_job(
    job: Sequence[PlanEntry],
    source: TensorSource,
    shardings: Mapping[str, Sharding],
    dtypes: Mapping[str, np.dtype],
    checked: Collection[str],
    suspects: dict[str, int],
) -> Callable[[], _Arrays]:
    """Return a task that reads the regions of each leaf, and counts NaN and infinity of those in `checked`."""
    arrays: dict[str, dict[Region, np.ndarray]] = {}
    for entry in job:
        place, dtype = shardings.get(entry.path), dtypes[entry.path]
        # Allocated here, in the caller's thread; see `threads.run_in_order`.
        if place is None:
            arrays[entry.path] = {regions.full_region(entry.shape): _allocate(entry, entry.shape, dtype)}
            continue
        boxes = regions.addressable_regions(place, entry.shape)
        arrays[entry.path] = {box: _allocate(entry, regions.region_shape(box), dtype) for box in boxes}

    def read() -> _Arrays:
        with np.errstate(over="ignore"):  # `explain_not_finite` names the tensors
            for entry in job:
                own = arrays[entry.path]
                _read_leaf(entry, source, own)
                # Now, while the processor has them in its cache.
                if entry.path in checked and not all(map(finite.is_finite, own.values())):
                    suspects[entry.path] = sum(map(finite.count_not_finite, own.values()))
        return arrays

    return read


def _transfer(
    job: Sequence[PlanEntry], arrays: _Arrays, shardings: Mapping[str, Sharding], dtypes: Mapping[str, np.dtype]
) -> dict[str, Any]:
    """Return the arrays of one job, on their devices."""
    # The memory is aligned and not used elsewhere, so XLA may share it. One call for all: each costs 0.1 ms.
    plain = {e.path: next(iter(arrays[e.path].values())) for e in job if e.path not in shardings}
    out: dict[str, Any] = dict(zip(plain, jax.device_put([*plain.values()], may_alias=True), strict=True))
    for path, shape in ((e.path, e.shape) for e in job if e.path in shardings):
        dtype = jax.dtypes.canonicalize_dtype(dtypes[path])
        # four times as fast as device_put of single-device arrays
        get = functools.partial(_part, arrays[path], shape)
        out[path] = jax.make_array_from_callback(shape, shardings[path], get, dtype)
    return out


def _part(parts: Mapping[Region, np.ndarray], shape: tuple[int, ...], index: Any) -> np.ndarray:
    return parts[regions.region_from_slices(index, shape)]


def _allocate(entry: PlanEntry, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Allocate the array of a region, in memory that XLA's CPU client accepts without a copy."""
    array = local_files.aligned_empty(math.prod(shape) * dtype.itemsize).view(dtype).reshape(shape)
    if entry.form.is_partial:  # the file does not contain all of it
        array[...] = 0
    return array


def _read_leaf(entry: PlanEntry, source: TensorSource, places: Mapping[Region, np.ndarray]) -> None:
    """Read the regions of a leaf into their arrays."""
    covers = regions.merge_neighbours(places) if len(places) > 1 else {box: [box] for box in places}
    for outer, members in covers.items():
        for piece in regions.file_regions(entry.form, outer):
            key = entry.keys[piece.number]
            target = places.get(outer)
            if target is not None and _read_in_place(
                source, key, piece, target[regions.relative_slices(piece.region, outer)]
            ):
                continue
            tile = _read_tile(source, key, piece)
            dtype = places[members[0]].dtype
            if not piece.is_exact and dtype.itemsize > tile.dtype.itemsize:
                tile = tile.astype(dtype)  # cast before decoding, which rounds only once then
            part = piece.decode(tile)
            for box in members:
                common = regions.intersection(box, piece.region)
                if common is not None:
                    _copy(
                        places[box][regions.relative_slices(common, box)],
                        part[regions.relative_slices(common, piece.region)],
                    )


def _read_in_place(source: TensorSource, key: str, piece: FileRegion, place: np.ndarray) -> bool:
    """Read a tensor directly into its place; return False, and do nothing, if the layouts differ."""
    if not piece.is_exact or not piece.is_full or place.dtype != source.specs[key].dtype:
        return False
    tile = piece.encode(place) if place.flags.c_contiguous else place
    if not tile.flags.c_contiguous:
        return False
    memory = tile.reshape(-1).view(np.uint8)
    data = source.read_into(key, memory)
    if not np.may_share_memory(data, memory):  # in memory already
        _copy(tile, data.reshape(tile.shape))
    return True


def _read_tile(source: TensorSource, key: str, piece: FileRegion) -> np.ndarray:
    """Return a region of one tensor, in the file's layout."""
    if piece.is_full:
        return source.read_into(key, None).reshape(piece.shape)
    return source.read_slice(key, regions.to_slices(piece.tensor_region), piece.shape)


def _copy(place: np.ndarray, part: np.ndarray) -> None:
    """Copy an array to its place, with a cast if the dtypes differ."""
    if place.dtype == part.dtype and place.ndim:  # numpy copies unsigned integers fastest
        bits = np.dtype(f"u{place.dtype.itemsize}")
        place, part = place.view(bits), part.view(bits)
    np.copyto(place, part, casting="unsafe")  # the caller chose the dtype


# ---------------------------------------------------------------- peft


def to_peft(
    tree: Any,
    name: str = DEFAULT,
    *,
    config: Config | None = None,
    keymap: KeyMap | str | None = None,
) -> PeftTensors:
    """Convert an adapter to PEFT's names and PyTorch's layout, in memory.

    Args:
        tree: an `Adapter`, an NNX model or state, Linen variables, or another library's tree, as in `extract`;
            or a `LoraTree` of one.
        config, keymap: needed only if the tree does not store them, or to rename by another keymap.

    Each tensor is encoded on access, as a numpy view where the layouts allow (inside jit: as a traced array).
    Raises `AttachError` or `KeyMapError`.

    >>> import jax, jaxadapt
    >>> base = {"q": {"kernel": jax.ShapeDtypeStruct((4, 6), "float32")}}
    >>> adapter = jaxadapt.init(jaxadapt.LoraConfig(r=2, target_modules=["q"]), base, key=jax.random.key(0))
    >>> {key: x.shape for key, x in to_peft(adapter).tensors.items()}
    {'base_model.model.q.lora_A.weight': (2, 4), 'base_model.model.q.lora_B.weight': (6, 2)}
    """
    if isinstance(tree, PeftTensors):
        raise AttachError(
            "to_peft: expected an adapter in a model's layout, found PeftTensors, which need no conversion"
        )
    return save_adapter.encode_tree(tree, name, config, keymap, in_memory=True)


def from_peft(
    tensors: PeftTensors,
    target: Any,
    *,
    keymap: KeyMap | str | None = None,
    dtype: Any = None,
    stack_axes: Sequence[int] | None = None,
    example: Sequence[Any] | None = None,
    shardings: Any = None,
    base: str | None = None,
    strict: bool = True,
) -> Adapter:
    """Convert PEFT's tensors to an adapter in the layout of `target`.

    Args:
        target: an NNX model, Linen variables, base parameters, or the shapes of any of them; or a `LoraTree` of one.
        keymap, dtype, stack_axes, example, shardings, strict: as in `load`.
        base: as in `load`, but only "changed" is possible here.

    Raises `MismatchError` listing every missing, unexpected, wrongly shaped or unusable tensor.

    >>> import jax, jaxadapt
    >>> base = {"q": {"kernel": jax.numpy.ones((4, 6))}}
    >>> config = jaxadapt.LoraConfig(r=2, target_modules=["q"])
    >>> adapter = jaxadapt.init(config, base, key=jax.random.key(0))
    >>> again = from_peft(jaxadapt.to_peft(adapter), base)
    >>> again.config == config, again.params["q"]["kernel"]["lora_A"].shape
    (True, (2, 4))
    """
    if base not in (None, "changed"):
        raise AttachError(
            f"base={base!r}: expected None, or 'changed' if the target's base is changed; from_peft changes no base"
        )
    if not isinstance(tensors, PeftTensors):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise AttachError(
            f"expected PeftTensors (from read or to_peft), found {type(tensors).__name__};"
            " add an Adapter to a model with jaxadapt.inject"
        )
    if base is None:
        lora.require_original_base(tensors.config, tensors.source)
    dtype = requested_dtype(dtype)
    given = LoraTree.of(target)
    parameters = carrier(given.tree).base()
    adapter, _ = adapter_from_tensors(
        key_names.without_names(tensors), parameters, keymap, dtype, stack_axes, example, shardings,
        on_shared=given.on_shared, strict=strict,
    )  # fmt: skip
    return collections.box_like_base(adapter, parameters.held)


def is_spread(base: BaseParams, shardings: Any) -> bool:
    """Return True if an adapter belongs anywhere but on the default device."""
    return shardings is not None or any(sharding is not None for sharding in base.shardings.values())


def adapter_from_tensors(
    tensors: PeftTensors,
    base: BaseParams,
    keymap: Any,
    dtype: Any,
    stack_axes: Any,
    example: Any,
    shardings: Any,
    on_mismatch: str | None = None,
    report: Report = no_report,
    on_shared: str | None = None,
    strict: bool = True,
    check: bool = False,
) -> tuple[Adapter, Sites]:
    """Decode PEFT's tensors into the layout of a base; return the adapter and its sites.

    With `check`, NaN and infinity in the tensors are a warning.

    Raises `MismatchError` listing all tensors that do not fit, and `AdapterError` for a configuration that does not fit
    the base.
    """
    try:
        keys = [key.removeprefix(PEFT_PREFIX) for key in tensors.tensors]
        get_method(tensors.config)
        keymap = planning.target_keymap(base, keymap, keys)
        if experts.may_have_experts(keys):
            tensors = experts.fuse_experts(tensors, keymap, on_shared)
        found = {key: shape for key, shape in as_source(tensors.tensors).shapes.items() if shape}
        recipe, adapter_sites = planning.plan_adapter(base, tensors.config, keymap, stack_axes, example, found)
        planning.check_kernels(recipe.config, base, adapter_sites)
        plan = make_file_plan(adapter_sites)
    except AdapterError as error:
        hint = _attention_hint(tensors.tensors) if isinstance(error, TargetError) else ""
        raise type(error)(f"{tensors.source}: {error}{hint}") from error
    if is_newer_attention_file(tensors.config, (site.match for site in adapter_sites if not site.method.copies)):
        warn(
            f"{tensors.source}: written by PEFT {tensors.config.peft_version}. PEFT up to {PEFT_VERSION} adds the"
            " product of an nn.MultiheadAttention's output projection twice, and so does jaxadapt; newer versions are"
            " untested. If that version adds it once, halve the projection's lora_B"
        )
    if has_parts(plan.keys):
        tensors = dataclasses.replace(tensors, tensors=cut_parts(tensors.tensors, plan.keys))
    if on_mismatch == "skip":
        fitted = base_weights.fit_vocabulary(tensors.tensors, adapter_sites, recipe.keymap, base.leaves, tensors.source)
        tensors = dataclasses.replace(tensors, tensors=fitted)
    specs = as_source(tensors.tensors).specs
    dtypes = {key: spec.dtype for key, spec in specs.items()}
    requested, dtype = dtype, None if dtype == AUTOCAST else dtype
    integers = {key: t.dtype for t, e in file_entries(adapter_sites) if t.dtype is not None for key in e.keys}
    non_floats = {d for d in set(dtypes.values()) if not jnp.issubdtype(d, jnp.floating)}
    unusable = [
        f"{k}: {d.name}, expected {'integers' if k in integers else 'floats'}"
        for k, d in dtypes.items()
        if k in plan.keys and (not jnp.issubdtype(d, jnp.integer) if k in integers else d in non_floats)
    ]
    shapes = {key: spec.shape for key, spec in specs.items()}
    if full_copies.repeats_heads(tensors.config, recipe.keymap, base.leaves):
        repeated = full_copies.redundant_head_keys(
            tensors.config, tensors.tensors, plan.entries, recipe.keymap, tensors.source
        )
        shapes = {key: shape for key, shape in shapes.items() if key not in repeated}
    if shapes.keys() - plan.keys.keys():
        redundant = base_weights.embedding_keys(
            tensors.config, tensors.tensors, shapes, plan.keys, recipe.keymap, base.leaves, tensors.source
        )
        redundant |= full_copies.redundant_keys(tensors.tensors, plan.keys, tensors.source)
        shapes = {key: shape for key, shape in shapes.items() if key not in redundant}
        redundant = base_weights.base_weight_keys(
            tensors.tensors, {key: shape for key, shape in shapes.items() if key not in plan.keys}, recipe.keymap,
            base.leaves, tensors.source, strict,
        )  # fmt: skip
        shapes = {key: shape for key, shape in shapes.items() if key not in redundant}
    repeats = repeated_keys(adapter_sites)
    full_copies.require_equal(tensors.tensors, repeats, tensors.source)
    for key, original in repeats.items():
        if original in shapes and key not in shapes:
            shapes[key], dtypes[key] = shapes[original], dtypes[original]
    optional = (entry for tensor, entry in file_entries(adapter_sites) if tensor.optional)
    missing = [key for entry in optional for key in entry.keys if key not in shapes]
    if strict or not plan.keys.keys() & shapes.keys():
        assumed = {key: plan.shapes[key] for key in missing}
        try:
            plan.check({**shapes, **assumed}, tensors.source, unusable, recipe.keymap.name if strict else "")
        except MismatchError as error:
            raise MismatchError(f"{error}{_attention_hint(shapes.keys() - plan.keys.keys())}") from error
    else:
        plan.check({**plan.shapes, **{k: s for k, s in shapes.items() if k in plan.keys}}, tensors.source, unusable)
        _warn_of_missing(tensors.source, plan, {*shapes, *missing}, shapes)
        missing = [key for key in plan.keys if key not in shapes]
    _require_bounded(missing, plan, adapter_sites, base.shapes, tensors.source)
    if missing:
        added = _created_tensors(tensors, plan, missing, recipe.config, adapter_sites, base)
        planned = {key: tensors.tensors[key] for key in plan.keys if key in tensors.tensors}
        tensors = dataclasses.replace(tensors, tensors=planned | added)
        dtypes |= {key: np.dtype(x.dtype) for key, x in added.items()}
    if dtype is None and np.dtype("float64") in dtypes.values() and jnp.zeros(0, float).dtype != "float64":
        warn(f"{tensors.source}: float64 tensors become float32, because jax_enable_x64 is off")
    placement = adapter_placement(shardings, base, adapter_sites) if is_spread(base, shardings) else {}
    copied = _copied_keys(adapter_sites)
    memory_dtypes = {d: memory_dtype(d, requested) for d in set(dtypes.values())}
    new_dtypes = {key: d if key in copied else memory_dtypes[d] for key, d in dtypes.items()}
    new_dtypes |= {key: np.dtype(name) for key, name in integers.items()}
    leaves = load_arrays(plan, tensors.tensors, new_dtypes, dtype, placement, report, name=tensors.source, check=check)
    if dtype is None and new_dtypes != dtypes:  # arrays in memory keep their own dtypes
        for entry in plan.entries:
            if any(new_dtypes[key] != dtypes[key] for key in entry.keys):
                leaves[entry.path] = leaves[entry.path].astype(entry.dtype(new_dtypes))
    if any(not tensor.in_file for tensor in all_tensors(adapter_sites)):
        leaves = initial_values.init_values(
            recipe.config,
            adapter_sites,
            jax.random.key(0),
            base=base.leaves,
            base_shardings=base.shardings,
            given=leaves,
        )
    return Adapter(recipe.config, paths.unflatten(leaves), recipe.keymap), adapter_sites


def _copied_keys(adapter_sites: Sequence[Site]) -> set[str]:
    """Return the keys of full copies (`modules_to_save`), which keep the file's dtype."""
    return {key for site in adapter_sites if site.method.copies for entry in site.entries for key in entry.keys}


def _attention_hint(keys: Iterable[str]) -> str:
    """Return a hint for keymaps without entries for an `nn.MultiheadAttention`, which only PEFT's keys name so."""
    split = (key.removeprefix(PEFT_PREFIX).partition(".base_layer.out_proj.lora_") for key in keys)
    modules = sorted({module for module, separator, _ in split if separator})
    if not modules:
        return ""
    return (
        "\nEach of these is an nn.MultiheadAttention in PyTorch, which stores queries, keys and values in one tensor."
        " Pass a KeyMap with entries for them, made by Weight.attention(path in JAX, name in PyTorch):\n"
        + paths.bullets(modules)
    )


def _warn_of_missing(source: str, plan: plans.Plan, present: Collection[str], found: Iterable[str]) -> None:
    """Warn of the tensors that a file lacks, which start as in a fresh adapter, and of unexpected tensors."""
    missing, unexpected = [k for k in plan.keys if k not in present], [k for k in found if k not in plan.keys]
    notes = [
        f"{len(keys)} {effect}:\n{paths.bullets(keys, len(keys))}"
        for effect, keys in (
            ("are missing, and start as in a fresh adapter", missing),
            ("have no place in the model, and are ignored", unexpected),
        )
        if keys
    ]
    if notes:
        warn(f"{source}: strict=False loads the tensors that fit. Of the adapter's tensors\n" + "\n".join(notes))


_CREATED = 2**24
"""The number of values that may be created for a file that lacks them, if its base is small."""


def _require_bounded(
    missing: Iterable[str],
    plan: plans.Plan,
    adapter_sites: Sites,
    base: Mapping[str, Sequence[int]],
    source: str,
) -> None:
    """Raise `MismatchError` if the tensors that the file lacks would be much larger than the adapted weights.

    Only the configuration states their sizes, so that a rank of 10^8 would take all memory.
    """
    created = sum(math.prod(plan.shapes[key]) for key in missing)
    created += sum(math.prod(e.shape) for tensor, e in tensor_entries(adapter_sites) if not tensor.in_file)
    weights = sum(math.prod(base[leaf]) for leaf in {site.leaf for site in adapter_sites})
    if created > (limit := max(_CREATED, 4 * weights)):
        raise MismatchError(
            f"{source}: the configuration asks for {created} values that the file lacks: expected at most {limit}, as"
            f" the adapted weights have {weights}. Correct the configuration's sizes, such as r"
        )


def _created_tensors(
    tensors: PeftTensors,
    plan: plans.Plan,
    missing: Sequence[str],
    config: Config,
    adapter_sites: Sites,
    base: planning.BaseParams,
) -> dict[str, Any]:
    """Return the tensors that a file lacks, as in a new adapter."""
    absent = set(missing)
    incomplete = Sites(
        (s for s in adapter_sites if any(key in absent for entry in s.entries for key in entry.keys)),
        (each for each in adapter_sites.shared if not absent.isdisjoint(each.entry.keys)),
        adapter_sites.method,
    )
    try:
        leaves = initial_values.init_values(
            config, incomplete, jax.random.key(0), base=base.leaves, whole=adapter_sites
        )
    except AdapterError as error:
        raise type(error)(f"{tensors.source}: cannot initialize the missing tensors: {error}") from error
    traced = any(isinstance(tensors.tensors[key], jax.Array) for key in plan.keys if key in tensors.tensors)
    encoded = make_file_plan(incomplete).encode(leaves, host=not traced)
    dtypes = {np.dtype(spec.dtype) for key, spec in as_source(tensors.tensors).specs.items() if key in plan.keys}
    copied = _copied_keys(incomplete)
    common = dtypes.pop() if len(dtypes) == 1 else None
    own = copied | {key for key, spec in encoded.specs.items() if spec.dtype.kind in "iu"}
    return {key: encoded[key] if common is None or key in own else encoded[key].astype(common) for key in missing}


AUTOCAST = "autocast"
"""In place of a dtype: float32 for tensors of fewer bits, as PEFT's `autocast_adapter_dtype`."""


def requested_dtype(dtype: Any) -> Any:
    """Return a caller's dtype in memory: None, `AUTOCAST` or a NumPy dtype. Raises `ConfigError` for any other."""
    return dtype if dtype is None or (isinstance(dtype, str) and dtype == AUTOCAST) else float_dtype(dtype)


def memory_dtype(stored: Any, requested: Any) -> np.dtype[Any]:
    """Return the dtype in memory of a tensor stored as `stored`: float32 for 8-bit floats, which have no arithmetic."""
    if not is_float(stored):
        return np.dtype(stored)
    if requested not in (None, AUTOCAST):
        return np.dtype(requested)
    narrow = np.dtype(stored).itemsize < (4 if requested == AUTOCAST else 2)
    return np.dtype("float32" if narrow else stored)


def adapter_placement(shardings: Any, base: BaseParams, adapter_sites: Sequence[Site]) -> dict[str, Any]:
    """Return {path: sharding}: the requested shardings, else those that follow from the base."""
    if shardings is not None:
        requested = shardings.flat() if isinstance(shardings, Adapter) else shardings
        return initial_values.requested_shardings(requested, adapter_sites)
    return initial_values.adapter_shardings(adapter_sites, base.shardings)


# ---------------------------------------------------------------- models in files


def with_pytorch_names(tensors: PeftTensors) -> Adapter:
    """Return the adapter for a model whose parameters have PyTorch's names and layouts."""
    shapes = as_source(tensors.tensors).shapes
    weights = pytorch.weight_shapes(shapes)
    base = paths.unflatten({leaf: jax.ShapeDtypeStruct(shape, "float32") for leaf, shape in weights.items()})
    sizes = functools.partial(file_sizes, tensors.config)
    return from_peft(tensors, base, keymap=pytorch.state_dict_keymap(weights, shapes, tensors.source, sizes))


def base_keymap(
    tensors: PeftTensors, base: Mapping[str, tuple[int, ...]], tied: tuple[tuple[str, str], ...] = ()
) -> KeyMap:
    """Return the keymap for an adapter of a model in files, from the shapes of its parameters; see `pytorch`."""
    shapes, sizes = as_source(tensors.tensors).shapes, functools.partial(file_sizes, tensors.config)
    turned = bool(tensors.config.get("fan_in_fan_out"))
    return pytorch.state_dict_keymap(base, shapes, tensors.source, sizes, turned, tied)
