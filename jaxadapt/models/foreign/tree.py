"""Foreign trees: `read_tree` converts their LoRA leaves to PEFT's tensors, and `fill_tree` writes such tensors.

The paths and layouts are in the dialects' files, the sites in `survey.py`, arrays of heads and of slots in `forms.py`,
access to the trees in `models/trees.py`.
"""

from __future__ import annotations

import dataclasses
import functools
import numbers
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxadapt.adapters import experts, selection
from jaxadapt.adapters.adapter import Adapter, is_array, make_file_plan
from jaxadapt.adapters.peft_tensors import PeftTensors
from jaxadapt.adapters.sites import expert_parameters, sites_of
from jaxadapt.arrays import regions
from jaxadapt.arrays.layout import Array, with_rank
from jaxadapt.arrays.tensor_source import as_source, bitwise_same
from jaxadapt.configs import matching
from jaxadapt.configs.base import Config
from jaxadapt.configs.lora import LoraConfig, require_original_base
from jaxadapt.core.errors import AttachError, KeyMapError, MismatchError, raise_listed, warn
from jaxadapt.core.paths import Spec, bullets, compare, group_findings, unflatten
from jaxadapt.keymaps import families
from jaxadapt.keymaps.keymap import PEFT_PREFIX, KeyMap, warn_unproved
from jaxadapt.models import graph, planning
from jaxadapt.models.foreign import DIALECTS, Claim, Dialect, forms, like_pattern, recognize_dialect, survey
from jaxadapt.models.trees import Leaves, Put, may_have_path, open_tree

# ---------------------------------------------------------------- fill


Placed = dict[int, tuple[Array, slice, float]]
"""The content of an array: `{number of a key: (tensor, its rows on the rank's axis, factor)}`."""


class Placement(NamedTuple):
    """The places of a file's tensors in the arrays of a tree.

    Attributes:
        placed: `{path of an array: (the array, its content)}`.
        differ: the arrays whose tensors differ, so that they are concatenated along the rank's axis.
    """

    placed: dict[str, tuple[survey.FactorArray, Placed]]
    differ: list[str]

    @property
    def need(self) -> dict[str, int]:
        """The rank that each array needs: 0 if the file has no tensor for it."""
        return {
            path: max((rows.stop for _, rows, _ in content.values()), default=0)
            for path, (_, content) in self.placed.items()
        }


def place_tensors(
    sites: survey.ForeignSites, tensors: Mapping[str, Array], ratios: Mapping[str, float], same: Any
) -> Placement:
    """Place a file's tensors in the arrays of a tree; equal tensors that share an array get the same rows.

    Args:
        tensors: `{key: array}`, with shapes that `check_tensors` accepts.
        ratios: `{module: the file's scale / the tree's scale}` of the modules that the file adapts.
        same: `(a, b) -> bool`, True if two tensors are bitwise equal.
    """
    rows: dict[str, slice] = {}
    found = Placement({}, [])
    for site in sites.sites:
        for half in sorted((site.a, site.b), key=lambda half: -half.shared):
            contents = Placed()
            for first in range(half.form.count):
                sharers = [i for i in range(first, len(half.keys), half.form.count) if half.modules[i] in ratios]
                groups = _group_equal([tensors[half.keys[i]] for i in sharers], same)
                if len(set(groups)) > 1:
                    names = [half.modules[i] for i in sharers]
                    more = ", …" if len(names) > 4 else ""
                    found.differ.append(f"{half.path} is shared by {', '.join(names[:4])}{more}")
                ends: dict[int, int] = {}
                end = 0
                for i, group in zip(sharers, groups, strict=True):
                    tensor, module = tensors[half.keys[i]], half.modules[i]
                    rank = int(tensor.shape[half.form.file_rank])
                    if half.shared > 1 or module not in rows:  # else its shared partner has set the rows
                        if group not in ends:
                            end += rank
                            ends[group] = end
                        own = slice(ends[group] - rank, ends[group])
                        if rows.setdefault(module, own) != own:
                            found.differ.append(f"{half.path} and its partner are both shared by several modules")
                    contents[i] = tensor, rows[module], ratios[module] if half is site.b else 1.0
            found.placed[half.path] = half, contents
    return found


