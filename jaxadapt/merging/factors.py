"""Plain LoRA as pairs, from an adapter of a model or from PEFT's tensors, and back; and the numerics of pairs.

    Adapter │ PeftTensors ──pairs_of──► {module: Pair} ──arithmetic──► {module: Pair} ──build──► Adapter │ PeftTensors

A leaf that stacks layers or fuses parts is several modules. Weights of a base are read by module as well. Pure; runs
under jit.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxadapt.adapters import experts, selection
from jaxadapt.adapters.adapter import SHARED_NODE, Adapter, Site, Sites, make_file_plan
from jaxadapt.adapters.peft_tensors import PeftTensors, without_names
from jaxadapt.adapters.sites import sites_from_shapes, sites_of
from jaxadapt.arrays import regions
from jaxadapt.arrays.layout import RANK
from jaxadapt.arrays.tensor_source import as_source
from jaxadapt.configs import matching
from jaxadapt.configs.base import Config
from jaxadapt.configs.lora import LoraConfig, reasons_not_a_product
from jaxadapt.core import paths
from jaxadapt.core.errors import AttachError, ConfigError, KeyMapError, MismatchError, raise_listed, warn
from jaxadapt.keymaps import plan
from jaxadapt.keymaps.keymap import KeyMap
from jaxadapt.keymaps.weight import Modules
from jaxadapt.merging.pairs import Pair, PairKeys, lora_pairs, module_name, pair_keys, read_pairs, write_pairs
from jaxadapt.methods.base import Array, Shapes, at_least_float32, get_method

Plain = TypeVar("Plain", Adapter, PeftTensors)

_WRAPPERS = re.compile(r"(\.base_layer)+$")


# ---------------------------------------------------------------- adapters as pairs


def has_one_pair(site: Site) -> bool:
    """Return True if a site holds A and B as matrices, one pair for each module, and nothing else."""
    sides = [tensor.name.rpartition("_")[2] for tensor in site.tensors]
    are_matrices = sides == ["A", "B"] and all(len(entry.form.file_shape) == 2 for entry in site.entries)
    has_experts = bool(site.axes.batch_axes) and not site.match.roles["fused"]
    return are_matrices and not has_experts and site.match.weight.kind not in ("attention", "fused")


def only_pair(site: Site) -> Site:
    """Return a site of LoRA with A and B only, without DoRA's magnitude, KaSA's diagonal and the bias of B."""
    kept = [each for each in site.bound if each.tensor.name.rpartition("_")[2] in ("A", "B")]
    tensors, entries = zip(*kept, strict=True) if kept else ((), ())
    return dataclasses.replace(site, tensors=tensors, entries=entries)


def matrix_sizes(site: Site) -> tuple[int, int]:
    """Return (out, in) of a site's matrices."""
    shapes = {entry.path.rpartition("_")[2]: entry.form.file_shape for entry in site.entries}
    return shapes["B"][0], shapes["A"][1]


def site_keys(adapter_sites: Iterable[Site]) -> dict[str, PairKeys]:
    """Return `{module: keys of A and B}` of a plain LoRA's sites; a parameter in `target_parameters` has its own name.

    The keys are those of the plan. "attn[0/3]" is a module's part that is a leaf of its own.
    """
    keys: dict[str, PairKeys] = {}
    for site in adapter_sites:
        for stem, own in lora_pairs(key for entry in site.entries for key in entry.keys).items():
            name, bracket, part = stem.partition("[")
            if site.method.on_parameters:  # the name in the file is that of a wrapper
                name = f"{_WRAPPERS.sub('', name)}.{site.modules[0].rpartition('.')[2]}"
            keys[_without_prefix(name, site) + bracket + part] = own
    return keys


def _without_prefix(name: str, site: Site) -> str:
    """Return a name as the site's modules have it, without the rest of a keymap's own prefix."""
    module, modules = module_name(name), set(site.modules)
    ends = [known for known in modules if module.endswith(f".{known}")] if module not in modules else []
    return name[len(module) - len(max(ends, key=len)) :] if ends else name


