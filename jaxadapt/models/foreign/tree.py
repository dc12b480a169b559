"""Trees of other libraries: their LoRA leaves out as PEFT's tensors, and a file's tensors in.

What lies where is `dialects/`; what the arrays hold, `guests.py`; the trees themselves, `trees.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxadapt import methods
from jaxadapt.adapters import experts, selection, sites
from jaxadapt.adapters.adapter import Adapter, is_array
from jaxadapt.adapters.peft_tensors import PeftTensors
from jaxadapt.configs import Config, LoraConfig, lora_variants, matching
from jaxadapt.core import paths
from jaxadapt.core.errors import AttachError, KeyMapError, MismatchError, warn
from jaxadapt.keymaps import families
from jaxadapt.keymaps.keymap import PEFT_PREFIX, KeyMap, warn_unproved
from jaxadapt.keymaps.plan import Encoded
from jaxadapt.models import trees
from jaxadapt.models.foreign import config as guest_config
from jaxadapt.models.foreign import dialects, fill, per_head, slots
from jaxadapt.models.foreign import survey as guests
from jaxadapt.models.foreign.dialect import Dialect, is_like
from jaxadapt.models.foreign.fill import Placed
from jaxadapt.models.foreign.survey import FactorArray, ForeignSites
from jaxadapt.models.linen import collections
from jaxadapt.models.nnx import attach
from jaxadapt.models.nnx import survey as nnx_survey
from jaxadapt.models.trees import Leaves, Put


@dataclasses.dataclass(frozen=True)
class ForeignTree:
    """A tree with LoRA leaves of a known dialect: the leaves, how to put others there, and the base's shapes.

    `stored` is the alpha of each base leaf, where the tree has it; `sizes` are those of axes that somebody gave; `slot`
    is the one that is meant where the arrays hold several adapters.
    """

    tree: Any
    dialect: Dialect
    leaves: Leaves
    put: Put
    base: dict[str, tuple[int, ...]]
    stored: dict[str, float]
    sizes: Mapping[str, int] = dataclasses.field(default_factory=dict[str, int])
    slot: int | None = None

    @property
    def arrays(self) -> dict[str, tuple[int, ...]]:
        return {path: tuple(leaf.shape) for path, leaf in self.leaves.items()}


def find_lora(tree: Any) -> ForeignTree | None:
    """The LoRA leaves of another library in a tree; None if it has none that a dialect knows.

    Raises `KeyMapError` where a dialect knows some of them and not all.
    """
    if not trees.may_have_path(tree, is_like):
        return None
    leaves, put = trees.open_tree(tree)
    leaves = {path: leaf for path, leaf in leaves.items() if not collections.is_moment(path)}
    if not any(map(is_like, leaves)) or not any(
        d.claim(leaves) and _has_slots(d, leaves) for d in dialects.DIALECTS.values()
    ):
        return None  # (an adapter of ours that has lost its configuration is named like one slot)
    dialect = dialects.recognize_dialect(leaves)
    assert dialect is not None
    mine = dialect.owned(leaves)
    if not _has_slots(dialect, mine):
        return None
    base = {dialect.base(path): tuple(leaf.shape) for path, leaf in leaves.items() if path not in mine}
    return ForeignTree(
        tree, dialect, {p: leaf for p, leaf in leaves.items() if p in mine}, put, base, trees.lorax_alphas(tree)
    )


def _has_slots(dialect: Dialect, leaves: Collection[str]) -> bool:
    return not dialect.slots or any(path.endswith(dialect.slots) for path in leaves)


def slot(tree: Any, number: int) -> ForeignTree:
    """One adapter of a tree whose arrays hold several (SkyRL-tx): what `save`, `load`, `to_peft` … take in its place.

    Args:
        tree: the model, its state, or any pytree with its LoRA leaves, their ranks and scales.
        number: of the slot, from 0.

    `load` and `inject` change that slot alone, set its rank and scale, and return the tree (NNX in place). Raises
    `AttachError` for any other tree, and what uses it `MismatchError` where there is no such slot, or it is empty.

    >>> tree = {"q_proj": {"kernel": np.ones((4, 6)), "lora_A": np.zeros((3, 4, 8)), "lora_B": np.zeros((3, 8, 6)),
    ...                    "lora_ranks": np.array([8, 2, 0]), "lora_scaling": np.ones(3, "float32")}}
    >>> import jaxadapt
    >>> {key: x.shape for key, x in jaxadapt.to_peft(slot(tree, 1)).tensors.items()}
    {'base_model.model.q_proj.lora_A.weight': (2, 4), 'base_model.model.q_proj.lora_B.weight': (6, 2)}
    """
    found = find_lora(tree)
    if found is None or not found.dialect.slots:
        what = "no LoRA leaves" if found is None else f"{found.dialect.name} leaves, each for one adapter"
        raise AttachError(f"expected a tree whose arrays hold several adapters, found {what}")
    return dataclasses.replace(found, slot=number)


def _of_slot(found: ForeignTree, room: bool = False) -> ForeignTree:
    """The tree with the arrays of its slot alone; itself, where there are no slots."""
    if not found.dialect.slots:
        return found
    if found.slot is None:
        raise AttachError(
            f"each array of this {found.dialect.name} tree holds several adapters; say which one:"
            " jaxadapt.models.slot(tree, 0) in the place of tree"
        )
    leaves, stored = slots.slot_arrays(found.dialect, found.leaves, found.slot, room)
    return dataclasses.replace(found, leaves=leaves, stored=stored)


def describe_unknown(tree: Any) -> str:
    """What to say of LoRA-like leaves that no dialect knows; "" if there are none."""
    like = [path for path in trees.open_tree(tree)[0] if is_like(path)]
    if not like:
        return ""
    known = ", ".join(dialects.DIALECTS)
    return f"\nIts leaves that look like a LoRA's are of no known dialect ({known}):\n{paths.bullets(like)}"


def survey_tree(found: ForeignTree, keymap: KeyMap | str | None, keys: Collection[str] = ()) -> ForeignSites:
    """The tree's LoRA leaves under a family's table (recognised, without `keymap`), spelt as in a file's `keys`."""
    leaves = found.dialect.claim(found.leaves)
    table = real = _table(found, keymap).spelling_for([key.removeprefix(PEFT_PREFIX) for key in keys], leaves)
    if any(site.weight.kind in ("experts", "parameter") for leaf in leaves if (site := table.match(leaf)) is not None):
        table = experts.per_expert_keymap(table)
    if isinstance(found.tree, attach.nnx.Module):
        claimed = found.dialect.claim(found.leaves)
        lines = nnx_survey.class_entries(nnx_survey.base_leaves(found.tree), table)
        table = table.with_entries(line for line in lines if line.leaf in claimed)
    known = guests.survey_sites(found.dialect, table, found.arrays, found.base, found.stored, found.sizes)
    return known if table is real else dataclasses.replace(known, real=real)