def _group_equal(tensors: Sequence[Array], same: Any) -> list[int]:
    """Return for each tensor the number of the first that is equal."""
    groups: list[int] = []
    for i, tensor in enumerate(tensors):
        groups.append(next((first for first in dict.fromkeys(groups) if same(tensors[first], tensor)), i))
    return groups


def check_tensors(
    sites: survey.ForeignSites, modules: Collection[str], shapes: Mapping[str, Sequence[int]], source: str
) -> None:
    """Raise one `MismatchError` unless a file has the tensors of `modules`, with the expected shapes but for the rank.

    Tensors of other modules may be missing: their B becomes zero.
    """
    expected = {
        key: Spec(tuple(None if axis == half.form.file_rank else n for axis, n in enumerate(half.form.file_shape)))
        for half in sites.arrays
        for key in half.keys
    }
    optional = {
        key
        for half in sites.arrays
        for key, module in zip(half.keys, half.modules, strict=True)
        if module not in modules
    }
    parts = group_findings(
        compare(expected, {key: Spec(tuple(shape)) for key, shape in shapes.items()}, optional),
        f"missing from {source} (its configuration names their modules)",
        f"unexpected (no {sites.dialect.name} parameter matches them)",
    )
    if parts:
        raise MismatchError(
            f"{source} does not match the {sites.dialect.name} parameters of the target:\n"
            + "\n".join(parts)
            + "\nCheck that the adapter is for this base model, that the target adapts the same layers, and keymap="
        )


# ---------------------------------------------------------------- build


def choose_dtypes(
    leaves: Mapping[str, Any], placed: Mapping[str, tuple[survey.FactorArray, Placed]], dtype: Any, source: str
) -> dict[str, Any]:
    """Return each array's dtype: `dtype`, or the tree's own, which must represent the file's numbers exactly."""
    dtypes = {path: np.dtype(leaves[path].dtype if dtype is None else dtype) for path in placed}
    raise_listed(
        MismatchError,
        f"{source}: the dtypes of the target's LoRA parameters cannot represent these tensors exactly. Pass dtype= to"
        " choose one, with rounding if necessary:",
        [
            f"{path}: {dtypes[path].name}, in the file {stored.name}"
            for path, (_, contents) in placed.items()
            for stored in {np.dtype(tensor.dtype) for tensor, _, _ in contents.values()}
            if dtype is None and not _is_exact(stored, dtypes[path])
        ],
    )
    return dtypes


def _is_exact(stored: np.dtype, own: np.dtype) -> bool:
    """Return True if a dtype represents the numbers of a file's dtype exactly; JAX promotes no 8-bit floats."""
    return own == stored or (own.itemsize > 1 and (stored.itemsize == 1 or jnp.promote_types(stored, own) == own))


def build_array(half: survey.FactorArray, contents: Placed, current: Any, keep: bool, dtype: Any, traced: bool) -> Any:
    """Build the new array in the tree's shape; rows without a tensor are zero, or unchanged if `keep`."""
    xp: Any = jnp if traced else np
    keep = keep and is_array(current) and not isinstance(current, jax.ShapeDtypeStruct)
    out = xp.array(current, dtype).reshape(half.shape) if keep else xp.zeros(half.shape, dtype)
    pieces = dict[tuple[int, int], tuple[Array, slice, float]]()
    for i, content in contents.items():  # one for each place: the modules that share it have the same tensor
        pieces.setdefault((half.tensor_number(i), content[1].start), content)
    for (number, _), (tensor, rows, factor) in pieces.items():
        piece = with_rank(half.form, rows.stop - rows.start).single_layout.decode(
            tensor if traced else np.asarray(tensor)
        )
        if factor != 1.0:  # at most one rounding
            wide = np.dtype(np.float32 if traced else np.float64)
            piece = piece.astype(wide) * wide.type(factor)
        index = list(half.form.index(number))
        index[half.form.rank_axis] = rows
        if traced:
            out = out.at[tuple(index)].set(piece.astype(dtype))
        else:
            out[tuple(index)] = piece.astype(dtype)
    return out.reshape(half.form.packed)