def site_pairs(config: Config, adapter_sites: Sequence[Site], leaves: Mapping[str, Array]) -> dict[str, Pair]:
    """Return `{module: pair}` of the As and Bs of some sites, from `{path: array}`."""
    assert isinstance(config, LoraConfig)
    return read_pairs(make_file_plan(adapter_sites).encode(leaves), site_keys(adapter_sites), config)


def pair_leaves(adapter_sites: Sequence[Site], pairs: Mapping[str, Pair]) -> dict[str, Array]:
    """Return `{path: array}` of the As and Bs of some sites: the inverse of `site_pairs`."""
    tensors = write_pairs(pairs, site_keys(adapter_sites))
    return {
        entry.path: entry.decode(tensors) for entry in make_file_plan(adapter_sites).entries if entry.keys[0] in tensors
    }


def normalize(source: Plain) -> Plain:
    """Return PEFT's tensors without an adapter's name in their keys, and warn of copies of base weights."""
    if not isinstance(source, PeftTensors):
        return source
    if copies := [key for key in source.tensors if key.endswith(".base_layer.weight")]:
        warn(f"{source.source}: the result leaves out these copies of base weights:\n" + paths.bullets(copies))
    return without_names(source)


def pairs_of(source: Adapter | PeftTensors, label: str = "the adapter") -> dict[str, Pair]:
    """Return `{module: pair}` of a plain LoRA, in float32 at least.

    Raises `ConfigError` if ΔW is more than s·B·A, or if only a model tells the layout of PEFT's tensors;
    `MismatchError` for PEFT's tensors of modules that are no targets; `AttachError` for abstract parameters.
    """
    if not isinstance(source, Adapter | PeftTensors):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise AttachError(
            f"{label}: expected an Adapter (from extract, init or from_peft), found {type(source).__name__}"
        )
    config = source.config
    reasons = reasons_not_a_product(config)
    if reasons or not isinstance(config, LoraConfig):
        raise ConfigError(
            f"{label} is not a plain LoRA, s·B·A on its weights only ({'; '.join(reasons)})."
            " jaxadapt.merging.to_lora(adapter, r, params=base) makes a plain LoRA of any adapter that only changes"
            " weights"
        )
    if isinstance(source, PeftTensors):
        if config.target_parameters:
            raise ConfigError(
                f"{source.source}: cannot combine or resize these tensors, because they do not contain the layout of"
                " the parameters in target_parameters. Load the adapter into its model, and use jaxadapt.combine or"
                " jaxadapt.merging.resize_rank"
            )
        keys = pair_keys(source)
        is_listed = config.target_modules not in (None, matching.ALL_LINEAR)  # otherwise a model decides
        raise_listed(
            MismatchError,
            f"{source.source}: target_modules does not select these modules of the file, so PEFT ignores their tensors."
            " Add them to target_modules, or remove their tensors:",
            [module for module in keys if is_listed and not matching.is_target(config, module_name(module))],
        )
        read = _read(source, [key for own in keys.values() for key in own])
        return read_pairs({key: at_least_float32(jnp.asarray(x)) for key, x in read.items()}, keys, config)
    flat = source.flat()
    raise_listed(
        AttachError,
        f"{label} has shapes but no values; pass an adapter with arrays:",
        [path for path, x in flat.items() if isinstance(x, jax.ShapeDtypeStruct)],
    )
    return site_pairs(config, sites_of(source), {path: at_least_float32(jnp.asarray(x)) for path, x in flat.items()})


def _read(source: PeftTensors, keys: Iterable[str]) -> dict[str, Any]:
    """Return tensors of a file; float64 becomes float32 with a warning where JAX is without 64 bits."""
    read = {key: np.asarray(source.tensors[key]) for key in keys}
    wide = [key for key, x in read.items() if x.dtype == np.float64]
    if not wide or jnp.zeros(0, float).dtype == np.float64:
        return read
    warn(f"{source.source}: float64 tensors become float32, because jax_enable_x64 is off")
    return read | {key: read[key].astype(np.float32) for key in wide}


