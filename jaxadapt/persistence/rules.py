"""The rules by which the tensors of an adapter's file become those that a model expects.

    file ──RULES──► the tensors of the plan ──create_missing──► all of them ──load_arrays──► arrays on the devices

A rule takes a source of tensors and what the model expects, and returns a source. It reads only the tensors that it
compares. What a rule refuses is collected, and `fit` raises it in one error. No rule changes the base, so weights of
the base in a file must equal the model's.

`load_arrays` reads tensors from a file, or from memory, into device arrays in the model's layout. Threads read the
regions that devices need, and transpose them where the layouts differ, into memory that XLA's CPU client accepts
without a copy. The caller's thread transfers arrays as they become ready. So the data is in memory once, and the device
does not wait for the whole file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxadapt.adapters import initial_values, peft_tensors
from jaxadapt.adapters.adapter import Recipe, Sites, file_entries, repeats_heads, tensor_entries
from jaxadapt.adapters.sites import WRAPPERS, is_embedding, repeat_for_heads, vocabulary_axes
from jaxadapt.arrays import regions
from jaxadapt.arrays.tensor_source import TensorSource, View, aligned_block, as_source, rename
from jaxadapt.configs.base import Config
from jaxadapt.core.errors import AdapterError, MismatchError, Report, bullets, byte_counter, no_report, warn
from jaxadapt.keymaps import check, pytorch
from jaxadapt.keymaps import plan as plans
from jaxadapt.keymaps.keymap import PEFT_PREFIX, KeyMap, entry_for_copy, fitting_match, is_guess
from jaxadapt.models.foreign.tree import LoraTree
from jaxadapt.models.planning import BaseParams
from jaxadapt.storage import local_files

# ---------------------------------------------------------------- expected


@dataclasses.dataclass(frozen=True)
class Options:
    """How an adapter's tensors are bound to a base, as in `load`; `given` has the options of a `LoraTree`."""

    keymap: KeyMap | str | None = None
    dtype: Any = None
    shardings: Any = None
    strict: bool = True
    given: LoraTree = dataclasses.field(default_factory=lambda: LoraTree(None))


@dataclasses.dataclass(frozen=True)
class Expected:
    """The expectations of a model about an adapter's file.

    Attributes:
        file: the file's configuration and tensors.
        recipe: the resolved configuration, and the model's keymap.
        sites: the adapted leaves.
        base: the base parameters.
        options: the caller's options.
        refusals: what the rules refuse, one text a rule.
    """

    file: peft_tensors.PeftTensors
    recipe: Recipe
    sites: Sites
    base: BaseParams
    options: Options
    refusals: list[str] = dataclasses.field(default_factory=list[str])

    @functools.cached_property
    def on_device(self) -> bool:
        """True if the file's tensors are JAX arrays, such as traced ones."""
        tensors = self.file.tensors
        return not isinstance(tensors, TensorSource) and any(isinstance(x, jax.Array) for x in tensors.values())

    @property
    def plan(self) -> plans.Plan:
        """The plan of the file."""
        return self.sites.file_plan

    def refuse(self, message: str, items: Collection[str], advice: str = "") -> None:
        """Add the problems of one rule, if there are any."""
        if items:
            self.refusals.append(f"{self.file.source}{message}\n{bullets(items)}{advice}")

    def is_lenient(self, source: TensorSource) -> bool:
        """Return True if only the tensors of a file that fit are loaded: with strict=False, if at least one fits."""
        return not self.options.strict and not self.plan.keys.keys().isdisjoint(source)

    @functools.cached_property
    def optional(self) -> set[str]:
        """The keys that a file may lack."""
        return {key for tensor, entry in file_entries(self.sites) if tensor.optional for key in entry.keys}


def _without(source: TensorSource, keys: Collection[str]) -> TensorSource:
    return rename(source, {key: key for key in source if key not in keys}) if keys else source


