"""Convert between a model's layout and PEFT's: `to_peft`, `from_peft`, and `adapter_from_tensors`, which `load` uses.

`load_arrays` reads tensors from a file, or from memory, into device arrays in the model's layout.
Threads read the regions that devices need, and transpose them where the layouts differ, into memory that XLA's CPU
client accepts without a copy. The caller's thread transfers arrays as they become ready. So the data is in memory once,
and the device does not wait for the whole file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from jaxadapt.adapters import experts, initial_values, peft_tensors
from jaxadapt.adapters.adapter import Adapter, Recipe
from jaxadapt.adapters.peft_tensors import PeftTensors
from jaxadapt.adapters.site import Site, Sites, all_tensors, file_entries
from jaxadapt.arrays import finite, regions
from jaxadapt.arrays.regions import FileRegion, Region
from jaxadapt.configs import lora
from jaxadapt.configs.base import PEFT_VERSION, Config
from jaxadapt.core import paths
from jaxadapt.core.errors import AdapterError, AttachError, TargetError, warn
from jaxadapt.core.progress import Report, byte_counter, no_report
from jaxadapt.keymaps import pytorch
from jaxadapt.keymaps.keymap import PEFT_PREFIX, KeyMap
from jaxadapt.keymaps.plan import Plan, PlanEntry
from jaxadapt.methods.base import file_sizes
from jaxadapt.methods.lora import is_newer_attention_file
from jaxadapt.methods.registry import get_method
from jaxadapt.models import planning
from jaxadapt.models.carriers import DEFAULT, carrier, refuse
from jaxadapt.models.foreign.tree import LoraTree
from jaxadapt.models.linen import wrapper
from jaxadapt.models.planning import BaseParams
from jaxadapt.persistence import rules, save_adapter
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
    if not isinstance(tensors, TensorSource) and any(isinstance(x, jax.Array) for x in tensors.values()):
        return _decode_in_memory(plan, tensors, dtype, shardings, name)
    source = as_source(tensors)

    def leaf_of(entry: PlanEntry) -> _Leaf:
        wanted = dtype[entry.path] if isinstance(dtype, Mapping) else dtype
        new = entry.dtype(dtypes) if wanted is None else np.dtype(wanted)
        place = shardings.get(entry.path)
        size = entry.form.size if place is None else regions.addressable_size(place, entry.shape)
        checked = check or any(source.specs[key].dtype != new for key in entry.keys[: entry.form.count])
        return _Leaf(entry, new, place, size * new.itemsize, checked)

    position = {key: number for number, key in enumerate(source)}
    order = sorted(map(leaf_of, plan.entries), key=lambda leaf: position[leaf.entry.keys[0]])  # file order
    count = byte_counter(report, stage, sum(leaf.nbytes for leaf in order))
    out: dict[str, Any] = {e.path: None for e in plan.entries}
    jobs = local_files.split_by_size(order, operator.attrgetter("nbytes"), _JOB)
    ready = local_files.run_in_order((_make_job(job, source) for job in jobs), len(jobs))
    with contextlib.closing(ready):
        for job, _ in zip(jobs, ready, strict=True):
            out |= _transfer(job)
            count(sum(leaf.nbytes for leaf in job))
    found = [(x.entry.keys[: x.entry.form.count], x.dtype, x.not_finite) for x in order if x.not_finite is not None]
    counts = finite.explain_not_finite(found, lambda key: source.read_into(key, None), name)
    if check:
        finite.warn_not_finite(counts, name)
    return out


def _decode_in_memory(
    plan: Plan, tensors: Mapping[str, Any], dtype: Any, shardings: Mapping[str, Sharding], name: str
) -> dict[str, Any]:
    """Return `{path: array}` of JAX arrays, which may be traced."""
    decoded = plan.decode({key: x if isinstance(x, jax.Array) else jnp.array(x) for key, x in tensors.items()})
    leaves = decoded if dtype is None else finite.cast_tree(decoded, dtype, name)
    return {path: regions.move_to(x, shardings[path]) if path in shardings else x for path, x in leaves.items()}


@dataclasses.dataclass
class _Leaf:
    """One array to load.

    Attributes:
        sharding: None for the default device.
        nbytes: the bytes that this process holds.
        is_checked: True to count NaN and infinity.
        regions: the regions that this process needs, in the host's memory.
        not_finite: the number of values that are NaN or infinite, if there are any.
    """

    entry: PlanEntry
    dtype: np.dtype[Any]
    sharding: Sharding | None
    nbytes: int
    is_checked: bool
    regions: dict[Region, np.ndarray] = dataclasses.field(default_factory=dict[Region, np.ndarray])
    not_finite: int | None = None

    def part(self, index: tuple[slice, ...] | None) -> np.ndarray:
        """Return one of the regions."""
        return self.regions[regions.region_from_slices(index or (), self.entry.shape)]


def _make_job(job: Sequence[_Leaf], source: TensorSource) -> Callable[[], None]:
    """Return a task that reads the regions of each leaf."""
    for leaf in job:
        # Allocated here, in the caller's thread; see `local_files.run_in_order`.
        place, shape = leaf.sharding, leaf.entry.shape
        boxes = [regions.full_region(shape)] if place is None else regions.addressable_regions(place, shape)
        leaf.regions = {box: _allocate(leaf, shape if place is None else regions.region_shape(box)) for box in boxes}

    def read() -> None:
        with np.errstate(over="ignore"):  # `explain_not_finite` names the tensors
            for leaf in job:
                _read_leaf(leaf.entry, source, leaf.regions)
                # Now, while the processor has them in its cache.
                if leaf.is_checked and not all(map(finite.is_finite, leaf.regions.values())):
                    leaf.not_finite = sum(map(finite.count_not_finite, leaf.regions.values()))

    return read


def _transfer(job: Sequence[_Leaf]) -> dict[str, Any]:
    """Return the arrays of one job, on their devices, and forget the host's memory."""
    # The memory is aligned and not used elsewhere, so XLA may share it. One call for all: each costs 0.1 ms.
    plain = {leaf.entry.path: next(iter(leaf.regions.values())) for leaf in job if leaf.sharding is None}
    out: dict[str, Any] = dict(zip(plain, jax.device_put([*plain.values()], may_alias=True), strict=True))
    for leaf in job:
        if leaf.sharding is not None:
            # four times as fast as device_put of single-device arrays
            out[leaf.entry.path] = jax.make_array_from_callback(
                leaf.entry.shape, leaf.sharding, leaf.part, jax.dtypes.canonicalize_dtype(leaf.dtype)
            )
        leaf.regions = {}
    return out


