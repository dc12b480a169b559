"""A keymap applied to concrete shapes: a bijection between leaves and keys, checked before any byte moves.

    sites + a method's tensors ──plan──► Entry per leaf tensor ──encode──► {key: array}
                                                               ◄─decode──

Pure: it works on shapes, and on anything that has `transpose`, `reshape` and indexing (numpy or JAX).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxadapt.arrays import pattern
from jaxadapt.arrays.layout import RANK, FileLayout
from jaxadapt.core import paths
from jaxadapt.core.errors import KeyMapError, MismatchError
from jaxadapt.keymaps import parts as pieces
from jaxadapt.keymaps.keymap import KeyMap, Match, index_entries
from jaxadapt.keymaps.tensor_spec import MethodTensor
from jaxadapt.keymaps.weight import Weight

Array = Any


@dataclasses.dataclass(frozen=True)
class PlanEntry:
    """One JAX leaf and the file tensors that hold it: one, or one per stacked layer and fused part.

    `keys` are the tensors of `form`, in its order.
    """

    path: str
    form: FileLayout
    keys: tuple[str, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the leaf."""
        return self.form.shape

    def dtype(self, dtypes: Mapping[str, Any]) -> np.dtype[Any]:
        """The dtype of the leaf whose tensors have these, by key.

        Raises `MismatchError` if they differ and no dtype holds them all exactly.
        """
        if len(self.keys) == 1:
            return np.dtype(dtypes[self.keys[0]])
        found = {np.dtype(dtypes[key]) for key in self.keys}
        if len(found) == 1:
            return found.pop()
        try:
            return np.result_type(*found)
        except TypeError as error:
            names = ", ".join(sorted(d.name for d in found))
            raise MismatchError(
                f"{self.path!r} is one array in this model, but its tensors {self.keys[0]!r}, … have the"
                f" dtypes {names}, which no dtype holds exactly; convert them to one"
            ) from error

    def decode(self, tensors: Mapping[str, Array]) -> Array:
        """The leaf from `{key: tensor}`; numpy or JAX arrays, traced ones too. A view where that is enough."""
        form, mine = self.form, [tensors[key] for key in self.keys]
        if not form.split:
            return form.decode(mine[0])
        dtype = self.dtype({key: t.dtype for key, t in zip(self.keys, mine, strict=True)})
        xp = mine[0].__array_namespace__()
        if form.partial:
            out = xp.zeros(form.shape, dtype)
            for i, t in enumerate(mine):
                part = form.part(i).decode(t.astype(dtype))
                if isinstance(out, np.ndarray):
                    out[form.index(i)] = part
                else:
                    out = out.at[form.index(i)].set(part)
            return out
        parts = xp.stack([form.decode(t.astype(dtype)) for t in mine])
        counts = tuple(form.shape[axis] for axis in form.split)
        parts = parts.reshape(counts + parts.shape[1:])
        return xp.moveaxis(parts, tuple(range(len(counts))), form.split)


@dataclasses.dataclass(frozen=True)
class Plan:
    """The checked bijection between the leaves of one adapter and the keys of one file."""

    entries: tuple[PlanEntry, ...]

    @functools.cached_property
    def keys(self) -> dict[str, tuple[PlanEntry, int]]:
        """Every file key, with the entry and index that make it."""
        return {key: (entry, i) for entry in self.entries for i, key in enumerate(entry.keys)}

    @functools.cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """`{key: shape}` of the file."""
        return {key: e.form.shape_of(i) for e in self.entries for i, key in enumerate(e.keys)}

    @functools.cached_property
    def inexact(self) -> dict[str, float]:
        """`{leaf: factor}` of those that a factor rounds on the way, in either direction."""
        return {e.path: e.form.factor for e in self.entries if not e.form.exact}

    def check(
        self,
        found: Mapping[str, Sequence[int]],
        source: str = "the file",
        more: Sequence[str] = (),
        table: str = "",
    ) -> None:
        """Raise one `MismatchError` that lists every missing, unexpected and wrongly shaped tensor.

        `more` are findings of the caller's own, for the same list; `table` is the name of the one in use.
        """
        parts = self.problems(found, source, more)
        if parts:
            raise MismatchError(
                f"{source} does not fit the model: of {len(self.shapes)} tensors,\n"
                + "\n".join(parts)
                + "\nIs it an adapter for another base model, or are target_modules, r or keymap= others?"
                + (f" (The names are those of the table {table!r}; strict=False takes what fits.)" if table else "")
            )

    def problems(self, found: Mapping[str, Sequence[int]], source: str, more: Sequence[str] = ()) -> list[str]:
        """What `check` lists, kind by kind."""
        shapes = self.shapes
        if found == shapes and not more:
            return []
        missing = [k for k in shapes if k not in found]
        unexpected = [k for k in found if k not in shapes]
        wrong = [
            f"{k}: expected {list(shape)}, found {list(found[k])}"
            for k, shape in shapes.items()
            if k in found and tuple(found[k]) != shape
        ]
        return [
            f"{len(items)} {what}:\n{paths.bullets(items)}"
            for what, items in (
                (f"missing from {source} (the model expects them)", missing),
                ("unexpected (nothing in the model takes them)", unexpected),
                ("wrongly shaped", wrong),
                ("of no use as they are", more),
            )
            if items
        ]

    def encode(self, leaves: Mapping[str, Array], dtype: Any = None, host: bool = False) -> Encoded:
        """`{key: array}` from `{path: leaf}`; each array is made when it is asked for.

        Args:
            dtype: of the tensors, the leaf's own by default.
            host: give numpy arrays, whatever the leaves are.
        """
        return Encoded(self, leaves, None if dtype is None else np.dtype(dtype), host)

    def decode(self, tensors: Mapping[str, Array]) -> dict[str, Array]:
        """`{path: leaf}` from `{key: array}`."""
        return {e.path: e.decode(tensors) for e in self.entries}