def _fitting(source: TensorSource, expected: Expected) -> TensorSource:
    """Return the tensors that have a place, if a file may hold others; else all."""
    surplus = [key for key in source if key not in expected.plan.keys] if expected.is_lenient(source) else []
    return _without(source, surplus)


def _with(source: TensorSource, arrays: Mapping[str, Any]) -> TensorSource:
    new = as_source(arrays)
    return (
        View(source.source, {key: (new if key in arrays else source, key) for key in [*source, *arrays]})
        if arrays
        else source
    )


# ---------------------------------------------------------------- rules


def cut_joint_tensors(source: TensorSource, expected: Expected) -> TensorSource:
    """Cut a tensor of PyTorch that is several leaves of the model into their parts."""
    keys = expected.plan.keys
    return as_source(plans.cut_parts(source, keys)) if plans.has_parts(keys) else source


def fit_vocabulary(source: TensorSource, expected: Expected) -> TensorSource:
    """Resize tensors for another vocabulary to the model's, with a warning for each, if `read` was asked for it.

    Rows that the file lacks have no effect in an adapter, and are the base's own in a copy. Tensors that differ in
    another way stay unchanged; `require_fit` refuses them.
    """
    fitted: dict[str, Any] = {}
    for site in expected.sites if expected.file.fit_vocabulary else ():
        axes = vocabulary_axes(site, expected.recipe.keymap)
        for tensor, entry in zip(site.tensors, site.entries, strict=True):
            key, *others = entry.keys
            shape = entry.form.file_shape
            found = source.specs[key].shape if key in source else shape
            differing = [i for i, (a, b) in enumerate(zip(found, shape, strict=False)) if a != b]
            if others or len(found) != len(shape) or not axes or [entry.form.right[i] for i in differing] != [axes]:
                continue
            (axis,) = differing
            base, dtype = expected.base.leaves.get(site.leaf), source.specs[key].dtype
            if tensor.name in site.method.neutral:
                rows = np.full(shape, site.method.neutral[tensor.name], dtype)
            elif tensor.is_copy and initial_values.has_value(base, abstract=False):
                rows = np.array(entry.form.encode(np.asarray(base), 0)).astype(dtype)
            else:
                continue
            count = min(found[axis], shape[axis])
            common = (slice(None),) * axis + (slice(count),)
            rows[common] = np.asarray(source[key])[common]
            fitted[key] = rows
            warn(
                f"{expected.file.source}: {key} is for a vocabulary of {found[axis]}, and the model's has {shape[axis]}"
                f": only the first {count} rows are used",
            )
    return _with(source, fitted)


def drop_repeats(source: TensorSource, expected: Expected) -> TensorSource:
    """Drop the tensors that repeat an embedding's for the head tied to it, or those of a fully trained module.

    They must be equal. With bias="all" PEFT writes the biases of a fully trained module twice more, under the names
    inside its wrapper: once as they were trained, and once as in the base, which is not used in any computation.
    """
    keymap = expected.recipe.keymap
    heads: dict[str, str] = {}
    turned: set[str] = set()
    if repeats_heads(expected.file.config, keymap, expected.base.shapes):
        first = {entry.path: entry for entry in expected.plan.entries}
        for entry in repeat_for_heads(expected.file.config, expected.plan.entries, keymap):
            own = first[entry.path]
            heads[entry.keys[0]] = own.keys[0]
            turned.update(entry.keys if entry.form.right != own.form.right else ())
    _require_equal(
        source, heads, expected, ": the head is tied to the embedding, so these tensors must be equal", turned
    )
    keys = expected.plan.keys
    surplus = [key for key in source if key not in keys]
    saved, original = (
        {key: name for key in surplus if f"{part}." in key and (name := "".join(key.rsplit(part, 1))) in keys}
        for part in WRAPPERS
    )
    _require_equal(source, saved, expected)
    return _without(source, {key for key, name in (saved | original).items() if name in source} | heads.keys())


