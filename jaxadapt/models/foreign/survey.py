"""The LoRA leaves of another library's tree, bound to a family's table: what each array holds, and as which keys.

    shapes of a tree ──survey──► Guests ──plan──► {key: array}
                                        ◄─filling──

Pure: shapes, and anything with `transpose`, `reshape` and indexing.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from jaxadapt import methods
from jaxadapt.arrays.layout import FileLayout
from jaxadapt.arrays.pattern import axis_parts
from jaxadapt.configs import LoraConfig
from jaxadapt.core import paths
from jaxadapt.core.errors import KeyMapError
from jaxadapt.keymaps import plan
from jaxadapt.keymaps.keymap import KeyMap, Match, index_entries
from jaxadapt.keymaps.tensor_spec import MethodTensor, Modules
from jaxadapt.keymaps.weight import Weight
from jaxadapt.models.foreign.dialect import RANK, Dialect, Dims, layouts

Shape = tuple[int, ...]
Array = Any


@dataclasses.dataclass(frozen=True)
class PackedLayout(FileLayout):
    """An arrangement in an array that may lie flattened in its tree, or serve several keys.

    `packed` is the array's shape there, `shape` with every axis apart. Each of its pieces (over `split`) holds
    `shared` tensors of the file, neighbours in its order.
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
        """Its position in the file's tensors."""
        return self.right.index((RANK,))

    @functools.cached_property
    def _units(self) -> dict[int, FileLayout]:
        return {}

    def unit(self, rank: int) -> FileLayout:
        """What turns one key's tensor, of this rank, into its piece of the array."""
        found = self._units.get(rank)
        if found is None:
            keep = [axis for axis in range(len(self.left)) if axis not in self.split]
            shape = tuple(rank if axis == self.rank else self.shape[axis] for axis in keep)
            left = tuple(self.left[axis] for axis in keep)
            found = self._units[rank] = FileLayout(shape, left, self.right, (), self.factor, self.sizes)
        return found


@dataclasses.dataclass(frozen=True)
class FactorArray(plan.PlanEntry):
    """One array of a site, A or B, its keys, and the PyTorch modules of these."""

    form: PackedLayout
    modules: tuple[str, ...] = ()

    @property
    def shared(self) -> int:
        return self.form.shared

    @property
    def rank(self) -> int:
        return self.shape[self.form.rank]


@dataclasses.dataclass(frozen=True)
class ForeignSite:
    """One site of another library: its base leaf, its two arrays, and what is known of the base's sizes."""

    match: Match
    a: FactorArray
    b: FactorArray
    sizes: tuple[tuple[str, int], ...]

    @property
    def base_shape(self) -> Shape | None:
        """The shape of the base leaf, None where the arrays do not tell it."""
        sizes = dict(self.sizes)
        left = self.match.weight.left
        return tuple(sizes[n] for n in left) if all(n in sizes for n in left) else None


@dataclasses.dataclass(frozen=True)
class ForeignSites:
    """All LoRA sites of a tree, the dialect and the table they were read by, and the tree's base weights.

    `stored` is the alpha of each base leaf, where the tree has it. `real` is the table in which all experts of a layer
    have one name, where `keymap` has one for each (`experts.per_expert_keymap`).
    """

    dialect: Dialect
    keymap: KeyMap
    sites: tuple[ForeignSite, ...]
    base: Mapping[str, Shape]
    stored: Mapping[str, float] = dataclasses.field(default_factory=dict[str, float])
    real: KeyMap | None = None

    @functools.cached_property
    def leaves(self) -> frozenset[str]:
        """The base leaves that the tree adapts."""
        return frozenset(guest.match.leaf for guest in self.sites)

    @functools.cached_property
    def plan(self) -> plan.Plan:
        """The bijection of the arrays and the keys of a file (a shared array is in the file once for each sharer)."""
        return plan.make_plan([half for guest in self.sites for half in (guest.a, guest.b)])

    @functools.cached_property
    def ranks(self) -> dict[str, int]:
        """`{module: rank}` of every PyTorch module that the tree adapts."""
        return {m: guest.a.rank for guest in self.sites for m in guest.a.modules}

    @functools.cached_property
    def alphas(self) -> dict[str, float]:
        """`{module: alpha}` where the dialect or the tree tells it, else nothing."""
        if self.dialect.unscaled:
            return dict(self.ranks)
        held = [(guest, self.stored[leaf]) for guest in self.sites if (leaf := guest.match.leaf) in self.stored]
        return {m: alpha for guest, alpha in held for m in guest.a.modules}

    @functools.cached_property
    def modules(self) -> frozenset[str]:
        """All modules of the base that the table knows, adapted or not; without a base, none."""
        out: set[str] = set()
        for leaf, shape in self.base.items():
            site = self.keymap.match(leaf)
            if site and len(site.weight.left) == len(shape) and site.weight.key.rpartition(".")[2] == "weight":
                out |= set(site.modules(plan.axis_sizes(site, shape)).values())
        return frozenset(out)