def build(pairs: Mapping[str, Pair], config: LoraConfig, like: Sequence[Plain], operation: str) -> Plain:
    """Return the adapter, or the PEFT tensors, of `{module: pair}` for a configuration of their scales.

    Args:
        like: adapters whose modules together are those of the result. Their dtype is that of the result.
        operation: the name of the operation, for messages.

    Raises `KeyMapError` if the keymaps of `like` contradict each other, `MismatchError` for values that overflow the
    dtype.
    """
    first = like[0]
    given: Sequence[Any] = like
    if isinstance(first, PeftTensors):
        keys: dict[str, PairKeys] = {}
        dtypes: list[np.dtype[Any]] = []
        for file in given:
            own = pair_keys(file)
            keys |= own
            specs = as_source(file.tensors).specs
            dtypes += [specs[key].dtype for pair in own.values() for key in pair]
        wide = [jax.dtypes.canonicalize_dtype(dtype if dtype.itemsize > 1 else np.float32) for dtype in dtypes]
        cast = regions.cast_tree(write_pairs(pairs, keys), jnp.result_type(*wide), operation)
        return dataclasses.replace(first, config=config, tensors={key: np.asarray(x) for key, x in cast.items()})
    shapes = _new_shapes(given, pairs)
    keymap = common_keymap((adapter.keymap for adapter in given), shapes)
    dtype = jnp.result_type(*(x.dtype for adapter in given for x in adapter.flat().values()))
    leaves = regions.cast_tree(pair_leaves(sites_from_shapes(config, keymap, shapes), pairs), dtype, operation)
    return dataclasses.replace(first, config=config, params=paths.unflatten(leaves), keymap=keymap)


def _new_shapes(adapters: Sequence[Adapter], pairs: Mapping[str, Pair]) -> dict[str, dict[str, tuple[int, ...]]]:
    """Return `{leaf: {tensor: shape}}` of the adapter of these pairs; `adapters` have its modules together."""
    parts: dict[str, set[int]] = {}
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    for site in (site for adapter in adapters for site in sites_of(adapter)):
        fused = {axis: range(len(site.match.weight.index_names(axis) or ())) for axis in site.match.roles["fused"]}
        adapted = parts.setdefault(site.leaf, set())
        adapted |= set(site.match.parts or next(iter(fused.values()), ()))
        sizes = {RANK: max(pairs[name].rank for name in site_keys([site])), **dict.fromkeys(fused, len(adapted))}
        own = shapes[site.leaf] = {}
        for entry in site.entries:
            axes = zip(entry.form.left, entry.shape, strict=True)
            own[entry.path.rpartition(".")[2]] = tuple(sizes.get(axis, size) for axis, size in axes)
    return shapes


def find_parts(adapters: Sequence[Mapping[str, Pair]]) -> dict[str, list[str]]:
    """Return `{matrix: modules}`: each module by itself, or the parts of one matrix in PyTorch together.

    Queries, keys and values of an `nn.MultiheadAttention` share one A there, and so do gate and up of experts (Llama
    4's share one B). An adapter from PEFT's file holds equal copies of the shared factor. Joined, they give PEFT's
    result, and the copies stay equal. After training here the copies differ, and each is a matrix by itself.

    Raises `AttachError` inside jit, where shared factors cannot be compared.
    """
    shared = {name: pair.shared for pairs in adapters for name, pair in pairs.items()}
    groups = paths.group((name.partition("[")[0] if side else name, name) for name, side in shared.items())
    for matrix, parts in [*groups.items()]:
        side = shared[parts[0]]
        if not side:
            continue
        factors = [[getattr(pairs[part], side) for part in filter(pairs.__contains__, parts)] for pairs in adapters]
        if regions.is_traced(*jax.tree.leaves(factors)):
            raise AttachError(
                "cannot compare these A and B tensors inside jit, so they cannot be joined to one matrix as in PEFT."
                " Call the function outside jit:\n" + paths.bullets(parts)
            )
        if not all(len(own) in (0, len(parts)) and experts.bitwise_equal(own) for own in factors):
            groups |= {part: [part] for part in groups.pop(matrix)}
    return groups


