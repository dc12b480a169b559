"""Adapters on NNX models: attached in place, and applied in the calls of their layers.

Each adapted layer gets a run-time subclass of its class, and the adapter's variables become attributes of the layer.
The paths, the values and the sharing of base parameters do not change. `delete` undoes it.

    layer.kernel                       as before
    layer.lora["default"]["kernel"]    {"lora_A": AdapterParam, "lora_B": AdapterParam}
    layer.active_adapters              ("default",)

The call of an adapted layer is its own function, with active adapters applied and quantized weights made dense. The
tensors of a prompt method are attributes of the model itself, whose call adds the virtual tokens:

    model.prefix_tuning["default"]["~shared"]    {"prompt_embeddings": SharedAdapterParam}

The adapters of the rows of a batch are variables beside the weights, which the model's scans slice.
"""

from __future__ import annotations

import collections
import copyreg
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
from flax import nnx

from jaxadapt.adapters import initial_values
from jaxadapt.adapters.adapter import SHARED_NODE, Recipe, Site, collection_name, shared_tensors
from jaxadapt.arrays import regions
from jaxadapt.arrays.layout import Axes
from jaxadapt.core import paths
from jaxadapt.core.errors import AttachError, raise_listed
from jaxadapt.keymaps import plan
from jaxadapt.methods.applied import AppliedMethod, Hook, apply_rows, refuse_rivals, together
from jaxadapt.methods.base import Drop, Method, get_method
from jaxadapt.models import attention_calls, call, graph, planning, prompts

# ---------------------------------------------------------------- shardings of parameters