def drop_base_weights(source: TensorSource, expected: Expected) -> TensorSource:
    """Drop weights and buffers of the base, as a complete state dict has them; weights must equal the model's.

    PEFT writes the token embedding and the head to the file of an adapter on them. With strict=False, other weights
    that differ stay, and count as unexpected.
    """
    keymap = expected.recipe.keymap
    surplus = [key for key in source if key not in expected.plan.keys]
    if not surplus:
        return source
    known = _base_tensors(expected)
    dropped: set[str] = set()
    uncompared: list[str] = []
    problems: dict[str, dict[str, str]] = {kind: {} for kind in ("head", "embeddings", "base weights")}
    for key in surplus:
        name = peft_tensors.unwrapped_key(key.removeprefix(keymap.prefix))
        if check.is_buffer(keymap, name) or _repeats_tied_module(source, key, keymap.tied):
            dropped.add(key)
        elif place := known.get(name):
            dropped.add(key)
            kind, problem = _judge_base_weight(source, key, place, expected)
            if problem is None:
                uncompared.append(key)
            elif problem:
                problems["head" if _is_saved(name, expected.file.config) else kind][key] = problem
    ignored = {} if expected.options.strict else problems.pop("base weights")
    expected.refuse(
        " holds a trained copy of a head that this model ties to its token embedding, so that the model has no"
        " parameter for the copy:",
        problems.pop("head").values(),
        "\nMerge the files (`jaxadapt merge BASE ADAPTER --out FOLDER`), which gives the head a tensor of its own, or"
        " load the adapter into a model with a separate head",
    )
    for kind, lines in problems.items():
        expected.refuse(
            f" holds {kind} that differ from the model's; loading an adapter never changes the base:",
            lines.values(),
            "\nReplace the base parameters yourself (jaxadapt.read(path).tensors has the values), then load again",
        )
    if uncompared:
        warn(
            f"{expected.file.source}: these tensors could not be compared, because the base has only shapes here; they"
            " are assumed to equal the base's:\n" + bullets(uncompared, len(uncompared))
        )
    return _without(source, dropped - ignored.keys())


def _is_saved(name: str, config: Config) -> bool:
    return name.removesuffix(".weight").rpartition(".")[2] in {
        str(each).rpartition(".")[2] for each in config.get("modules_to_save") or ()
    }


def _judge_base_weight(
    source: TensorSource, key: str, place: tuple[plans.PlanEntry, int], expected: Expected
) -> tuple[str, str | None]:
    """Return the kind of a weight of the base in a file, and how it differs from the base's.

    The difference is "" if it equals the base's, and None if the base has only shapes. `place` has the base's entry,
    and the number of the tensor in it.
    """
    entry, number = place
    keymap = expected.recipe.keymap
    form = entry.form
    leaf = expected.base.leaves[entry.path]
    shape = tuple(source.specs[key].shape)
    embeds = is_embedding(keymap, keymap.match(entry.path))
    kind = "embeddings" if embeds else "base weights"
    # A guessed layout may be a Conv1D's, which stores (in, out).
    turns = not embeds and len(form.file_shape) == 2 and is_guess(keymap, entry.path, expected.base.shapes[entry.path])
    if shape != form.file_shape and not (turns and shape[::-1] == form.file_shape):
        return kind, f"{key}: expected {list(form.file_shape)} as in the base, found {list(shape)}"
    if not isinstance(leaf, np.ndarray | jax.Array) or regions.is_traced(leaf):
        return kind, None
    own, value = np.asarray(form.encode(np.asarray(leaf), number)), np.asarray(source[key])
    exact = embeds or form.is_exact  # an embedding may have been trained a little
    for each in (value, value.T) if turns else (value,):
        if each.shape == own.shape and _is_near(each.astype(own.dtype), own, exact):
            return kind, ""
    return kind, f"{key}: its values differ from the base's"


