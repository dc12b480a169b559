"""Attach adapters to NNX models in place.

Each adapted layer gets a run-time subclass of its class, and the adapter's variables become attributes of the layer.
The paths, the values and the sharing of base parameters do not change. `delete` undoes it.

    layer.kernel                       as before
    layer.lora["default"]["kernel"]    {"lora_A": AdapterParam, "lora_B": AdapterParam}
    layer.active_adapters              ("default",)

The adapters of the rows of a batch are variables beside the weights, which the model's scans slice.

Abstract calls of the model show how its layers use their weights, and which uses no adapter can follow.
"""

from __future__ import annotations

import collections
import functools
import itertools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
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
from jaxadapt.arrays.products import contradiction_message, transposed_axes
from jaxadapt.core import paths
from jaxadapt.core.errors import AttachError, raise_listed
from jaxadapt.keymaps import plan
from jaxadapt.methods.applied import refuse_rivals
from jaxadapt.methods.base import Method
from jaxadapt.methods.prompt import BaseSizes
from jaxadapt.methods.registry import get_method
from jaxadapt.models import call, prompts, tracing
from jaxadapt.models.nnx import graph
from jaxadapt.models.nnx.layer import (
    ACTIVE,
    DROPOUT,
    ROWS,
    AdaptedMeta,
    Attached,
    TracedAxes,
    adapted_class,
    adapters_on,
    attached_to,
    base_class,
    bind_layer,
    custom_leaves,
    entry_points,
    layer_state,
    list_contradictions,
    mark_attention,
    open_copy,
    plain_view,
    quantized_params,
    set_class,
)

_REWRITERS = (nnx.WeightNorm, nnx.SpectralNorm)
"""Modules that change the parameters inside them, adapters included, at every call."""

# ---------------------------------------------------------------- the model's leaves


def find_obstacles(walk: graph.ModelWalk, leaves: Sequence[str], saved: Collection[str] = ()) -> dict[str, str]:
    """Return `{leaf: reason}` for the given leaves that cannot carry an adapter of any method.

    Args:
        saved: the leaves that `modules_to_save` copies. Their modules must not keep state besides parameters.
    """
    problems: dict[str, str] = {}
    for path, node in walk.modules:
        if isinstance(node, _REWRITERS):
            inside = [leaf for leaf in leaves if not path or leaf.startswith(f"{path}.")]
            problem = f"{type(node).__name__} rewrites the parameters inside it at every call"
            problems |= {leaf: f"{leaf}: {problem}" for leaf in inside}
    holders = _list_holders(walk, leaves)
    for leaf in leaves:
        module, attr = walk.leaves[leaf]
        other_paths = [path for path in holders[id(vars(module)[attr])] if path != leaf]
        if other_paths:  # an adapter would apply in one of the modules, but a merged weight in all of them
            problem = f"{leaf}: several modules hold this weight, also as {', '.join(other_paths)}"
            problems[leaf] = f"{problem}; share the module instead of the weight, or leave it out"
        state = layer_state(module).values() if leaf in saved else ()
        if types := sorted({type(v).__name__ for v in state if not isinstance(v, nnx.RngState)}):
            name = base_class(module).__name__
            problems[leaf] = f"{leaf}: {name} keeps state besides its parameters ({', '.join(types)}); leave it out"
    return problems


def _list_holders(walk: graph.ModelWalk, leaves: Sequence[str]) -> dict[int, list[str]]:
    """Return `{id of a leaf's parameter: every path of an attribute that holds it}`."""
    owners = [walk.leaves[leaf] for leaf in leaves]
    holders: dict[int, list[str]] = {id(vars(module)[attr]): [] for module, attr in owners}
    for path, node in walk.modules:
        for attr, var in vars(node).items():
            if id(var) in holders:
                holders[id(var)].append(paths.join(path, attr))
    return holders


# ---------------------------------------------------------------- abstract call


Observe = Callable[[str, str, call.Layer, call.Args, Mapping[str, Any]], Mapping[str, Any]]
"""`observe(leaf, attribute, layer, args, kwargs)` sees a call of a leaf's layer, and returns parameters to replace."""