def _allocate(leaf: _Leaf, shape: tuple[int, ...]) -> np.ndarray:
    """Allocate the array of a region, in memory that XLA's CPU client accepts without a copy."""
    array = local_files.aligned_empty(math.prod(shape) * leaf.dtype.itemsize).view(leaf.dtype).reshape(shape)
    if leaf.entry.form.is_partial:  # the file does not contain all of it
        array[...] = 0
    return array


def _read_leaf(entry: PlanEntry, source: TensorSource, places: Mapping[Region, np.ndarray]) -> None:
    """Read the regions of a leaf into their arrays."""
    covers = regions.merge_neighbours(places) if len(places) > 1 else {box: [box] for box in places}
    for outer, members in covers.items():
        for piece in regions.file_regions(entry.form, outer):
            key, slices = entry.keys[piece.number], regions.relative_slices(piece.region, outer)
            if outer in places and _read_in_place(source, key, piece, places[outer][slices]):
                continue
            whole, part = piece.is_full, regions.to_slices(piece.tensor_region)
            tile = (
                source.read_into(key, None).reshape(piece.shape) if whole else source.read_slice(key, part, piece.shape)
            )
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


def _copy(place: np.ndarray, part: np.ndarray) -> None:
    """Copy an array to its place, with a cast if the dtypes differ."""
    if place.dtype == part.dtype and place.ndim:  # numpy copies unsigned integers fastest
        bits = np.dtype(f"u{place.dtype.itemsize}")
        place, part = place.view(bits), part.view(bits)
    np.copyto(place, part, casting="unsafe")  # the caller chose the dtype


