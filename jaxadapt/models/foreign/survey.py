"""The LoRA sites of a foreign tree, bound to a family's keymap: the axes and the PEFT keys of each array.

    shapes of a tree ──survey_sites──► ForeignSites ──plan──► {key: array}
                                                    ◄──fill──

Uses only shapes, and arrays with `transpose`, `reshape` and indexing.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from jaxadapt.arrays.layout import FileLayout
from jaxadapt.arrays.pattern import axis_parts
from jaxadapt.configs import LoraConfig
from jaxadapt.core.errors import KeyMapError, raise_listed
from jaxadapt.keymaps import plan
from jaxadapt.keymaps.keymap import KeyMap, Match, index_entries
from jaxadapt.keymaps.plan import axis_sizes, scale_factor, tensor_key, torch_axes
from jaxadapt.keymaps.weight import MethodTensor, Weight
from jaxadapt.methods.base import Target
from jaxadapt.methods.registry import get_method
from jaxadapt.models.foreign.dialect import RANK, Dialect, Dims, layouts

Shape = tuple[int, ...]
Array = Any


@dataclasses.dataclass(frozen=True)
class PackedLayout(FileLayout):
    """The layout of an array that may have flattened axes, or may be shared by several keys.

    `packed` is the array's shape in its tree, `shape` its shape with all axes separate. Each subarray (over `split`)
    stands for `shared` tensors of the file, which are consecutive.
    """

    packed: Shape = ()
    shared: int = 1

    def index(self, i: int) -> tuple[Any, ...]:
        return super().index(i // self.shared)

    def encode(self, leaf: Array, i: int) -> Array:
        return super().encode(leaf.reshape(self.shape), i)

    @functools.cached_property
    def rank(self) -> int:
        """The position of the rank's axis."""
        return self.left.index(RANK)

    @functools.cached_property
    def file_rank(self) -> int:
        """The position of the rank's axis in the file's tensors."""
        return self.right.index((RANK,))

    @functools.cached_property
    def _units(self) -> dict[int, FileLayout]:
        return {}

    def unit(self, rank: int) -> FileLayout:
        """Return the layout that converts one key's tensor of this rank to its subarray."""
        layout = self._units.get(rank)
        if layout is None:
            keep = [axis for axis in range(len(self.left)) if axis not in self.split]
            shape = tuple(rank if axis == self.rank else self.shape[axis] for axis in keep)
            left = tuple(self.left[axis] for axis in keep)
            layout = self._units[rank] = FileLayout(shape, left, self.right, (), self.factor, self.sizes)
        return layout


@dataclasses.dataclass(frozen=True)
class FactorArray(plan.PlanEntry):
    """One array of a site, A or B, with its keys and their PyTorch modules."""

    form: PackedLayout
    modules: tuple[str, ...] = ()

    def keys_of(self, i: int) -> tuple[str, ...]:
        """Return the consecutive keys that share subarray `i`."""
        return self.keys[i * self.shared : (i + 1) * self.shared]

    def tensor_number(self, key_number: int) -> int:
        """Return the position of the key itself: `PackedLayout.index` finds its subarray."""
        return key_number

    @property
    def shared(self) -> int:
        return self.form.shared

    @property
    def rank(self) -> int:
        return self.shape[self.form.rank]


@dataclasses.dataclass(frozen=True)
class ForeignSite:
    """One site of a foreign tree: its base leaf, its two arrays, and the known sizes of the base's axes."""

    match: Match
    a: FactorArray
    b: FactorArray
    sizes: tuple[tuple[str, int], ...]

    @property
    def base_shape(self) -> Shape | None:
        """The shape of the base leaf; None if it does not follow from the arrays."""
        sizes = dict(self.sizes)
        left = self.match.weight.left
        return tuple(sizes[n] for n in left) if all(n in sizes for n in left) else None


