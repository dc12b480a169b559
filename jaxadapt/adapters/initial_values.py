"""A new adapter's initial values and shardings.

Values are drawn, constant, or derived from the base weights. Each is created on its own devices, and its sharding
follows from the base weight's sharding.

base weight's sharding ──propagate_axes──► adapter tensor's sharding ──arrays.regions──► each device's region
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import zlib
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp

from jaxadapt.adapters.adapter import (
    SHARED_NODE,
    Site,
    Sites,
    adapted_modules,
    map_stack,
    shared_tensors,
    tensor_entries,
)
from jaxadapt.arrays import quantized, random_draws, regions
from jaxadapt.arrays.layout import FileLayout
from jaxadapt.arrays.tensor_source import float_dtype
from jaxadapt.configs.base import Config
from jaxadapt.core import paths
from jaxadapt.core.errors import AttachError, ConfigError, raise_listed
from jaxadapt.keymaps.keymap import PEFT_PREFIX, Match, sort_modules
from jaxadapt.keymaps.plan import PlanEntry
from jaxadapt.keymaps.weight import MethodTensor
from jaxadapt.methods.base import Method, Start

# ---------------------------------------------------------------- from the base weight to the adapter


def propagate_axes(match: Match, form: FileLayout, axes: Sequence[Any]) -> tuple[Any, ...]:
    """Return values for the axes of one adapter tensor, from values for the axes of its base weight.

    Args:
        axes: one value for each axis of the base leaf: mesh axes (of a `PartitionSpec`) or logical names. None means
            none, and missing values at the end count as None.

    Every axis that the tensor shares with the weight takes the weight's value, whatever the method: inputs in `lora_A`,
    outputs in `lora_B`, stacked layers, fused parts, experts. The keymap defines these axes. An axis of the method
    itself (the rank) has None: it is replicated. A fused axis with only some parts adapted has None too: its size is
    not the weight's. Shared axes have the weight's size, so a mesh that divides the weight divides the tensor.

    >>> from jaxadapt.keymaps.weight import Weight
    >>> match = Match("q.kernel", Weight("q.kernel", "q.weight", "d n h -> (n h) d"))
    >>> b = FileLayout((2, 4, 8), ("~r", "n", "h"), (("n", "h"), ("~r",)), ())
    >>> propagate_axes(match, b, ("fsdp", "tp"))
    (None, 'tp', None)
    """
    values = dict(itertools.zip_longest(match.weight.left, axes))
    if match.parts is not None:
        values[match.roles["batch"][0]] = None
    return tuple(values.get(name) for name in form.left)


@functools.lru_cache(maxsize=1024)
def _named_sharding(mesh: Any, axes: tuple[Any, ...]) -> jax.sharding.NamedSharding:
    """Return one object for all layers, so that JAX and the caches here recognize it without comparing."""
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))


def adapter_shardings(sites: Sequence[Site], base: Mapping[str, Any]) -> dict[str, jax.sharding.NamedSharding]:
    """Return `{path: sharding}` for an adapter's tensors from the `{leaf: sharding}` that the base has.

    Only a `NamedSharding` names axes. The adapter of a weight with another one (one device, or one that the compiler
    chose) is created where JAX puts new arrays, and moves to its base inside jit.
    """
    named = {leaf: sharding for leaf, sharding in base.items() if isinstance(sharding, jax.sharding.NamedSharding)}
    shardings = {
        entry.path: _named_sharding(at.mesh, propagate_axes(site.match, entry.form, tuple(at.spec)))
        for site in sites
        if (at := named.get(site.leaf)) is not None
        for entry in site.entries
    }
    for each in shared_tensors(sites) if named else ():  # all sites read them, so every device has them
        shardings[each.entry.path] = _named_sharding(next(iter(named.values())).mesh, ())
    return shardings


def requested_shardings(shardings: Any, sites: Sequence[Site]) -> dict[str, jax.sharding.Sharding]:
    """Return `{path: sharding}` from one sharding for all tensors, or a tree of them.

    Raises `AttachError` if a sharding is missing or does not fit.
    """
    shapes = {entry.path: entry.shape for _, entry in tensor_entries(sites)}
    if not isinstance(shardings, jax.sharding.Sharding | Mapping):
        raise AttachError(
            f"shardings: expected a Sharding, or a tree like the adapter's, found {type(shardings).__name__}"
        )
    requested = (
        dict.fromkeys(shapes, shardings) if isinstance(shardings, jax.sharding.Sharding) else paths.flatten(shardings)
    )
    problems = [f"{path}: the adapter has no such parameter" for path in requested if path not in shapes]
    for path, shape in shapes.items():
        sharding = requested.get(path)
        if not isinstance(sharding, jax.sharding.Sharding):
            problems.append(f"{path}: expected a Sharding, found {type(sharding).__name__}")
            continue
        try:
            sharding.shard_shape(shape)
        except ValueError as error:
            problems.append(f"{path} {shape}: {error}")
    raise_listed(
        AttachError, "shardings: expected one Sharding, or a tree with one that fits each parameter:", problems
    )
    return requested


# ---------------------------------------------------------------- initial values


BASE = "base"
"""In place of a dtype: each parameter has the dtype of the weight it adapts, as with `autocast_adapter_dtype=False`."""


@dataclasses.dataclass(frozen=True)
class _Wanted:
    """One tensor to create: of a site, or shared."""

    tensor: MethodTensor
    entry: PlanEntry
    site: Site | None
    method: Method


_Context = Mapping[str, Any]
"""The fields of `Start` that all tensors of an adapter have in common, by name."""


def _make_context(sites: Sequence[Site], whole: Sites | None) -> _Context:
    whole = whole or (sites if isinstance(sites, Sites) else None)

    @functools.cache
    def order_modules() -> Mapping[str, tuple[int, int]]:
        assert whole is not None, "only the sites of a whole adapter have an order"
        assert whole.keymap is not None
        targets = {module: site.target for site in whole if not site.method.copies for module in site.modules}
        return {name: (targets[name].in_size, targets[name].out_size) for name in sort_modules(whole.keymap, targets)}

    return {
        "modules": tuple(adapted_modules(sites)),
        "shared": {each.tensor.name: each.entry.shape for each in shared_tensors(sites)},
        "order_modules": order_modules,
    }


def init_values(
    config: Config,
    sites: Sequence[Site],
    key: Any,
    dtype: Any = None,
    abstract: bool = False,
    base: Mapping[str, Any] = MappingProxyType({}),
    base_shardings: Mapping[str, Any] = MappingProxyType({}),
    given: Mapping[str, Any] = MappingProxyType({}),
    whole: Sites | None = None,
) -> dict[str, Any]:
    """Return initial parameters, `{path: array}`, each drawn from its own fold of `key`; specs if `abstract`.

    The dtype is float32 by default, whatever the base's dtype is (PEFT's `autocast_adapter_dtype`). With `BASE` it is
    the base's. A copy of a leaf keeps the leaf's dtype, and a tensor of integers its own.

    Args:
        base: `{leaf: array}` of the base parameters, for tensors derived from them.
        base_shardings: `{leaf: sharding}` of the base parameters that have one; each tensor is created with its own.
        given: `{path: array}` of tensors that exist already and are not created.
        whole: all sites of the adapter, if `sites` are a part of them.
    """
    shardings = adapter_shardings(sites, base_shardings)
    use_base_dtype, dtype = dtype == BASE, new_dtype(dtype)
    wanted = [each for each in _list_tensors(sites) if each.entry.path not in given]
    without_values = {
        each.site.leaf: None
        for each in wanted
        if each.site and each.tensor.from_base and not has_value(base.get(each.site.leaf), abstract)
    }
    if without_values:
        raise_listed(
            AttachError,
            "these adapters start from the values of the base weights, but the base has only shapes here; pass base"
            " parameters with values:",
            without_values,
        )
    context = _make_context(sites, whole)

    def dtype_of(each: _Wanted) -> Any:
        w = None if each.site is None else base.get(each.site.leaf)
        if each.tensor.is_copy:
            return w.dtype if w is not None else dtype
        if each.tensor.dtype is not None:
            return jnp.dtype(each.tensor.dtype)
        return w.dtype if use_base_dtype and w is not None and jnp.issubdtype(w.dtype, jnp.floating) else dtype

    if abstract:
        return dict(given) | {
            each.entry.path: jax.ShapeDtypeStruct(
                each.entry.shape, dtype_of(each), sharding=shardings.get(each.entry.path)
            )
            for each in wanted
        }
    values = dict(given) | regions.put_on_devices(
        _draw_values(config, [each for each in wanted if not each.tensor.from_base], key, dtype, context), shardings
    )
    for each in wanted:
        path, site = each.entry.path, each.site
        if path not in values:
            assert site is not None, f"{path}: a shared tensor cannot start from one weight"
            w = jnp.asarray(quantized.to_dense(base[site.leaf]))
            derived = _derive_tensor(config, site, each, values, w, key, context)
            # Always copy, so that donating the adapter never donates the base's array.
            keeps_own = each.tensor.is_copy or each.tensor.dtype is not None
            copy = jnp.array(derived, dtype=dtype_of(each) if keeps_own else dtype, copy=True)
            values[path] = regions.move_to(copy, shardings[path]) if path in shardings else copy
    values |= {each.entry.path: values[each.entry.path].astype(dtype_of(each), copy=False) for each in wanted}
    return {each.entry.path: values[each.entry.path] for each in _list_tensors(sites)}


def _list_tensors(sites: Sequence[Site]) -> list[_Wanted]:
    wanted = [_Wanted(*each, site, site.method) for site in sites for each in site.bound]
    if isinstance(sites, Sites) and sites.shared:
        assert sites.method is not None
        wanted += [_Wanted(*each, None, sites.method) for each in sites.shared]
    return wanted


# ---------------------------------------------------------------- without the base


def new_dtype(dtype: Any) -> Any:
    """Return the dtype of new tensors: float32 for None and `BASE`. Raises `ConfigError` if it has no fractions."""
    is_default = dtype is None or (isinstance(dtype, str) and dtype == BASE)
    return jnp.dtype("float32") if is_default else float_dtype(dtype)


def _draw_values(config: Config, wanted: Sequence[_Wanted], key: Any, dtype: Any, context: _Context) -> dict[str, Any]:
    """Return random and constant values, and arrays that do not depend on the base, `{path: array}`."""
    draws: dict[str, tuple[random_draws.Draw, Sequence[int]]] = {}
    values: dict[str, Any] = {}
    scales: dict[str, list[float]] = {}
    forms = {each.entry.path: each.entry.form for each in wanted}
    try:
        for each in wanted:
            path = each.entry.path
            first = each.method.init(config, each.tensor, _start(each, key, 0, context))
            if not isinstance(first, random_draws.Draw):
                numbers = range(1, each.entry.form.count)
                others = (each.method.init(config, each.tensor, _start(each, key, i, context)) for i in numbers)
                has_entries = each.site is not None and each.method.torch_layout
                values[path] = _stack_entries(each.entry.form, [first, *others]) if has_entries else first
                continue
            draws[path] = first, each.entry.shape
            if each.site is not None and (by_tensor := _scales_by_tensor(config, each)) is not None:
                scales[path] = by_tensor
    except ConfigError as error:  # this start has no random draw; under tracing no values are needed
        if not regions.is_tracing():
            raise
        return {each.entry.path: random_draws.missing_array(each.entry.shape, dtype, str(error)) for each in wanted}
    values |= random_draws.draw_arrays(key, draws, dtype)
    unit_draws = {path: (dataclasses.replace(draws[path][0], scale=1.0), draws[path][1]) for path in scales}
    unit_values = random_draws.draw_arrays(key, unit_draws, jnp.float32)
    values |= {
        path: (array * forms[path].expand_by_tensor(scales[path])).astype(dtype) for path, array in unit_values.items()
    }
    return {path: forms[path].clear_gaps(array) for path, array in values.items()}


def _scales_by_tensor(config: Config, each: _Wanted) -> list[float] | None:
    """Return the scale of each tensor's draws if their ranks differ; None if all are drawn alike."""
    tensor = each.tensor
    sizes = [size for size in tensor.used_sizes or () if size]
    if len(set(sizes)) < 2:
        return None
    draws: list[random_draws.Draw] = []
    for size in sizes:
        own_sizes = tuple((name, size if name == "r" else value) for name, value in tensor.own)
        ranked = dataclasses.replace(each, tensor=dataclasses.replace(tensor, own=own_sizes))
        draw = each.method.init(config, ranked.tensor, _start(ranked, None, 0, {}))
        assert isinstance(draw, random_draws.Draw)
        draws.append(draw)
    if draws[0].kind == "constant" or len(set(draws)) == 1:
        return None
    scales = {size: draw.scale for size, draw in zip(sizes, draws, strict=True)}
    return [scales[rank] for rank in each.entry.form.ranks or ()]