def survey_sites(
    dialect: Dialect,
    keymap: KeyMap,
    arrays: Mapping[str, Shape],
    base: Mapping[str, Shape],
    stored: Mapping[str, float] | None = None,
    sizes: Mapping[str, int] | None = None,
) -> ForeignSites:
    """Bind the LoRA arrays of a tree, `{path: shape}`, to a family's table.

    Args:
        base: `{the family's name of a base leaf: shape}`; may be empty, where only the LoRA leaves are at hand.
        stored: `{base leaf: alpha}` where the tree has it.
        sizes: of axes, by the letters of the table's lines, where the base is not at hand.

    Raises one `KeyMapError` with every leaf that the table has no line for, or whose shape no layout of the
    dialect explains.
    """
    out: list[ForeignSite] = []
    problems: list[str] = []
    for leaf, candidates in dialect.claim(arrays).items():
        site = keymap.match(leaf)
        names = sorted({path for a, b, _ in candidates for path in (a, b)})
        if site is None:
            problems.append(f"{', '.join(names)}: the table {keymap.name!r} has no line for {leaf!r}")
            continue
        try:
            hints = hinted_sizes(site.weight, sizes or {})
            out.append(_guest(dialect, keymap, site, candidates, arrays, base.get(leaf), hints))
        except KeyMapError as error:
            problems.append(str(error))
    if problems:
        raise KeyMapError(
            f"these {dialect.name} LoRA leaves have no exact place in a PEFT file:\n"
            + paths.bullets(problems)
            + "\nSay which family the model is with keymap=, or give a KeyMap with a line for each base weight"
        )
    return ForeignSites(dialect, keymap, tuple(out), dict(base), stored or {})


def hinted_sizes(weight: Weight, sizes: Mapping[str, int]) -> dict[str, int]:
    """The sizes of a line's axes, of those whose letters have one; "(c p)" where c and p do."""
    known = {**sizes, **dict(weight.sizes)}
    return {
        axis: math.prod(known[n] for n in axis_parts(axis))
        for axis in weight.left
        if set(axis_parts(axis)) <= set(known)
    }