class TensorSpec(NamedTuple):
    """What a tensor will be."""

    shape: tuple[int, ...]
    dtype: Any


@dataclasses.dataclass(frozen=True, eq=False)
class Encoded(Mapping[str, Any]):
    """The tensors of a plan under PEFT's names, each made (and forgotten) at every look-up."""

    plan: Plan
    leaves: Mapping[str, Array]
    dtype: np.dtype[Any] | None = None
    host: bool = False

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """Shapes and dtypes by key, without making a tensor."""
        return {
            key: TensorSpec(e.form.shape_of(i), dtype)
            for e in self.plan.entries
            for dtype in (self.dtype or np.dtype(self.leaves[e.path].dtype),)
            for i, key in enumerate(e.keys)
        }

    def __getitem__(self, key: str) -> Array:
        entry, i = self.plan.keys[key]
        leaf = self.leaves[entry.path]
        # On the host a tensor is a view where the layouts allow; on a device each step is a computation.
        tensor = entry.form.encode(np.asarray(leaf) if self.host else leaf, i)
        return tensor if self.dtype is None or tensor.dtype == self.dtype else tensor.astype(self.dtype)

    def __contains__(self, key: object) -> bool:
        return key in self.plan.keys  # Mapping's own would make the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.plan.keys)

    def __len__(self) -> int:
        return len(self.plan.keys)


Layout = tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]


def _layout(site: Match, tensor: MethodTensor) -> Layout:
    """A tensor's axis names in the model (stacked axes where the base has them) and in the file."""
    known = site.weight.layout_cache  # one line serves every layer, and this is asked for each of its tensors
    found = known.get(tensor)
    if found is None:
        found = known[tensor] = _make_layout(site, tensor)
    return found