def _sharding_metadata(site: Site, entry: plan.PlanEntry, base: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metadata from which `nnx.get_partition_spec` derives the sharding of an adapter parameter."""
    spec = base.get("out_sharding")
    if isinstance(spec, jax.sharding.NamedSharding):
        spec = spec.spec
    if not spec or not isinstance(spec, tuple | jax.sharding.PartitionSpec):
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
    """Return the key of `rngs.params()`; raise `AttachError` unless `rngs` is an `nnx.Rngs` with such a stream."""
    require_stream(rngs, "params")
    return rngs["params"]()


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
    stacks = nnx.graphlib.GRAPH_CONTEXT.update_context_stacks.values()
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
    _require_room(walk, adapter_sites, collection)
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
    activate(walk, (name,))


def _hold(module: nnx.Module, collection: str, name: str, leaf: str, tensors: dict[str, Any]) -> None:
    """Make the tensors of one adapter at one leaf attributes of a module, whose calls apply them."""
    # nnx.jit walks the model at every call, and nnx.Dict takes twice the time of a plain dict marked as data.
    if collection not in vars(module):
        setattr(module, collection, nnx.data({}))
    elif not isinstance(vars(module)[collection], Mapping):
        raise AttachError(f"cannot attach the adapter: the model has an attribute {collection!r} of its own")
    vars(module)[collection].setdefault(name, {})[leaf] = tensors
    install_adapters(module)
    if graph.ACTIVE not in vars(module):
        setattr(module, graph.ACTIVE, (name,))


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
        stream.count.set_value(jax.numpy.broadcast_to(stream.count.get_value(), sizes))
    if graph.DROPOUT not in vars(module):
        setattr(module, graph.DROPOUT, nnx.Dict())
    vars(module)[graph.DROPOUT][name] = dropout


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
    shardings = (
        {}
        if sharding is None
        else dict.fromkeys(site.data, jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec()))
    )
    return tensors | {name: graph.LayerNumber(x) for name, x in regions.put_on_devices(site.data, shardings).items()}


def _require_room(walk: graph.ModelWalk, adapter_sites: Sequence[Site], collection: str) -> None:
    """Raise `AttachError`, listing all problems, if a layer cannot carry the adapter."""
    owners = {site.leaf: walk.leaves[site.leaf] for site in adapter_sites}
    saved = {site.leaf for site in adapter_sites if site.method.copies and site.hparams.because == "modules_to_save"}
    scaled = [site.leaf for site in adapter_sites if site.effects.bias == "scales"]
    count = collections.Counter(id(owners[leaf][0]) for leaf in scaled)
    problems = [
        *planning.find_obstacles(walk, list(owners), saved).values(),
        *(
            f"{leaf}: its module has one bias for several adapted weights"
            for leaf in scaled
            if count[id(owners[leaf][0])] > 1 and "bias" in vars(owners[leaf][0])
        ),
        *planning.list_contradictions(adapter_sites, owners),
        *(
            f"{leaf}: its module already has an attribute {collection!r} of its own"
            for leaf, (module, _) in owners.items()
            if collection in vars(module) and graph.ACTIVE not in vars(module)
        ),
    ]
    if problems:
        raise_listed(AttachError, "these layers cannot carry the adapter:", problems)


def install_adapters(layer: nnx.Module) -> None:
    """Change a layer's class to the run-time subclass that applies its adapters and dequantizes its weights."""
    if not isinstance(type(layer), graph.AdaptedMeta):
        graph.set_class(layer, adapted_class(type(layer)))


def uninstall_adapters(layer: nnx.Module) -> None:
    """Restore a layer's own class, unless it has adapters or quantized weights."""
    if (
        isinstance(type(layer), graph.AdaptedMeta)
        and vars(layer).keys().isdisjoint((graph.ACTIVE, ROWS))
        and not graph.quantized_params(layer)
    ):
        graph.set_class(layer, planning.base_class(layer))


def activate(walk: graph.ModelWalk, names: tuple[str, ...]) -> None:
    """Make these adapters, and no others, active in every adapted layer.

    Raises `AttachError` if several of them each replace the same weight.
    """
    layers = walk.adapted
    if len(names) > 1:
        methods_by_leaf = paths.nest(
            (paths.join(path, leaf), name, attached_to(tensors).method)
            for path, layer in layers
            for name, leaf, tensors in adapters_on(layer, names)
        )
        refuse_rivals(methods_by_leaf)
    for _, layer in layers:
        if getattr(layer, graph.ACTIVE) != names:
            setattr(layer, graph.ACTIVE, names)


def delete(model: graph.Model, *names: str) -> None:
    """Remove these adapters, and restore the class of each layer that has no adapter left."""
    walk = graph.walk_model(model)
    layers = walk.adapted
    require_current_trace(layer for _, layer in layers)
    activate(walk, tuple(name for name in walk.active if name not in names))
    for _, layer in layers:
        attributes = vars(layer)
        for name, attr in itertools.product(names, (*graph.held_adapters(layer), graph.DROPOUT)):
            if name in attributes.get(attr, ()):
                del attributes[attr][name]
                if not attributes[attr]:
                    delattr(layer, attr)
        if not graph.held_adapters(layer):
            delattr(layer, graph.ACTIVE)
            uninstall_adapters(layer)


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
    problems = list(planning.find_obstacles(walk, leaves).values())
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
        AttachError,
        "the route belongs to another bank, which lacks these weights:",
        sorted(banked.keys() - set(wanted)),
    )
    shared = [{name: graph.SharedRowParam(x, whole=x.shape) for name, x in of.items()} for of in rows.shared]
    for number, (site, arrays) in enumerate(zip(rows.sites, rows.arrays, strict=True)):
        own = {name: graph.RowParam(x, row_site=site) for name, x in arrays.items()}
        banked[site.leaf][str(number)] = own if site.shared is None else own | shared[site.shared]


# ---------------------------------------------------------------- prompts


def active_prompt(module: nnx.Module, names: Sequence[str]) -> prompts.Prompt | None:
    """Return the active adapter of a prompt method among `names`; None if there is none.

    Raises `AttachError` if there are several.
    """
    found: dict[str, prompts.Prompt] = {}
    for name, adapters in itertools.product(names, graph.held_adapters(module).values()):
        if tensors := adapters.get(name, {}).get(SHARED_NODE):
            values = {t: var.get_value() for t, var in tensors.items()}
            data = {t: x for t, x in values.items() if isinstance(tensors[t], graph.CallData)}
            params = {t: x for t, x in values.items() if t not in data}
            recipe = next(var.get_metadata()["adapter"].recipe for t, var in tensors.items() if t in params)
            found[name] = prompts.Prompt(recipe, params, data)
    return prompts.only_one(found)


