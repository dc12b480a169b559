"""A keymap applied to concrete shapes: a bijection between leaves and keys, checked before any data is read or written.

    sites + a method's tensors ──make_plan──► PlanEntry per leaf ──encode──► {key: array}
                                                                 ◄─decode──

It works on shapes, and on NumPy and JAX arrays: anything with `transpose`, `reshape` and indexing.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxadapt.arrays.layout import RANK, FileLayout
from jaxadapt.arrays.tensor_source import TensorSource, TensorSpec
from jaxadapt.core import paths
from jaxadapt.core.compare import Spec, compare, group_findings
from jaxadapt.core.errors import KeyMapError, MismatchError, raise_listed
from jaxadapt.keymaps.keymap import KeyMap, Match, index_entries
from jaxadapt.keymaps.tensor_layout import (
    axis_sizes,
    model_shape,
    scale_factor,
    tensor_key,
    tensor_layout,
    tensor_part_key,
)
from jaxadapt.keymaps.tensor_spec import MethodTensor

Array = Any


@dataclasses.dataclass(frozen=True)
class PlanEntry:
    """One JAX leaf and its file tensors: one tensor, or one for each stacked layer and fused part.

    Attributes:
        path: the leaf.
        form: the layout of the leaf in the file.
        keys: the tensors, in the order of `form`; more keys than that repeat the same tensors.
    """

    path: str
    form: FileLayout
    keys: tuple[str, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the leaf."""
        return self.form.shape

    def keys_of(self, i: int) -> tuple[str, ...]:
        """Return the keys of tensor `i` of the layout: one, and those that repeat it."""
        return self.keys[i :: self.form.count]

    def tensor_number(self, key_number: int) -> int:
        """Return the number of the layout's tensor for a key, given by its position in `keys`."""
        return key_number % self.form.count

    def dtype(self, dtypes: Mapping[str, Any]) -> np.dtype[Any]:
        """Return the dtype of the leaf, from the dtypes of its tensors by key.

        Raises `MismatchError` if they differ and no dtype represents them all exactly.
        """
        if len(self.keys) == 1:
            return np.dtype(dtypes[self.keys[0]])
        distinct = {np.dtype(dtypes[key]) for key in self.keys}
        if len(distinct) == 1:
            return distinct.pop()
        try:
            return np.result_type(*distinct)
        except TypeError as error:
            names = ", ".join(sorted(d.name for d in distinct))
            raise MismatchError(
                f"cannot choose a dtype for {self.path!r}: it is one array in this model, but its tensors"
                f" {self.keys[0]!r}, … have the dtypes {names}, and no dtype represents them all exactly. Convert them"
                " to one dtype"
            ) from error

    def decode(self, tensors: Mapping[str, Array]) -> Array:
        """Return the leaf from `{key: tensor}`, NumPy or JAX arrays (also traced ones); a view where possible."""
        form, file_tensors = self.form, [tensors[key] for key in self.keys[: self.form.count]]
        if not form.split:
            return form.decode(file_tensors[0])
        dtype = self.dtype({key: t.dtype for key, t in zip(self.keys, file_tensors, strict=True)})
        xp = file_tensors[0].__array_namespace__()
        if form.is_partial:
            out = xp.zeros(form.shape, dtype)
            for i, t in enumerate(file_tensors):
                part = form.part_layout(i).decode(t.astype(dtype))
                if isinstance(out, np.ndarray):
                    out[form.index(i)] = part
                else:
                    out = out.at[form.index(i)].set(part)
            return out
        parts = xp.stack([form.decode(t.astype(dtype)) for t in file_tensors])
        counts = tuple(form.shape[axis] for axis in form.split)
        parts = parts.reshape(counts + parts.shape[1:])
        return xp.moveaxis(parts, tuple(range(len(counts))), form.split)