def place_like(leaf: Any, value: Any) -> Any:
    """Place the value on the leaf's devices, if it has any."""
    if regions.is_traced(value):
        return value
    placed = isinstance(leaf, jax.Array | jax.ShapeDtypeStruct) and not regions.is_traced(leaf)
    return jax.device_put(value, leaf.sharding if placed else None)


# ---------------------------------------------------------------- tree


_NEARLY = re.compile(r"(?<![a-z])lora", re.IGNORECASE)
"""Paths that may be LoRA leaves, also under names that no dialect has."""


@dataclasses.dataclass(frozen=True)
class LoraTree:
    """A tree that has LoRA or gets it, and the facts about it that the tree does not tell.

    `save`, `load`, `to_peft`, `from_peft`, `extract`, `inject` and checkpoints take it as they take the tree. Functions
    that fill a tree return the tree itself.

    Args:
        tree: a tree with the LoRA leaves of another library, or any model or tree that `load` or `save` takes.
        config: the configuration, if the tree has lost it or is another library's; for `save`, `to_peft`, `extract` and
            checkpoints that are saved.
        lora_alpha: the alpha by which another library's tree scales, if the tree does not store one (Qwix, keras, …).
        on_shared: "concat" concatenates different As along the rank: where PyTorch has one A for several weights of the
            tree (the heads of keras and openpi; queries, keys and values of an `nn.MultiheadAttention`), and where the
            tree has one A for several modules of the file. By default they are refused.
        slot: the number, from 0, of one adapter of a tree whose arrays hold several (SkyRL-tx). `load` and `inject`
            change only that slot, and set its rank and scale.
        stack_axes, example: for `load` and `from_peft` into an NNX model with custom or scanned layers, as in
            `jaxadapt.adapt`.

    Raises `MismatchError` for any other `on_shared`. Functions that take the value raise `AttachError` for options that
    its tree does not need, and `MismatchError` if the slot does not exist or is empty.

    >>> import jaxadapt
    >>> tree = {"q": {"kernel": np.ones((4, 6)), "kernel_lora_a": np.ones((4, 2)), "kernel_lora_b": np.ones((2, 6))}}
    >>> jaxadapt.to_peft(LoraTree(tree, lora_alpha=4)).config
    LoraConfig(r=2, target_modules=['q'], lora_alpha=4)
    >>> tree = {"q_proj": {"kernel": np.ones((4, 6)), "lora_A": np.zeros((3, 4, 8)), "lora_B": np.zeros((3, 8, 6)),
    ...                    "lora_ranks": np.array([8, 2, 0]), "lora_scaling": np.ones(3, "float32")}}
    >>> {key: x.shape for key, x in jaxadapt.to_peft(LoraTree(tree, slot=1)).tensors.items()}
    {'base_model.model.q_proj.lora_A.weight': (2, 4), 'base_model.model.q_proj.lora_B.weight': (6, 2)}
    """

    tree: Any
    _: dataclasses.KW_ONLY
    config: Config | None = None
    lora_alpha: float | None = None
    on_shared: str | None = None
    slot: int | None = None
    stack_axes: Sequence[int] | None = None
    example: Sequence[Any] | None = None

    def __post_init__(self) -> None:
        if self.on_shared not in (None, "concat"):
            raise MismatchError(f'on_shared: expected None or "concat", found {self.on_shared!r}')

    @classmethod
    def of(cls, tree: Any) -> LoraTree:
        """Return a tree as a `LoraTree`, without options unless it is one."""
        return tree if isinstance(tree, cls) else cls(tree)


@dataclasses.dataclass(frozen=True)
class ForeignTree:
    """A tree with LoRA leaves of a known dialect: the leaves, a function that replaces them, and the base's shapes.

    Attributes:
        arrays: the arrays of the base, if they are in the tree.
        stored: the alpha or scale of each base leaf, if the tree has it as a number and not as an array.
        sizes: the axis sizes that the caller passed.
        walked: the walk over an NNX model.
        unread: why the scales of other base leaves cannot be read.
        growth: the rank of each base leaf over that in the tree, where heads are concatenated.
    """

    given: LoraTree
    dialect: Dialect
    leaves: Leaves
    put: Put
    base: dict[str, tuple[int, ...]]
    stored: dict[str, Any]
    sizes: Mapping[str, int] = dataclasses.field(default_factory=dict[str, int])
    arrays: Leaves = dataclasses.field(default_factory=dict[str, Any])
    walked: graph.ModelWalk | None = None
    unread: Sequence[str] = ()
    growth: Mapping[str, float] = dataclasses.field(default_factory=dict[str, float])

    @functools.cached_property
    def claimed(self) -> dict[str, list[Claim]]:
        """`{base leaf: its claims}`."""
        return self.dialect.claim(self.leaves)