def _make_layout(site: Match, tensor: MethodTensor) -> Layout:
    """As `_layout`. The method's own axes are marked "~": a base weight may have an axis called "r" as well."""
    if tensor.is_copy:
        return site.weight.left, site.weight.right

    def expand(names: Iterable[str], roles: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
        return tuple(n for name in names for n in roles.get(name, (f"~{name}",)))

    left = list(expand(tensor.axes, site.roles))
    for axis in site.stack:  # ascending, so each lands at the base weight's own position
        if axis > len(left):
            raise KeyMapError(
                f"leaf {site.leaf!r} stacks its layers on axis {axis}, but its {tensor.name} has only"
                f" {len(left)} axes of its own; stack on an axis from 0 to {len(left)}"
            )
        left.insert(axis, site.weight.left[axis])
    torch = site.weight.torch_roles
    right: list[tuple[str, ...]] = []
    for group in tensor.torch:
        if site.weight.kind == "conv" and "in" in group:
            channels, *window = site.weight.right[1:]
            right += [expand((name for name in group if name != "in"), torch) + channels, *window]
        else:
            right.append(expand(group, torch))
    return tuple(left), tuple(right)


def torch_axes(site: Match, tensor: MethodTensor) -> tuple[tuple[str, ...], ...]:
    """The axes of a tensor in the file, each a group of the base weight's, or "~" and the method's own."""
    return _layout(site, tensor)[1]


def plan_entry(keymap: KeyMap, site: Match, tensor: MethodTensor, sizes: Mapping[str, int]) -> PlanEntry:
    """The entry of one tensor at one site; `sizes` are those of the base leaf's axes, by name."""
    form, texts = _arranged(keymap, site, tensor, sizes)
    keys = tuple(tensor_key(keymap, site, tensor, text) for text in texts)
    return PlanEntry(paths.join(site.leaf, tensor.name), form, keys)


def _arranged(
    keymap: KeyMap, site: Match, tensor: MethodTensor, sizes: Mapping[str, int]
) -> tuple[FileLayout, list[dict[str, str]]]:
    """The arrangement of a tensor at a line, and what fills the key's holes for each of its file tensors."""
    known = site.weight.layout_cache
    at = (tensor, site.parts, *sizes.items())
    if at not in known:
        left, right = _layout(site, tensor)
        only = {site.roles["fused"][0]: site.parts} if site.parts is not None else {}
        split = tuple(i for i, n in enumerate(left) if n.startswith("{"))
        axes = [left[i] for i in split]
        found = index_entries(site.weight, axes, sizes, only)
        texts = [text for _, text in found]
        held, ranks = None, None
        if tensor.used is not None:
            order = [site.braced.index(axis) for axis in axes]
            each = zip(index_entries(site.weight, site.braced, sizes, only), tensor.used, strict=True)
            used = {tuple(index[i] for i in order): size for (index, _), size in each}
            mine = [used[index] for index, _ in found]
            some = tuple(i for i, size in enumerate(mine) if size)
            held = None if len(some) == len(mine) else some
            texts = [texts[i] for i in some]
            sized = tuple(mine[i] for i in some)
            ranks = sized if RANK in left and set(sized) != {dict(tensor.own)["r"]} else None
        shape, factor = _shape(site, tensor, sizes, left), scale_factor(keymap, site, tensor, sizes)
        shift = site.weight.shift if tensor.is_copy else 0.0
        form = FileLayout(shape, left, right, split, factor, site.weight.sizes, shift, held, ranks)
        known[at] = form, texts
    return known[at]


def scale_factor(keymap: KeyMap, site: Match, tensor: MethodTensor, sizes: Mapping[str, int]) -> float:
    """What the file's tensor is multiplied by to give the model's."""
    factor = 1.0
    if site.weight.scale is not None and tensor.scale_power != 0:
        if tensor.scale_power is None:
            raise KeyMapError(
                f"leaf {site.leaf!r} holds PyTorch's weight times a factor, says the table {keymap.name!r}; what that"
                f" makes of {tensor.name} is not known: leave the module out, or use a method such as LORA"
            )
        factor = site.weight.factor(sizes) ** tensor.scale_power
    return factor


def tensor_key(keymap: KeyMap, site: Match, tensor: MethodTensor, text: Mapping[str, str]) -> str:
    """The name of one tensor in the file; the root module has no name of its own."""
    line = site.weight
    if tensor.is_copy:
        module, parameter = site.parameter(text)
        return tensor_part_key(
            line, paths.join(f"{keymap.prefix}{module}".rstrip(".") + tensor.suffix, parameter), line.right
        )
    suffix = f".base_layer.out_proj{tensor.suffix}" if line.kind == "attention" and not line.part else tensor.suffix
    module = site.parameter(text)[0] if line.kind == "experts" else site.module(text)
    return tensor_part_key(line, f"{keymap.prefix}{module}".rstrip(".") + suffix, torch_axes(site, tensor))


def tensor_part_key(line: Weight, key: str, axes: Sequence[tuple[str, ...]]) -> str:
    """The key of a tensor with these axes, as a part of the file's where the line's leaf is one of several in it."""
    if not line.part:
        return key
    return pieces.part_key(key, next((i for i, axis in enumerate(axes) if axis == line.part_axis), None), line.part)


def model_shape(site: Match, tensor: MethodTensor, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape of one tensor in the model."""
    return _shape(site, tensor, sizes, _layout(site, tensor)[0])


def _shape(site: Match, tensor: MethodTensor, sizes: Mapping[str, int], left: Sequence[str]) -> tuple[int, ...]:
    size = {**sizes, **{f"~{name}": size for name, size in tensor.own}}
    if site.parts is not None:
        size[site.roles["fused"][0]] = len(site.parts)
    return tuple(size[n] for n in left)


def axis_sizes(site: Match, shape: Sequence[int]) -> dict[str, int]:
    """Axis sizes by name from the base leaf's shape; `MismatchError` if the line wants another rank."""
    left = site.weight.left
    if len(left) != len(shape):
        raise MismatchError(
            f"leaf {site.leaf!r} has shape {tuple(shape)}, but its line {site.weight.pattern!r} names {len(left)} axes"
        )
    sizes = dict(zip(left, shape, strict=True))
    for axis, size in sizes.items():
        pattern.part_sizes(axis, size, dict(site.weight.sizes))
    for axis in site.roles["fused"]:
        names = site.weight.names(axis)
        if names is not None and len(names) != sizes[axis]:
            raise MismatchError(
                f"leaf {site.leaf!r} has {sizes[axis]} entries on its fused axis, but its line names {list(names)}"
            )
    return sizes


def axis_sizes_from_tensors(
    site: Match, tensors: Sequence[MethodTensor], shapes: Mapping[str, Sequence[int]]
) -> dict[str, int]:
    """Axis sizes by name from an adapter's own tensors, where the base is not at hand.

    Raises `MismatchError` if a tensor is missing, has the wrong rank, or two tensors disagree.
    """
    sizes = {axis: len(site.weight.names(axis) or ()) for axis in site.roles["fused"]}
    parts = {axis: size if site.parts is None else len(site.parts) for axis, size in sizes.items()}
    wanted = {t.name for t in tensors}
    problems = [f"{site.leaf}.{name}: no such tensor in this method" for name in shapes if name not in wanted]
    for tensor in tensors:
        left, _ = _layout(site, tensor)
        shape = shapes.get(tensor.name)
        if shape is None:
            problems.append(f"{site.leaf}.{tensor.name}: missing")
            continue
        if len(shape) != len(left):
            axes = " ".join(left).replace("~", "")
            problems.append(f"{site.leaf}.{tensor.name}: expected axes ({axes}), found shape {tuple(shape)}")
            continue
        fixed = {**parts, **{f"~{name}": size for name, size in tensor.own}}
        for name, size in zip(left, shape, strict=True):
            want = fixed[name] if name in fixed else sizes.setdefault(name, size)
            if want != size:
                what = f"axis {name.strip('~{}')!r} has {size} entries, expected {want}"
                problems.append(f"{site.leaf}.{tensor.name}: {what}")
            try:
                pattern.part_sizes(name, size, dict(site.weight.sizes))
            except MismatchError as error:
                problems.append(f"{site.leaf}.{tensor.name}: {error}")
    if problems:
        raise MismatchError(
            "the adapter contradicts itself or its configuration:\n"
            + paths.bullets(problems)
            + "\nOf several that are stacked (by vmap, say) take one: jax.tree.map(lambda x: x[0], tree)"
        )
    return sizes


def stack_sizes(site: Match, tensors: Sequence[MethodTensor], shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """The sizes of the numbered axes alone, from what tensors of theirs have the right number of axes."""
    numbered = [axis for axis in site.braced if site.weight.names(axis) is None]
    layouts = [(_layout(site, t)[0], shapes[t.name]) for t in tensors if t.name in shapes]
    found = [dict(zip(left, shape, strict=True)) for left, shape in layouts if len(left) == len(shape)]
    return {axis: sizes[axis] for sizes in reversed(found) for axis in numbered if axis in sizes}


def make_plan(entries: Sequence[PlanEntry]) -> Plan:
    """The plan of these entries; keys claimed twice raise `MismatchError`."""
    owners: dict[str, list[str]] = {}
    for e in entries:
        for key in e.keys:
            owners.setdefault(key, []).append(e.path)
    twice = [f"{key}: {', '.join(sorted(who))}" for key, who in owners.items() if len(who) > 1]
    if twice:
        raise MismatchError("tensors are claimed by several leaves:\n" + paths.bullets(twice))
    return Plan(tuple(entries))


def base_plan(keymap: KeyMap, shapes: Mapping[str, Sequence[int]]) -> Plan:
    """The plan of the *base* weights themselves: what proves a table, and what exports a merged model.

    Raises `KeyMapError` with every leaf that has no line, several, or one that contradicts its shape;
    `MismatchError` where two leaves claim one key.
    """
    out: list[PlanEntry] = []
    problems: list[str] = []
    for leaf, shape in shapes.items():
        try:
            made = base_plan_entry(keymap, leaf, shape)
        except KeyMapError as error:
            problems.append(str(error))
            continue
        if made is None:
            problems.append(f"{leaf} {tuple(shape)}: no line")
        else:
            out.append(made)
    if problems:
        raise KeyMapError(f"the table {keymap.name!r} does not fit these leaves:\n" + paths.bullets(problems))
    return make_plan(out)


def base_plan_entry(keymap: KeyMap, leaf: str, shape: Sequence[int]) -> PlanEntry | None:
    """One base weight itself; None without a line, and `KeyMapError` or `MismatchError` where it does not fit."""
    site = keymap.match(leaf)
    if site is None:
        return None
    sizes = axis_sizes(site, shape)
    left = site.weight.left
    split = tuple(i for i, n in enumerate(left) if n.startswith("{"))
    line = site.weight
    keys = tuple(
        tensor_part_key(line, line.file_key.format(**dict(site.holes), **text), line.right)
        for _, text in index_entries(line, [left[i] for i in split], sizes)
    )
    form = FileLayout(tuple(shape), left, line.right, split, line.factor(sizes), line.sizes, line.shift)
    return PlanEntry(leaf, form, keys)
