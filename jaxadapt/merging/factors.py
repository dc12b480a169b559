"""Plain LoRA as matrices, for combining, resizing and converting.

    Adapter ──lora_factors──► {leaf: Factors} ──arithmetic──► {leaf: FactorRows} ──build_adapter──► Adapter

Each PyTorch module has one pair of matrices, B (n, out, r) and A (n, r, in), in PyTorch's layout, also where a leaf
stacks layers or fuses parts. So the arithmetic is PEFT's, module by module. Pure; runs under jit.

The tensors of a plain LoRA's site as rows of matrices: their plan entries, names and shapes.

Leaves that are one matrix in PyTorch, joined for arithmetic on the full matrix (its SVD, its largest values).

Queries, keys and values of an `nn.MultiheadAttention` share one A there, and so do gate and up of experts (Llama 4's
share one B). An adapter from PEFT's file holds equal copies of the shared factor. Joined, they give PEFT's result, and
the copies stay equal. After training here the copies differ, and each leaf is treated as its own matrix.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxadapt.adapters import joint_tensors, sites
from jaxadapt.adapters.adapter import Adapter
from jaxadapt.adapters.site import Site
from jaxadapt.adapters.sites import single_entry_sizes, sites_from_shapes, sites_of
from jaxadapt.arrays.layout import FileLayout
from jaxadapt.arrays.per_entry import PerEntry
from jaxadapt.configs.base import Config
from jaxadapt.configs.lora import reasons_not_a_product
from jaxadapt.core import paths
from jaxadapt.core.errors import AttachError, ConfigError, KeyMapError, raise_listed
from jaxadapt.keymaps import plan
from jaxadapt.keymaps.keymap import KeyMap, Match
from jaxadapt.keymaps.plan import PlanEntry, parse_part_key
from jaxadapt.methods.base import at_least_float32
from jaxadapt.methods.registry import get_method

# ---------------------------------------------------------------- site entries


Array = Any


def select_rows(rows: Array, modules: Sequence[str], selected: Sequence[str]) -> Array:
    """Return the rows of the selected modules, in their order."""
    positions = {module: i for i, module in enumerate(modules)}
    return rows if tuple(modules) == tuple(selected) else rows[np.array([positions[module] for module in selected])]


def count_experts(site: Site) -> int:
    """Return the number of experts in one PyTorch tensor of this leaf; 1 for other leaves."""
    sizes = site.entries[0].form.axis_sizes
    return math.prod(sizes[axis] for axis in site.match.roles["experts"])


def row_names(site: Site, entry: PlanEntry) -> list[str]:
    """Return a name for each matrix of a leaf."""
    kind = site.match.weight.kind
    if kind not in ("experts", "attention"):
        return entry_stems(site, entry)
    stems = [key.rpartition(".lora_")[0] for key in entry.keys]
    return (
        [f"{stem}#{expert}" for stem in stems for expert in range(count_experts(site))] if kind == "experts" else stems
    )


def to_matrices(site: Site, side: str, x: Array) -> Array:
    """Return file tensors (n, …) as matrices; A's rows are (expert, rank) and B's columns (rank, expert)."""
    count, rank = count_experts(site), dict(site.tensors[0].own)["r"]
    if side == "A":
        return x.reshape(x.shape[0] * count, rank, -1)
    return jnp.moveaxis(x.reshape(x.shape[0], x.shape[1], rank, count), 3, 1).reshape(-1, x.shape[1], rank)


def from_matrices(site: Site, entry: PlanEntry, side: str, x: Array) -> Array:
    """Invert `_to_matrices`."""
    shape, count = entry.form.file_shape, count_experts(site)
    if side == "B":
        x = jnp.moveaxis(x.reshape(-1, count, x.shape[1], x.shape[2]), 1, 3)
    return x.reshape(-1, *shape)


def tensor_name(entry: PlanEntry) -> str:
    """Return the tensor's name in the adapter."""
    return entry.path.rpartition(".")[2]