def _table(found: ForeignTree, keymap: KeyMap | str | None) -> KeyMap:
    if isinstance(keymap, KeyMap) or keymap not in (None, "auto"):
        return families.resolve_keymap(keymap, {})
    leaves = list(found.dialect.claim(found.leaves))
    if any(leaf in found.base for leaf in leaves):
        return families.resolve_keymap(keymap, found.base)
    return families.family_of_leaves(leaves)  # only the LoRA leaves are at hand


def _with_heads(found: ForeignTree, keymap: KeyMap | str | None) -> per_head.Several:
    """The leaves whose A has heads that their B has not."""
    return (
        per_head.per_head_leaves(found.dialect, _table(found, keymap), found.leaves) if found.dialect.per_head else {}
    )


# ---------------------------------------------------------------- out


def tree_to_peft(
    found: ForeignTree,
    config: Config | None,
    keymap: KeyMap | str | None,
    lora_alpha: float | None,
    call: str,
    dtype: Any = None,
    on_shared: str | None = None,
    parts: bool = False,
) -> tuple[LoraConfig, ForeignSites, Mapping[str, Any]]:
    """The tree's LoRA as PEFT's tensors, each made when it is asked for, with the configuration that goes with them.

    Those of experts are made at once. `parts`: where gate and up are two leaves they stay apart.
    """
    found = _of_slot(found)
    if several := _with_heads(found, keymap):
        if lora_alpha is None and config is None:
            raise guest_config.missing_alpha(found.dialect, call)
        said = guest_config.resolve_alpha(config, lora_alpha)
        given = LoraConfig().lora_alpha if said is None else said  # which a configuration then says
        leaves = per_head.widen_leaves(found.dialect, several, found.leaves, on_shared)
        stored = per_head.rescaled_alphas(found.dialect, found.leaves, leaves, given)
        found, lora_alpha = dataclasses.replace(found, leaves=leaves, stored=stored), None
        config = None if config is None else config.replace(lora_alpha=LoraConfig().lora_alpha)
    known = survey_tree(found, keymap)
    warn_unproved(known.keymap)
    config = guest_config.infer_config(known, config, lora_alpha, call)
    host = not any(isinstance(leaf, Tracer) for leaf in found.leaves.values())
    tensors = known.plan.encode(found.leaves, dtype, host)
    if known.real is None:
        return config, known, tensors
    held = PeftTensors(config, tensors, f"this {found.dialect.name} tree")
    parts = parts or known.real.single
    left = {leaf: shape for leaf, shape in known.base.items() if leaf not in known.leaves}
    others = experts.expert_parameters(known.real, left)
    held = experts.fuse_experts(held, known.keymap, on_shared, call, known.real, others if known.base else None, parts)
    if known.real.single:
        held = PeftTensors(*experts.split_experts(held.config, held.tensors, known.real), held.source)
    assert isinstance(held.config, LoraConfig)
    return held.config, known, held.tensors


