"""Plain LoRA as matrices: what combining, resizing and converting have in common.

    Adapter ──pairs──► {leaf: Pair}, B (n, out, r) and A (n, r, in) for each PyTorch module ──built──► Adapter

A leaf that stacks layers or fuses parts gives one pair of matrices for each module it stands for, in PyTorch's
layout, so what is computed here is what PEFT computes module by module. Pure; runs under jit.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxadapt import methods
from jaxadapt.adapters import sites as bind
from jaxadapt.adapters import target_parameters
from jaxadapt.adapters.adapter import Adapter
from jaxadapt.configs import Config
from jaxadapt.configs.lora_variants import reasons_not_a_product
from jaxadapt.core import paths
from jaxadapt.core.errors import AttachError, ConfigError, KeyMapError
from jaxadapt.keymaps import plan
from jaxadapt.keymaps.keymap import KeyMap, Match
from jaxadapt.keymaps.plan import PlanEntry

Array = Any

# ---------------------------------------------------------------- leaves as rows of matrices


def weight_matrices(table: KeyMap, bound: bind.Site, leaf: Array, scaled: bool = True) -> Array:
    """A base weight (or a change of one) as `(n, out, in)`, one row for each module of a site in `matrices_to_leaves`'s
    order.

    In PyTorch's values, or with `scaled=False` in the leaf's own where the table has a factor.
    """
    entry, at = _in_base(table, bound, leaf.shape)
    rows = (entry.form if scaled else dataclasses.replace(entry.form, factor=1.0)).to_rows(leaf)[at]
    return jnp.swapaxes(rows, 1, 2) if _turned(bound) else rows


def with_weight_matrices(table: KeyMap, bound: bind.Site, leaf: Array, rows: Array) -> Array:
    """The base weight with these rows; parts that are not targeted stay as they are."""
    entry, at = _in_base(table, bound, leaf.shape)
    rows = jnp.swapaxes(rows, 1, 2) if _turned(bound) else rows
    if bound.match.parts is None and len(at) == entry.form.count:
        return entry.form.from_rows(rows[np.argsort(at)])
    if bound.match.parts is None:
        return entry.form.from_rows(entry.form.to_rows(jnp.asarray(leaf)).astype(rows.dtype).at[at].set(rows))
    axis = bound.match.weight.left.index(bound.match.roles["fused"][0])
    where = (slice(None),) * axis + (np.array(bound.match.parts),)
    whole = entry.form.from_rows(jnp.zeros((len(entry.keys), *entry.form.file_shape), rows.dtype).at[at].set(rows))
    return jnp.asarray(leaf).at[where].set(whole[where].astype(leaf.dtype))


def _turned(bound: bind.Site) -> bool:
    return bound.match.weight.fan_in_fan_out or bound.match.weight.kind == "embedding"


def _in_base(table: KeyMap, bound: bind.Site, shape: Sequence[int]) -> tuple[PlanEntry, np.ndarray]:
    """The base weight's own entry, and where in its keys the site's modules are."""
    (entry,) = plan.base_plan(table, {bound.leaf: shape}).entries
    stems = _stems(bound, _ab(bound)[0])
    at = {f"{table.prefix}{key.removesuffix('weight')}".rstrip("."): i for i, key in enumerate(entry.keys)}
    return entry, np.array([at[stem] for stem in stems])


@dataclasses.dataclass(frozen=True, eq=False)
class Factors:
    """One leaf of a plain LoRA: for module i, ΔW = scale · b[i] @ a[i], in PyTorch's (out, in), by PEFT's own account
    (its `nn.MultiheadAttention` adds the output projection's twice: see methods/lora).

    `site_modules` are named as in the file, prefix included. `entries` are A's and B's, for their layout. Where modules
    differ, `scale` is (n, 1, 1), and `ranks` says how much of A and B is not padding.
    """

    site: bind.Site
    modules: tuple[str, ...]
    a: Array
    b: Array
    scale: float | np.ndarray
    entries: tuple[PlanEntry, PlanEntry]
    ranks: tuple[int, ...]

    @property
    def match(self) -> Match:
        return self.site.match

    @property
    def rank(self) -> int:
        return self.a.shape[1]

    def rows_of(self, side: str, modules: Sequence[str]) -> Array:
        """A or B of some modules."""
        return self.rows_at(self.a if side == "a" else self.b, modules)

    def rank_of(self, module: str) -> int:
        """The rank of one module."""
        return self.ranks[self.modules.index(module)]

    def scales_of(self, modules: Sequence[str]) -> tuple[float, ...]:
        """The scales of some modules."""
        if isinstance(self.scale, float):
            return (self.scale,) * len(modules)
        return tuple(self.rows_at(self.scale, modules)[:, 0, 0].tolist())

    def rows_at(self, rows: Array, modules: Sequence[str]) -> Array:
        """These modules' rows of an array with one row for each of `self.modules`."""
        return _picked(rows, self.modules, modules)


@dataclasses.dataclass(frozen=True, eq=False)
class FactorRows:
    """New matrices for one leaf: A (n, r, in) and B (n, out, r) of n modules."""

    modules: tuple[str, ...]
    a: Array
    b: Array

    @staticmethod
    def concatenate(several: Sequence[FactorRows]) -> FactorRows:
        if len(several) == 1:
            return several[0]
        a, b = (jnp.concatenate(list(side)) for side in zip(*((r.a, r.b) for r in several), strict=True))
        return FactorRows(tuple(m for r in several for m in r.modules), a, b)


def _picked(rows: Array, have: Sequence[str], want: Sequence[str]) -> Array:
    at = {module: i for i, module in enumerate(have)}
    return rows if tuple(have) == tuple(want) else rows[np.array([at[m] for m in want])]


def lora_factors(adapter: Adapter, what: str = "the adapter") -> dict[str, Factors]:
    """The leaves of a plain LoRA adapter, in float32 at least.

    Raises `ConfigError` where ΔW is more than s·B·A, `AttachError` for abstract parameters.
    """
    if not isinstance(adapter, Adapter):  # pyright: ignore[reportUnnecessaryIsInstance]
        found = type(adapter).__name__
        raise AttachError(f"{what}: expected an Adapter (from extract, init or from_peft), found {found}")
    why = reasons_not_a_product(adapter.config)
    if why:
        raise ConfigError(
            f"{what} is not s·B·A on its weights alone ({'; '.join(why)}); jaxadapt.merging.to_lora(adapter, r,"
            f" params=base)"
            " makes a plain LoRA of whatever changes weights only"
        )
    sites = adapter.sites
    abstract = [leaf for leaf, ts in sites.items() if any(isinstance(x, jax.ShapeDtypeStruct) for x in ts.values())]
    if abstract:
        raise AttachError(f"{what} has shapes only, no values:\n" + paths.bullets(abstract))
    return {b.leaf: _pair(b, sites[b.leaf]) for b in bind.sites_of(adapter)}


def _pair(bound: bind.Site, tensors: Mapping[str, Array]) -> Factors:
    entries = _any_ab(bound)
    a, b = site_matrices(bound, {name: methods.at_least_float32(jnp.asarray(x)) for name, x in tensors.items()})
    line = bound.match.weight
    times = 2 if line.kind == "attention" and not line.part else 1  # PEFT's out_proj counts twice (methods/lora)
    ranks = tuple(rank for rank in entries[0].form.ranks or [a.shape[1]] * entries[0].form.count)
    each = tuple(rank for rank in ranks for _ in range(_experts(bound)))
    return Factors(bound, tuple(_rows(bound, entries[0])), a, b, scale(bound) / times, entries, each)


def scale(bound: bind.Site) -> float | np.ndarray:
    """The scale of a site's matrices: a number, or (n, 1, 1) in the order of `site_matrices` where they differ."""
    found = bound.hparams.scale
    if not isinstance(found, methods.PerEntry):
        return found
    entry, inner = _any_ab(bound)[0], [n for n in bound.match.roles["batch"] if n.startswith("{")]
    axes, form = (*bound.match.roles["stack"], *inner), entry.form
    sizes = dict(zip(form.left, form.shape, strict=True))
    split = [form.left[at] for at in form.split]
    table = np.array(found.values).reshape([sizes[name] for name in axes])
    flat = table.transpose([axes.index(name) for name in split]).reshape(-1)
    flat = flat if form.held is None else flat[np.array(form.held)]
    return np.repeat(flat, _experts(bound)).reshape(-1, 1, 1)


def site_matrices(bound: bind.Site, tensors: Mapping[str, Array], scaled: bool = True) -> tuple[Array, Array]:
    """A as (n, r, in) and B as (n, out, r), in one order of modules; `scaled` as in `weight_matrices`.

    Of experts in one array each is a module, and a convolution's window is part of "in".
    """
    first, last = _any_ab(bound)
    a, b = (
        (e.form if scaled else dataclasses.replace(e.form, factor=1.0)).to_rows(tensors[_name(e)])
        for e in (first, last)
    )
    mine, others = _rows(bound, first), _rows(bound, last)
    return _flat(bound, "A", a), _picked(_flat(bound, "B", b), others, mine)


def _experts(bound: bind.Site) -> int:
    """How many experts PyTorch has in one tensor of this leaf; 1 of any other."""
    form = bound.entries[0].form
    return math.prod(dict(zip(form.left, form.shape, strict=True))[n] for n in bound.match.roles["experts"])


def _rows(bound: bind.Site, entry: PlanEntry) -> list[str]:
    """A name for each matrix of a leaf."""
    kind = bound.match.weight.kind
    if kind not in ("experts", "attention"):
        return _stems(bound, entry)
    stems = [key.rpartition(".lora_")[0] for key in entry.keys]
    return [f"{stem}#{e}" for stem in stems for e in range(_experts(bound))] if kind == "experts" else stems


def _flat(bound: bind.Site, side: str, x: Array) -> Array:
    """Tensors as in a file, (n, …), as matrices; A's rows are (expert, rank) and B's columns (rank, expert)."""
    count, rank = _experts(bound), dict(bound.tensors[0].own)["r"]
    if side == "A":
        return x.reshape(x.shape[0] * count, rank, -1)
    return jnp.moveaxis(x.reshape(x.shape[0], x.shape[1], rank, count), 3, 1).reshape(-1, x.shape[1], rank)


def _full(bound: bind.Site, entry: PlanEntry, side: str, x: Array) -> Array:
    """The inverse of `_flat`."""
    shape, count = entry.form.file_shape, _experts(bound)
    if side == "B":
        x = jnp.moveaxis(x.reshape(-1, count, x.shape[1], x.shape[2]), 1, 3)
    return x.reshape(-1, *shape)


def _name(entry: PlanEntry) -> str:
    return entry.path.rpartition(".")[2]


def _ab(bound: bind.Site) -> tuple[PlanEntry, PlanEntry]:
    """The entries of A and B; a site that holds anything else, or no matrices, is refused."""
    found = {t.name: e for t, e in zip(bound.tensors, bound.entries, strict=True)}
    a, b = (next((e for name, e in found.items() if name.endswith(end)), None) for end in ("_A", "_B"))
    matrices = a is not None and b is not None and len(a.form.file_shape) == len(b.form.file_shape) == 2
    experts = bool(bound.axes.batch_axes) and not bound.match.roles["fused"]
    odd = experts or bound.match.weight.kind == "attention"  # several leaves are one module there
    if a is None or b is None or not matrices or len(found) != 2 or odd:
        held = ", ".join(f"{n} {list(e.form.file_shape)}" for n, e in found.items())
        raise ConfigError(
            f"{bound.leaf}: holds {held}, which is no pair of matrices; leave it out of the arithmetic"
            " (so it is with LoRA's variants, and convolutions with groups)"
        )
    return a, b


def _any_ab(bound: bind.Site) -> tuple[PlanEntry, PlanEntry]:
    """The entries of A and B of a leaf whose change is B·A, matrix by matrix; any other is refused."""
    site = bound.match.weight
    found = {t.name: e for t, e in zip(bound.tensors, bound.entries, strict=True)}
    if len(found) == 2 and "lora_A" in found and "lora_B" in found and site.groups == 1:
        return found["lora_A"], found["lora_B"]
    return _ab(bound)


def _stems(bound: bind.Site, entry: PlanEntry) -> list[str]:
    (suffix,) = (t.suffix for t in bound.tensors if t.name == _name(entry))
    return [key.removesuffix(suffix) for key in entry.keys]


def site_modules(bound: bind.Site, table: KeyMap) -> list[str]:
    """The PyTorch modules of a site's matrices, in their order."""
    return [stem.removeprefix(table.prefix) for stem in _stems(bound, _ab(bound)[0])]


def matrix_sizes(bound: bind.Site) -> tuple[int, int]:
    """(out, in) of a site's matrices."""
    a, b = (entry.form.file_shape for entry in _ab(bound))
    return b[0], a[1]


def base_factor(table: KeyMap, bound: bind.Site, shape: Sequence[int]) -> float:
    """What the leaf is of PyTorch's weight."""
    return _in_base(table, bound, shape)[0].form.factor


def build_adapter(
    config: Config, keymap: KeyMap, like: Mapping[str, Factors], new: Mapping[str, FactorRows], dtype: Any
) -> Adapter:
    """The adapter of new matrices by leaf; `like` gives the layout, the configuration the rank."""
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    for leaf, made in new.items():
        old = like[leaf]
        size = {"~r": made.a.shape[1]} | {name: _parts(keymap, old, made) for name in old.match.roles["fused"]}
        shapes[leaf] = {
            _name(e): tuple(size.get(n, have) for n, have in zip(e.form.left, e.shape, strict=True))
            for e in old.entries
        }
    methods.get_method(config)
    out: dict[str, Array] = {}
    for bound in bind.sites_from_shapes(config, keymap, shapes):
        made = new[bound.leaf]
        for entry, side, matrices in zip(_any_ab(bound), "AB", (made.a, made.b), strict=True):
            rows = _full(bound, entry, side, _picked(matrices, made.modules, _rows(bound, entry)))
            out[entry.path] = entry.form.from_rows(rows).astype(dtype)
    return Adapter(config, paths.unflatten(out), keymap)


def _parts(keymap: KeyMap, old: Factors, made: FactorRows) -> int:
    """How many fused parts of a leaf these modules are of, in whatever layers."""
    site = dataclasses.replace(old.match, parts=None)
    sizes = bind.single_entry_sizes(site) | {
        name: n for name, n in _sizes(old).items() if name not in site.roles["fused"]
    }
    called = (target_parameters.parameter_names if old.site.method.wrapper_depth is not None else Match.modules)(
        site, sizes
    )
    mine = {module.partition("#")[0].removeprefix(keymap.prefix) for module in made.modules}
    return len({index[-1] for index, name in called.items() if name in mine}) or len(
        site.weight.names(site.roles["fused"][0]) or ()
    )


def has_one_pair(bound: bind.Site) -> bool:
    """Whether a site holds A and B as matrices, one pair for each module, and nothing else."""
    try:
        _ab(bound)
    except ConfigError:
        return False
    return True


def matrices_to_leaves(
    bound: bind.Site, a: Array, b: Array, scaled: bool = True
) -> tuple[tuple[str, ...], dict[str, Array]]:
    """The modules of a site, and its leaves from A (n, r, in) and B (n, out, r) in their order (`weight_matrices`'
    too).
    """
    first, last = _ab(bound)
    modules = tuple(_stems(bound, first))
    b = _picked(b, modules, _stems(bound, last))
    forms = [e.form if scaled else dataclasses.replace(e.form, factor=1.0) for e in (first, last)]
    return modules, {first.path: forms[0].from_rows(a), last.path: forms[1].from_rows(b)}


def _sizes(pair: Factors) -> dict[str, int]:
    return dict(zip(pair.entries[0].form.left, pair.entries[0].shape, strict=True))


def common_keymap(tables: Iterable[KeyMap], leaves: Iterable[str]) -> KeyMap:
    """One table for the leaves of several adapters of one model; `KeyMapError` where theirs contradict each other."""
    tables = list(dict.fromkeys(tables))
    first = tables[0]
    lines = {
        w.leaf: w for t in reversed(tables[1:]) for w in t.weights if "{" not in w.leaf and first.match(w.leaf) is None
    }
    table = first.with_entries(lines.values())
    problems: list[str] = []
    for leaf in dict.fromkeys(leaves):
        known = [site for t in tables if (site := t.match(leaf)) is not None]
        mine = table.match(leaf)
        if mine is None or any((s.weight, s.holes) != (mine.weight, mine.holes) for s in known):
            problems.append(f"{leaf}: " + " and ".join(repr(s.weight.pattern) + " as " + s.weight.key for s in known))
    if problems:
        raise KeyMapError(
            "the adapters name or lay out the same weights differently:\n"
            + paths.bullets(problems)
            + "\nAttach them with one keymap=; from_peft(to_peft(adapter), model) carries one over"
        )
    return table


# ---------------------------------------------------------------- the SVD of a product


def product_svd(b: Array, a: Array) -> tuple[Array, Array, Array]:
    """U, S, Vh of b @ a for b (..., out, k) and a (..., k, in), not formed: QR of the factors, SVD of a k × k core."""
    qb, rb = jnp.linalg.qr(b)
    qa, ra = jnp.linalg.qr(jnp.swapaxes(a, -1, -2))
    u, s, vh = jnp.linalg.svd(rb @ jnp.swapaxes(ra, -1, -2), full_matrices=False)
    return qb @ u, s, vh @ jnp.swapaxes(qa, -1, -2)


def truncate_svd(u: Array, s: Array, vh: Array, r: int) -> tuple[Array, Array]:
    """A and B of the r largest singular triples, B = U·S and A = Vh as in PEFT; zeros where there are fewer."""
    b, a = (u * s[..., None, :])[..., :r], vh[..., :r, :]
    return pad_rank(a, b, r)


def pad_rank(a: Array, b: Array, r: int) -> tuple[Array, Array]:
    """A and B with zeros up to rank r: the same product."""
    more = r - a.shape[-2]
    none = [(0, 0)] * (a.ndim - 2)
    return jnp.pad(a, [*none, (0, more), (0, 0)]), jnp.pad(b, [*none, (0, 0), (0, more)])


def truncation_error(s: Array, r: int) -> Array:
    """‖what truncation to rank r drops‖ / ‖all of it‖, in the Frobenius norm; 0 for a zero matrix."""
    total, kept_out = jnp.sqrt(jnp.sum(s**2, -1)), jnp.sqrt(jnp.sum(s[..., r:] ** 2, -1))
    return kept_out / jnp.where(total == 0, 1, total)