def factor_entries(site: Site) -> tuple[PlanEntry, PlanEntry]:
    """Return the entries of A and B; raise `ConfigError` for a site with other tensors, or without matrices."""
    entries = {tensor.name: entry for tensor, entry in zip(site.tensors, site.entries, strict=True)}
    a, b = (next((entry for name, entry in entries.items() if name.endswith(suffix)), None) for suffix in ("_A", "_B"))
    are_matrices = a is not None and b is not None and len(a.form.file_shape) == len(b.form.file_shape) == 2
    has_experts = bool(site.axes.batch_axes) and not site.match.roles["fused"]
    is_shared = has_experts or site.match.weight.kind == "attention"  # several leaves form one module
    if a is None or b is None or not are_matrices or len(entries) != 2 or is_shared:
        tensors = ", ".join(f"{name} {list(entry.form.file_shape)}" for name, entry in entries.items())
        raise ConfigError(
            f"{site.leaf}: expected one pair of matrices A and B, found {tensors} (a variant of LoRA, or a convolution"
            " with groups); leave this leaf out"
        )
    return a, b


def product_entries(site: Site) -> tuple[PlanEntry, PlanEntry]:
    """Return the entries of A and B of a leaf whose change is B·A, matrix by matrix; raise `ConfigError` for others."""
    entry = site.match.weight
    entries = {tensor.name: tensor_entry for tensor, tensor_entry in zip(site.tensors, site.entries, strict=True)}
    if len(entries) == 2 and "lora_A" in entries and "lora_B" in entries and entry.groups == 1:
        return entries["lora_A"], entries["lora_B"]
    return factor_entries(site)


def entry_stems(site: Site, entry: PlanEntry) -> list[str]:
    """Return the keys of an entry without the tensor's suffix."""
    (suffix,) = (tensor.suffix for tensor in site.tensors if tensor.name == tensor_name(entry))
    return [key.removesuffix(suffix) for key in entry.keys]


# ---------------------------------------------------------------- factors


# ---------------------------------------------------------------- leaves as matrices


def weight_matrices(keymap: KeyMap, site: Site, leaf: Array, scaled: bool = True) -> Array:
    """Return a base weight (or a change of one) as `(n, out, in)`, one matrix for each module of a site.

    The order is that of `matrices_to_leaves`. The values are PyTorch's; with `scaled=False` they are the leaf's own,
    where the keymap has a factor.
    """
    entry, positions = _base_positions(keymap, site, leaf.shape)
    rows = _form(entry, scaled).to_rows(leaf)[positions]
    return jnp.swapaxes(rows, 1, 2) if site.match.weight.is_stored_in_out else rows


def _form(entry: PlanEntry, scaled: bool) -> FileLayout:
    """Return the layout of an entry; unless `scaled`, without the factor between the leaf and PyTorch's tensor."""
    return entry.form if scaled else dataclasses.replace(entry.form, factor=1.0)


def with_weight_matrices(keymap: KeyMap, site: Site, leaf: Array, rows: Array) -> Array:
    """Return the base weight with these matrices; parts that are not targeted stay unchanged."""
    entry, positions = _base_positions(keymap, site, leaf.shape)
    rows = jnp.swapaxes(rows, 1, 2) if site.match.weight.is_stored_in_out else rows
    if site.match.parts is None and len(positions) == entry.form.count:
        return entry.form.from_rows(rows[np.argsort(positions)])
    if site.match.parts is None:
        return entry.form.from_rows(entry.form.to_rows(jnp.asarray(leaf)).astype(rows.dtype).at[positions].set(rows))
    axis = site.match.weight.left.index(site.match.roles["fused"][0])
    index = (slice(None),) * axis + (np.array(site.match.parts),)
    full = entry.form.from_rows(
        jnp.zeros((len(entry.keys), *entry.form.file_shape), rows.dtype).at[positions].set(rows)
    )
    return jnp.asarray(leaf).at[index].set(full[index].astype(leaf.dtype))