@dataclasses.dataclass(frozen=True)
class ForeignSites:
    """All LoRA sites of a foreign tree, with its dialect, keymap and base weights.

    `stored` is the alpha of each base leaf, if the tree stores it. `real` is the keymap with one name for all experts
    of a layer, if `keymap` has one for each expert (`experts.per_expert_keymap`).
    """

    dialect: Dialect
    keymap: KeyMap
    sites: tuple[ForeignSite, ...]
    base: Mapping[str, Shape]
    stored: Mapping[str, float] = dataclasses.field(default_factory=dict[str, float])
    real: KeyMap | None = None

    @property
    def own_keymap(self) -> KeyMap:
        """The keymap of the tree, with one name for all experts of a layer if it has them in one array."""
        return self.real or self.keymap

    @functools.cached_property
    def leaves(self) -> frozenset[str]:
        """The base leaves that the tree adapts."""
        return frozenset(site.match.leaf for site in self.sites)

    @functools.cached_property
    def arrays(self) -> list[FactorArray]:
        """The arrays of all sites, A before B."""
        return [half for site in self.sites for half in (site.a, site.b)]

    @functools.cached_property
    def plan(self) -> plan.Plan:
        """The bijection of arrays and file keys; a shared array has one key for each module that shares it."""
        return plan.make_plan(self.arrays)

    @functools.cached_property
    def ranks(self) -> dict[str, int]:
        """`{module: rank}` of every PyTorch module that the tree adapts."""
        return {m: site.a.rank for site in self.sites for m in site.a.modules}

    @functools.cached_property
    def alphas(self) -> dict[str, float]:
        """`{module: alpha}` if the dialect or the tree defines it, else empty."""
        if self.dialect.unscaled:
            return dict(self.ranks)
        alphas = [(site, self.stored[leaf]) for site in self.sites if (leaf := site.match.leaf) in self.stored]
        return {m: alpha for site, alpha in alphas for m in site.a.modules}

    @functools.cached_property
    def modules(self) -> frozenset[str]:
        """All modules of the base in the keymap, adapted or not; empty without a base."""
        out: set[str] = set()
        for leaf, shape in self.base.items():
            match = self.keymap.match(leaf)
            if match and len(match.weight.left) == len(shape) and match.weight.key.rpartition(".")[2] == "weight":
                out |= set(match.modules(axis_sizes(match, shape)).values())
        return frozenset(out)


def survey_sites(
    dialect: Dialect,
    keymap: KeyMap,
    arrays: Mapping[str, Shape],
    base: Mapping[str, Shape],
    stored: Mapping[str, float] | None = None,
    sizes: Mapping[str, int] | None = None,
) -> ForeignSites:
    """Bind the LoRA arrays of a tree, `{path: shape}`, to a family's keymap.

    Args:
        base: `{the family's path of a base leaf: shape}`; empty if the tree has only LoRA leaves.
        stored: `{base leaf: alpha}`, if the tree stores it.
        sizes: `{letter of the keymap's patterns: size}` of axes, if `base` is empty.

    Raises one `KeyMapError` with every leaf that no entry of the keymap matches, or whose shape matches no layout of
    the dialect.
    """
    out: list[ForeignSite] = []
    problems: list[str] = []
    for leaf, candidates in dialect.claim(arrays).items():
        match = keymap.match(leaf)
        names = sorted({path for a, b, _ in candidates for path in (a, b)})
        if match is None:
            problems.append(f"{', '.join(names)}: the keymap {keymap.name!r} has no entry for {leaf!r}")
            continue
        try:
            hints = hinted_sizes(match.weight, sizes or {})
            out.append(_bind_site(dialect, keymap, match, candidates, arrays, base.get(leaf), hints))
        except KeyMapError as error:
            problems.append(str(error))
    raise_listed(
        KeyMapError,
        f"these {dialect.name} LoRA leaves have no exact equivalent in a PEFT file:",
        problems,
        "\nPass the model's family as keymap=, or a KeyMap with an entry for each base weight",
    )
    return ForeignSites(dialect, keymap, tuple(out), dict(base), stored or {})


def hinted_sizes(weight: Weight, sizes: Mapping[str, int]) -> dict[str, int]:
    """Return the sizes of an entry's axes whose letters have sizes; "(c p)" has one if c and p do."""
    known = {**sizes, **dict(weight.sizes)}
    return {
        axis: math.prod(known[n] for n in axis_parts(axis))
        for axis in weight.left
        if set(axis_parts(axis)) <= set(known)
    }