def join_parts(pairs: Mapping[str, Pair], parts_of: Mapping[str, Sequence[str]]) -> dict[str, Pair]:
    """Return the pairs of whole matrices, from `{matrix: modules}`."""
    joined: dict[str, Pair] = {}
    for matrix, parts in parts_of.items():
        if parts[0] in pairs:
            first = pairs[parts[0]]
            side, axis = ("b", -2) if first.shared == "a" else ("a", -1)
            whole = jnp.concatenate([getattr(pairs[part], side) for part in parts], axis)
            joined[matrix] = dataclasses.replace(first, **{side: whole})
    return joined


def split_parts(pairs: Mapping[str, Pair], parts_of: Mapping[str, Sequence[str]]) -> dict[str, Pair]:
    """Return the pairs of the modules: the inverse of `join_parts`."""
    split: dict[str, Pair] = {}
    for matrix, pair in pairs.items():
        side, axis = ("b", -2) if pair.shared == "a" else ("a", -1)
        pieces = jnp.split(getattr(pair, side), len(parts_of[matrix]), axis)
        split |= {p: dataclasses.replace(pair, **{side: x}) for p, x in zip(parts_of[matrix], pieces, strict=True)}
    return split


# ---------------------------------------------------------------- weights as matrices


def site_weights(keymap: KeyMap, site: Site, x: Array, power: int = 1) -> dict[str, Array]:
    """Return `{module: matrix (out, in)}` of a site's base weight, or of an array that lies like it.

    Args:
        power: of the keymap's factor between the leaf and PyTorch's weight: 1 for values, -1 for gradients.
    """
    (entry,) = plan.base_plan(keymap, {site.leaf: x.shape}).entries
    form = dataclasses.replace(entry.form, factor=entry.form.factor**power)
    numbers = _weight_numbers(entry)
    weights = {module: form.encode(x, numbers[module.removesuffix(".weight")]) for module in site.modules}
    return {module: w.T for module, w in weights.items()} if site.match.weight.is_stored_in_out else weights


def with_site_weights(keymap: KeyMap, site: Site, x: Array, weights: Mapping[str, Array]) -> Array:
    """Return a site's base weight with other matrices of its modules, in its dtype."""
    (entry,) = plan.base_plan(keymap, {site.leaf: x.shape}).entries
    numbers, wide = _weight_numbers(entry), at_least_float32(jnp.asarray(x))
    tensors = {key: entry.form.encode(wide, i) for i, key in enumerate(entry.keys)}
    for module, w in weights.items():
        key = entry.keys[numbers[module.removesuffix(".weight")]]
        tensors[key] = w.T if site.match.weight.is_stored_in_out else w
    return entry.decode(tensors).astype(x.dtype)


def _weight_numbers(entry: plan.PlanEntry) -> dict[str, int]:
    """Return `{module: number of its tensor}` of a base weight."""
    return {key.removesuffix("weight").rstrip("."): i for i, key in enumerate(entry.keys)}


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


# ---------------------------------------------------------------- numerics


def map_equal(function: Callable[[Any, Any], Any], items: Mapping[str, tuple[Any, Any]]) -> dict[str, Any]:
    """Return `{name: function(static, tree)}` from `{name: (static, tree)}`.

    `function` is compiled once for trees with equal static values and arrays of equal shapes. Inside jit these are one
    loop: a program of 160 matrices compiles in 1 s, and without the loop in 13 s. Outside of jit a loop would take
    longer to compile than it saves.
    """
    compute = jax.jit(function, static_argnums=0)
    groups: dict[Any, list[str]] = {}
    for name, (static, tree) in items.items():
        leaves, structure = jax.tree.flatten(tree)
        groups.setdefault((static, structure, *((x.shape, x.dtype) for x in leaves)), []).append(name)
    mapped: dict[str, Any] = {}
    for form, names in groups.items():
        trees = [items[name][1] for name in names]
        if len(names) > 1 and regions.is_traced(*jax.tree.leaves(trees)):
            stacked = jax.tree.map(lambda *arrays: jnp.stack(arrays), *trees)
            looped = jax.lax.map(functools.partial(function, form[0]), stacked)
            results = [jax.tree.map(lambda x, i=i: x[i], looped) for i in range(len(names))]
        else:
            results = [compute(form[0], tree) for tree in trees]
        mapped |= zip(names, results, strict=True)
    return {name: mapped[name] for name in items}


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
    return pad_rank(vh[..., :r, :], (u * s[..., None, :])[..., :r], r)