def _base_positions(keymap: KeyMap, site: Site, shape: Sequence[int]) -> tuple[PlanEntry, np.ndarray]:
    """Return the base weight's own plan entry, and the positions of the site's modules among its keys."""
    (entry,) = plan.base_plan(keymap, {site.leaf: shape}).entries
    stems = entry_stems(site, factor_entries(site)[0])
    positions = {f"{keymap.prefix}{key.removesuffix('weight')}".rstrip("."): i for i, key in enumerate(entry.keys)}
    return entry, np.array([positions[stem] for stem in stems])


@dataclasses.dataclass(frozen=True, eq=False)
class Factors:
    """One leaf of a plain LoRA: ΔW = scale · b[i] @ a[i] for module i, in PyTorch's (out, in).

    This is ΔW by PEFT's definition; its `nn.MultiheadAttention` adds the output projection's twice.
    `modules` are named as in the file, prefix included. `entries` are A's and B's, for their layout. If modules differ,
    `scale` is (n, 1, 1), and `ranks` are the ranks without padding.
    """

    site: Site
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
        """Return A or B of some modules."""
        return self.rows_at(self.a if side == "a" else self.b, modules)

    def rank_of(self, module: str) -> int:
        """Return the rank of one module."""
        return self.ranks[self.modules.index(module)]

    def scales_of(self, modules: Sequence[str]) -> tuple[float, ...]:
        """Return the scales of some modules."""
        if isinstance(self.scale, float):
            return (self.scale,) * len(modules)
        return tuple(self.rows_at(self.scale, modules)[:, 0, 0].tolist())

    def rows_at(self, rows: Array, modules: Sequence[str]) -> Array:
        """Return these modules' rows of an array with one row for each of `self.modules`."""
        return select_rows(rows, self.modules, modules)


@dataclasses.dataclass(frozen=True, eq=False)
class FactorRows:
    """New matrices for one leaf: A (n, r, in) and B (n, out, r) of n modules."""

    modules: tuple[str, ...]
    a: Array
    b: Array

    @staticmethod
    def concatenate(parts: Sequence[FactorRows]) -> FactorRows:
        """Return the rows of all modules of `parts`."""
        if len(parts) == 1:
            return parts[0]
        a, b = (jnp.concatenate(list(side)) for side in zip(*((rows.a, rows.b) for rows in parts), strict=True))
        return FactorRows(tuple(module for rows in parts for module in rows.modules), a, b)


def lora_factors(adapter: Adapter, label: str = "the adapter") -> dict[str, Factors]:
    """Return the leaves of a plain LoRA adapter, in float32 at least.

    Raises `ConfigError` if ΔW is more than s·B·A, `AttachError` for abstract parameters.
    """
    if not isinstance(adapter, Adapter):  # pyright: ignore[reportUnnecessaryIsInstance]
        type_name = type(adapter).__name__
        raise AttachError(f"{label}: expected an Adapter (from extract, init or from_peft), found {type_name}")
    reasons = reasons_not_a_product(adapter.config)
    if reasons:
        raise ConfigError(
            f"{label} is not a plain LoRA, s·B·A on its weights only ({'; '.join(reasons)})."
            " jaxadapt.merging.to_lora(adapter, r, params=base) makes a plain LoRA of any adapter that only changes"
            " weights"
        )
    tensors_of = adapter.sites
    raise_listed(
        AttachError,
        f"{label} has shapes but no values; pass an adapter with arrays:",
        [
            leaf
            for leaf, tensors in tensors_of.items()
            if any(isinstance(array, jax.ShapeDtypeStruct) for array in tensors.values())
        ],
    )
    return {site.leaf: _site_factors(site, tensors_of[site.leaf]) for site in sites_of(adapter)}


def _site_factors(site: Site, tensors: Mapping[str, Array]) -> Factors:
    """Return the factors of one site."""
    entries = product_entries(site)
    a, b = site_matrices(site, {name: at_least_float32(jnp.asarray(x)) for name, x in tensors.items()})
    ranks = tuple(rank for rank in entries[0].form.ranks or [a.shape[1]] * entries[0].form.count)
    row_ranks = tuple(rank for rank in ranks for _ in range(count_experts(site)))
    return Factors(
        site, tuple(row_names(site, entries[0])), a, b, scale(site) / site.match.weight.products, entries, row_ranks
    )