def _start(each: _Wanted, key: Any, i: int, context: _Context, **more: Any) -> Start:
    """Return the circumstances of the values of one entry, or of the whole leaf if the method sees the model's."""
    site = each.site
    common: dict[str, Any] = {
        "make_key": lambda: (
            None
            if key is None
            else jax.random.fold_in(jax.random.fold_in(key, zlib.crc32(each.entry.path.encode())), i)
        ),
        **context,
        **more,
    }
    if site is None:
        return Start(each.entry.form.file_shape, **common)
    module = each.entry.keys[i] if i < len(each.entry.keys) else ""
    return Start(
        each.entry.form.shape_of(i) if site.method.torch_layout else each.entry.form.shape,
        site.fan_in,
        hparams=site.hparams.own if site.method.torch_layout else site.hparams,
        module=module.removeprefix(PEFT_PREFIX).removesuffix(each.tensor.suffix),
        target=site.target,
        **common,
    )


def _stack_entries(form: FileLayout, values: Iterable[Any]) -> Any:
    """Return the leaf whose entries have these values; a tensor of a smaller rank is filled with zeros."""

    def pad(row: Any) -> Any:
        return jnp.pad(row, [(0, full - size) for full, size in zip(form.file_shape, row.shape, strict=True)])

    return form.from_rows(jnp.stack([pad(jnp.asarray(row)) for row in values]))