@dataclasses.dataclass(frozen=True)
class Plan:
    """The checked bijection between the leaves of one adapter and the keys of one file."""

    entries: tuple[PlanEntry, ...]

    @functools.cached_property
    def keys(self) -> dict[str, tuple[PlanEntry, int]]:
        """`{key: (entry, index)}` of the file: the entry that has the key, and its index there."""
        return {key: (entry, i) for entry in self.entries for i, key in enumerate(entry.keys)}

    @functools.cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """`{key: shape}` of the file."""
        return {key: e.form.shape_of(i) for e in self.entries for i, key in enumerate(e.keys)}

    @functools.cached_property
    def inexact(self) -> dict[str, float]:
        """`{leaf: factor}` of the leaves whose scale factor causes rounding, in either direction."""
        return {e.path: e.form.factor for e in self.entries if not e.form.is_exact}

    def check(
        self,
        found_shapes: Mapping[str, Sequence[int]],
        source: str = "the file",
        other_problems: Sequence[str] = (),
        keymap_name: str = "",
    ) -> None:
        """Raise one `MismatchError` that lists every missing, unexpected and wrongly shaped tensor.

        Args:
            found: the shapes of the file's tensors, by key.
            source: the file, for the message.
            more: further problems for the same list.
            table: the name of the keymap.
        """
        problems = self.list_problems(found_shapes, source, other_problems)
        if problems:
            raise MismatchError(
                f"{source} does not fit the model: of {len(self.shapes)} tensors,\n"
                + "\n".join(problems)
                + "\nCheck that the adapter is for this base model, and that target_modules, r and keymap= are right."
                + (
                    f" (The keymap is {keymap_name!r}; strict=False loads only the tensors that fit.)"
                    if keymap_name
                    else ""
                )
            )

    def list_problems(
        self, found: Mapping[str, Sequence[int]], source: str, other_problems: Sequence[str] = ()
    ) -> list[str]:
        """Return the problems that `check` lists, one text for each kind."""
        if found == self.shapes and not other_problems:
            return []
        expected, given = ({k: Spec(tuple(shape)) for k, shape in shapes.items()} for shapes in (self.shapes, found))
        problems = group_findings(
            compare(expected, given),
            f"missing from {source} (the model expects them)",
            "unexpected (no leaf of the model uses them)",
        )
        unusable = f"{len(other_problems)} unusable:\n{paths.bullets(other_problems)}"
        return [*problems, unusable] if other_problems else problems

    def encode(self, leaves: Mapping[str, Array], host: bool = False) -> Encoded:
        """Return a lazy `{key: array}` from `{path: leaf}`; each look-up computes its array.

        Args:
            leaves: the leaves by path.
            host: return NumPy arrays, also from JAX leaves.
        """
        return Encoded(self, leaves, host)

    def decode(self, tensors: Mapping[str, Array]) -> dict[str, Array]:
        """Return `{path: leaf}` from `{key: array}`."""
        return {e.path: e.decode(tensors) for e in self.entries}


@dataclasses.dataclass(frozen=True, eq=False)
class Encoded(TensorSource):
    """The tensors of a plan under PEFT's names, computed at each look-up and not cached."""

    plan: Plan
    leaves: Mapping[str, Array]
    host: bool = False

    @functools.cached_property
    def specs(self) -> dict[str, TensorSpec]:
        """Shapes and dtypes by key; no tensor is computed."""
        return {
            key: TensorSpec(e.form.shape_of(i), dtype)
            for e in self.plan.entries
            for dtype in (np.dtype(self.leaves[e.path].dtype),)
            for i, key in enumerate(e.keys)
        }

    def read(self, key: str) -> Array:
        """Compute one tensor."""
        entry, i = self.plan.keys[key]
        leaf = self.leaves[entry.path]
        # On the host, transposes and reshapes are views where the layouts allow; on a device each is a computation.
        return entry.form.encode(np.asarray(leaf) if self.host else leaf, entry.tensor_number(i))


def plan_entry(keymap: KeyMap, match: Match, tensor: MethodTensor, sizes: Mapping[str, int]) -> PlanEntry:
    """Return the entry of one tensor of one site; `sizes` are the sizes of the base leaf's axes, by name."""
    form, texts = _file_layout(keymap, match, tensor, sizes)
    keys = tuple(tensor_key(keymap, match, tensor, text) for text in texts)
    return PlanEntry(paths.join(match.leaf, tensor.name), form, keys)