def scale(site: Site) -> float | np.ndarray:
    """Return the scale of a site's matrices: a number, or (n, 1, 1) in the order of `site_matrices` if they differ."""
    site_scale = site.hparams.scale
    if not isinstance(site_scale, PerEntry):
        return site_scale
    entry, inner_axes = product_entries(site)[0], [axis for axis in site.match.roles["batch"] if axis.startswith("{")]
    axes, form = (*site.match.roles["stack"], *inner_axes), entry.form
    split = [form.left[axis] for axis in form.split]
    scales = np.array(site_scale.values).reshape([form.axis_sizes[name] for name in axes])
    rows = scales.transpose([axes.index(name) for name in split]).reshape(-1)
    rows = rows if form.file_entries is None else rows[np.array(form.file_entries)]
    return np.repeat(rows, count_experts(site)).reshape(-1, 1, 1)


def site_matrices(site: Site, tensors: Mapping[str, Array], scaled: bool = True) -> tuple[Array, Array]:
    """Return A as (n, r, in) and B as (n, out, r), in one order of modules; `scaled` as in `weight_matrices`.

    Each expert in one array is a module. A convolution's window is part of "in".
    """
    entry_a, entry_b = product_entries(site)
    a, b = (_form(entry, scaled).to_rows(tensors[tensor_name(entry)]) for entry in (entry_a, entry_b))
    names_a, names_b = row_names(site, entry_a), row_names(site, entry_b)
    return to_matrices(site, "A", a), select_rows(to_matrices(site, "B", b), names_b, names_a)


def site_modules(site: Site, keymap: KeyMap) -> list[str]:
    """Return the PyTorch modules of a site's matrices, in their order."""
    return [stem.removeprefix(keymap.prefix) for stem in entry_stems(site, factor_entries(site)[0])]


def matrix_sizes(site: Site) -> tuple[int, int]:
    """Return (out, in) of a site's matrices."""
    a, b = (entry.form.file_shape for entry in factor_entries(site))
    return b[0], a[1]


def base_factor(keymap: KeyMap, site: Site, shape: Sequence[int]) -> float:
    """Return the leaf's value divided by PyTorch's weight."""
    return _base_positions(keymap, site, shape)[0].form.factor


def build_adapter(
    config: Config, keymap: KeyMap, like: Mapping[str, Factors], rows_by_leaf: Mapping[str, FactorRows], dtype: Any
) -> Adapter:
    """Return the adapter with new matrices by leaf; `like` gives the layout, the configuration the rank."""
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    for leaf, leaf_rows in rows_by_leaf.items():
        factors = like[leaf]
        new_sizes = {"~r": leaf_rows.a.shape[1]} | {
            name: _count_parts(keymap, factors, leaf_rows) for name in factors.match.roles["fused"]
        }
        shapes[leaf] = {
            tensor_name(entry): tuple(
                new_sizes.get(axis, size) for axis, size in zip(entry.form.left, entry.shape, strict=True)
            )
            for entry in factors.entries
        }
    get_method(config)
    params: dict[str, Array] = {}
    for site in sites_from_shapes(config, keymap, shapes):
        leaf_rows = rows_by_leaf[site.leaf]
        for entry, side, matrices in zip(product_entries(site), "AB", (leaf_rows.a, leaf_rows.b), strict=True):
            rows = from_matrices(site, entry, side, select_rows(matrices, leaf_rows.modules, row_names(site, entry)))
            params[entry.path] = entry.form.from_rows(rows).astype(dtype)
    return Adapter(config, paths.unflatten(params), keymap)


def _count_parts(keymap: KeyMap, factors: Factors, rows: FactorRows) -> int:
    """Return the number of fused parts of a leaf that have one of these modules, in any layer."""
    match = dataclasses.replace(factors.match, parts=None)
    sizes = single_entry_sizes(match) | {
        name: size for name, size in factors.entries[0].form.axis_sizes.items() if name not in match.roles["fused"]
    }
    names = (sites.parameter_names if factors.site.method.on_parameters else Match.modules)(match, sizes)
    modules = {module.partition("#")[0].removeprefix(keymap.prefix) for module in rows.modules}
    return len({index[-1] for index, name in names.items() if name in modules}) or len(
        match.weight.index_names(match.roles["fused"][0]) or ()
    )