# ---------------------------------------------------------------- peft


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
    return save_adapter.encode_tree(model, name, keymap, in_memory=True)


def from_peft(
    tensors: PeftTensors,
    model: Any,
    *,
    keymap: KeyMap | str | None = None,
    dtype: Any = None,
    shardings: Any = None,
    strict: bool = True,
) -> Adapter:
    """Convert PEFT's tensors to an adapter in the layout of `model`.

    Args:
        tensors: from `read` or `to_peft`. With `change_base=True` they are refused: only `load` changes a base.
        model: an NNX model, Linen variables, base parameters, or the shapes of any of them; or a `LoraTree` of one.
        keymap, dtype, shardings: as in `load`.
        strict: as in `load`, True or False.

    Raises `MismatchError` listing every missing, unexpected, wrongly shaped or unusable tensor.

    >>> import jax, jaxadapt
    >>> base = {"q": {"kernel": jax.numpy.ones((4, 6))}}
    >>> config = jaxadapt.LoraConfig(r=2, target_modules=["q"])
    >>> adapter = jaxadapt.init(base, config, key=jax.random.key(0))
    >>> again = from_peft(jaxadapt.to_peft(adapter), base)
    >>> again.config == config, again.params["q"]["kernel"]["lora_A"].shape
    (True, (2, 4))
    """
    if not isinstance(tensors, PeftTensors):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise AttachError(
            f"expected PeftTensors (from read or to_peft), found {type(tensors).__name__};"
            " add an Adapter to a model with jaxadapt.inject"
        )
    if tensors.change_base is None:
        lora.require_original_base(tensors.config, tensors.source)
    if tensors.change_base:
        raise AttachError(
            f"{tensors.source}: change_base=True: from_peft changes no base; pass the tensors to load, or read them"
            " with change_base=False if the base of the model is changed"
        )
    if strict not in (True, False):
        raise AttachError(f"strict={strict!r}: expected True or False; only load compares the base")
    given = LoraTree.of(model)
    refuse({"config": given.config}, "applies to a tree that is read, not to one that is filled")
    parameters = carrier(given.tree).base()
    options = rules.Options(keymap, requested_dtype(dtype), shardings, strict, given)
    tensors = peft_tensors.without_names(tensors)
    return wrapper.box_like_base(adapter_from_tensors(tensors, parameters, options)[0], parameters.held)


def adapter_from_tensors(
    tensors: PeftTensors, base: BaseParams, options: rules.Options, report: Report = no_report, check: bool = False
) -> tuple[Adapter, Sites]:
    """Decode PEFT's tensors into the layout of a base; return the adapter and its sites.

    With `check`, NaN and infinity in the tensors are a warning.

    Raises `MismatchError` listing all tensors that do not fit, and `AdapterError` for a configuration that does not fit
    the base.
    """
    tensors, recipe, adapter_sites = _bind(tensors, base, options)
    expected = rules.Expected(tensors, recipe, adapter_sites, base, options)
    source = rules.fit(expected)
    own = {key: spec.dtype for key, spec in source.specs.items()}
    if options.dtype is None and np.dtype("float64") in own.values() and jnp.zeros(0, float).dtype != "float64":
        warn(f"{tensors.source}: float64 tensors become float32, because jax_enable_x64 is off")
    dtype = None if options.dtype == AUTOCAST else options.dtype
    dtypes = _memory_dtypes(own, options.dtype, adapter_sites)
    placement = adapter_placement(options.shardings, base, adapter_sites)
    plan, on_device = expected.plan, expected.on_device
    arrays = dict(source) if on_device else source
    leaves = load_arrays(plan, arrays, dtypes, dtype, placement, report, name=tensors.source, check=check)
    if dtype is None and on_device and dtypes != own:  # arrays in memory keep their own dtypes
        leaves |= {e.path: leaves[e.path].astype(e.dtype(dtypes)) for e in plan.entries}
    if any(not tensor.in_file for tensor in all_tensors(adapter_sites)):
        leaves = initial_values.init_values(
            recipe.config, adapter_sites, jax.random.key(0), base=base.leaves, base_shardings=base.shardings,
            given=leaves,
        )  # fmt: skip
    return Adapter(recipe.config, paths.unflatten(leaves), recipe.keymap), adapter_sites