def pad_rank(a: Array, b: Array, r: int) -> tuple[Array, Array]:
    """Return A and B padded with zeros to rank r: the same product."""
    padding = r - a.shape[-2]
    unpadded = [(0, 0)] * (a.ndim - 2)
    return jnp.pad(a, [*unpadded, (0, padding), (0, 0)]), jnp.pad(b, [*unpadded, (0, 0), (0, padding)])


def truncation_error(s: Array, r: int) -> Array:
    """Return ‖the part dropped by truncation to rank r‖ / ‖the matrix‖ in the Frobenius norm; 0 for a zero matrix."""
    total = jnp.sqrt(jnp.sum(s**2, -1))
    return jnp.sqrt(jnp.sum(s[..., r:] ** 2, -1)) / jnp.where(total == 0, 1, total)


# ---------------------------------------------------------------- the plain LoRA of another method


def plain_config(config: Config, r: int) -> LoraConfig:
    """Return a plain LoRA configuration for the same modules of the same base."""
    names = (
        "task_type", "base_model_name_or_path", "revision", "target_modules", "exclude_modules", "auto_mapping",
        "layers_to_transform", "layers_pattern", "fan_in_fan_out",
    )  # fmt: skip
    return LoraConfig(r=r, lora_alpha=r, **{name: value for name in names if (value := config.get(name)) is not None})


def plain_sites(adapter: Adapter, sites: Sites, r: int, shapes: Shapes) -> tuple[LoraConfig, Sites]:
    """Return the configuration and the sites of a plain LoRA on the weights that an adapter changes.

    Args:
        sites: the adapter's sites.
        shapes: `{leaf: shape}` of the base.
    """
    config = plain_config(adapter.config, r)
    modules = sorted({module for site in sites for module in site.modules})
    if not all(matching.is_target(config, module) for module in modules):
        config = config.replace(target_modules=modules, exclude_modules=None)
    return config, selection.select_sites(config, adapter.keymap, {leaf: shapes[leaf] for leaf in adapter.sites})


def low_rank_form(adapter: Adapter, shapes: Shapes) -> Adapter | None:
    """Return a plain LoRA, float32 at least, with the factors that an adapter's method computes.

    Its rank is the method's `plain_rank`. It computes the same, up to rounding. None if the method does not compute
    factors, or not for all weights of the adapter: for embeddings, convolutions, experts and full copies.
    """
    sites = sites_of(adapter)
    rank = get_method(adapter.config).plain_rank(adapter.config)
    if rank is None or any(site.method.copies or site.match.weight.kind != "linear" for site in sites):
        return None
    config, made = plain_sites(adapter, sites, rank, shapes)
    if not all(has_one_pair(site) for site in made):
        return None
    leaves = {path: at_least_float32(jnp.asarray(x)) for path, x in adapter.flat().items()}
    shared = {name: leaves[paths.join(SHARED_NODE, name)] for name in adapter.shared}
    tensors = paths.nest(
        (key.removeprefix(adapter.keymap.prefix).removesuffix(tensor.suffix), tensor.name, row)
        for site in sites
        for tensor, entry in site.bound
        for key, row in zip(entry.keys, entry.form.to_rows(leaves[entry.path]), strict=True)
    )
    by_leaf = {site.leaf: site for site in sites}
    pairs: dict[str, Pair] = {}
    with jax.default_matmul_precision("highest"):
        for plain in made:
            site: Any = by_leaf[plain.leaf]
            for module in plain.modules:
                own = site.method.own(adapter.config, dataclasses.replace(site.target, modules=Modules((module,))))
                a, b = site.method.factors(own, shared | tensors.get(module, {}), matrix_sizes(plain))
                pairs[module] = Pair(*pad_rank(a, b, rank), 1.0)
    return Adapter(config, paths.unflatten(pair_leaves(made, pairs)), adapter.keymap)