def has_one_pair(site: Site) -> bool:
    """Return True if a site holds A and B as matrices, one pair for each module, and nothing else."""
    try:
        factor_entries(site)
    except ConfigError:
        return False
    return True


def matrices_to_leaves(site: Site, a: Array, b: Array, scaled: bool = True) -> tuple[tuple[str, ...], dict[str, Array]]:
    """Return the modules of a site, and its leaves from A (n, r, in) and B (n, out, r) in the modules' order."""
    entry_a, entry_b = factor_entries(site)
    modules = tuple(entry_stems(site, entry_a))
    b = select_rows(b, modules, entry_stems(site, entry_b))
    pairs = ((entry_a, a), (entry_b, b))
    return modules, {entry.path: _form(entry, scaled).from_rows(rows) for entry, rows in pairs}


def common_keymap(keymaps: Iterable[KeyMap], leaves: Iterable[str]) -> KeyMap:
    """Return one keymap for the leaves of several adapters of one model.

    Raises `KeyMapError` if their keymaps contradict each other.
    """
    keymaps = list(dict.fromkeys(keymaps))
    first = keymaps[0]
    entries = {
        entry.leaf: entry
        for candidate in reversed(keymaps[1:])
        for entry in candidate.weights
        if "{" not in entry.leaf and first.match(entry.leaf) is None
    }
    common = first.with_entries(entries.values())
    problems: list[str] = []
    for leaf in dict.fromkeys(leaves):
        matches = [match for candidate in keymaps if (match := candidate.match(leaf)) is not None]
        common_match = common.match(leaf)
        if common_match is None or any(
            (known.weight, known.holes) != (common_match.weight, common_match.holes) for known in matches
        ):
            problems.append(
                f"{leaf}: " + " and ".join(repr(known.weight.pattern) + " as " + known.weight.key for known in matches)
            )
    raise_listed(
        KeyMapError,
        "the adapters' keymaps name or lay out the same weights differently:",
        problems,
        "\nAttach the adapters with one keymap=; from_peft(to_peft(adapter), model) converts one",
    )
    return common


# ---------------------------------------------------------------- the SVD of a product


def svd(w: Array) -> tuple[Array, Array, Array]:
    """Return U, S, Vh of matrices; S is NaN where a matrix has a NaN or an infinity, on which LAPACK may not end."""
    is_finite = jnp.isfinite(w).all((-2, -1), keepdims=True)
    u, s, vh = jnp.linalg.svd(jnp.where(is_finite, w, 0), full_matrices=False)
    return u, jnp.where(is_finite[..., 0], s, jnp.nan), vh


def product_svd(b: Array, a: Array) -> tuple[Array, Array, Array]:
    """Return U, S, Vh of b @ a for b (..., out, k) and a (..., k, in), without forming the product.

    It takes QR of the factors and the SVD of a k × k core.
    """
    qb, rb = jnp.linalg.qr(b)
    qa, ra = jnp.linalg.qr(jnp.swapaxes(a, -1, -2))
    u, s, vh = svd(rb @ jnp.swapaxes(ra, -1, -2))
    return qb @ u, s, vh @ jnp.swapaxes(qa, -1, -2)


def truncate_svd(u: Array, s: Array, vh: Array, r: int) -> tuple[Array, Array]:
    """Return A and B of the r largest singular triples, B = U·S and A = Vh as in PEFT; zeros if there are fewer."""
    b, a = (u * s[..., None, :])[..., :r], vh[..., :r, :]
    return pad_rank(a, b, r)


def pad_rank(a: Array, b: Array, r: int) -> tuple[Array, Array]:
    """Return A and B padded with zeros to rank r: the same product."""
    padding = r - a.shape[-2]
    unpadded = [(0, 0)] * (a.ndim - 2)
    return jnp.pad(a, [*unpadded, (0, padding), (0, 0)]), jnp.pad(b, [*unpadded, (0, 0), (0, padding)])


