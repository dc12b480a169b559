"""Attach adapters to NNX models in place.

Each adapted layer gets a run-time subclass of its class, and the adapter's variables become attributes of the layer.
The paths, the values and the sharing of base parameters do not change. `delete` undoes it.

    layer.kernel                       as before
    layer.lora["default"]["kernel"]    {"lora_A": AdapterParam, "lora_B": AdapterParam}
    layer.active_adapters              ("default",)

The adapters of the rows of a batch are variables beside the weights, which the model's scans slice.
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.nnx import graphlib
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

from jaxadapt.adapters import initial_values
from jaxadapt.adapters.adapter import SHARED_NODE, Adapter, Recipe, Site, collection_name, shared_tensors
from jaxadapt.arrays import random_draws, regions
from jaxadapt.arrays.layout import Axes
from jaxadapt.core import paths
from jaxadapt.core.errors import AttachError, raise_listed
from jaxadapt.keymaps import plan
from jaxadapt.methods.applied import refuse_rivals
from jaxadapt.methods.base import Method
from jaxadapt.methods.registry import get_method
from jaxadapt.models.call import RowLayout, Rows
from jaxadapt.models.nnx import graph, survey
from jaxadapt.models.nnx.graph import (
    AdapterParam,
    FrozenParam,
    LayerNumber,
    Owner,
    RowParam,
    SharedAdapterParam,
    SharedFrozenParam,
    SharedRowParam,
)
from jaxadapt.models.nnx.layer import (
    ACTIVE,
    ROWS,
    Attached,
    adapted_class,
    adapters_on,
    attached_to,
    prepare_model,
    restore_attention,
)

# ---------------------------------------------------------------- attach


Layers = Sequence[tuple[str, Any]]


# ---------------------------------------------------------------- shardings of parameters


def _sharding_metadata(site: Site, entry: plan.PlanEntry, base: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metadata from which `nnx.get_partition_spec` derives the sharding of an adapter parameter."""
    spec = base.get("out_sharding")
    if isinstance(spec, NamedSharding):
        spec = spec.spec
    if not spec or not isinstance(spec, tuple | PartitionSpec):
        return {}
    inherited = {key: base[key] for key in ("sharding_rules", "mesh", nnx.PARTITION_NAME) if key in base}
    return {
        **inherited,
        "out_sharding": initial_values.propagate_axes(site.match, entry.form, tuple(spec)),
        # The values are already placed, or the surrounding trace places them.
        "eager_sharding": False,
    }


# ---------------------------------------------------------------- attaching and detaching


def require_stream(rngs: Any, name: str) -> None:
    """Raise `AttachError` unless `rngs` is an `nnx.Rngs` with the stream `name` or "default"."""
    if not (isinstance(rngs, nnx.Rngs) and {name, "default"} & set(rngs)):
        raise AttachError(f'rngs: expected nnx.Rngs with a stream "{name}" or "default", such as nnx.Rngs(0)')


def draw_params_key(rngs: nnx.Rngs) -> Any:
    """Return the key that `rngs.params()` returns, and advance the stream as it does.

    Flax compiles two programs for that call in every new process. Outside jit, this function compiles none.
    """
    stream: Any = rngs["params"]
    if type(stream) is not nnx.RngStream or regions.is_tracing():
        return stream()
    key: Any = stream.key.get_value()
    count: Any = stream.count.get_value()
    concrete = isinstance(count, jax.Array) and not isinstance(key, Tracer) and not isinstance(count, Tracer)
    if not concrete or key.shape or count.committed:  # also several keys, or a count committed to a device
        return stream()
    n = int(count)
    stream.count[...] = jax.device_put(np.uint32((n + 1) % 2**32))
    return random_draws.fold_in(key, n)


def require_current_trace(modules: Iterable[Any]) -> None:
    """Raise `AttachError` for a model created outside the current trace, because its layers cannot change class there.

    A Flax transform passes a copy of the model to the function and writes the copy's changes back to the model
    afterwards. It does not write back the classes of layers.
    """
    remedy = (
        ", so its layers cannot be changed here. Attach, load, delete or detach outside, where the model was created;"
        " or create the model inside, nnx.jit(lambda: jaxadapt.adapt(Net(nnx.Rngs(0)), config, rngs=nnx.Rngs(1)))();"
        " or return an adapted copy, jaxadapt.adapt(nnx.clone(model), …)"
    )
    stacks = graphlib.GRAPH_CONTEXT.update_context_stacks.values()
    arguments = [context.inner_ref_outer_index for stack in stacks for context in stack]
    for module in modules:
        if any(nodes is not None and module in nodes for nodes in arguments):
            raise AttachError("this model was passed to nnx.jit, nnx.grad or another Flax transform" + remedy)
        if not vars(module)["_pytree__state"].trace_state.is_valid():
            raise AttachError("this model was created outside the function that JAX is tracing" + remedy)