def _file_layout(
    keymap: KeyMap, match: Match, tensor: MethodTensor, sizes: Mapping[str, int]
) -> tuple[FileLayout, list[dict[str, str]]]:
    """Return the layout of a tensor, and the texts for the holes of the key of each of its file tensors."""
    cache = match.weight.layout_cache
    cache_key = (tensor, match.parts, *sizes.items())
    if cache_key not in cache:
        left, right = tensor_layout(match, tensor)
        only = {match.roles["fused"][0]: match.parts} if match.parts is not None else {}
        split = tuple(i for i, n in enumerate(left) if n.startswith("{"))
        axes = [left[i] for i in split]
        indices = index_entries(match.weight, axes, sizes, only)
        texts = [text for _, text in indices]
        in_file, ranks = None, None
        if tensor.used_sizes is not None:
            order = [match.braced.index(axis) for axis in axes]
            each = zip(index_entries(match.weight, match.braced, sizes, only), tensor.used_sizes, strict=True)
            used = {tuple(index[i] for i in order): size for (index, _), size in each}
            used_sizes = [used[index] for index, _ in indices]
            adapted = tuple(i for i, size in enumerate(used_sizes) if size)
            in_file = None if len(adapted) == len(used_sizes) else adapted
            texts = [texts[i] for i in adapted]
            adapted_ranks = tuple(used_sizes[i] for i in adapted)
            ranks = adapted_ranks if RANK in left and set(adapted_ranks) != {dict(tensor.own)["r"]} else None
        shape, factor = model_shape(match, tensor, sizes), scale_factor(keymap, match, tensor, sizes)
        shift = match.weight.shift if tensor.is_copy else 0.0
        form = FileLayout(shape, left, right, split, factor, match.weight.sizes, shift, in_file, ranks)
        cache[cache_key] = form, texts
    return cache[cache_key]


def make_plan(entries: Sequence[PlanEntry]) -> Plan:
    """Return the plan of these entries; raise `MismatchError` if several leaves claim one key."""
    owners: dict[str, list[str]] = {}
    for e in entries:
        for key in e.keys:
            owners.setdefault(key, []).append(e.path)
    conflicts = [f"{key}: {', '.join(sorted(leaves))}" for key, leaves in owners.items() if len(leaves) > 1]
    raise_listed(
        MismatchError,
        "several leaves claim the same tensor; correct the keymap so that each tensor has one leaf:",
        conflicts,
    )
    return Plan(tuple(entries))


def base_plan(keymap: KeyMap, shapes: Mapping[str, Sequence[int]]) -> Plan:
    """Return the plan of the base weights themselves, which verifies a keymap and exports a merged model.

    Raises `KeyMapError` listing every leaf that no entry or several entries match, or whose entry contradicts its
    shape; `MismatchError` if two leaves claim one key.
    """
    entries: list[PlanEntry] = []
    problems: list[str] = []
    for leaf, shape in shapes.items():
        try:
            entry = base_plan_entry(keymap, leaf, shape)
        except KeyMapError as error:
            problems.append(str(error))
            continue
        if entry is None:
            problems.append(f"{leaf} {tuple(shape)}: no entry")
        else:
            entries.append(entry)
    raise_listed(KeyMapError, f"the keymap {keymap.name!r} does not fit these leaves:", problems)
    return make_plan(entries)


def base_plan_entry(keymap: KeyMap, leaf: str, shape: Sequence[int]) -> PlanEntry | None:
    """Return the plan entry of one base weight, or None if no entry of the keymap matches it.

    Raises `KeyMapError` if several entries match; `MismatchError` if the entry contradicts the shape.
    """
    match = keymap.match(leaf)
    if match is None:
        return None
    sizes = axis_sizes(match, shape)
    left = match.weight.left
    split = tuple(i for i, n in enumerate(left) if n.startswith("{"))
    weight = match.weight
    keys = tuple(
        tensor_part_key(weight, weight.file_key.format(**dict(match.holes), **text), weight.right)
        for _, text in index_entries(weight, [left[i] for i in split], sizes)
    )
    form = FileLayout(tuple(shape), left, weight.right, split, weight.factor(sizes), weight.sizes, weight.shift)
    return PlanEntry(leaf, form, keys)