# ---------------------------------------------------------------- from the base


def _derive_tensor(
    config: Config, site: Site, each: _Wanted, values: Mapping[str, Any], w: Any, key: Any, context: _Context
) -> Any:
    """Return the initial values of a tensor of a site that starts from the base weight `w`.

    Args:
        values: `{path: array}` of the tensors that precede it, and of the shared ones.
        context: the other sites and the shared tensors of the adapter.
    """
    form = each.entry.form
    params = {t.name: values[e.path] for t, e in site.bound if e.path in values}
    shared = {name: paths.join(SHARED_NODE, name) for name in context["shared"]}
    common = {name: values[path] for name, path in shared.items() if path in values}
    if not site.method.torch_layout:

        def change(applied: Any, w: Any) -> Any:
            axes = dataclasses.replace(applied.axes, parts=None)
            return site.method.init(
                config, each.tensor, _start(each, key, 0, context, w=applied.part(w), axes=axes, params=applied.params)
            )

        return form.clear_gaps(map_stack(site, change, {**params, **common}, w))
    weights = _weight_rows(site, form, w)
    rows = {t.name: e.form.to_rows(params[t.name]) for t, e in site.bound if t.name in params}
    starts = (
        _start(each, key, i, context, w=weights[i], params={**{name: x[i] for name, x in rows.items()}, **common})
        for i in range(form.count)
    )
    return _stack_entries(form, (site.method.init(config, each.tensor, start) for start in starts))


def _weight_rows(site: Site, form: FileLayout, w: Any) -> Any:
    """Return the adapted entries of a weight in PyTorch's layout, in the order of a tensor's entries."""
    layout, left = site.axes.torch, site.match.weight.left
    assert layout is not None
    if site.match.parts is not None:
        w = jnp.take(w, jnp.array(site.match.parts), left.index(site.match.roles["fused"][0]))
    split = tuple(left.index(form.left[axis]) for axis in form.split)
    factor = site.match.weight.factor(dict(zip(left, w.shape, strict=True)))
    return FileLayout(
        tuple(w.shape), left, layout.right, split, factor, layout.sizes, layout.shift, form.file_entries
    ).to_rows(w)


def has_value(leaf: Any, abstract: bool) -> bool:
    """Return True if a base leaf has values, or with `abstract` at least a shape."""
    return leaf is not None and (abstract or not isinstance(leaf, jax.ShapeDtypeStruct))