def attach(
    model: nnx.Module,
    recipe: Recipe,
    adapter_sites: Sequence[Site],
    name: str,
    values: Mapping[str, Any],
    rngs: nnx.Rngs | None = None,
    walk: graph.ModelWalk | None = None,
) -> None:
    """Attach an adapter's values (`{path: array or spec}`) to a model's layers, and make it the only active adapter.

    Raises `AttachError`, listing all problems, for layers that cannot carry the adapter.
    """
    walk = graph.walk_model(model) if walk is None else walk
    owners = walk.leaves
    require_current_trace(module for module, _ in owners.values())
    collection = collection_name(recipe.config)
    saved = {site.leaf for site in adapter_sites if site.method.copies and site.hparams.because == "modules_to_save"}
    problems = [*survey.find_obstacles(walk, [site.leaf for site in adapter_sites], saved).values()]
    problems += _find_misfits(adapter_sites, owners, collection)
    raise_listed(AttachError, "these layers cannot carry the adapter:", problems)
    if rngs is not None and any(site.method.dropout(site.hparams) for site in adapter_sites):
        require_stream(rngs, "dropout")
    method = get_method(recipe.config)
    whole = Attached(recipe, method, Axes((), ()), None)
    shared = {
        each.tensor.name: (SharedAdapterParam if each.tensor.trained else SharedFrozenParam)(
            values[each.entry.path], adapter=whole, whole=each.entry.shape
        )
        for each in shared_tensors(adapter_sites)
    }
    if method.scope == "model":
        require_current_trace([model])
        prepare_model(model, collection, method)
        _hold_tensors(model, collection, name, SHARED_NODE, shared)
        _apply_adapters(model, name)
    for site in adapter_sites:
        module, attr = owners[site.leaf]
        tensors = _site_variables(recipe, site, values, vars(module)[attr])
        _hold_tensors(module, collection, name, attr, tensors if site.method.copies else tensors | shared)
        _hold_dropout(module, name, site, rngs)
        _apply_adapters(module, name)
    _set_active(adapted_layers(walk), (name,))


def _hold_tensors(module: nnx.Module, collection: str, name: str, leaf: str, tensors: dict[str, Any]) -> None:
    """Make the tensors of one adapter at one leaf attributes of a module."""
    # nnx.jit walks the model at every call, and nnx.Dict takes twice the time of a plain dict marked as data.
    if collection not in vars(module):
        setattr(module, collection, nnx.data({}))
    vars(module)[collection].setdefault(name, {})[leaf] = tensors


def _hold_dropout(module: nnx.Module, name: str, site: Site, rngs: nnx.Rngs | None) -> None:
    """Give a layer the dropout of an adapter, if the adapter has some."""
    rate = site.method.dropout(site.hparams)
    if not rate:
        return
    if survey.DROPOUT not in vars(module):
        setattr(module, survey.DROPOUT, nnx.Dict())
    vars(module)[survey.DROPOUT][name] = _make_dropout(rate, rngs, site.stack_sizes)


def _site_variables(recipe: Recipe, site: Site, values: Mapping[str, Any], base: nnx.Variable[Any]) -> dict[str, Any]:
    """Return a site's tensors and layer numbers as variables, for the layer that holds `base`."""
    attached, metadata = Attached(recipe, site.method, site.axes, site.hparams), base.get_metadata()
    tensors = {
        t.name: (AdapterParam if t.trained else FrozenParam)(
            values[e.path], adapter=attached, **_sharding_metadata(site, e, metadata)
        )
        for t, e in zip(site.tensors, site.entries, strict=True)
    }
    if not site.data:
        return tensors
    # The layer numbers are replicated over the devices of the base weight.
    sharding = regions.sharding_of(base.get_value())
    shardings = {} if sharding is None else dict.fromkeys(site.data, NamedSharding(sharding.mesh, PartitionSpec()))
    return tensors | {name: LayerNumber(x) for name, x in regions.put_on_devices(site.data, shardings).items()}