def _guest(
    dialect: Dialect,
    keymap: KeyMap,
    site: Match,
    candidates: Sequence[tuple[str, str, int]],
    arrays: Mapping[str, Shape],
    base: Shape | None,
    hints: Mapping[str, int],
) -> ForeignSite:
    sizes = {**hints, **{axis: len(site.weight.names(axis) or ()) for axis in site.roles["fused"]}}
    if base is not None:
        sizes = plan.axis_sizes(site, base)
    tried: list[str] = []
    fits: list[ForeignSite] = []
    for path_a, path_b, number in candidates:
        pair = dialect.pairs[number]
        for dims_a, dims_b in layouts(pair, site.weight, dialect.shares):
            known = _solve(((dims_a, arrays[path_a]), (dims_b, arrays[path_b])), sizes)
            tried.append(f"A ({_spell(dims_a)}), B ({_spell(dims_b)})")
            if known is not None:
                a, b = (
                    _half(keymap, site, tensor, path, arrays[path], dims, known)
                    for tensor, path, dims in zip(_tensors(site), (path_a, path_b), (dims_a, dims_b), strict=True)
                )
                fits.append(ForeignSite(site, a, b, tuple(sorted(known.items()))))
    if not fits:
        path_a, path_b, _ = candidates[0]
        shape = "" if base is None else f" beside {site.leaf} {base}"
        raise KeyMapError(
            f"{path_a} {arrays[path_a]} and {path_b} {arrays[path_b]}{shape} with axes"
            f" ({' '.join(site.weight.left)}): expected {' or '.join(tried) or 'another kind of weight'}"
        )
    # Two readings of one shape may mean the same (an axis of size 1); where they do not, nobody can tell.
    different = {(g.a.form, g.b.form) for g in fits}
    if len(different) > 1:
        raise KeyMapError(
            f"{fits[0].a.path} {fits[0].a.form.packed} and {fits[0].b.path} {fits[0].b.form.packed} can be read in"
            f" {len(different)} ways: {' or '.join(tried)}; give the whole tree, with its base weights"
        )
    return fits[0]


def _spell(dims: Dims) -> str:
    return " ".join(f"({' '.join(d)})" if len(d) != 1 else "".join(d).strip("~") for d in dims)


def _solve(pairs: Sequence[tuple[Dims, Shape]], sizes: Mapping[str, int]) -> dict[str, int] | None:
    """All sizes that follow from the arrays' shapes; None if they contradict each other or the base's."""
    known = dict(sizes)
    for _ in range(2):  # what the second array tells may split an axis of the first
        for dims, shape in pairs:
            if len(dims) != len(shape):
                return None
            for dim, size in zip(dims, shape, strict=True):
                open_ = [n for n in dim if n not in known]
                rest = math.prod(known[n] for n in dim if n in known)
                if len(open_) == 1 and rest and size % rest == 0:
                    known[open_[0]] = size // rest
                elif not open_ and rest != size:
                    return None
    return known


def _tensors(site: Match) -> tuple[MethodTensor, MethodTensor]:
    """PEFT's two tensors of a site; the rank is an axis like another here, so any will do."""
    config = LoraConfig(r=1)
    a, b = methods.get_method(config).tensors(config, site, Modules())
    return a, b


def _half(
    keymap: KeyMap, site: Match, tensor: MethodTensor, path: str, packed: Shape, dims: Dims, sizes: Mapping[str, int]
) -> FactorArray:
    right = list(plan.torch_axes(site, tensor))
    left: list[str] = []
    shape: list[int] = []
    for dim, size in zip(dims, packed, strict=True):
        if all(n in sizes for n in dim):
            left += dim
            shape += [sizes[n] for n in dim]
        elif dim in right:  # flattened alike in PyTorch: it can stay one axis, whatever the single sizes are
            right[right.index(dim)] = (" ".join(dim),)
            left.append(" ".join(dim))
            shape.append(size)
        else:
            raise KeyMapError(
                f"{path} {packed} has {' and '.join(dim)} of {site.leaf!r} flattened into one axis, otherwise than"
                " PyTorch does, and their sizes are not known; give the whole tree, with its base weights"
            )
    split = tuple(i for i, n in enumerate(left) if n.startswith("{"))
    missing = [n for n in site.braced if n not in left]
    texts = index_entries(site.weight, [left[i] for i in split] + missing, sizes)
    modules = tuple(site.module(text) for _, text in texts)
    keys = tuple(plan.tensor_key(keymap, site, tensor, text) for _, text in texts)
    try:
        factor = plan.scale_factor(keymap, site, tensor, sizes)
    except KeyError as error:
        raise KeyMapError(
            f"{path}: PyTorch's {site.leaf!r} is scaled by the size of an axis that its LoRA leaves do not tell; give"
            " the whole tree, with its base weights"
        ) from error
    shared = math.prod(sizes[n] for n in missing)
    form = PackedLayout(
        tuple(shape), tuple(left), tuple(right), split, factor, site.weight.sizes, packed=packed, shared=shared
    )
    return FactorArray(path, form, keys, modules)