def _base_tensors(expected: Expected) -> dict[str, tuple[plans.PlanEntry, int]]:
    """Return `{PyTorch's name: (entry, number of the tensor)}` of the base's weights, also under names tied to them."""
    shapes = expected.base.shapes
    keymap = expected.recipe.keymap
    unmapped = [leaf for leaf, shape in shapes.items() if fitting_match(keymap, leaf, shape) is None]
    full = keymap.with_entries(entry_for_copy(leaf, shapes[leaf]) for leaf in unmapped)
    entries = (plans.base_plan_entry(full, leaf, shape) for leaf, shape in shapes.items())
    known = {key: (entry, i) for entry in entries if entry is not None for i, key in enumerate(entry.keys)}
    return {alias: known[name] for alias, name in keymap.tied if name in known} | known


def _is_near(found: np.ndarray, own: np.ndarray, exact: bool) -> bool:
    """Return True if values equal the base's; a keymap's factor may add one rounding."""
    if exact:
        return np.array_equal(found, own)
    rtol = 4 * float(jnp.finfo(own.dtype).eps)
    return np.allclose(found.astype("float32"), own.astype("float32"), rtol=rtol, atol=0)


def _repeats_tied_module(source: TensorSource, key: str, tied: Iterable[tuple[str, str]]) -> bool:
    """Return True if a tensor of a tied module equals the tensor of the module it is tied to, in the same file."""
    twins = [
        key.replace(f"{alias.removesuffix('weight')}token_adapter.", f"{original.removesuffix('weight')}token_adapter.")
        for alias, original in tied
    ]
    return any(twin != key and twin in source and np.array_equal(source[twin], source[key]) for twin in twins)


def repeat_shared(source: TensorSource, expected: Expected) -> TensorSource:
    """Give a tensor of the whole adapter all its names; tensors that repeat it must be equal."""
    repeats = {key: s.entry.keys[0] for s in expected.sites.shared for key in s.entry.keys[s.entry.form.count :]}
    _require_equal(source, repeats, expected)
    missing = {key: name for key, name in repeats.items() if name in source and key not in source}
    return rename(source, {**{key: key for key in source}, **missing}) if missing else source


def _require_equal(
    source: TensorSource,
    originals: Mapping[str, str],
    expected: Expected,
    message: str = ": these tensors must be equal, since one repeats the other",
    turned: Collection[str] = (),
) -> None:
    """Refuse tensors that differ from the one that they repeat, from `{key: key of that one}`.

    Those in `turned` are transposed.
    """
    different: list[str] = []
    for key, name in originals.items():
        if key in source and name in source:  # `require_fit` refuses a missing one
            # `array_equal` alone takes values that it cannot read, such as traced ones, for different.
            one = np.asarray(source[name])
            if not np.array_equal(one.T if key in turned else one, np.asarray(source[key])):
                different.append(f"{key} and {name}")
    expected.refuse(f"{message}, and they differ:", different)


def require_fit(source: TensorSource, expected: Expected) -> TensorSource:
    """Refuse missing, unexpected, wrongly shaped and unusable tensors, in one list.

    With strict=False only the last two, unless no tensor fits.
    """
    given = _fitting(source, expected)
    integers = expected.sites.integers
    is_kind = functools.cache(jnp.issubdtype)
    unusable = [
        f"{key}: {spec.dtype.name}, expected {'integers' if key in integers else 'floats'}"
        for key, spec in given.specs.items()
        if key in expected.plan.keys and not is_kind(spec.dtype, jnp.integer if key in integers else jnp.floating)
    ]
    may_lack = expected.plan.keys if expected.is_lenient(source) else expected.optional
    keymap = expected.recipe.keymap.name if expected.options.strict else ""
    try:
        expected.plan.check(
            {key: expected.plan.shapes[key] for key in may_lack} | given.shapes, expected.file.source, unusable, keymap
        )
    except MismatchError as error:
        others = given.keys() - expected.plan.keys.keys()
        line = pytorch.no_place_for(expected.file.source, expected.file.config, (key for key in given if key in others))
        expected.refusals.append(f"{line}{error}{attention_hint(others)}")
    return source