def _apply_adapters(module: nnx.Module, name: str) -> None:
    install_adapters(module)
    if ACTIVE not in vars(module):
        setattr(module, ACTIVE, (name,))


def _find_misfits(adapter_sites: Sequence[Site], owners: Mapping[str, Owner], collection: str) -> list[str]:
    """Return a message for each site whose module cannot hold the adapter."""
    scaled = [site.leaf for site in adapter_sites if site.effects.bias == "scales"]
    count = collections.Counter(id(owners[leaf][0]) for leaf in scaled)
    shared = [leaf for leaf in scaled if count[id(m := owners[leaf][0])] > 1 and "bias" in vars(m)]
    problems = [f"{leaf}: its module has one bias for several adapted weights" for leaf in shared]
    problems += survey.list_contradictions(adapter_sites, owners)
    for site in adapter_sites:
        if collection in (attributes := vars(owners[site.leaf][0])) and ACTIVE not in attributes:
            problems.append(f"{site.leaf}: its module already has an attribute {collection!r} of its own")
    return problems


def _make_dropout(rate: float, rngs: nnx.Rngs | None, sizes: Sequence[int]) -> nnx.Dropout:
    """Return a dropout layer with one random state per stacked layer, stacked on axis 0 (a key has no other axis)."""
    if rngs is None:
        return nnx.Dropout(rate, deterministic=True)
    dropout = nnx.Dropout(rate, rngs=rngs)
    stream: Any = dropout.rngs
    if sizes:
        shape = tuple(sizes)
        stream.key.set_value(jax.random.split(stream.key.get_value(), shape))
        stream.count.set_value(jnp.broadcast_to(stream.count.get_value(), shape))
    return dropout


def install_adapters(layer: nnx.Module) -> None:
    """Change a layer's class to the run-time subclass that applies its adapters and dequantises its weights."""
    if not isinstance(type(layer), survey.AdaptedMeta):
        survey.set_class(layer, adapted_class(type(layer)))


def uninstall_adapters(layer: nnx.Module) -> None:
    """Restore a layer's own class, unless it has adapters or quantised weights."""
    if (
        isinstance(type(layer), survey.AdaptedMeta)
        and vars(layer).keys().isdisjoint((ACTIVE, ROWS))
        and not survey.quantized_params(layer)
    ):
        survey.set_class(layer, survey.base_class(layer))


def adapted_layers(model: graph.Model) -> list[tuple[str, Any]]:
    """Return `(path, layer)` for every adapted layer."""
    modules = graph.walk_model(model).modules
    return [
        (path, node) for path, node in modules if isinstance(type(node), survey.AdaptedMeta) and ACTIVE in vars(node)
    ]


def activate(model: graph.Model, names: Sequence[str]) -> None:
    """Make these adapters, and no others, active in every adapted layer.

    Raises `AttachError` for a name that no adapter has.
    """
    walk = graph.walk_model(model)
    layers, present = adapted_layers(walk), walk.adapters
    unknown = [name for name in names if name not in present]
    if unknown:
        raise AttachError(f"no adapter is called {', '.join(map(repr, unknown))}; this model has {list(present)}")
    _set_active(layers, tuple(names))


def _set_active(layers: Layers, names: tuple[str, ...]) -> None:
    if len(names) > 1:
        methods_by_leaf: dict[str, dict[str, Method]] = {}
        for path, layer in layers:
            for name, leaf, tensors in adapters_on(layer, names):
                methods_by_leaf.setdefault(paths.join(path, leaf), {})[name] = attached_to(tensors).method
        refuse_rivals(methods_by_leaf)
    for _, layer in layers:
        if getattr(layer, ACTIVE) != names:
            setattr(layer, ACTIVE, names)


def active_names(model: graph.Model) -> tuple[str, ...]:
    """Return the names of a model's active adapters, each once."""
    return tuple(dict.fromkeys(name for _, layer in adapted_layers(model) for name in getattr(layer, ACTIVE)))


def delete(model: graph.Model, *names: str) -> None:
    """Remove these adapters, and restore the class of each layer that has no adapter left."""
    walk = graph.walk_model(model)
    layers = adapted_layers(walk)
    require_current_trace(layer for _, layer in layers)
    _set_active(layers, tuple(name for name in active_names(walk) if name not in names))
    for _, layer in layers:
        attributes = vars(layer)
        for name, attr in itertools.product(names, (*graph.held_adapters(layer), survey.DROPOUT)):
            if name in attributes.get(attr, ()):
                del attributes[attr][name]
                if not attributes[attr]:
                    delattr(layer, attr)
        if not graph.held_adapters(layer):
            delattr(layer, ACTIVE)
            uninstall_adapters(layer)
    restore_attention(walk.model)


