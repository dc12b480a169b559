"""Whole models to and from Hugging Face folders, by the same tables that name their adapters' weights.

parameters ──base_plan.encode──► {PyTorch's key: tensor} ──shards.write──► model.safetensors (or several files)
           ◄─────────fill──────                          ◄─shards.opened──
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
from jaxadapt.arrays import finite, placement
from jaxadapt.core import paths
from jaxadapt.core.errors import AttachError, KeyMapError, MismatchError, warn
from jaxadapt.core.progress import LOGGER, Progress, Report, byte_counter, reporter
from jaxadapt.export import untying
from jaxadapt.keymaps import check, expert_names, families, plan
from jaxadapt.keymaps import parts as pieces
from jaxadapt.keymaps.generic import GENERIC, own_names
from jaxadapt.keymaps.keymap import KeyMap, warn_unproved
from jaxadapt.merging import base_merge
from jaxadapt.models import base_params, planning
from jaxadapt.models.nnx import attach, survey
from jaxadapt.persistence import device_arrays, encode, folder
from jaxadapt.storage import hf_model
from jaxadapt.storage import location as places
from jaxadapt.storage.dtypes import dtype_name, numpy_dtype
from jaxadapt.storage.location import Place

SHARD = 5_000_000_000


def export_base(
    params: Any,
    path: str | os.PathLike[str],
    adapter: Adapter | None = None,
    *,
    keymap: KeyMap | str | None = None,
    dtype: Any = None,
    max_shard_size: int = SHARD,
    allow_nan: bool = False,
    progress: Progress = None,
) -> None:
    """Write a whole model under PyTorch's names, as the weights of a Hugging Face folder.

    `model.safetensors`, or above `max_shard_size` bytes several files and their index. What else lies in the
    folder (config.json, a tokenizer) stays; a former set of weights is replaced by one rename, and then removed.

    Args:
        params: an NNX model (its base; adapters on it are left out), Linen variables or base parameters.
        adapter: merged into the weights on the way: W + s·B·A, in float32, rounded once.
        keymap: the model's family; None recognises it.
        dtype: of the file's tensors; as in memory by default.
        allow_nan: merge an adapter also where a tensor of it, or of the result, holds a NaN or an infinity.
        progress: None, True (a bar on a terminal or in a notebook) or a function of ("export", bytes done, in all).

    One tensor is held at a time, and a merge is made of a few outputs at a time. Tied embeddings are written once, as
    they are held. Raises `KeyMapError` with every weight that has no line, `MismatchError` if the adapter does not fit,
    `FileError`; then the weights that were there still are.

    >>> import tempfile, jax.numpy as jnp, jaxadapt
    >>> table = jaxadapt.KeyMap("mine", (jaxadapt.Weight("q.kernel", "q.weight", "i o -> o i"),))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     export_base({"q": {"kernel": jnp.ones((2, 3))}}, folder, keymap=table)
    ...     import_base(folder, {"q": {"kernel": jnp.zeros((2, 3))}}, keymap=table)["q"]["kernel"].sum()
    Array(6., dtype=float32)
    """
    leaves, table = _leaves(params, keymap)
    _refuse_statistics(params, leaves)
    encode.require_values(leaves, traced=False)
    made = plan.base_plan(table, _shapes(leaves))
    changed = {} if adapter is None else base_merge.plan_merge(leaves, adapter)
    strict = adapter is not None and not allow_nan
    if adapter is not None and strict:
        base_merge.refuse_nan(leaves, adapter, changed)
    warn_unproved(table)
    kind = None if dtype is None else np.dtype(dtype)
    target = places.to_location(path)
    _check_ties(target, table, made, leaves, changed)
    specs: Specs = {}
    grouped = pieces.group_by_file_key(made.keys)
    for key, parts in sorted(grouped.items(), key=lambda item: survey.natural_key(item[0])):
        entry, _ = made.keys[parts[0]]
        dtype_ = dtype_name(kind or leaves[entry.path].dtype)
        specs[key] = dtype_, pieces.joined_shape(parts, entry.form.file_shape)
    if not specs:
        raise MismatchError(f"{target}: there is no weight to write")
    folder.make_folder(target)
    get = _reader(made, leaves, changed, kind)
    total = sum(math.prod(shape) * numpy_dtype(name).itemsize for name, shape in specs.values())
    specs, home = _apart(table, specs) if table.single else (specs, {key: (key, ()) for key in specs})

    @functools.lru_cache(maxsize=2 if table.single else 0)  # a folder has gate, up and down of an expert in turns
    def whole(key: str) -> Any:
        return pieces.join_parts([get(part) for part in grouped[key]], grouped[key], np)

    with reporter(progress) as report:
        more = byte_counter(report, "export", total)

        def tensor(key: str) -> Any:
            name, at = home[key]
            value = whole(name)[at] if at else whole(name)
            more(value.nbytes)
            return value

        def lost(keys: list[str]) -> MismatchError:
            return MismatchError(
                f"{target}: {finite.not_finite_message(keys, 'allow_nan=True writes them all the same')}"
            )

        look = finite.check_while_reading(tensor, len(specs), lost) if strict else tensor
        with name_donated_arrays(leaves):
            hf_model.write_model(target, specs, look, max_shard_size)
    LOGGER.info("%s: %d tensors, %d bytes", target, len(specs), total)


Specs = dict[str, tuple[str, tuple[int, ...]]]


def _apart(table: KeyMap, specs: Specs) -> tuple[Specs, dict[str, tuple[str, Any]]]:
    """With a tensor for each expert: their dtypes and shapes, and of which tensor each is what part."""
    rows, renamed = expert_names.folder_names(table, {key: shape for key, (_, shape) in specs.items()})
    out: Specs = {}
    home: dict[str, tuple[str, Any]] = {}
    for key, (dtype, shape) in specs.items():
        for e, line in enumerate(rows.get(key, ())):
            wide = shape[1] // len(line)
            for part, name in enumerate(line):
                out[name] = dtype, (wide, *shape[2:])
                home[name] = key, (e, slice(part * wide, (part + 1) * wide))
        if key not in rows:
            out[renamed.get(key, key)] = dtype, shape
            home[renamed.get(key, key)] = key, ()
    return out, home


def _leaves(params: Any, keymap: KeyMap | str | None, own: bool = False) -> tuple[dict[str, Any], KeyMap]:
    """`{path: array}` of the base weights of a model, of variables, or of parameters, and the table for them.

    That no table fits is an error, unless the model's `own` paths may be PyTorch's names.
    Of an NNX model also what is no parameter there, if the table has a line for it (the bias of MaxText's routers).
    """
    found = base_params.base_leaves(planning.base_params(params))
    loose = survey.walk_model(params).loose if isinstance(params, attach.nnx.Module) else {}
    if loose:
        raise AttachError(
            "these weights are held by no nnx.Module itself, and would be left out; hold them in one, or give the"
            " parameters as a tree of arrays:\n" + paths.bullets(loose)
        )
    odd = [f"{p}: {type(x).__name__}" for p, x in found.items() if not is_array(x)]
    if odd:
        raise AttachError(
            "expected arrays as base parameters (jaxadapt.models.dequantize makes them of quantised ones), found:\n"
            + paths.bullets(odd)
        )
    table = families.resolve_keymap(keymap, _shapes(found))
    if table is GENERIC and not own:
        raise _unknown(_shapes(found))
    if isinstance(params, attach.nnx.Module):
        more = {path: var.get_value() for path, var in survey.layer_state(params).items() if table.match(path)}
        found = dict(sorted({**found, **more}.items(), key=lambda item: survey.natural_key(item[0])))
    return found, table


def _refuse_statistics(params: Any, leaves: Mapping[str, Any]) -> None:
    if isinstance(params, attach.nnx.Module):
        left = [
            p for p, v in survey.layer_state(params).items() if isinstance(v, attach.nnx.BatchStat) and p not in leaves
        ]
    else:
        held = params.get("batch_stats", {}) if isinstance(params, Mapping) and "params" in params else {}
        left = [f"batch_stats.{path}" for path in paths.flatten(held)]
    if left:
        raise KeyMapError(
            "statistics of batch normalisation would be left out: no line of the table has them (of an NNX model it"
            " may; of Linen variables give variables['params'], and write them beside)\n" + paths.bullets(left)
        )


def _shapes(leaves: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {path: tuple(x.shape) for path, x in leaves.items()}


def _unknown(shapes: Mapping[str, tuple[int, ...]]) -> KeyMapError:
    return KeyMapError(
        "what these weights are called in PyTorch is not known: no table of a model family fits them, and the"
        " generic map has no names but their own paths; say the family with keymap=, or give a KeyMap with a line"
        " for each. They are\n"
        + paths.bullets(f"{path} {shape}" for path, shape in shapes.items())
        + families.nearest(shapes)
    )


def _with_own_names(
    table: KeyMap, target: Any, shapes: Mapping[str, tuple[int, ...]], found: Collection[str], source: str
) -> KeyMap:
    """The table, with lines for the leaves that it has none for and whose own paths are names of the file."""
    known = {} if table is GENERIC else {path: shape for path, shape in shapes.items() if table.match(path) is not None}
    rest = {path: shape for path, shape in shapes.items() if path not in known}
    owners = survey.base_leaves(target) if isinstance(target, attach.nnx.Module) else {}
    owners = {path: owner for path, owner in owners.items() if path in rest}
    lines = survey.class_entries(owners, KeyMap(GENERIC.name, ()))
    own, unsure = own_names(rest, lines, survey.custom_leaves(owners, owners))
    named = [line for line in own.weights if line.key in found]
    if table is GENERIC:
        if not named:
            raise _unknown(shapes)
        table, named = own, []
    unsure = [leaf for leaf in unsure if (site := own.match(leaf)) is not None and site.weight.key in found]
    if unsure:
        raise KeyMapError(
            f"{source}: nothing tells which axis of these square matrices PyTorch has first, since no table of a model"
            " family has a line for them; give a KeyMap with a line for each weight, as keymap=:\n"
            + paths.bullets(unsure)
            + families.nearest(shapes)
        )
    return table.with_entries(named)


def _reader(
    made: plan.Plan, leaves: Mapping[str, Any], changed: Mapping[str, base_merge.ChangedLeaf], dtype: Any
) -> Callable[[str], Any]:
    """What gives the tensor of a key: cut out where the leaf is, and turned on the host."""

    def get(key: str) -> Any:
        entry, number = made.keys[key]
        if entry.path in changed:
            return _merged(entry, number, changed[entry.path], leaves[entry.path].dtype, dtype)
        tensor = entry.form.single.encode(np.asarray(leaves[entry.path][entry.form.index(number)]), 0)
        return tensor if dtype is None else tensor.astype(dtype, copy=False)

    return get


SLICE = 1 << 22
"""Bytes of float32 that are merged at once; of a very large tensor more, so that there are not too many."""


def _merged(entry: plan.PlanEntry, number: int, changed: base_merge.ChangedLeaf, own: Any, dtype: Any) -> Any:
    """One tensor of a leaf that an adapter changes: its outputs slice by slice, each put where the file has it.

    A sum takes several arrays of float32 beside the weight: of slices they are small.
    """
    form, where = entry.form, entry.form.index(number)
    unrounded = dtype is not None and dtype != own  # else the sum would be rounded to the leaf's dtype first
    stack = changed.site.match.stack
    layer = {axis: where[axis] for axis in stack} if set(stack) <= set(form.split) else {}
    rest = tuple(i for axis, i in enumerate(where) if axis not in layer)
    out = np.empty(form.file_shape, dtype or own)
    firsts = {group[0]: at for at, group in enumerate(form.right) if group}
    axes = [a for a in changed.outputs if form.left[a] in firsts] if changed.site.leaf == entry.path else []
    if not axes:
        out[...] = form.single.encode(np.asarray(changed.value(layer, unrounded=unrounded)[rest]), 0)
        return out
    axis = axes[0]
    size, row, at = form.shape[axis], math.prod(form.file_shape) // form.shape[axis], firsts[form.left[axis]]
    step = max(1, max(SLICE // 4, out.size // 32) // max(row, 1))
    inner = form.file_shape[at] // max(size, 1)  # PyTorch's rows for one entry of the axis
    for first in range(0, size, step):
        last = min(first + step, size)
        piece = np.asarray(changed.value({**layer, axis: slice(first, last)}, unrounded=unrounded)[rest])
        shape = tuple(last - first if a == axis else n for a, n in enumerate(form.shape))
        tensor = dataclasses.replace(form, shape=shape).single.encode(piece, 0)
        out[(*[slice(None)] * at, slice(first * inner, last * inner))] = tensor
    return out


def _check_ties(
    target: Place,
    table: KeyMap,
    made: plan.Plan,
    leaves: Mapping[str, Any],
    changed: Mapping[str, base_merge.ChangedLeaf],
) -> None:
    """Refuse a head of its own in a folder whose config.json ties it to the embedding: transformers would drop it."""
    path = target / "config.json"
    config = untying.read_model_config(path)
    if config is None or True not in (config.get(untying.FIELD), untying.is_tied(config)):
        return
    get = _reader(made, leaves, changed, None)
    apart = [
        f"{key} differs from {same}"
        for key, same in table.tied
        if key in made.keys and same in made.keys and not np.array_equal(get(key), get(same))
    ]
    if apart:
        raise MismatchError(
            f"{path}: tie_word_embeddings is true (or missing, which means true here), so transformers would ignore"
            " weights of this model; set it to false, or export to another folder:\n" + paths.bullets(apart)
        )


# ---------------------------------------------------------------- and back


def import_base(
    path: str | os.PathLike[str],
    target: Any,
    adapter: Adapter | None = None,
    *,
    keymap: KeyMap | str | None = None,
    strict: bool = True,
    allow_nan: bool = False,
    progress: Progress = None,
) -> Any:
    """Read the weights of a Hugging Face model into a model of any family here.

    Args:
        path: a folder with model.safetensors, its index and shards, or pytorch_model.bin; or one such file.
        target: an NNX model, filled in place and returned; Linen variables or parameters, returned anew. Abstract
            ones work too. Each array keeps the target's dtype and sharding.
        adapter: of this target (`from_peft` makes one of a file's tensors), merged into the weights that were read.
        keymap: the target's family; None recognises it. A target of no family is read by its own paths, where those are
            the file's names ("fc1.kernel" from "fc1.weight").
        strict: False takes what fits and warns of the rest: weights the file lacks stay as they are (a new head), and
            tensors the model has no place for are left out (an old one).
        allow_nan: merge the adapter also where it, or a weight that it changes, holds a NaN or an infinity.
        progress: None, True (a bar on a terminal or in a notebook) or a function of ("import", bytes done, in all).

    A head that the file ties to the embedding is filled from there. Raises `MismatchError` with all missing, unexpected
    and wrongly shaped tensors together, `KeyMapError`, `FileError`, `FormatError`; then the target is as it was.

    >>> import tempfile, jax.numpy as jnp
    >>> from jaxadapt import KeyMap, Weight
    >>> table = KeyMap("mine", (Weight("q.kernel", "q.weight", "i o -> o i"),))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     export_base({"q": {"kernel": jnp.ones((2, 3))}}, folder, keymap=table)
    ...     import_base(folder, {"q": {"kernel": jnp.zeros((2, 3))}}, keymap=table)["q"]["kernel"].sum()
    Array(6., dtype=float32)
    """
    leaves, table = _leaves(target, keymap, own=True)
    shapes = _shapes(leaves)
    if adapter is not None:  # what does not fit shows before anything is read
        base_merge.plan_merge(base_merge.mergeable_leaves(planning.base_params(target), adapter), adapter)
    with hf_model.open_model(places.to_location(path)) as tensors:
        hf_model.refuse_packed(tensors)
        table = table.spelling_for(tensors, shapes)
        if keymap in (None, "auto", GENERIC.name):
            table = _with_own_names(table, target, shapes, tensors, tensors.source)
        if table.each:
            tensors = tensors.with_stacks(*expert_names.expert_rows(table, tensors, tensors.source))
        known = shapes if strict else {p: s for p, s in shapes.items() if table.match(p) is not None}
        made = plan.base_plan(table, known)
        found = {key: tuple(spec.shape) for key, spec in tensors.specs.items()}
        tensors = tensors.with_parts(pieces.locate_parts(found, made.keys))
        source = _sources(tensors, table, made, strict, lambda: _near(table, shapes))
        entries = [e for e in made.entries if all(key in source for key in e.keys)]
        left = {e.path for e in made.entries} - {e.path for e in entries} | (shapes.keys() - known.keys())
        hollow = [p for p in left if isinstance(leaves[p], jax.ShapeDtypeStruct)]
        if hollow:
            raise MismatchError(
                f"{tensors.source}: holds nothing for weights that have no values in the target either:\n"
                + paths.bullets(hollow)
            )
        if left:
            warn(f"{tensors.source}: left as they were: {', '.join(sorted(left))}")
        with reporter(progress) as report:
            new = _read(entries, tensors.with_names(source), leaves, planning.target_base(target).shardings, report)
    if adapter is not None:
        changed = base_merge.plan_merge({**leaves, **new}, adapter)
        if not allow_nan:
            base_merge.refuse_nan({**leaves, **new}, adapter, changed)
        for leaf in list(changed):
            new[leaf] = changed.pop(leaf).value(donate=leaf in new)
    LOGGER.info("%s: %d weights read, by the table %s", tensors.source, len(new), table.name)
    base = planning.base_params(target)
    done = base_params.replace_leaves(base, new)
    return done if base is target else {**target, "params": done}


def _near(table: KeyMap, shapes: Mapping[str, tuple[int, ...]]) -> str:
    return families.nearest(shapes) if table.name == GENERIC.name else ""


def _sources(
    tensors: hf_model.ModelTensors, table: KeyMap, made: plan.Plan, strict: bool, near: Callable[[], str]
) -> dict[str, str]:
    """`{key: the tensor it is filled from}`, itself or one it is tied to; all problems in one error."""
    found = {key: tuple(spec.shape) for key, spec in tensors.specs.items()}
    source = {key: key for key in made.shapes if key in found}
    for key, same in table.tied:
        if key in made.shapes and key not in found and same in found:
            source[key] = same
    ties = dict(table.tied)
    spare = {
        key
        for key in found
        if key not in made.shapes
        and (
            check.is_buffer(table, key)
            or (key in ties and ties[key] in found and untying.bitwise_same(tensors, key, ties[key]))
        )
    }
    odd = [
        f"{key}: {spec.dtype.name}, expected floats"
        for key, spec in tensors.specs.items()
        if key in made.shapes and not jnp.issubdtype(spec.dtype, jnp.floating)
    ]
    have = {key: found[name] for key, name in source.items()}
    have |= {key: shape for key, shape in found.items() if key not in spare and key not in have}
    if not strict:
        extra = [key for key in have if key not in made.shapes]
        if extra:
            warn(f"{tensors.source}: not used: {', '.join(extra)}")
        have = {key: have.get(key, shape) for key, shape in made.shapes.items()}
    problems = made.problems(have, tensors.source, odd)
    if problems:
        raise MismatchError(
            f"{tensors.source} does not fit the model by the table {table.name!r}: of {len(made.shapes)} tensors,\n"
            + "\n".join(problems)
            + "\nIs it another model, or one of another size?"
            + (
                " strict=False takes what fits."
                if strict
                else " strict=False does not leave out tensors of another shape."
            )
            + near()
        )
    return source


def _read(
    entries: Sequence[plan.PlanEntry],
    tensors: hf_model.ModelTensors,
    leaves: Mapping[str, Any],
    places: Mapping[str, Any],
    report: Report,
) -> dict[str, Any]:
    """New arrays in the place of the target's: its dtypes and shardings, numpy where it is numpy."""
    where = {path: leaf.sharding for path, leaf in leaves.items() if isinstance(leaf, jax.Array)}
    where |= {path: placement.concrete_sharding(place) for path, place in places.items() if place is not None}
    dtypes = {key: spec.dtype for key, spec in tensors.specs.items()}
    wanted = {e.path: leaves[e.path].dtype for e in entries}
    out = device_arrays.load_arrays(plan.Plan(tuple(entries)), tensors, dtypes, wanted, where, report, "import")
    return {path: np.array(x) if isinstance(leaves[path], np.ndarray) else x for path, x in out.items()}