def _bind_site(
    dialect: Dialect,
    keymap: KeyMap,
    match: Match,
    candidates: Sequence[tuple[str, str, int]],
    arrays: Mapping[str, Shape],
    base: Shape | None,
    hints: Mapping[str, int],
) -> ForeignSite:
    sizes = {**hints, **{axis: len(match.weight.index_names(axis) or ()) for axis in match.roles["fused"]}}
    if base is not None:
        sizes = axis_sizes(match, base)
    tried: list[str] = []
    fits: list[ForeignSite] = []
    for path_a, path_b, number in candidates:
        pair = dialect.pairs[number]
        for dims_a, dims_b in layouts(pair, match.weight, dialect.shares):
            known = _solve_sizes(((dims_a, arrays[path_a]), (dims_b, arrays[path_b])), sizes)
            tried.append(f"A ({_layout_text(dims_a)}), B ({_layout_text(dims_b)})")
            if known is not None:
                a, b = (
                    _bind_array(keymap, match, tensor, path, arrays[path], dims, known)
                    for tensor, path, dims in zip(_lora_tensors(match), (path_a, path_b), (dims_a, dims_b), strict=True)
                )
                fits.append(ForeignSite(match, a, b, tuple(sorted(known.items()))))
    if not fits:
        path_a, path_b, _ = candidates[0]
        shape = "" if base is None else f" beside {match.leaf} {base}"
        raise KeyMapError(
            f"{path_a} {arrays[path_a]} and {path_b} {arrays[path_b]}{shape} with axes"
            f" ({' '.join(match.weight.left)}): expected {' or '.join(tried) or 'another kind of weight'}"
        )
    # Several layouts of one shape may be equivalent (an axis of size 1). Otherwise the shapes are ambiguous.
    different = {(g.a.form, g.b.form) for g in fits}
    if len(different) > 1:
        raise KeyMapError(
            f"{fits[0].a.path} {fits[0].a.form.packed} and {fits[0].b.path} {fits[0].b.form.packed} are"
            f" ambiguous between {len(different)} layouts: {' or '.join(tried)}. Pass the whole tree, with its"
            " base weights"
        )
    return fits[0]


def _layout_text(dims: Dims) -> str:
    return " ".join(f"({' '.join(d)})" if len(d) != 1 else "".join(d).strip("~") for d in dims)


def _solve_sizes(pairs: Sequence[tuple[Dims, Shape]], sizes: Mapping[str, int]) -> dict[str, int] | None:
    """Return all axis sizes that follow from the arrays' shapes; None if these contradict each other or `sizes`."""
    known = dict(sizes)
    for _ in range(2):  # sizes from the second array may split an axis of the first
        for dims, shape in pairs:
            if len(dims) != len(shape):
                return None
            for dim, size in zip(dims, shape, strict=True):
                unknown = [n for n in dim if n not in known]
                rest = math.prod(known[n] for n in dim if n in known)
                if len(unknown) == 1 and rest and size % rest == 0:
                    known[unknown[0]] = size // rest
                elif not unknown and rest != size:
                    return None
    return known


def _lora_tensors(match: Match) -> tuple[MethodTensor, MethodTensor]:
    """Return PEFT's two tensors of a site. Their rank is a symbolic axis, so its value in the config is arbitrary."""
    config = LoraConfig(r=1)
    a, b = get_method(config).tensors(config, Target(match))
    return a, b


def _bind_array(
    keymap: KeyMap, match: Match, tensor: MethodTensor, path: str, packed: Shape, dims: Dims, sizes: Mapping[str, int]
) -> FactorArray:
    right = list(torch_axes(match, tensor))
    left: list[str] = []
    shape: list[int] = []
    for dim, size in zip(dims, packed, strict=True):
        if all(n in sizes for n in dim):
            left += dim
            shape += [sizes[n] for n in dim]
        elif dim in right:  # flattened as in PyTorch, so that it can stay one axis
            right[right.index(dim)] = (" ".join(dim),)
            left.append(" ".join(dim))
            shape.append(size)
        else:
            raise KeyMapError(
                f"{path} {packed} has {' and '.join(dim)} of {match.leaf!r} flattened into one axis, in another order"
                " than PyTorch, and their sizes are not known. Pass the whole tree, with its base weights"
            )
    split = tuple(i for i, n in enumerate(left) if n.startswith("{"))
    missing = [n for n in match.braced if n not in left]
    texts = index_entries(match.weight, [left[i] for i in split] + missing, sizes)
    modules = tuple(match.module(text) for _, text in texts)
    keys = tuple(tensor_key(keymap, match, tensor, text) for _, text in texts)
    try:
        factor = scale_factor(keymap, match, tensor, sizes)
    except KeyError as error:
        raise KeyMapError(
            f"{path}: PyTorch's {match.leaf!r} is scaled by the size of an axis, which its LoRA leaves do not"
            " show. Pass"
            " the whole tree, with its base weights"
        ) from error
    shared = math.prod(sizes[n] for n in missing)
    form = PackedLayout(
        tuple(shape), tuple(left), tuple(right), split, factor, match.weight.sizes, packed=packed, shared=shared
    )
    return FactorArray(path, form, keys, modules)