def extract_adapter(
    found: ForeignTree, config: Config | None, keymap: KeyMap | str | None, lora_alpha: float | None
) -> Adapter:
    """The tree's LoRA as an adapter in our layout: one A for each fused part, every axis apart."""
    config, known, tensors = tree_to_peft(found, config, keymap, lora_alpha, "extract(tree", parts=True)
    shapes = {g.match.leaf: shape for g in known.sites if (shape := g.base_shape) is not None}
    lost = [g.match.leaf for g in known.sites if g.base_shape is None]
    if lost:
        raise KeyMapError(
            "the shapes of these weights do not follow from their LoRA leaves alone; give the whole tree, or use"
            f" to_peft, which needs less:\n{paths.bullets(lost)}"
        )
    table = known.real or known.keymap
    bounds = selection.select_sites(config, table, shapes)
    leaves = sites.make_file_plan(bounds).decode(tensors)
    return Adapter(config, paths.unflatten(leaves), table)


# ---------------------------------------------------------------- in


def fill_tree(
    found: ForeignTree,
    config: Config,
    tensors: Mapping[str, Any],
    *,
    keymap: KeyMap | str | None = None,
    lora_alpha: float | None = None,
    on_shared: str | None = None,
    dtype: Any = None,
    source: str = "the file",
    call: str = "load(path, tree",
) -> Any:
    """The tree with a file's tensors in its LoRA leaves (NNX in place). Nothing is changed unless all of it fits.

    Where the file adapts fewer modules, or a smaller rank, than the tree has room for, B is zero and A stays.
    """
    if on_shared not in (None, "concat"):
        raise MismatchError(f'on_shared: expected None or "concat", found {on_shared!r}')
    lora_variants.require_original_base(config, source)
    tree, found = found, _of_slot(found, room=True)
    several = _with_heads(found, keymap)
    if several and lora_alpha is not None:
        leaves = per_head.reserve_rank(several, found.leaves, _specs(tensors))
        stored = per_head.rescaled_alphas(found.dialect, found.leaves, leaves, lora_alpha)
        found, lora_alpha = dataclasses.replace(found, leaves=leaves, stored=stored), None
    known = survey_tree(found, keymap, tensors)
    if known.real is not None:
        held = experts.fuse_experts(PeftTensors(config, tensors, source), known.real, on_shared, call)
        config, tensors = experts.split_experts(held.config, held.tensors, known.keymap, known.real)
    if found.slot is not None and isinstance(config, LoraConfig):  # (`ratios` refuses what is none)
        known = dataclasses.replace(known, stored=_slot_alphas(tree, known, config))
    ratios = guest_config.scale_ratios(known, config, lora_alpha, call)
    shapes = {key: tuple(spec.shape) for key, spec in _specs(tensors).items()}
    fill.check_tensors(known, ratios, shapes, source)
    values = {key: tensors[key] for half in _halves(known) for key in half.keys if key in shapes}
    traced = any(isinstance(x, Tracer) for x in [*values.values(), *found.leaves.values()])
    if traced and on_shared is None and any(half.shared > 1 for half in _halves(known)):
        raise MismatchError(
            f'inside jit nobody can tell whether two As are equal; pass on_shared="concat", or put them into the'
            f" {found.dialect.name} tree outside"
        )
    placed = fill.place_tensors(known, values, ratios, on_shared == "concat", _never if traced else bitwise_same)
    # Where the file says nothing B is zero, so A may stay as it is, and can be trained; not so beside a shared B.
    # (A slot's rank ends where the file's does, and what is beyond must be zero.)
    kept = {guest.a.path for guest in known.sites if guest.b.shared == 1 and found.slot is None}
    dtypes = _dtypes(found, placed, dtype, source)
    rounded = guest_config.first_inexact(ratios)
    if rounded is not None:
        warn(
            f"{source}: its scale is {rounded:g} times that of the {found.dialect.name} tree, which no power of two is:"
            " B is multiplied by it and rounded once",
        )
    new = {
        path: _build(half, where, found.leaves[path], path in kept, dtypes[path], traced)
        for path, (half, where) in placed.items()
    }
    if several:
        new |= per_head.narrow_leaves(found.dialect, several, tree.leaves, new, on_shared == "concat")
    new = {path: _like(tree.leaves[path], x) for path, x in new.items()}
    if found.slot is not None:
        new = slots.with_slot(found.dialect, tree.leaves, found.slot, new, _used(known, placed))
    return found.put(new)