def find_lora(given: LoraTree, walked: graph.ModelWalk | None = None) -> ForeignTree | None:
    """Return the foreign tree in a tree; None if it has no LoRA leaves of a known dialect.

    `walked`: the walk over an NNX model, if the tree is one. Raises `KeyMapError` if a dialect matches only some of
    the LoRA leaves, and `AttachError` for a slot of a tree whose arrays hold one adapter.
    """
    if isinstance(given.tree, ForeignTree):
        return dataclasses.replace(given.tree, given=dataclasses.replace(given, tree=given.tree.given.tree))
    tree = given.tree if walked is None else walked
    if not may_have_path(tree, like_pattern().search):
        return None
    leaves, put = open_tree(tree)
    leaves = {path: leaf for path, leaf in leaves.items() if "opt_state" not in path.split(".")}
    dialect = recognize_dialect(leaves)
    if dialect is None:
        return None
    lora = dialect.owned(leaves)
    arrays = {path: leaf for path, leaf in leaves.items() if not isinstance(leaf, numbers.Real)}
    base = {dialect.base(path): leaf for path, leaf in arrays.items() if path not in lora}
    own = {path: leaf for path, leaf in arrays.items() if path in lora}
    stored, _ = forms.read_stored(dialect, own, {path: leaves[path] for path in leaves.keys() - arrays.keys()})
    return ForeignTree(
        given,
        dialect,
        own,
        put,
        {path: tuple(leaf.shape) for path, leaf in base.items()},
        stored,
        arrays=base,
        walked=walked,
    )


def _select_slot(foreign_tree: ForeignTree, room: bool = False) -> ForeignTree:
    """Return the tree with only the arrays of its slot, if there are slots, and with the numbers that it stores."""
    dialect, slot = foreign_tree.dialect, foreign_tree.given.slot
    if dialect.has_slots and slot is None:
        raise AttachError(
            f"cannot select an adapter: each array of this {dialect.name} tree holds several. Pass"
            " jaxadapt.models.LoraTree(tree, slot=0) instead of tree"
        )
    if slot is not None and not dialect.has_slots:
        raise AttachError(
            f"slot={slot}: expected a tree whose arrays hold several adapters, found {dialect.name} parameters, which"
            " hold one adapter"
        )
    leaves = foreign_tree.leaves
    leaves = leaves if slot is None else forms.slot_arrays(dialect, leaves, slot, room)
    beside, unread = forms.read_stored(dialect, leaves, leaves, foreign_tree.stored)
    return dataclasses.replace(foreign_tree, leaves=leaves, stored={**beside, **foreign_tree.stored}, unread=unread)


def describe_unknown(tree: Any) -> str:
    """Return a message about leaves that look like LoRA leaves but match no dialect; "" if there are none."""
    if not (like := [path for path in open_tree(tree)[0] if _NEARLY.search(path)]):
        return ""
    return f"\nThese parameters look like LoRA, but match no known dialect ({', '.join(DIALECTS)}):\n{bullets(like)}"