RULES: tuple[Callable[[TensorSource, Expected], TensorSource], ...] = (
    cut_joint_tensors, fit_vocabulary, drop_repeats, drop_base_weights, repeat_shared, require_fit,
)  # fmt: skip


def fit(expected: Expected) -> TensorSource:
    """Return the tensors that a model expects.

    Raises one `MismatchError` with all that the rules refuse.
    """
    source = as_source(expected.file.tensors)
    for rule in RULES if source.shapes != expected.plan.shapes or expected.sites.shared else (require_fit,):
        source = rule(source, expected)
    if expected.refusals:
        raise MismatchError("\n".join(expected.refusals))
    return create_missing(source, expected)


def attention_hint(keys: Iterable[str]) -> str:
    """Return a hint for keymaps without entries for an `nn.MultiheadAttention`, which only PEFT's keys name so."""
    split = (key.removeprefix(PEFT_PREFIX).partition(".base_layer.out_proj.lora_") for key in keys)
    modules = sorted({module for module, separator, _ in split if separator})
    if not modules:
        return ""
    return (
        "\nEach of these is an nn.MultiheadAttention in PyTorch, which stores queries, keys and values in one tensor."
        " Pass a KeyMap with entries for them, made by Weight.attention(path in JAX, name in PyTorch):\n"
        + bullets(modules)
    )


# ---------------------------------------------------------------- tensors that a file lacks


_CREATED = 2**24
"""The number of values that may be created for a file that lacks them, if its base is small."""


def create_missing(source: TensorSource, expected: Expected) -> TensorSource:
    """Add the tensors that a file lacks, as in a new adapter; leave out those without a place, with a warning.

    Raises `MismatchError` if they would be much larger than the adapted weights: only the configuration states their
    sizes, so that a rank of 10^8 would take all memory. Raises `AdapterError` if they cannot be initialized.
    """
    fitting = _fitting(source, expected)
    missing = [key for key in expected.plan.keys if key not in source]
    if expected.is_lenient(source):
        _warn_of_others(
            [key for key in missing if key not in expected.optional],
            source.keys() - fitting.keys(),
            expected.file.source,
        )
    created = sum(math.prod(expected.plan.shapes[key]) for key in missing)
    created += sum(math.prod(e.shape) for tensor, e in tensor_entries(expected.sites) if not tensor.in_file)
    weights = sum(math.prod(expected.base.shapes[leaf]) for leaf in {site.leaf for site in expected.sites})
    if created > (limit := max(_CREATED, 4 * weights)):
        raise MismatchError(
            f"{expected.file.source}: the configuration asks for {created} values that the file lacks: expected at most"
            f" {limit}, as the adapted weights have {weights}. Correct the configuration's sizes, such as r"
        )
    return _with(fitting, _new_tensors(set(missing), fitting, expected)) if missing else fitting


def _warn_of_others(missing: Collection[str], unexpected: Collection[str], file: str) -> None:
    """Warn of the tensors that a file lacks, and of those without a place."""
    lists = {
        "are missing, and start as in a fresh adapter": missing,
        "have no place in the model, and are ignored": sorted(unexpected),
    }
    notes = [f"{len(keys)} {effect}:\n{bullets(keys, len(keys))}" for effect, keys in lists.items() if keys]
    if notes:
        warn("\n".join([f"{file}: strict=False loads the tensors that fit. Of the adapter's tensors", *notes]))