def embed_tokens(module: nnx.Module, prompt: prompts.Prompt, tokens: Any) -> Any:
    """Return the embeddings of tokens, by the model's own layer."""
    owners = graph.walk_model(module).leaves
    leaf = attention_calls.input_embedding(prompt.recipe.keymap, owners)
    layer = None if leaf is None else owners[leaf][0]
    if not isinstance(layer, nnx.Embed):
        raise AttachError(
            f"{prompt.method.peft_type}: the nnx.Embed that embeds the tokens is unclear"
            f" ({'none or several are candidates' if leaf is None else f'{leaf} is of another class'}). Pass embeddings"
            " to the call in place of tokens"
        )
    return layer(tokens)


def call_with_keys(
    module: nnx.Module,
    prompt: prompts.Prompt,
    base: type[nnx.Module],
    call: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> Any:
    """Return `call(module, args, kwargs)` with keys and values of an adapter in every attention layer.

    Raises `AttachError` if the call adds variables to the model.
    """
    # The model's transforms (nnx.scan, nnx.remat) write to all variables, so they must belong to the current trace.
    open_model, inputs = graph.open_copy(graph.plain_view(module, base, {}))

    def run(inputs: Mapping[str, Any], args: Any, kwargs: Any) -> tuple[Any, dict[str, Any]]:
        copy = open_model(inputs)
        planning.mark_attention(copy)
        y = call(copy, args, kwargs)
        return y, graph.changed_values(base.__name__, inputs, graph.open_copy(copy)[1])

    y, changed = prompts.call_with_keys(
        run,
        prompt,
        base.__call__,
        args,
        kwargs,
        state=inputs,
        base=lambda: graph.base_values(graph.walk_model(module).leaves),
    )
    variables = {paths.join(*map(str, path)): var for path, var in nnx.to_flat_state(nnx.state(module))}
    graph.set_values(variables, changed)
    return y


# ---------------------------------------------------------------- the call of a layer


ROWS = "adapter_rows"
"""The attribute of a layer with a bank: `{leaf: {number of the site: {tensor: RowParam}}}`, empty without a route."""


@dataclasses.dataclass(frozen=True)
class Attached:
    """The metadata of an `AdapterParam`: its adapter's recipe, and the method, axes and hyperparameters of its site."""

    recipe: Recipe
    method: Method = dataclasses.field(repr=False)
    axes: Axes = dataclasses.field(repr=False)
    hparams: Any

    @functools.cached_property
    def _hash(self) -> int:
        return hash((self.recipe, self.method, self.axes, self.hparams))

    def __hash__(self) -> int:
        return self._hash


def attached_to(tensors: Mapping[str, nnx.Variable[Any]]) -> Attached:
    """Return the metadata of one adapter at one leaf.

    Only its own tensors carry this metadata. Shared tensors carry their adapter's, and `LayerNumber`s carry none.
    """
    param = next(
        var for var in tensors.values()
        if isinstance(var, graph.AdapterParam | graph.FrozenParam) and not isinstance(var, graph.SharedParam)
    )  # fmt: skip
    return param.get_metadata()["adapter"]


# ---------------------------------------------------------------- the run-time subclass


@functools.cache
def adapted_class(base: type[nnx.Module]) -> type[nnx.Module]:
    """Return the subclass of a layer class whose entry points (see `graph.entry_points`) apply the active adapters."""

    def wrap(f: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(f)
        def method(self: nnx.Module, *args: Any, **kwargs: Any) -> Any:
            return _call_adapted(self, base, f, args, kwargs)

        return method

    body: dict[str, Any] = {name: wrap(f) for name, f in graph.entry_points(base).items()} | {
        "base": base,
        "__module__": base.__module__,
        "__doc__": base.__doc__,
    }
    subclass: Any = graph.AdaptedMeta(f"Adapted{base.__name__}", (base,), body)
    return subclass


copyreg.pickle(graph.AdaptedMeta, lambda cls: (adapted_class, (cls.base,)))  # pyright: ignore[reportArgumentType]


# ---------------------------------------------------------------- calling


def adapters_on(layer: nnx.Module, names: Iterable[str]) -> Iterator[tuple[str, str, Mapping[str, nnx.Variable[Any]]]]:
    """Yield (adapter, leaf, tensors) for these adapters of one layer's weights."""
    for name, adapters in itertools.product(names, graph.held_adapters(layer).values()):
        for leaf, tensors in adapters.get(name, {}).items():
            if leaf != SHARED_NODE:  # a prompt's tensors: see `prompt`
                yield name, leaf, tensors


def _active_hooks(module: nnx.Module) -> dict[str, Hook]:
    """Return `{leaf: hook}` for the active adapters of one layer."""
    hooks: dict[str, list[AppliedMethod]] = {}
    attributes = vars(module)
    for name, leaf, tensors in adapters_on(module, attributes.get(graph.ACTIVE, ())):
        params = {tensor: _value_of(tensor, var) for tensor, var in tensors.items()}
        hooks.setdefault(leaf, []).append(
            AppliedMethod.in_call(attached_to(tensors), params, _active_dropout(module, name))
        )
    for leaf, sites in attributes.get(ROWS, {}).items():
        if not sites:
            raise AttachError(call.NO_ROUTE)
        hooks.setdefault(leaf, []).extend(map(_row_hook, sites.values()))
    return {leaf: together(each) for leaf, each in hooks.items()}


def _active_dropout(module: nnx.Module, name: str) -> Drop | None:
    """Return the dropout of an adapter; None if it has none, or if the layer is in evaluation mode."""
    dropouts = vars(module).get(graph.DROPOUT, ())
    if name not in dropouts or (dropout := dropouts[name]).deterministic:
        return None
    if dropout.rngs is None:
        raise AttachError(
            f"the adapter {name!r} has dropout but no random stream, because it was loaded without rngs."
            " Load it with load(…, rngs=nnx.Rngs(seed)) to train it, or call model.eval() to use it"
        )
    return Drop(dropout.rate, dropout.rngs)


def _row_hook(tensors: Mapping[str, nnx.Variable[Any]]) -> AppliedMethod:
    """Return the method of a bank's site with the tensors of a batch's rows."""
    shared = {name: _value_of(name, var) for name, var in tensors.items() if isinstance(var, graph.SharedParam)}
    own = {name: var for name, var in tensors.items() if name not in shared}
    site: call.RowSite = next(iter(own.values())).get_metadata()["row_site"]
    return apply_rows(site, site.how, {name: _value_of(name, var) for name, var in own.items()}, shared)


def _value_of(tensor: str, variable: nnx.Variable[Any]) -> Any:
    """Return a variable's value; raise `AttachError` for a slice of a shared tensor."""
    value = variable.get_value()
    if isinstance(variable, graph.SharedParam) and value.shape != (shape := variable.get_metadata()["whole"]):
        raise AttachError(
            f"cannot run a layer: {tensor} belongs to the whole adapter and has shape {list(shape)}, but this layer got"
            f" {list(value.shape)}. Make the model's nnx.scan or nnx.vmap leave variables of type"
            " jaxadapt.models.SharedParam whole: nnx.StateAxes({jaxadapt.models.SharedParam: None, nnx.Param: 0,"
            " ...: 0})"
        )
    return value


def _call_adapted(module: Any, base: Any, f: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a method of a layer with its active adapters applied and its quantized weights made dense."""
    if f is base.__call__ and (virtual := active_prompt(module, vars(module).get(graph.ACTIVE, ()))) is not None:
        if (hooked := prompts.hooked_call(module, virtual)) is not None:
            name, first = hooked
            return getattr(base, name)(graph.plain_view(module, base, {}), *first, *args, **kwargs)
        if virtual.method.adds != "embeddings":
            run: Any = functools.partial(_call_layer, base, f)
            return call_with_keys(module, virtual, base, run, args, kwargs)
        args, kwargs = prompts.with_embeddings(
            virtual, base.__call__, args, kwargs, functools.partial(embed_tokens, module, virtual)
        )
    return _call_layer(base, f, module, args, kwargs)


def _call_layer(base: Any, f: Callable[..., Any], module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a method of a layer with the adapters of its own weights."""
    return call.apply(graph.bind_layer(module, base, f), _active_hooks(module), args, kwargs)