def survey_tree(
    foreign_tree: ForeignTree, keymap: KeyMap | str | None, keys: Collection[str] = ()
) -> survey.ForeignSites:
    """Bind the tree's LoRA leaves to a keymap (default: the recognized family), in the spelling of a file's `keys`."""
    leaves = foreign_tree.claimed
    bound_keymap = real = _resolve_keymap(foreign_tree, keymap).spelling_for(
        [key.removeprefix(PEFT_PREFIX) for key in keys], leaves
    )
    if any(match.weight.by_parameter for leaf in leaves if (match := bound_keymap.match(leaf)) is not None):
        bound_keymap = experts.per_expert_keymap(bound_keymap)
    if foreign_tree.walked is not None:
        owners = foreign_tree.walked.leaves
        shapes = {leaf: tuple(x.shape) for leaf, x in graph.base_values(owners).items()}
        bound_keymap = bound_keymap.with_entries(
            entry for entry in planning.class_entries(owners, shapes, bound_keymap) if entry.leaf in leaves
        )
    shapes = {path: tuple(leaf.shape) for path, leaf in foreign_tree.leaves.items()}
    known = survey.survey_sites(
        foreign_tree.dialect,
        bound_keymap,
        shapes,
        foreign_tree.base,
        foreign_tree.stored,
        foreign_tree.sizes,
        foreign_tree.growth,
    )
    return dataclasses.replace(known, real=None if bound_keymap is real else real, unread=foreign_tree.unread)


def _resolve_keymap(foreign_tree: ForeignTree, keymap: KeyMap | str | None) -> KeyMap:
    if isinstance(keymap, KeyMap) or keymap not in (None, "auto"):
        return families.resolve_keymap(keymap, {})
    leaves = list(foreign_tree.claimed)
    has_base = any(leaf in foreign_tree.base for leaf in leaves)  # else the tree has only LoRA leaves
    return (
        families.resolve_keymap(keymap, foreign_tree.base, model=type(foreign_tree.given.tree))
        if has_base
        else families.family_of_leaves(leaves)
    )


def _find_heads(foreign_tree: ForeignTree, keymap: KeyMap | str | None) -> list[forms.HeadPair]:
    """Return the pairs of leaves with head axes."""
    dialect = foreign_tree.dialect
    return (
        forms.find_heads(dialect, _resolve_keymap(foreign_tree, keymap), foreign_tree.leaves) if dialect.heads else []
    )


def _with_leaves(foreign_tree: ForeignTree, new: Leaves) -> ForeignTree:
    """Return the tree with leaves of other ranks."""
    growth = {
        leaf: new[claim.a].shape[-1] / foreign_tree.leaves[claim.a].shape[-1]
        for leaf, (claim, *_) in foreign_tree.claimed.items()
    }
    return dataclasses.replace(foreign_tree, leaves=new, growth=growth)


# ---------------------------------------------------------------- export


def read_tree(
    foreign_tree: ForeignTree, keymap: KeyMap | str | None, parts: bool = False
) -> tuple[PeftTensors, survey.ForeignSites]:
    """Convert the tree's LoRA to PEFT's tensors and configuration; return them and its sites.

    Tensors are computed on access, those of experts at once. `parts`: keep gate and up separate if they are two leaves.
    """
    foreign_tree = _select_slot(foreign_tree)
    if pairs := _find_heads(foreign_tree, keymap):
        foreign_tree = _with_leaves(
            foreign_tree,
            forms.widen_leaves(
                foreign_tree.dialect, pairs, foreign_tree.leaves, foreign_tree.given.on_shared == "concat"
            ),
        )
    sites = survey_tree(foreign_tree, keymap)
    config = survey.infer_config(sites, foreign_tree.given.config, foreign_tree.given.lora_alpha)
    warn_unproved(sites.keymap)
    host = not regions.is_traced(*foreign_tree.leaves.values())
    peft = PeftTensors(config, sites.plan.encode(foreign_tree.leaves, host), f"this {foreign_tree.dialect.name} tree")
    if sites.real is None:
        return peft, sites
    parts = parts or sites.real.per_expert
    adapted = {site.match.leaf for site in sites.sites}
    unadapted = {leaf: shape for leaf, shape in sites.base.items() if leaf not in adapted}
    others = expert_parameters(sites.real, unadapted, ("experts", "parameter")) if sites.base else None
    peft = experts.fuse_experts(peft, sites.keymap, foreign_tree.given.on_shared, sites.real, others, parts)
    if sites.real.per_expert:
        peft = PeftTensors(*experts.split_experts(peft.config, peft.tensors, sites.real), peft.source)
    return peft, sites