def _new_tensors(absent: set[str], source: TensorSource, expected: Expected) -> dict[str, Any]:
    """Return the tensors with these keys of a new adapter, in the dtype of the others if they have one."""
    every = expected.sites
    incomplete = Sites(
        (s for s in every if any(key in absent for entry in s.entries for key in entry.keys)),
        (each for each in every.shared if not absent.isdisjoint(each.entry.keys)),
        every.method,
    )
    try:
        leaves = initial_values.init_values(
            expected.recipe.config, incomplete, jax.random.key(0), base=expected.base.leaves, whole=every
        )
    except AdapterError as error:
        raise type(error)(f"{expected.file.source}: cannot initialize the missing tensors: {error}") from error
    new = incomplete.file_plan.encode(leaves, host=not expected.on_device)
    dtypes = {spec.dtype for spec in source.specs.values()}
    own = dtypes.pop() if len(dtypes) == 1 else None

    def value(key: str) -> Any:
        keeps = own is None or key in incomplete.copied_keys or new.specs[key].dtype.kind in "iu"
        return new[key] if keeps else new[key].astype(own)

    return {key: value(key) for key in new if key in absent}


# ---------------------------------------------------------------- device arrays


# Bytes of the leaves of one job: small enough to share the work between threads.
_JOB = 16 << 20