def truncation_error(s: Array, r: int) -> Array:
    """Return ‖the part dropped by truncation to rank r‖ / ‖the matrix‖ in the Frobenius norm; 0 for a zero matrix."""
    total, dropped = jnp.sqrt(jnp.sum(s**2, -1)), jnp.sqrt(jnp.sum(s[..., r:] ** 2, -1))
    return dropped / jnp.where(total == 0, 1, total)


# ---------------------------------------------------------------- joint


@dataclasses.dataclass(frozen=True)
class JointMatrix:
    """The leaves of one matrix: usually one, or several that share the factor `shared`."""

    leaves: tuple[str, ...]
    shared: str = ""

    def is_present(self, factors: Mapping[str, Factors]) -> bool:
        """Return True if an adapter has this matrix."""
        return self.leaves[0] in factors

    def factors(self, by_leaf: Mapping[str, Factors]) -> Factors:
        """Return the factors of the full matrix, of an adapter that has it."""
        parts = [by_leaf[leaf] for leaf in self.leaves]
        a, b = self.join([part.a for part in parts], [part.b for part in parts])
        return dataclasses.replace(parts[0], a=a, b=b)

    def join(self, a: Sequence[Array], b: Sequence[Array]) -> tuple[Array, Array]:
        """Return A (n, r, in) and B (n, out, r) of the full matrix, or other arrays of these shapes."""
        if not self.shared:
            return a[0], b[0]
        return (a[0], jnp.concatenate(b, 1)) if self.shared == "a" else (jnp.concatenate(a, 2), b[0])

    def split(self, rows: FactorRows, like: Mapping[str, Factors]) -> dict[str, FactorRows]:
        """Return the rows of each leaf from those of the full matrix; `like` gives the leaves' sizes."""
        if not self.shared:
            return {self.leaves[0]: rows}
        side, axis = ("b", 1) if self.shared == "a" else ("a", 2)
        ends = np.cumsum([getattr(like[leaf], side).shape[axis] for leaf in self.leaves])
        parts = jnp.split(getattr(rows, side), ends[:-1].tolist(), axis)
        return {leaf: dataclasses.replace(rows, **{side: x}) for leaf, x in zip(self.leaves, parts, strict=True)}


def joint_matrices(adapters: Sequence[Mapping[str, Factors]]) -> list[JointMatrix]:
    """Return the matrices of several adapters.

    Raises `AttachError` inside jit where shared factors cannot be compared.
    """
    factors = {leaf: leaf_factors for by_leaf in adapters for leaf, leaf_factors in by_leaf.items()}
    groups: dict[Hashable, list[str]] = {}
    for leaf, leaf_factors in factors.items():
        groups.setdefault(leaf_factors.modules if leaf_factors.match.weight.part else leaf, []).append(leaf)
    matrices: list[JointMatrix] = []
    for leaves in groups.values():
        side = _shared_side(factors[leaves[0]])
        shared_arrays = (
            [[getattr(by_leaf[leaf], side) for leaf in leaves if leaf in by_leaf] for by_leaf in adapters]
            if side
            else []
        )
        if any(isinstance(x, Tracer) for arrays in shared_arrays for x in arrays):
            raise AttachError(
                "inside jit these shared factors cannot be compared, so the leaves cannot be joined to one matrix as in"
                " PEFT. Call the function outside jit:\n" + paths.bullets(leaves)
            )
        if side and all(
            not arrays or (len(arrays) == len(leaves) and joint_tensors.bitwise_equal(arrays))
            for arrays in shared_arrays
        ):
            matrices.append(JointMatrix(tuple(leaves), side))
        else:
            matrices += [JointMatrix((leaf,)) for leaf in leaves]
    return matrices


def _shared_side(factors: Factors) -> str:
    """Return the factor that a part shares with the others, "a" or "b"; "" for a full matrix."""
    parts = [parse_part_key(entry.keys[0]) for entry in factors.entries]
    return next((side for side, part in zip("ab", parts, strict=True) if part is not None and part.axis is None), "")