def instrument(
    model: nnx.Module, leaves: Sequence[str], observe: Observe, args: call.Args
) -> tuple[Callable[[Mapping[str, Any]], list[Any]], dict[str, Any]]:
    """Return `(f, inputs)`, where `f(inputs)` calls a copy of the model and lets `observe` see calls of its layers.

    Args:
        leaves: the leaves whose layers are observed.

    `inputs` holds every array of the model by its path, and the arrays among `args`. The other arguments are constants.
    """
    copy, variables = open_copy(model)
    values, tree = jax.tree.flatten(tuple(args))
    arrays = {f"~{i}": v for i, v in enumerate(values) if isinstance(v, jax.Array | jax.ShapeDtypeStruct)}

    def f(inputs: Mapping[str, Any]) -> list[Any]:
        called = copy(inputs)
        for leaf, (module, attr) in graph.walk_model(called).leaves.items():
            if leaf in leaves:
                base = base_class(module)
                body = {name: _observed(leaf, attr, base, f, observe) for name, f in entry_points(base).items()}
                set_class(module, type(base.__name__, (base,), body))
        outputs = called(*tree.unflatten([inputs.get(f"~{i}", v) for i, v in enumerate(values)]))
        return [x for x in jax.tree.leaves(outputs) if isinstance(x, jax.Array)]

    return f, variables | arrays


def _observed(leaf: str, attr: str, base: type[nnx.Module], f: Callable[..., Any], observe: Observe) -> Any:
    """Return the method that runs in place of a layer's own."""

    def method(self: nnx.Module, *args: Any, **kwargs: Any) -> Any:
        values = observe(leaf, attr, bind_layer(self, base, f), args, kwargs)
        return f(plain_view(self, base, values), *args, **kwargs)

    return method