def extract_adapter(foreign_tree: ForeignTree, keymap: KeyMap | str | None) -> Adapter:
    """Return the tree's LoRA as an `Adapter`, with one A for each fused part and all axes separate."""
    peft, sites = read_tree(foreign_tree, keymap, parts=True)
    raise_listed(
        KeyMapError,
        "cannot extract the adapter: the shapes of these weights do not follow from their LoRA parameters. Pass the"
        " whole tree, or call to_peft, which does not need the shapes:",
        [site.match.leaf for site in sites.sites if site.base_shape is None],
    )
    shapes = {site.match.leaf: site.base_shape for site in sites.sites if site.base_shape is not None}
    leaves = make_file_plan(selection.select_sites(peft.config, sites.own_keymap, shapes)).decode(peft.tensors)
    return Adapter(peft.config, unflatten(leaves), sites.own_keymap)


# ---------------------------------------------------------------- import


def fill_tree(
    foreign_tree: ForeignTree, tensors: PeftTensors, keymap: KeyMap | str | None = None, dtype: Any = None
) -> Any:
    """Write PEFT's tensors into the LoRA leaves of a tree (NNX in place). On an error nothing is changed.

    If the tensors adapt fewer modules than the tree, or have a smaller rank, the rest of B is zero and the rest of A is
    unchanged.
    """
    require_original_base(tensors.config, tensors.source)
    given = foreign_tree.given
    room = _select_slot(foreign_tree, room=True)
    if pairs := _find_heads(room, keymap):
        room = _with_leaves(room, forms.reserve_rank(pairs, room.leaves, as_source(tensors.tensors).specs))
    sites = survey_tree(room, keymap, tensors.tensors)
    if sites.real is not None:
        fused = experts.fuse_experts(tensors, sites.real, given.on_shared)
        tensors = PeftTensors(
            *experts.split_experts(fused.config, fused.tensors, sites.keymap, sites.real), tensors.source
        )
    if given.slot is not None and isinstance(tensors.config, LoraConfig):  # `scale_ratios` refuses other methods
        sites = _with_scales(foreign_tree, sites, tensors.config)
    ratios = survey.scale_ratios(sites, tensors.config, given.lora_alpha)
    shapes = as_source(tensors.tensors).shapes
    check_tensors(sites, ratios, shapes, tensors.source)
    values = {key: tensors.tensors[key] for half in sites.arrays for key in half.keys if key in shapes}
    placed, new = _build_arrays(room, sites, values, ratios, dtype, tensors.source)
    if pairs:
        new |= forms.narrow_leaves(foreign_tree.dialect, pairs, foreign_tree.leaves, new, given.on_shared == "concat")
    new = {path: place_like(foreign_tree.leaves[path], x) for path, x in new.items()}
    if given.slot is not None:
        used = {  # the ranks and scales of the modules that the file adapts
            site.a.path: (max(rows.stop for _, rows, _ in contents.values()), (site.alpha or 0.0) / site.a.rank)
            for site in sites.sites
            if (contents := placed[site.a.path][1])
        }
        new = forms.with_slot(foreign_tree.dialect, foreign_tree.leaves, given.slot, new, used)
    return foreign_tree.put(new)


def inject_adapter(foreign_tree: ForeignTree, adapter: Adapter) -> Any:
    """Write an `Adapter` into the LoRA leaves of a tree, by the adapter's keymap if it has entries for all of them."""
    leaves = adapter.flat()
    tensors = make_file_plan(sites_of(adapter)).encode(leaves, host=not regions.is_traced(*leaves.values()))
    return fill_tree(
        foreign_tree,
        PeftTensors(adapter.config, tensors, "this adapter"),
        adapter.keymap if all(map(adapter.keymap.match, foreign_tree.claimed)) else None,
    )


def _is_traced(sites: survey.ForeignSites, arrays: Sequence[Array], on_shared: str | None) -> bool:
    """Return True inside jit; raise `MismatchError` if tensors must be compared there."""
    traced = regions.is_traced(*arrays)
    if traced and on_shared is None and any(half.shared > 1 for half in sites.arrays):
        raise MismatchError(
            'cannot compare the shared A tensors inside jit. Pass jaxadapt.models.LoraTree(tree, on_shared="concat")'
            f" instead of the tree, or fill the {sites.dialect.name} tree outside jit"
        )
    return traced