def needed_rank(
    found: ForeignTree, keymap: KeyMap | str | None, tensors: Mapping[str, Any], modules: Collection[str]
) -> int:
    """The rank that a tree needs to hold a file's tensors, side by side where they share an array and differ."""
    several = _with_heads(found, keymap)
    room = dataclasses.replace(found, leaves=per_head.reserve_rank(several, found.leaves, _specs(tensors)))
    known, ratios = survey_tree(room, keymap), dict.fromkeys(modules, 1.0)
    if not several:
        return fill.needed_rank(known, tensors, ratios, bitwise_same)
    placed = fill.place_tensors(known, tensors, ratios, True, bitwise_same)
    ranks = {path: max((rows.stop for _, rows, _ in where.values()), default=0) for path, (_, where) in placed.items()}
    for a, b, w in several.values():
        whole_a, whole_b = (
            _build(*placed[path], room.leaves[path], False, room.leaves[path].dtype, False) for path in (a, b)
        )
        ranks[a] = ranks[b] = len(per_head.narrow(whole_a, whole_b, w)[1])
    return max(ranks.values())


def _slot_alphas(tree: ForeignTree, known: ForeignSites, config: LoraConfig) -> dict[str, float]:
    """`{base leaf: alpha}` that a slot will have: the file's, as far as its scales can hold it."""
    out: dict[str, float] = {}
    for guest in known.sites:
        mine = [m for m in guest.a.modules if matching.matches(config, m)]
        if mine:
            dtype = tree.leaves[tree.dialect.slot_paths(guest.a.path)[1]].dtype
            out[guest.match.leaf] = float(np.asarray(methods.lora_scale(config, mine[0]), dtype)) * guest.a.rank
    return out


