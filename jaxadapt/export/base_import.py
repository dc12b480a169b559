"""Import of whole models from Hugging Face folders.

model.safetensors ──hf_model.open_model──► {PyTorch key: tensor} ──device_arrays.load_arrays──► parameters
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxadapt.adapters.adapter import Adapter
from jaxadapt.arrays import regions
from jaxadapt.core import paths
from jaxadapt.core.errors import KeyMapError, MismatchError, raise_listed, warn
from jaxadapt.core.progress import LOGGER, Progress, Report, reporter
from jaxadapt.export import untying
from jaxadapt.export.base_export import collect_base_leaves, leaf_shapes, unknown_names_error
from jaxadapt.keymaps import check, families, plan, pytorch
from jaxadapt.keymaps.generic import GENERIC, keymap_from_paths
from jaxadapt.keymaps.keymap import KeyMap
from jaxadapt.merging import base_merge
from jaxadapt.models.carriers import carrier
from jaxadapt.models.nnx import survey
from jaxadapt.persistence import peft
from jaxadapt.storage import hf_model, location
from jaxadapt.storage.source import TensorSource, cut, rename, stack


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
        base_merge.plan_merge(base_merge.mergeable_leaves(carrier(model).params, adapter), adapter)
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
        sources = _find_sources(tensors, resolved, base_plan, strict, lambda: _describe_nearest(resolved, shapes))
        entries = [e for e in base_plan.entries if all(key in sources for key in e.keys)]
        unfilled = {e.path for e in base_plan.entries} - {e.path for e in entries} | (shapes.keys() - known.keys())
        abstract = [p for p in unfilled if isinstance(leaves[p], jax.ShapeDtypeStruct)]
        raise_listed(
            MismatchError,
            f"{tensors.source}: cannot fill weights that are abstract in the target, because the file does not"
            " contain them; give them values first:",
            abstract,
        )
        if unfilled:
            warn(
                f"{tensors.source}: does not contain some weights, which keep their values:"
                f" {', '.join(sorted(unfilled))}"
            )
        with reporter(progress) as report:
            shardings = carrier(model).base().shardings
            new = _load_leaves(entries, rename(tensors, sources), leaves, shardings, report)
    if adapter is not None:
        changed = base_merge.plan_merge({**leaves, **new}, adapter)
        if not allow_nan:
            base_merge.refuse_nan({**leaves, **new}, adapter, changed)
        for leaf in list(changed):
            new[leaf] = changed.pop(leaf).value(donate=leaf in new)
    LOGGER.info("%s: %d weights read with the keymap %s", tensors.source, len(new), resolved.name)
    return carrier(model).replace(new)


def _describe_nearest(keymap: KeyMap, shapes: Mapping[str, tuple[int, ...]]) -> str:
    return families.describe_nearest_family(shapes) if keymap.name == GENERIC.name else ""


def _find_sources(
    tensors: TensorSource,
    keymap: KeyMap,
    base_plan: plan.Plan,
    strict: bool,
    describe_nearest: Callable[[], str],
) -> dict[str, str]:
    """Return for each key the file tensor that fills it: the tensor of this name or one that it is tied to.

    Raise `MismatchError` with all problems.
    """
    shapes = tensors.shapes
    sources = {key: key for key in base_plan.shapes if key in shapes}
    for key, same in keymap.tied:
        if key in base_plan.shapes and key not in shapes and same in shapes:
            sources[key] = same
    ties = dict(keymap.tied)
    redundant = {
        key
        for key in shapes
        if key not in base_plan.shapes
        and (
            check.is_buffer(keymap, key)
            or (key in ties and ties[key] in shapes and untying.bitwise_same(tensors, key, ties[key]))
        )
    }
    given = {key: shapes[name] for key, name in sources.items()}
    given |= {key: shape for key, shape in shapes.items() if key not in redundant and key not in given}
    _check_sources(tensors, keymap, base_plan, given, strict, describe_nearest)
    return sources


def _check_sources(
    tensors: TensorSource,
    keymap: KeyMap,
    base_plan: plan.Plan,
    given: Mapping[str, tuple[int, ...]],
    strict: bool,
    describe_nearest: Callable[[], str],
) -> None:
    """Raise `MismatchError` with all problems of the shapes that a file gives; warn of tensors that are not used."""
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
            + describe_nearest()
        )


def _load_leaves(
    entries: Sequence[plan.PlanEntry],
    tensors: TensorSource,
    leaves: Mapping[str, Any],
    base_shardings: Mapping[str, Any],
    report: Report,
) -> dict[str, Any]:
    """Return new arrays with the target's dtypes and shardings; numpy arrays for the target's numpy arrays."""
    shardings = {path: leaf.sharding for path, leaf in leaves.items() if isinstance(leaf, jax.Array)}
    shardings |= {
        p: regions.concrete_sharding(sharding) for p, sharding in base_shardings.items() if sharding is not None
    }
    file_dtypes = {key: spec.dtype for key, spec in tensors.specs.items()}
    dtypes = {e.path: leaves[e.path].dtype for e in entries}
    arrays = peft.load_arrays(plan.Plan(tuple(entries)), tensors, file_dtypes, dtypes, shardings, report, "import")
    return {path: np.array(x) if isinstance(leaves[path], np.ndarray) else x for path, x in arrays.items()}


def _with_path_names(
    keymap: KeyMap, target: Any, shapes: Mapping[str, tuple[int, ...]], file_keys: Collection[str], source: str
) -> KeyMap:
    """Add entries to the keymap for unmatched leaves whose own paths are names in the file."""
    rest = {path: shape for path, shape in shapes.items() if keymap is GENERIC or keymap.match(path) is None}
    walk = carrier(target).walk()
    owners = {} if walk is None else {path: owner for path, owner in walk.leaves.items() if path in rest}
    entries = survey.class_entries(owners, shapes, KeyMap(GENERIC.name, ()))
    by_path, ambiguous = keymap_from_paths(rest, entries, survey.custom_leaves(owners, owners))
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
            + paths.bullets(ambiguous)
            + families.describe_nearest_family(shapes)
        )
    return keymap.with_entries(added)