def trace_axes(
    model: nnx.Module, walk: graph.ModelWalk, args: call.Args, leaves: Sequence[str], required: bool
) -> tuple[dict[str, TracedAxes], set[str]]:
    """Trace the axis roles of custom layers' leaves in one abstract call of the model.

    Returns `{leaf: traced axes}`, and the leaves that are used but have no single set of roles. Leaves that the call
    does not use are in neither.

    Raises `AttachError` if `required` and the roles of any leaf are not found, listing all such leaves.
    """
    blocked = find_obstacles(walk, leaves)
    raise_listed(AttachError, "these layers cannot carry the adapter:", blocked.values() if required else ())
    leaves = [leaf for leaf in leaves if leaf not in blocked]
    if not leaves:
        return {}, set()
    traced: dict[str, TracedAxes] = {}
    problems: dict[str, str] = {}

    def observe(
        leaf: str, attr: str, layer: call.Layer, args: call.Args, kwargs: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        weight = layer.params[attr]
        try:
            found = tracing.uses(functools.partial(layer.output, **kwargs), {attr: weight}, *args)[attr]
            seen = TracedAxes(call.infer_axes(found, attr), tuple(weight.shape))
            if traced.setdefault(leaf, seen) != seen:
                problems[leaf] = f"one call shows {traced[leaf]}, another {seen}"
        except AttachError as error:
            problems[leaf] = str(error)
        return {}

    jax.eval_shape(*instrument(model, leaves, observe, args))
    not_called = "its module's __call__ never ran with these inputs"
    unclear = {leaf: problems.get(leaf, not_called) for leaf in leaves if leaf in problems or leaf not in traced}
    raise_listed(
        AttachError,
        "the axis roles of these weights could not be traced:",
        (f"{leaf}: {reason}" for leaf, reason in unclear.items() if required),
    )
    return {leaf: axes for leaf, axes in traced.items() if leaf not in unclear}, set(problems)


def record_uses(model: nnx.Module, adapted: Mapping[str, tracing.Hook], args: call.Args) -> dict[str, str]:
    """Return `{leaf: note}` on how the adapter follows each custom layer's weight in one abstract call of the model."""
    notes: dict[str, str] = {}
    owners = graph.walk_model(model).leaves
    leaves = custom_leaves(owners, adapted)

    def observe(
        leaf: str, attr: str, layer: call.Layer, args: call.Args, kwargs: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        notes[leaf] = call.describe(layer.name, layer, {attr: adapted[leaf]}, args, kwargs)[attr]
        return {}

    jax.eval_shape(*instrument(model, leaves, observe, args))
    return {leaf: f"{base_class(owners[leaf][0]).__name__}, not called with these inputs" for leaf in leaves} | notes


def check_calls(
    model: nnx.Module,
    adapted: Mapping[str, tracing.Hook],
    dropped: Sequence[str],
    forward: Sequence[str],
    args: call.Args,
) -> None:
    """Raise `AttachError` for uses that an adapter cannot follow in one abstract call of the model.

    These are a weight read outside its own module's call, dropout on a weight whose use is not a product along its
    axis roles, and a keymap entry that swaps a layer's inputs and outputs.

    Args:
        dropped: the leaves whose adapter has dropout.
        forward: the leaves whose axis roles are checked against their layer's products.
    """
    stray_uses: dict[str, str] = {}
    products: dict[str, list[tracing.Contraction]] = {}
    shapes: dict[str, tuple[int, ...]] = {}

    def observe(
        leaf: str, attr: str, layer: call.Layer, args: call.Args, kwargs: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        weight = layer.params[attr]
        # The module reads a copy, so only reads outside its call keep the weight itself live.
        alias = jnp.zeros(weight.shape, weight.dtype)
        if not layer.known:
            uses = tracing.uses(functools.partial(layer.output, **kwargs), {attr: alias}, *args)[attr]
            shapes[leaf] = weight.shape
            products.setdefault(leaf, []).extend(use for use in uses if isinstance(use, tracing.Contraction))
            unfollowed = call.unfollowed_uses(uses, adapted[leaf])
            if leaf in dropped and unfollowed:
                stray_uses[leaf] = ", ".join(unfollowed)
        return {attr: alias}

    live = call.live_weights(*instrument(model, list(adapted), observe, args))
    own = {
        leaf: transposed_axes(adapted[leaf].axes, products[leaf], shapes[leaf]) for leaf in forward if leaf in products
    }
    raise_listed(
        AttachError,
        "these layers cannot carry the adapter:",
        (
            f"{leaf}: {contradiction_message(adapted[leaf].axes, axes)}"
            for leaf, axes in own.items()
            if axes is not None
        ),
    )
    call.refuse_reads_outside(leaf for leaf in adapted if live[leaf])
    raise_listed(
        AttachError,
        "dropout cannot be applied, because these layers use their weight outside a supported product, where only"
        " an effective weight can replace it:",
        (f"{leaf}: {reason}" for leaf, reason in stray_uses.items()),
        "\nSet the dropout of the configuration to 0.0, or exclude them with exclude_modules",
    )


def measure_base(model: nnx.Module, example: Sequence[Any]) -> BaseSizes:
    """Return the sizes of a base model that a trace of its call with these inputs shows."""
    copy: Any = nnx.clone(model)
    mark_attention(copy)
    return prompts.measure_base(*instrument(copy, (), lambda *_: {}, tuple(example)))


# ---------------------------------------------------------------- shardings of parameters


def _sharding_metadata(site: Site, entry: plan.PlanEntry, base: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metadata from which `nnx.get_partition_spec` derives the sharding of an adapter parameter."""
    spec = base.get("out_sharding")
    if isinstance(spec, NamedSharding):
        spec = spec.spec
    if not spec or not isinstance(spec, tuple | PartitionSpec):
        return {}
    return {
        **{key: base[key] for key in ("sharding_rules", "mesh", nnx.PARTITION_NAME) if key in base},
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
    contexts = itertools.chain.from_iterable(graphlib.GRAPH_CONTEXT.update_context_stacks.values())
    arguments = [context.inner_ref_outer_index for context in contexts]
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
    problems = [*find_obstacles(walk, [site.leaf for site in adapter_sites], saved).values()]
    problems += _find_misfits(adapter_sites, owners, collection)
    raise_listed(AttachError, "these layers cannot carry the adapter:", problems)
    if rngs is not None and any(site.method.dropout(site.hparams) for site in adapter_sites):
        require_stream(rngs, "dropout")
    method = get_method(recipe.config)
    whole = Attached(recipe, method, Axes((), ()), None)
    shared = {
        each.tensor.name: (graph.SharedAdapterParam if each.tensor.trained else graph.SharedFrozenParam)(
            values[each.entry.path], adapter=whole, whole=each.entry.shape
        )
        for each in shared_tensors(adapter_sites)
    }
    if method.scope == "model":
        require_current_trace([model])
        _hold(model, collection, name, SHARED_NODE, shared)
    for site in adapter_sites:
        module, attr = owners[site.leaf]
        tensors = _site_variables(recipe, site, values, vars(module)[attr])
        _hold(module, collection, name, attr, tensors if site.method.copies else tensors | shared)
        _hold_dropout(module, name, site, rngs)
    _set_active(adapted_layers(walk), (name,))


def _hold(module: nnx.Module, collection: str, name: str, leaf: str, tensors: dict[str, Any]) -> None:
    """Make the tensors of one adapter at one leaf attributes of a module, whose calls apply them."""
    # nnx.jit walks the model at every call, and nnx.Dict takes twice the time of a plain dict marked as data.
    if collection not in vars(module):
        setattr(module, collection, nnx.data({}))
    elif not isinstance(vars(module)[collection], Mapping):
        raise AttachError(f"cannot attach the adapter: the model has an attribute {collection!r} of its own")
    vars(module)[collection].setdefault(name, {})[leaf] = tensors
    install_adapters(module)
    if ACTIVE not in vars(module):
        setattr(module, ACTIVE, (name,))


def _hold_dropout(module: nnx.Module, name: str, site: Site, rngs: nnx.Rngs | None) -> None:
    """Give a layer the dropout of an adapter, if the adapter has some, with a random state for each stacked layer.

    The states are stacked on axis 0, because a key has no other axis.
    """
    rate = site.method.dropout(site.hparams)
    if not rate:
        return
    dropout = nnx.Dropout(rate, deterministic=rngs is None, rngs=rngs)
    if rngs is not None and (sizes := site.stack_sizes):
        stream: Any = dropout.rngs
        stream.key.set_value(jax.random.split(stream.key.get_value(), sizes))
        stream.count.set_value(jnp.broadcast_to(stream.count.get_value(), sizes))
    if DROPOUT not in vars(module):
        setattr(module, DROPOUT, nnx.Dict())
    vars(module)[DROPOUT][name] = dropout


def _site_variables(recipe: Recipe, site: Site, values: Mapping[str, Any], base: nnx.Variable[Any]) -> dict[str, Any]:
    """Return a site's tensors and layer numbers as variables, for the layer that holds `base`."""
    attached, metadata = Attached(recipe, site.method, site.axes, site.hparams), base.get_metadata()
    tensors = {
        t.name: (graph.AdapterParam if t.trained else graph.FrozenParam)(
            values[e.path], adapter=attached, **_sharding_metadata(site, e, metadata)
        )
        for t, e in zip(site.tensors, site.entries, strict=True)
    }
    if not site.data:
        return tensors
    # The layer numbers are replicated over the devices of the base weight.
    sharding = regions.sharding_of(base.get_value())
    shardings = {} if sharding is None else dict.fromkeys(site.data, NamedSharding(sharding.mesh, PartitionSpec()))
    return tensors | {name: graph.LayerNumber(x) for name, x in regions.put_on_devices(site.data, shardings).items()}


def _find_misfits(adapter_sites: Sequence[Site], owners: Mapping[str, graph.Owner], collection: str) -> list[str]:
    """Return a message for each site whose module cannot hold the adapter."""
    scaled = [site.leaf for site in adapter_sites if site.effects.bias == "scales"]
    count = collections.Counter(id(owners[leaf][0]) for leaf in scaled)
    shared = [leaf for leaf in scaled if count[id(m := owners[leaf][0])] > 1 and "bias" in vars(m)]
    problems = [f"{leaf}: its module has one bias for several adapted weights" for leaf in shared]
    problems += list_contradictions(adapter_sites, owners)
    for site in adapter_sites:
        if collection in (attributes := vars(owners[site.leaf][0])) and ACTIVE not in attributes:
            problems.append(f"{site.leaf}: its module already has an attribute {collection!r} of its own")
    return problems


def install_adapters(layer: nnx.Module) -> None:
    """Change a layer's class to the run-time subclass that applies its adapters and dequantises its weights."""
    if not isinstance(type(layer), AdaptedMeta):
        set_class(layer, adapted_class(type(layer)))


def uninstall_adapters(layer: nnx.Module) -> None:
    """Restore a layer's own class, unless it has adapters or quantised weights."""
    if (
        isinstance(type(layer), AdaptedMeta)
        and vars(layer).keys().isdisjoint((ACTIVE, ROWS))
        and not quantized_params(layer)
    ):
        set_class(layer, base_class(layer))


def adapted_layers(model: graph.Model) -> list[tuple[str, Any]]:
    """Return `(path, layer)` for every adapted layer."""
    return [
        (path, node)
        for path, node in graph.walk_model(model).modules
        if isinstance(type(node), AdaptedMeta) and ACTIVE in vars(node)
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


def _set_active(layers: Sequence[tuple[str, Any]], names: tuple[str, ...]) -> None:
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
        for name, attr in itertools.product(names, (*graph.held_adapters(layer), DROPOUT)):
            if name in attributes.get(attr, ()):
                del attributes[attr][name]
                if not attributes[attr]:
                    delattr(layer, attr)
        if not graph.held_adapters(layer):
            delattr(layer, ACTIVE)
            uninstall_adapters(layer)


# ---------------------------------------------------------------- extracting and injecting values


def extract(tree: graph.Tree, name: str) -> Adapter:
    """Return the adapter called `name` as a value.

    Raises `AttachError` if the tree has no such adapter, if parts of the adapter are missing, or if its parameters
    carry several recipes.
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
    values = graph.values_of(adapters[name])
    carried = {id(recipe := var.get_metadata("adapter").recipe): recipe for var in adapters[name].values()}
    recipe, *others = set(carried.values())  # comparing takes longer than finding that nearly all are one object
    if others:
        raise AttachError(
            f"cannot extract the adapter {name!r}: its parameters carry {1 + len(others)} different configurations."
            " Delete it and attach it again"
        )
    leaves = {path.rpartition(".")[0] for path in values}
    if leaves != {SHARED_NODE}:  # the trained parameters of a method whose sites have none
        recipe.check_complete(len(leaves - {SHARED_NODE}), name)
    return Adapter(recipe.config, paths.unflatten(values), recipe.keymap)


# ---------------------------------------------------------------- rows


def attach_rows(model: nnx.Module, layout: call.RowLayout) -> None:
    """Let the layers of these sites expect a route; raise `AttachError` for layers that cannot."""
    walk = graph.walk_model(model)
    leaves = [site.leaf for site in layout.sites]
    require_current_trace(module for module, _ in walk.leaves.values())
    raise_listed(
        AttachError,
        "the bank is for another base; the model lacks these weights:",
        (leaf for leaf in dict.fromkeys(leaves) if leaf not in walk.leaves),
    )
    problems = list(find_obstacles(walk, leaves).values())
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


def set_rows(model: nnx.Module, rows: call.Rows | None) -> None:
    """Store the tensors of a batch's rows beside the weights, or remove them."""
    leaves: Mapping[str, Any] = graph.walk_model(model).leaves
    banked = {leaf: vars(m)[ROWS][attr] for leaf, (m, attr) in leaves.items() if attr in vars(m).get(ROWS, {})}
    for of_module in banked.values():
        of_module.clear()
    if rows is None:
        return
    wanted = [site.leaf for site in rows.layout.sites]
    raise_listed(
        AttachError,
        "the model has no bank at these weights; call attach first:",
        (leaf for leaf in wanted if leaf not in banked),
    )
    raise_listed(
        AttachError, "the route is of another bank, which lacks these weights:", sorted(banked.keys() - set(wanted))
    )
    shared = [{name: graph.SharedRowParam(x, whole=x.shape) for name, x in of.items()} for of in rows.shared]
    for number, (site, arrays) in enumerate(zip(rows.sites, rows.arrays, strict=True)):
        own = {name: graph.RowParam(x, row_site=site) for name, x in arrays.items()}
        banked[site.leaf][str(number)] = own if site.shared is None else own | shared[site.shared]