def _build_arrays(
    room: ForeignTree,
    sites: survey.ForeignSites,
    values: Mapping[str, Array],
    ratios: Mapping[str, float],
    dtype: Any,
    source: str,
) -> tuple[dict[str, tuple[survey.FactorArray, Placed]], dict[str, Array]]:
    """Return the content of each array, and the arrays, `{path: array}`; warn of rounding and of NaN and infinity.

    `values` are the file's tensors by key, and `ratios` the factors of each module's B.
    """
    on_shared = room.given.on_shared
    traced = _is_traced(sites, [*values.values(), *room.leaves.values()], on_shared)
    found = place_tensors(sites, values, ratios, (lambda a, b: a is b) if traced else bitwise_same)
    raise_listed(
        MismatchError,
        f"cannot fill these {sites.dialect.name} parameters: several tensors of the file share each, but differ:",
        [] if on_shared == "concat" else dict.fromkeys(found.differ),
        "\nTrain the modules with one A, or build the target with a larger rank and pass"
        ' jaxadapt.models.LoraTree(target, on_shared="concat"), which concatenates the tensors',
    )
    placed, need = found.placed, found.need
    forms.require_rank({half.path: (half.rank, need[half.path]) for half in sites.arrays})
    # Where the file has no rows B is zero, so A can keep its values, which makes it trainable; but not beside a shared
    # B. Nor in a slot, where rows beyond the used rank must be zero.
    kept = {site.a.path for site in sites.sites if site.b.shared == 1 and room.given.slot is None}
    dtypes = choose_dtypes(room.leaves, placed, dtype, source)
    rounded = next((f for f in ratios.values() if np.frexp(f)[0] != 0.5), None)  # no power of two
    if rounded is not None:
        warn(
            f"{source}: its scale is {rounded:g} times that of the {sites.dialect.name} tree, not a power of two: B is"
            " multiplied by it and rounded once"
        )
    with np.errstate(over="ignore"):  # `explain_not_finite` names the tensors
        new = {
            path: build_array(half, contents, room.leaves[path], path in kept, dtypes[path], traced)
            for path, (half, contents) in placed.items()
        }
    not_finite = [
        (
            [key for key in placed[path][0].keys if key in values],
            dtypes[path],
            0 if path in kept else regions.count_not_finite(new[path]),
        )
        for path in regions.names_not_finite(new)
    ]
    regions.explain_not_finite(not_finite, lambda key: np.asarray(values[key]), source)
    return placed, new


def needed_rank(
    foreign_tree: ForeignTree, keymap: KeyMap | str | None, tensors: Mapping[str, Any], modules: Collection[str]
) -> int:
    """Return the rank that a tree needs for a file's tensors if differing tensors are concatenated."""
    pairs = _find_heads(foreign_tree, keymap)
    wide = forms.reserve_rank(pairs, foreign_tree.leaves, as_source(tensors).specs)
    sites = survey_tree(dataclasses.replace(foreign_tree, leaves=wide), keymap)
    found = place_tensors(sites, tensors, dict.fromkeys(modules, 1.0), bitwise_same)
    needed = found.need
    for pair in pairs:
        filled = (build_array(*found.placed[at], wide[at], False, wide[at].dtype, False) for at in (pair.a, pair.b))
        needed[pair.a] = needed[pair.b] = pair.narrow(*filled)[0].shape[-1]
    return max(needed.values())


def _with_scales(tree: ForeignTree, sites: survey.ForeignSites, config: LoraConfig) -> survey.ForeignSites:
    """Return the sites with the scales that a slot takes: the file's, rounded to the dtype of the tree's, or 0."""
    out: list[survey.ForeignSite] = []
    for site in sites.sites:
        adapted = (config.scale_of(m) for m in site.a.modules if matching.is_target(config, m))
        dtype = tree.leaves[tree.claimed[site.match.leaf][0].scale].dtype
        out.append(dataclasses.replace(site, alpha=float(np.asarray(next(adapted, 0.0), dtype)) * site.a.rank))
    return dataclasses.replace(sites, sites=tuple(out))