# ---------------------------------------------------------------- extracting and injecting values


def extract(tree: graph.Tree, name: str) -> Adapter:
    """Return the adapter called `name` as a value.

    Raises `AttachError` if the tree has no such adapter, or if parts of the adapter are missing.
    """
    adapters = graph.adapter_variables(tree)
    if name not in adapters:
        merged = (
            ". If merge merged it, it is in the weights: save it from the model before the merge, or write the merged"
            " weights with jaxadapt.export.export_base"
        )
        raise AttachError(
            f"there is no adapter {name!r} here; found {sorted(adapters) or 'none'}{'' if adapters else merged}"
        )
    variables = adapters[name]
    recipe = _recipe_of(variables, name)
    values = graph.values_of(variables)
    adapter = Adapter(recipe.config, paths.unflatten(values), recipe.keymap)
    leaves = {path.rpartition(".")[0] for path in values}
    if leaves != {SHARED_NODE}:  # the trained parameters of a method whose sites have none
        recipe.check_complete(len(leaves - {SHARED_NODE}), name)
    return adapter


def _recipe_of(variables: Mapping[str, Any], name: str) -> Recipe:
    """Return the recipe that all these parameters carry; raise `AttachError` if they carry several."""
    carried = {id(recipe := var.get_metadata("adapter").recipe): recipe for var in variables.values()}
    recipes = set(carried.values())  # comparing them takes longer than finding that nearly all are one object
    if len(recipes) > 1:
        raise AttachError(
            f"cannot extract the adapter {name!r}: its parameters carry {len(recipes)} different configurations."
            " Delete it and attach it again"
        )
    return recipes.pop()


# ---------------------------------------------------------------- rows


def attach_rows(model: nnx.Module, layout: RowLayout) -> None:
    """Let the layers of these sites expect a route; raise `AttachError` for layers that cannot."""
    walk = graph.walk_model(model)
    leaves = [site.leaf for site in layout.sites]
    require_current_trace(module for module, _ in walk.leaves.values())
    if missing := [leaf for leaf in dict.fromkeys(leaves) if leaf not in walk.leaves]:
        raise AttachError("the bank is for another base; the model lacks these weights:\n" + paths.bullets(missing))
    problems = list(survey.find_obstacles(walk, leaves).values())
    owners = [walk.leaves[leaf][0] for leaf in leaves]
    problems += [f"{p}: the model has a bank already" for p, m in walk.modules if ROWS in vars(m) and m in owners]
    raise_listed(AttachError, "these layers cannot take a bank:", problems)
    for leaf in leaves:
        module, attr = walk.leaves[leaf]
        if ROWS not in vars(module):
            setattr(module, ROWS, nnx.data({}))
        vars(module)[ROWS][attr] = {}
        install_adapters(module)


def detach_rows(model: nnx.Module) -> None:
    """Restore the layers that `attach_rows` changed."""
    for _, module in graph.walk_model(model).modules:
        if ROWS in vars(module):
            delattr(module, ROWS)
            uninstall_adapters(module)


def set_rows(model: nnx.Module, rows: Rows | None) -> None:
    """Store the tensors of a batch's rows beside the weights, or remove them."""
    leaves: Mapping[str, Any] = graph.walk_model(model).leaves
    banked = {leaf: vars(m)[ROWS][attr] for leaf, (m, attr) in leaves.items() if attr in vars(m).get(ROWS, {})}
    for of_module in banked.values():
        of_module.clear()
    if rows is None:
        return
    if missing := [site.leaf for site in rows.layout.sites if site.leaf not in banked]:
        raise AttachError("the model has no bank at these weights; call attach first:\n" + paths.bullets(missing))
    if more := banked.keys() - {site.leaf for site in rows.layout.sites}:
        raise AttachError("the route is of another bank, which lacks these weights:\n" + paths.bullets(sorted(more)))
    shared = [{name: SharedRowParam(x, whole=x.shape) for name, x in of.items()} for of in rows.shared]
    for number, (site, arrays) in enumerate(zip(rows.sites, rows.arrays, strict=True)):
        own = {name: RowParam(x, row_site=site) for name, x in arrays.items()}
        banked[site.leaf][str(number)] = own if site.shared is None else own | shared[site.shared]
