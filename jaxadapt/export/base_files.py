"""Write a whole model as a Hugging Face folder, and read one, with the keymap that also names its adapters' weights.

parameters ──Plan.encode──► {PyTorch key: tensor} ──hf_model.write_model──► model.safetensors, or several
model.safetensors ──hf_model.open_model──► {PyTorch key: tensor} ──rules.load_arrays──► parameters
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxadapt.adapters.adapter import Adapter, is_array, name_donated_arrays
from jaxadapt.arrays import regions
from jaxadapt.arrays.tensor_source import (
    TensorSource,
    bitwise_same,
    cast,
    cut,
    dtype_name,
    float_dtype,
    is_float,
    numpy_dtype,
    rename,
    stack,
)
from jaxadapt.core.errors import (
    LOGGER,
    AttachError,
    FileError,
    KeyMapError,
    MismatchError,
    Progress,
    Report,
    bullets,
    byte_counter,
    raise_listed,
    reporter,
    warn,
)
from jaxadapt.keymaps import check, families, plan, pytorch
from jaxadapt.keymaps.keymap import GENERIC, KeyMap, keymap_from_paths, warn_unproved
from jaxadapt.merging import base_merge
from jaxadapt.models import graph, planning
from jaxadapt.models.carriers import carrier
from jaxadapt.persistence import rules
from jaxadapt.persistence.save_adapter import require_values
from jaxadapt.storage import atomic, hf_model, location

# ---------------------------------------------------------------- base leaves


def collect_base_leaves(
    params: Any, keymap: KeyMap | str | None, *, allow_generic: bool = False
) -> tuple[dict[str, Any], KeyMap]:
    """Return the base weights of a model, of variables or of parameters as `{path: array}`, and their keymap.

    Raise `KeyMapError` if no family's keymap fits, unless `allow_generic`. Of an NNX model, state that is not a
    parameter is included if the keymap has an entry for it (for example the bias of MaxText's routers).
    """
    held = carrier(params)
    leaves = held.leaves()
    walk = held.walked
    raise_listed(
        AttachError,
        "cannot collect all parameters: some are not direct attributes of an nnx.Module (for example inside a dict)."
        " Store each in a module, or pass the parameters as a tree of arrays:",
        () if walk is None else walk.unowned,
    )
    raise_listed(
        AttachError,
        "expected arrays as base parameters (for quantized ones call jaxadapt.models.dequantize first), found:",
        (f"{path}: {type(x).__name__}" for path, x in leaves.items() if not is_array(x)),
    )
    resolved = families.resolve_keymap(keymap, leaf_shapes(leaves))
    if resolved is GENERIC and not allow_generic:
        raise unknown_names_error(leaf_shapes(leaves))
    if walk is not None:
        state = {path: var.get_value() for path, var in graph.layer_state(params).items() if resolved.match(path)}
        leaves = dict(sorted({**leaves, **state}.items(), key=lambda item: graph.natural_key(item[0])))
    return leaves, resolved


def leaf_shapes(leaves: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return `{path: shape}`."""
    return {path: tuple(x.shape) for path, x in leaves.items()}


def unknown_names_error(shapes: Mapping[str, tuple[int, ...]]) -> KeyMapError:
    """Return the error for parameters that no family's keymap matches."""
    return KeyMapError(
        "cannot export or import these parameters: no known model family matches them, so their PyTorch names are"
        " unknown. Pass keymap=<family>, or a KeyMap with an entry for each:\n"
        + bullets(f"{path} {shape}" for path, shape in shapes.items())
        + families.describe_nearest_family(shapes)
    )


# ---------------------------------------------------------------- base export


SHARD = 5_000_000_000


def export_base(
    model: Any,
    path: str | os.PathLike[str],
    adapter: Adapter | None = None,
    *,
    like: str | os.PathLike[str] | None = None,
    keymap: KeyMap | str | None = None,
    dtype: Any = None,
    max_shard_size: int = SHARD,
    allow_nan: bool = False,
    progress: Progress = None,
) -> None:
    """Write the weights of a whole model to a Hugging Face folder, with PyTorch's names and layouts.

    The weights are `model.safetensors` or, above `max_shard_size` bytes, several files and their index. Other files in
    the folder (config.json, a tokenizer) are kept, or copied from `like`. For a model of a known family, a warning says
    if there is no config.json, since transformers would then build a model of its default sizes. Existing weights are
    replaced by one rename and then removed. One tensor is in memory at a time, and a merge computes a few outputs at a
    time. Tied embeddings are written once if the model stores them once.

    Args:
        model: an NNX model, Linen variables or base parameters. With active adapters it needs `adapter`.
        path: the folder, or an address of an object store.
        adapter: an adapter to merge into the weights: W + s·B·A, in float32, rounded once.
        like: the folder of the same model, whose configuration and tokenizer are copied. In config.json the dtype is
            set to the dtype written, and a head that differs from the embedding is untied.
        keymap: the model's family; None recognizes it.
        dtype: the dtype of the file's tensors. Default: as in memory.
        max_shard_size: the largest size of one file, in bytes.
        allow_nan: accept a NaN or an infinity in the adapter's tensors and in the result.
        progress: None, True (a bar on a terminal or in a notebook) or a function of ("export", bytes done, total
            bytes).

    Raises:
        KeyMapError: weights have no entry in the keymap; the message lists all of them.
        AttachError: the model has active adapters and `adapter` is missing.
        MismatchError: the adapter does not fit.
        FileError: the folder cannot be written. After any error, the existing weights are unchanged.

    >>> import tempfile, jax.numpy as jnp, jaxadapt
    >>> from jaxadapt.export import import_base
    >>> keymap = jaxadapt.KeyMap("mine", (jaxadapt.Weight("q.kernel", "q.weight", "i o -> o i"),))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     export_base({"q": {"kernel": jnp.ones((2, 3))}}, folder, keymap=keymap)
    ...     import_base(folder, {"q": {"kernel": jnp.zeros((2, 3))}}, keymap=keymap)["q"]["kernel"].sum()
    Array(6., dtype=float32)
    """
    with atomic.clean_target(path), reporter(progress) as report:
        _refuse_active(model, adapter)
        leaves, resolved = collect_base_leaves(model, keymap)
        _refuse_statistics(model, leaves)
        require_values(leaves, traced=False)
        base_plan = plan.base_plan(resolved, leaf_shapes(leaves))
        changed = {} if adapter is None else base_merge.plan_changes(leaves, adapter)
        strict = adapter is not None and not allow_nan
        if adapter is not None and strict:
            base_merge.refuse_nan(leaves, adapter, changed)
        warn_unproved(resolved)
        file_dtype = None if dtype is None else float_dtype(dtype)
        target = location.to_location(path)
        source = target if like is None else location.to_location(like)
        different = _different_ties(source / hf_model.CONFIG, resolved, base_plan, leaves, changed)
        raise_listed(
            MismatchError,
            f"{source / hf_model.CONFIG}: tie_word_embeddings is true (or missing, and true by default), so"
            " transformers would ignore weights of this model; set it to false, or export to another folder:",
            different if like is None else [],
        )
        part_keys = plan.group_by_file_key(base_plan.keys)
        specs = _file_specs(base_plan, part_keys, leaves, file_dtype)
        if not specs:
            raise MismatchError(f"{target}: cannot export the model: it has no weights")
        other_files = {} if like is None else _read_like(source, specs, bool(different))
        encode = functools.partial(_encode, base_plan, leaves, changed, file_dtype)
        specs, sources = (
            _split_experts(resolved, specs) if resolved.per_expert else (specs, {key: (key, ()) for key in specs})
        )

        # The gate, up and down tensors of an expert come from the same two fused tensors.
        @functools.lru_cache(maxsize=2 if resolved.per_expert else 0)
        def join(key: str) -> Any:
            return plan.join_parts([encode(part) for part in part_keys[key]], part_keys[key], np)

        def read(key: str) -> Any:
            name, index = sources[key]
            return join(name)[index] if index else join(name)

        def not_finite_error(keys: list[str]) -> MismatchError:
            return MismatchError(f"{target}: {regions.not_finite_message(keys, 'allow_nan=True writes them anyway')}")

        with name_donated_arrays(leaves):
            total = write_folder(
                target, specs, read, not_finite_error if strict else None, max_shard_size, other_files, "export", report
            )
    # With a KeyMap of the caller's, the names may be those of any program.
    if not isinstance(keymap, KeyMap) and not location.exists(target / hf_model.CONFIG):
        warn(
            f"{target}: has no {hf_model.CONFIG}, so transformers' from_pretrained would build a model of its default"
            " sizes. Copy it and the tokenizer's files from the folder of the base, as export_base(…, like=folder) does"
        )
    LOGGER.info("%s: %d tensors, %d bytes", target, len(specs), total)


def _refuse_statistics(params: Any, leaves: Mapping[str, Any]) -> None:
    """Raise `KeyMapError` for statistics of batch normalization that the export would omit."""
    raise_listed(
        KeyMapError,
        "cannot export statistics of batch normalization: the keymap has no entry for them. For an NNX model, add"
        " entries to the keymap. For Linen, pass variables['params'] and save the statistics separately:",
        [path for path in carrier(params).statistics() if path not in leaves],
    )


Specs = dict[str, tuple[str, tuple[int, ...]]]
"""`{key: (dtype, shape)}`."""


def write_folder(
    target: location.Location,
    specs: Specs,
    read: Callable[[str], Any],
    not_finite_error: Callable[[list[str]], MismatchError] | None,
    max_shard_size: int,
    other_files: Mapping[str, bytes],
    task: str,
    report: Report,
) -> int:
    """Write a model's weights and its other files into a folder; return the size of the weights in bytes.

    Args:
        read: returns the tensor of a key.
        not_finite_error: returns the error about tensors that hold a NaN or an infinity; None to accept them.
        task: the name of the task in the report.
    """
    total = sum(math.prod(shape) * numpy_dtype(name).itemsize for name, shape in specs.values())
    checked = read if not_finite_error is None else regions.check_while_reading(read, len(specs), not_finite_error)
    atomic.make_folder(target)
    hf_model.write_model(target, specs, checked, max_shard_size, byte_counter(report, task, total))
    for name, data in other_files.items():
        atomic.write_bytes(target / name, data)
    return total


def _file_specs(
    base_plan: plan.Plan, part_keys: Mapping[str, list[str]], leaves: Mapping[str, Any], dtype: Any
) -> Specs:
    """Return the specs of the file's tensors, from the keys of each one's parts."""
    specs: Specs = {}
    for key, group in sorted(part_keys.items(), key=lambda item: graph.natural_key(item[0])):
        entry, _ = base_plan.keys[group[0]]
        own = leaves[entry.path].dtype
        written = own if dtype is None or not is_float(own) else dtype
        specs[key] = dtype_name(written), plan.joined_shape(group, entry.form.file_shape)
    return specs


def _split_experts(keymap: KeyMap, specs: Specs) -> tuple[Specs, dict[str, tuple[str, Any]]]:
    """Return the specs with one tensor per expert, and for each its fused tensor and the index into it."""
    rows, renamed = pytorch.folder_names(keymap, {key: shape for key, (_, shape) in specs.items()})
    split: Specs = {}
    sources: dict[str, tuple[str, Any]] = {}
    for key, (dtype, shape) in specs.items():
        for expert, names in enumerate(rows.get(key, ())):
            width = shape[1] // len(names)
            for part, name in enumerate(names):
                split[name] = dtype, (width, *shape[2:])
                sources[name] = key, (expert, slice(part * width, (part + 1) * width))
        if key not in rows:
            split[renamed.get(key, key)] = dtype, shape
            sources[renamed.get(key, key)] = key, ()
    return split, sources


def _encode(
    base_plan: plan.Plan, leaves: Mapping[str, Any], changed: Mapping[str, base_merge.ChangedLeaf], dtype: Any, key: str
) -> Any:
    """Return the tensor of a key, indexed on the leaf's device and transposed on the host."""
    entry, number = base_plan.keys[key]
    if entry.path in changed:
        return _merge_tensor(entry, number, changed[entry.path], leaves[entry.path].dtype, dtype)
    tensor = entry.form.single_layout.encode(np.asarray(leaves[entry.path][entry.form.index(number)]), 0)
    return tensor if dtype is None else cast({key: tensor}, dtype)[key]


SLICE = 1 << 22
"""Bytes of float32 that are merged at once. For a very large tensor it is 1/32 of the tensor, to limit the number."""


def _merge_tensor(
    entry: plan.PlanEntry, number: int, changed: base_merge.ChangedLeaf, leaf_dtype: Any, dtype: Any
) -> Any:
    """Return one tensor of a leaf that an adapter changes, computed in slices of its outputs.

    A merge needs several float32 arrays of the size of its slice, so slices save memory.
    """
    form, index = entry.form, entry.form.index(number)
    # Without this, the sum would be rounded to the leaf's dtype first.
    unrounded = dtype is not None and dtype != leaf_dtype
    stack = changed.site.match.stack
    layer = {axis: index[axis] for axis in stack} if set(stack) <= set(form.split) else {}
    inner_index = tuple(i for axis, i in enumerate(index) if axis not in layer)
    out = np.empty(form.file_shape, dtype or leaf_dtype)
    file_axes = {group[0]: axis for axis, group in enumerate(form.right) if group}  # by the outermost part's name
    axes = [a for a in changed.outputs if form.left[a] in file_axes] if changed.site.leaf == entry.path else []
    if not axes:
        out[...] = form.single_layout.encode(np.asarray(changed.value(layer, unrounded=unrounded)[inner_index]), 0)
        return out
    axis = axes[0]
    file_axis = file_axes[form.left[axis]]
    size, row = form.shape[axis], math.prod(form.file_shape) // form.shape[axis]
    step = max(1, max(SLICE // 4, out.size // 32) // max(row, 1))
    rows = form.file_shape[file_axis] // max(size, 1)  # PyTorch's rows for one entry of the axis
    for begin in range(0, size, step):
        end = min(begin + step, size)
        values = np.asarray(changed.value({**layer, axis: slice(begin, end)}, unrounded=unrounded)[inner_index])
        shape = tuple(end - begin if a == axis else n for a, n in enumerate(form.shape))
        tensor = dataclasses.replace(form, shape=shape).single_layout.encode(values, 0)
        out[(*[slice(None)] * file_axis, slice(begin * rows, end * rows))] = tensor
    return out


def _refuse_active(params: Any, adapter: Adapter | None) -> None:
    """Raise `AttachError` for a model with active adapters if none is to be merged."""
    held = carrier(params)
    if adapter is None and (active := held.active()):
        base = "within `with jaxadapt.disable(model):`" if held.in_place else 'variables["params"]'
        raise AttachError(
            f"cannot export: the model has the active adapter {', '.join(map(repr, active))}, and its weights do not"
            " contain it. Pass adapter=jaxadapt.extract(model, name=name), or export the merged model,"
            f" jaxadapt.merge(model). For the base alone, export {base}"
        )


def _different_ties(
    path: location.Location,
    keymap: KeyMap,
    base_plan: plan.Plan,
    leaves: Mapping[str, Any],
    changed: Mapping[str, base_merge.ChangedLeaf],
) -> list[str]:
    """Return the weights that a config.json ties and that differ: transformers would ignore one of them."""
    config = hf_model.read_model_config(path)
    if config is None or True not in (config.get(hf_model.TIE_FIELD), hf_model.is_tied(config)):
        return []
    encode = functools.partial(_encode, base_plan, leaves, changed, None)
    return [
        f"{key} differs from {same}"
        for key, same in keymap.tied
        if key in base_plan.keys and same in base_plan.keys and not np.array_equal(encode(key), encode(same))
    ]


def _read_like(source: location.Location, specs: Specs, untie: bool) -> dict[str, bytes]:
    """Return the other files of a model's folder, for these weights. Raise `FileError` if config.json is missing."""
    if not location.exists(source / hf_model.CONFIG):
        raise FileError(
            f"like={source}: expected the folder of a model, but it has no {hf_model.CONFIG}; check the path"
        )
    names = {dtype.name for name, _ in specs.values() if jnp.issubdtype(dtype := numpy_dtype(name), jnp.floating)}
    return hf_model.read_other_files(source, names.pop() if len(names) == 1 else None, untie)


# ---------------------------------------------------------------- base import


def import_base(
    path: str | os.PathLike[str],
    model: Any,
    adapter: Adapter | None = None,
    *,
    keymap: KeyMap | str | None = None,
    strict: bool = True,
    allow_nan: bool = False,
    progress: Progress = None,
) -> Any:
    """Read the weights of a Hugging Face model into a model of any known family.

    If the file ties the head to the embedding and the target has a separate head, the head is filled from the
    embedding.

    Args:
        path: a folder with model.safetensors (or its index and shards) or pytorch_model.bin, or one such file.
        model: an NNX model, which is filled in place and returned; or Linen variables or parameters, which are
            returned as a new tree. Abstract targets work too. Each array keeps the target's dtype and sharding.
        adapter: an adapter of this target (from `from_peft`, for example) to merge into the weights.
        keymap: the target's family; None recognizes it. A target of no family is read by its own paths if they equal
            the file's names ("fc1.kernel" from "fc1.weight").
        strict: False loads the tensors that fit and warns of the others: weights that the file does not contain keep
            their values (a new head), and tensors that the model does not have are ignored (an old head).
        allow_nan: accept a NaN or an infinity in the adapter and in the weights that it changes.
        progress: None, True (a bar on a terminal or in a notebook) or a function of ("import", bytes done, total
            bytes).

    Raises:
        MismatchError: tensors are missing, unexpected or of another shape; the message lists all of them.
        KeyMapError: the names of the weights are unknown or ambiguous.
        FileError, FormatError: a file cannot be read. After any error, the target is unchanged.

    >>> import tempfile, jax.numpy as jnp
    >>> from jaxadapt import KeyMap, Weight
    >>> from jaxadapt.export import export_base
    >>> keymap = KeyMap("mine", (Weight("q.kernel", "q.weight", "i o -> o i"),))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     export_base({"q": {"kernel": jnp.ones((2, 3))}}, folder, keymap=keymap)
    ...     import_base(folder, {"q": {"kernel": jnp.zeros((2, 3))}}, keymap=keymap)["q"]["kernel"].sum()
    Array(6., dtype=float32)
    """
    leaves, resolved = collect_base_leaves(model, keymap, allow_generic=True)
    shapes = leaf_shapes(leaves)
    if adapter is not None:  # raise before anything is read if the adapter does not fit
        base_merge.plan_changes(base_merge.mergeable(carrier(model).params).leaves(), adapter)
    with hf_model.open_model(location.to_location(path)) as tensors:
        hf_model.refuse_packed(tensors)
        resolved = resolved.spelling_for(tensors, shapes)
        if keymap in (None, "auto", GENERIC.name):
            resolved = _with_path_names(resolved, model, shapes, tensors, tensors.source)
        if resolved.expert_modules:
            tensors = stack(tensors, *pytorch.expert_rows(resolved, tensors, tensors.source))
        known = shapes if strict else {p: s for p, s in shapes.items() if resolved.match(p) is not None}
        base_plan = plan.base_plan(resolved, known)
        tensors = cut(tensors, plan.locate_parts(tensors.shapes, base_plan.keys))
        sources = _find_sources(tensors, resolved, base_plan, strict, shapes)
        entries = [e for e in base_plan.entries if all(key in sources for key in e.keys)]
        unfilled = {e.path for e in base_plan.entries} - {e.path for e in entries} | (shapes.keys() - known.keys())
        raise_listed(
            MismatchError,
            f"{tensors.source}: cannot fill weights that are abstract in the target, because the file does not"
            " contain them; give them values first:",
            [path for path in unfilled if isinstance(leaves[path], jax.ShapeDtypeStruct)],
        )
        if unfilled:
            warn(
                f"{tensors.source}: does not contain some weights, which keep their values:"
                f" {', '.join(sorted(unfilled))}"
            )
        with reporter(progress) as report:
            new = _load_leaves(entries, rename(tensors, sources), leaves, carrier(model).base().shardings, report)
    if adapter is not None:
        changed = base_merge.plan_changes({**leaves, **new}, adapter)
        if not allow_nan:
            base_merge.refuse_nan({**leaves, **new}, adapter, changed)
        for leaf in list(changed):
            new[leaf] = changed.pop(leaf).value(donate=leaf in new)
    LOGGER.info("%s: %d weights read with the keymap %s", tensors.source, len(new), resolved.name)
    return carrier(model).replace(new)


def _find_sources(
    tensors: TensorSource,
    keymap: KeyMap,
    base_plan: plan.Plan,
    strict: bool,
    leaves: Mapping[str, tuple[int, ...]],
) -> dict[str, str]:
    """Return for each key the file tensor that fills it: the tensor of this name or one that it is tied to.

    Raise `MismatchError` with all problems.
    """
    shapes = tensors.shapes
    ties = {key: same for key, same in keymap.tied if same in shapes}
    sources = {key: key if key in shapes else ties[key] for key in base_plan.shapes if key in shapes or key in ties}
    redundant = {
        key
        for key in shapes.keys() - base_plan.shapes.keys()
        if check.is_buffer(keymap, key) or (key in ties and bitwise_same(tensors[key], tensors[ties[key]]))
    }
    given = {key: shapes[name] for key, name in sources.items()}
    given |= {key: shape for key, shape in shapes.items() if key not in redundant and key not in given}
    _check_sources(tensors, keymap, base_plan, given, strict, leaves)
    return sources


def _check_sources(
    tensors: TensorSource,
    keymap: KeyMap,
    base_plan: plan.Plan,
    given: Mapping[str, tuple[int, ...]],
    strict: bool,
    leaves: Mapping[str, tuple[int, ...]],
) -> None:
    """Raise `MismatchError` with all problems of the shapes that a file gives; warn of tensors that are not used.

    `leaves` are the shapes of the model's leaves.
    """
    wrong_dtypes = [
        f"{key}: {spec.dtype.name}, expected floats"
        for key, spec in tensors.specs.items()
        if key in base_plan.shapes and not jnp.issubdtype(spec.dtype, jnp.floating)
    ]
    if not strict:
        extra = [key for key in given if key not in base_plan.shapes]
        if extra:
            warn(f"{tensors.source}: tensors not used: {', '.join(extra)}")
        given = {key: given.get(key, shape) for key, shape in base_plan.shapes.items()}
    problems = base_plan.list_problems(given, tensors.source, wrong_dtypes)
    if problems:
        raise MismatchError(
            f"{tensors.source}: does not fit the model with the keymap {keymap.name!r}. Of {len(base_plan.shapes)}"
            " tensors:\n"
            + "\n".join(problems)
            + "\nCheck that the file is of this model and size."
            + (
                " strict=False loads the tensors that fit."
                if strict
                else " strict=False does not skip tensors of another shape."
            )
            + (families.describe_nearest_family(leaves) if keymap.name == GENERIC.name else "")
        )


def _load_leaves(
    entries: Sequence[plan.PlanEntry],
    tensors: TensorSource,
    leaves: Mapping[str, Any],
    base_shardings: Mapping[str, Any],
    report: Report,
) -> dict[str, Any]:
    """Return new arrays with the target's dtypes and shardings; numpy arrays for the target's numpy arrays."""
    shardings = {path: leaf.sharding for path, leaf in leaves.items() if isinstance(leaf, jax.Array)} | {
        p: regions.concrete_sharding(sharding) for p, sharding in base_shardings.items() if sharding is not None
    }
    dtypes = {key: leaves[e.path].dtype for e in entries for key in e.keys}
    arrays = rules.load_arrays(plan.Plan(tuple(entries)), tensors, dtypes, shardings, report, "import")
    return {path: np.array(x) if isinstance(leaves[path], np.ndarray) else x for path, x in arrays.items()}


def _with_path_names(
    keymap: KeyMap, target: Any, shapes: Mapping[str, tuple[int, ...]], file_keys: Collection[str], source: str
) -> KeyMap:
    """Add entries to the keymap for unmatched leaves whose own paths are names in the file."""
    rest = {path: shape for path, shape in shapes.items() if keymap is GENERIC or keymap.match(path) is None}
    walk = carrier(target).walked
    owners = {} if walk is None else {path: owner for path, owner in walk.leaves.items() if path in rest}
    entries = planning.class_entries(owners, shapes, KeyMap(GENERIC.name, ()))
    by_path, ambiguous = keymap_from_paths(rest, entries, planning.custom_leaves(owners, owners))
    added = [entry for entry in by_path.weights if entry.key in file_keys]
    if keymap is GENERIC:
        if not added:
            raise unknown_names_error(shapes)
        keymap, added = by_path, []
    ambiguous = [
        leaf for leaf in ambiguous if (match := by_path.match(leaf)) is not None and match.weight.key in file_keys
    ]
    if ambiguous:
        raise KeyMapError(
            f"{source}: cannot decide the layout of these square matrices, (in, out) or (out, in), because no keymap"
            " of a model family has an entry for them. Pass a KeyMap with an entry for each weight as keymap=:\n"
            + bullets(ambiguous)
            + families.describe_nearest_family(shapes)
        )
    return keymap.with_entries(added)