def _used(known: ForeignSites, placed: Mapping[str, tuple[FactorArray, Placed]]) -> dict[str, tuple[int, float]]:
    """`{path of A: (the rank in use, the scale)}` of the arrays that a file fills."""
    filled = [(g, placed[g.a.path][1].values()) for g in known.sites if placed[g.a.path][1]]
    return {
        g.a.path: (max(rows.stop for _, rows, _ in where), known.stored[g.match.leaf] / g.a.rank) for g, where in filled
    }


def _halves(known: ForeignSites) -> list[FactorArray]:
    return [half for guest in known.sites for half in (guest.a, guest.b)]


def _specs(tensors: Mapping[str, Any]) -> Mapping[str, Any]:
    return tensors.specs if isinstance(tensors, Encoded) else tensors


def bitwise_same(a: Any, b: Any) -> bool:
    """Bit for bit, so that a NaN equals itself and 0.0 is not -0.0."""
    x, y = np.asarray(a), np.asarray(b)
    return x.dtype == y.dtype and x.tobytes() == y.tobytes()


def _never(a: Any, b: Any) -> bool:
    return a is b


def _dtypes(
    found: ForeignTree, placed: Mapping[str, tuple[FactorArray, Placed]], dtype: Any, source: str
) -> dict[str, Any]:
    """The dtype each array will have: the tree's own, which must hold the file's numbers exactly."""
    out: dict[str, Any] = {}
    lossy: list[str] = []
    for path, (_, where) in placed.items():
        own = np.dtype(found.leaves[path].dtype)
        out[path] = own if dtype is None else np.dtype(dtype)
        given = {np.dtype(tensor.dtype) for tensor, _, _ in where.values()}
        lossy += [f"{path}: {own.name}, in the file {d.name}" for d in given if jnp.promote_types(d, own) != own]
    if lossy and dtype is None:
        raise MismatchError(
            f"{source}: the target's LoRA leaves cannot hold these numbers exactly; pass dtype= to say what they shall"
            f" be, rounded where need be:\n{paths.bullets(lossy)}"
        )
    return out


def _build(half: FactorArray, where: Placed, current: Any, keep: bool, dtype: Any, traced: bool) -> Any:
    """The new array, in the tree's own shape; zero, or what it was, where nothing is placed."""
    keep = keep and is_array(current) and not isinstance(current, jax.ShapeDtypeStruct)
    if traced:
        out: Any = jnp.asarray(current, dtype).reshape(half.shape) if keep else jnp.zeros(half.shape, dtype)
    else:
        out = np.array(current, dtype).reshape(half.shape) if keep else np.zeros(half.shape, dtype)
    done: set[tuple[int, int]] = set()
    for i, (tensor, rows, factor) in where.items():
        spot = (i // half.shared, rows.start)
        if spot in done:  # the same tensor again, for another sharer
            continue
        done.add(spot)
        piece = half.form.unit(rows.stop - rows.start).decode(tensor if traced else np.asarray(tensor))
        if factor != 1.0:  # rounded once, if at all
            wide = np.dtype(np.float32 if traced else np.float64)
            piece = piece.astype(wide) * wide.type(factor)
        index = list(half.form.index(i))
        index[half.form.rank] = rows
        if traced:
            out = out.at[tuple(index)].set(piece.astype(dtype))
        else:
            out[tuple(index)] = piece.astype(dtype)
    return out.reshape(half.form.packed)


def _like(leaf: Any, value: Any) -> Any:
    """The value where the leaf was: on its devices, if it is on any."""
    if isinstance(value, Tracer):
        return value
    placed = isinstance(leaf, jax.Array | jax.ShapeDtypeStruct) and not isinstance(leaf, Tracer)
    return jax.device_put(value, leaf.sharding if placed else None)


__all__ = [
    "ForeignTree",
    "bitwise_same",
    "describe_unknown",
    "extract_adapter",
    "fill_tree",
    "find_lora",
    "needed_rank",
    "slot",
    "survey_tree",
    "tree_to_peft",
]