def _bind(tensors: PeftTensors, base: BaseParams, options: rules.Options) -> tuple[PeftTensors, Recipe, Sites]:
    """Bind a file's configuration to a base; return the tensors, fused as the base is, the recipe and the sites."""
    try:
        keys = [key.removeprefix(PEFT_PREFIX) for key in tensors.tensors]
        keymap = planning.target_keymap(base, options.keymap, keys)
        if experts.may_have_experts(keys):
            fused = experts.fuse_experts(tensors, keymap, options.given.on_shared)
            tensors = dataclasses.replace(tensors, config=fused.config, tensors=fused.tensors)
        found = {key: shape for key, shape in as_source(tensors.tensors).shapes.items() if shape}
        recipe, adapter_sites = planning.plan_adapter(
            base, tensors.config, keymap, options.given.stack_axes, options.given.example, found
        )
        planning.check_kernels(recipe.config, base, adapter_sites)
    except AdapterError as error:
        hint = rules.attention_hint(tensors.tensors) if isinstance(error, TargetError) else ""
        raise type(error)(f"{tensors.source}: {error}{hint}") from error
    if is_newer_attention_file(tensors.config, (site.match for site in adapter_sites if not site.method.copies)):
        warn(
            f"{tensors.source}: written by PEFT {tensors.config.peft_version}. PEFT up to {PEFT_VERSION} adds the"
            " product of an nn.MultiheadAttention's output projection twice, and so does jaxadapt; newer versions are"
            " untested. If that version adds it once, halve the projection's lora_B"
        )
    return tensors, recipe, adapter_sites


def _memory_dtypes(own: Mapping[str, Any], requested: Any, adapter_sites: Sites) -> dict[str, Any]:
    """Return the dtypes in memory by key, from a file's: copies keep theirs, and integers have the method's."""
    new = {dtype: memory_dtype(dtype, requested) for dtype in set(own.values())}
    integers = {key: np.dtype(t.dtype) for t, e in file_entries(adapter_sites) if t.dtype for key in e.keys}
    copied = rules.copied_keys(adapter_sites)
    return {key: dtype if key in copied else new[dtype] for key, dtype in own.items()} | integers


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
    """Return {path: sharding}: the requested shardings, else those that follow from the base; none on one device."""
    if shardings is not None:
        shardings = shardings.flat() if isinstance(shardings, Adapter) else shardings
        return initial_values.requested_shardings(shardings, adapter_sites)
    if all(sharding is None for sharding in base.shardings.values()):
        return {}
    return initial_values.adapter_shardings(adapter_sites, base.shardings)


# ---------------------------------------------------------------- models in files


def _module_sizes(config: Config, *given: Any) -> tuple[int | None, int | None]:
    return file_sizes(get_method(config), config, *given)


def with_pytorch_names(tensors: PeftTensors) -> Adapter:
    """Return the adapter for a model whose parameters have PyTorch's names and layouts."""
    shapes = as_source(tensors.tensors).shapes
    weights = pytorch.weight_shapes(shapes)
    base = paths.unflatten({leaf: jax.ShapeDtypeStruct(shape, "float32") for leaf, shape in weights.items()})
    sizes = functools.partial(_module_sizes, tensors.config)
    return from_peft(tensors, base, keymap=pytorch.state_dict_keymap(weights, shapes, tensors.source, sizes))


def base_keymap(
    tensors: PeftTensors, base: Mapping[str, tuple[int, ...]], tied: tuple[tuple[str, str], ...] = ()
) -> KeyMap:
    """Return the keymap for an adapter of a model in files, from the shapes of its parameters; see `pytorch`."""
    shapes, sizes = as_source(tensors.tensors).shapes, functools.partial(_module_sizes, tensors.config)
    turned = bool(tensors.config.get("fan_in_fan_out"))
    return pytorch.state_dict_keymap(base, shapes, tensors.source, sizes, turned, tied)