def load_arrays(
    plan: plans.Plan,
    tensors: Mapping[str, Any],
    dtypes: Mapping[str, Any],
    shardings: Mapping[str, jax.sharding.Sharding] | None = None,
    report: Report = no_report,
    stage: str = "load",
    name: str = "the file",
    check: bool = False,
) -> dict[str, Any]:
    """Return {path: array} from {key: tensor}.

    Args:
        plan: the leaves and their tensors.
        tensors: a `TensorSource`, or arrays in memory (traced ones inside jit). They are copied, never shared.
        dtypes: the dtypes that the tensors have in their arrays, by key.
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
        return _decode_in_memory(plan, tensors, dtypes, shardings, name)
    source = as_source(tensors)

    def leaf_of(entry: plans.PlanEntry) -> _Leaf:
        new, place = entry.dtype(dtypes), shardings.get(entry.path)
        size = entry.form.size if place is None else regions.addressable_size(place, entry.shape)
        is_cast = {source.specs[key].dtype for key in entry.keys[: entry.form.count]} != {new}
        is_copy = not is_cast and entry.form.is_identity and 2 * size >= entry.form.size
        return _Leaf(entry, new, place, size * new.itemsize, check or is_cast, is_copy, {})

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
    regions.explain_not_finite(found, lambda key: source.read_into(key, None), name, warns=check)
    return out


def _decode_in_memory(
    plan: plans.Plan,
    tensors: Mapping[str, Any],
    dtypes: Mapping[str, Any],
    shardings: Mapping[str, jax.sharding.Sharding],
    name: str,
) -> dict[str, Any]:
    """Return `{path: array}` of JAX arrays, which may be traced."""
    leaves = plan.decode({key: x if isinstance(x, jax.Array) else jnp.array(x) for key, x in tensors.items()})
    wanted = {entry.path: jax.dtypes.canonicalize_dtype(entry.dtype(dtypes)) for entry in plan.entries}
    for dtype in {new for path, new in wanted.items() if leaves[path].dtype != new}:
        leaves |= regions.cast_tree({path: leaves[path] for path, new in wanted.items() if new == dtype}, dtype, name)
    return {path: regions.move_to(x, shardings[path]) if path in shardings else x for path, x in leaves.items()}


@dataclasses.dataclass(slots=True)
class _Leaf:
    """One array to load.

    Attributes:
        sharding: None for the default device.
        nbytes: the bytes that this process holds.
        is_checked: True to count NaN and infinity.
        is_copy: True if the array has the bytes of one tensor of the file, and this process needs half of them or more.
        arrays: {region to read: its array in the host's memory}.
        not_finite: the number of values that are NaN or infinite, if there are any.
    """

    entry: plans.PlanEntry
    dtype: np.dtype[Any]
    sharding: jax.sharding.Sharding | None
    nbytes: int
    is_checked: bool
    is_copy: bool
    arrays: dict[regions.Region, np.ndarray]
    not_finite: int | None = None

    def to_read(self) -> Iterable[regions.Region]:
        """Return the regions to read: those that this process needs, or all of a copy, which is one read for many."""
        return (
            (regions.full_region(self.entry.shape),)
            if self.sharding is None or self.is_copy
            else regions.addressable_regions(self.sharding, self.entry.shape)
        )

    def part(self, index: tuple[slice, ...] | None) -> np.ndarray:
        """Return the values of a shard."""
        if self.is_copy:
            return self.arrays[regions.full_region(self.entry.shape)][index or ()]
        return self.arrays[regions.region_from_slices(index or (), self.entry.shape)]


def _make_job(job: Sequence[_Leaf], source: TensorSource) -> Callable[[], None]:
    """Return a task that reads the regions of each leaf."""
    # Allocated here, in the caller's thread; see `local_files.run_in_order`. In one piece: that is faster.
    held = [(leaf, box, regions.region_shape(box)) for leaf in job for box in leaf.to_read()]
    sizes = [math.prod(shape) * leaf.dtype.itemsize for leaf, _, shape in held]
    block, starts = aligned_block(sizes)
    for (leaf, box, shape), start in zip(held, starts, strict=True):
        leaf.arrays[box] = np.ndarray(shape, leaf.dtype, block, start)
    if any(leaf.entry.form.is_partial for leaf in job):  # the file does not contain all of such a leaf
        block[...] = 0
    (dtype, *others) = {leaf.dtype for leaf in job}
    is_block = not others and all(leaf.is_copy for leaf in job) and len(block) == sum(sizes)

    def read() -> None:
        if (
            is_block
            and source.read_block([leaf.entry.keys[0] for leaf in job], block)
            and regions.is_finite(block.view(dtype))
        ):
            return
        with np.errstate(over="ignore"):  # `explain_not_finite` names the tensors
            for leaf in job:
                _read_leaf(leaf.entry, source, leaf.arrays)
                # Now, while the processor has them in its cache.
                if leaf.is_checked and not all(map(regions.is_finite, leaf.arrays.values())):
                    leaf.not_finite = sum(map(regions.count_not_finite, leaf.arrays.values()))

    return read


def _transfer(job: Sequence[_Leaf]) -> dict[str, Any]:
    """Return the arrays of one job, on their devices, and forget the host's memory."""
    # The memory is aligned and not used elsewhere, so XLA may share it. One call for all: each costs 0.1 ms.
    plain = {leaf.entry.path: next(iter(leaf.arrays.values())) for leaf in job if leaf.sharding is None}
    out: dict[str, Any] = dict(zip(plain, jax.device_put([*plain.values()], may_alias=True), strict=True))
    for leaf in job:
        if leaf.sharding is not None:
            # four times as fast as device_put of single-device arrays
            out[leaf.entry.path] = jax.make_array_from_callback(
                leaf.entry.shape, leaf.sharding, leaf.part, jax.dtypes.canonicalize_dtype(leaf.dtype)
            )
        leaf.arrays = {}
    return out


def _read_leaf(entry: plans.PlanEntry, source: TensorSource, places: Mapping[regions.Region, np.ndarray]) -> None:
    """Read the regions of a leaf into their arrays."""
    covers = regions.merge_neighbors(places) if len(places) > 1 else {box: [box] for box in places}
    for outer, members in covers.items():
        for piece in regions.file_regions(entry.form, outer):
            key, slices = entry.keys[piece.number], regions.relative_slices(piece.region, outer)
            if outer in places and _read_in_place(source, key, piece, places[outer][slices]):
                continue
            if piece.is_full:
                tile = source.read_into(key, None).reshape(piece.shape)
            else:
                tile = source.read_slice(key, regions.to_slices(piece.tensor_region), piece.shape)
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


def _read_in_place(source: TensorSource, key: str, piece: regions.FileRegion, place: np.ndarray) -> bool:
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
