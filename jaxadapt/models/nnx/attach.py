"""Adapters on NNX models, in place: a layer's class is swapped for a run-time subclass, and the adapter's
variables hang on the layer. Base paths, sharing and values stay as they are; `detach` undoes it.

    layer.kernel                       as before
    layer.lora["default"]["kernel"]    {"lora_A": AdapterParam, "lora_B": AdapterParam}
    layer.active_adapters              ("default",)
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.nnx import graphlib
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

from jaxadapt import methods
from jaxadapt.adapters import sharding, sites
from jaxadapt.adapters.adapter import Adapter, Recipe, collection_name
from jaxadapt.arrays import placement as placement_module
from jaxadapt.arrays import random_draws
from jaxadapt.arrays.axes import find_contradiction
from jaxadapt.core import paths
from jaxadapt.core.errors import AttachError
from jaxadapt.keymaps import plan
from jaxadapt.methods import Method
from jaxadapt.models.nnx import survey
from jaxadapt.models.nnx.layer import ACTIVE, Attached, adapted_class, attached_to
from jaxadapt.models.nnx.params import AdapterParam, LayerNumber
from jaxadapt.models.nnx.survey import DROPOUT, AdaptedMeta, Owner, base_class, natural_key, swap

Tree = nnx.Module | nnx.State[Any, Any]
Layers = Sequence[tuple[str, Any]]


# ---------------------------------------------------------------- where parameters live


def base_shardings(owners: Mapping[str, Owner]) -> dict[str, NamedSharding | None]:
    """The sharding of every base leaf: what its array or spec has, else what its metadata says it will have."""
    out: dict[str, NamedSharding | None] = {}
    for leaf, (module, attr) in owners.items():
        var: nnx.Variable[Any] = vars(module)[attr]
        value, metadata = var.get_value(), var.get_metadata()
        out[leaf] = placement_module.sharding_of(value)
        if placement_module.is_unplaced(value) and metadata.get("out_sharding"):
            spec = nnx.get_partition_spec({"": var})[""].get_value()
            out[leaf] = placement_module.sharding_from_spec(spec, metadata.get("mesh"))
    return out


def _annotation(bound: sites.Site, entry: plan.PlanEntry, base: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata from which `nnx.get_partition_spec` tells an adapter parameter's sharding."""
    said = base.get("out_sharding")
    if isinstance(said, NamedSharding):
        said = said.spec
    if not said or not isinstance(said, tuple | PartitionSpec):
        return {}
    # Not eager: the values are where they belong already, or are to be put there by whoever is tracing.
    kept = {key: base[key] for key in ("sharding_rules", "mesh", nnx.PARTITION_NAME) if key in base}
    return {
        **kept,
        "out_sharding": sharding.propagate_axes(bound.match, entry.form, tuple(said)),
        "eager_sharding": False,
    }


# ---------------------------------------------------------------- attaching and detaching


def require_stream(rngs: Any, name: str) -> None:
    """Raises `AttachError` for what cannot give the random numbers called so."""
    if not (isinstance(rngs, nnx.Rngs) and {name, "default"} & set(rngs)):
        raise AttachError(f'rngs: expected nnx.Rngs with a stream "{name}" or "default", such as nnx.Rngs(0)')


def next_key(rngs: nnx.Rngs) -> Any:
    """`rngs.params()`: the same key, and the stream goes on alike.

    Flax compiles two programs for it, in every new process; outside jit, nothing need be.
    """
    stream: Any = rngs["params"]
    if type(stream) is not nnx.RngStream or placement_module.is_tracing():
        return stream()
    key: Any = stream.key.get_value()
    count: Any = stream.count.get_value()
    known = isinstance(count, jax.Array) and not isinstance(key, Tracer) and not isinstance(count, Tracer)
    if not known or key.shape or count.committed:  # traced, of several keys, or on a device of its own
        return stream()
    n = int(count)
    stream.count[...] = jax.device_put(np.uint32((n + 1) % 2**32))
    return random_draws.fold_in(key, n)


def need_own(modules: Iterable[Any]) -> None:
    """Raises `AttachError` for a model that is not this trace's own: its layers could not get another class.

    A transform of Flax gives a function a copy of the model that it was called with, and lays the changes of the copy
    into the model afterwards. Of its layers' classes it cannot.
    """
    way = (
        ": attach, load, delete and detach outside, where the model was made; or make the model inside,"
        " nnx.jit(lambda: jaxadapt.adapt(Net(nnx.Rngs(0)), config, rngs=nnx.Rngs(1)))(); or return an adapted copy,"
        " jaxadapt.adapt(nnx.clone(model), …)"
    )
    stacks = graphlib.GRAPH_CONTEXT.update_context_stacks.values()
    given = [context.inner_ref_outer_index for stack in stacks for context in stack]
    for module in modules:
        if any(held is not None and module in held for held in given):
            raise AttachError("this model was given to nnx.jit, nnx.grad or another of Flax's transforms" + way)
        if not vars(module)["_pytree__state"].trace_state.is_valid():
            raise AttachError("this model was made outside of the function that JAX traces now" + way)


def attach(
    model: nnx.Module,
    recipe: Recipe,
    bounds: Sequence[sites.Site],
    name: str,
    values: Mapping[str, Any],
    rngs: nnx.Rngs | None = None,
    walked: survey.ModelWalk | None = None,
) -> None:
    """Hang an adapter's values (`{path: array or spec}`) on a model's layers, and make it active alone."""
    walked = survey.walk_model(model) if walked is None else walked
    owners = walked.leaves
    need_own(module for module, _ in owners.values())
    collection = collection_name(recipe.config)
    saved = {b.leaf for b in bounds if b.method.copies and b.hparams.because == "modules_to_save"}
    problems = [*survey.obstacles(walked, [b.leaf for b in bounds], saved).values()]
    problems += _misfits(bounds, owners, collection)
    if problems:
        raise AttachError("these layers cannot carry the adapter:\n" + paths.bullets(problems))
    if rngs is not None and any(b.method.dropout(b.hparams) for b in bounds):
        require_stream(rngs, "dropout")
    for bound in bounds:
        module, attr = owners[bound.leaf]
        attached = Attached(recipe, bound.method, bound.axes, bound.hparams)
        said = vars(module)[attr].get_metadata()
        tensors = {
            t.name: AdapterParam(values[e.path], adapter=attached, **_annotation(bound, e, said))
            for t, e in zip(bound.tensors, bound.entries, strict=True)
        } | _numbers(bound, placement_module.sharding_of(vars(module)[attr].get_value()))
        # Plain dicts, marked as data: nnx.jit walks the model at every call, and nnx.Dicts take twice the time.
        if collection not in vars(module):
            setattr(module, collection, nnx.data({}))
        vars(module)[collection].setdefault(name, {})[attr] = tensors
        rate = bound.method.dropout(bound.hparams)
        if rate:
            sizes = [vars(module)[attr].shape[axis] for axis in bound.match.stack]
            if DROPOUT not in vars(module):
                setattr(module, DROPOUT, nnx.Dict())
            vars(module)[DROPOUT][name] = _dropout(rate, rngs, sizes)
        install_adapters(module)
        if ACTIVE not in vars(module):
            setattr(module, ACTIVE, (name,))
    _set_active(adapted_layers(model, owners), (name,))


def _numbers(bound: sites.Site, base: NamedSharding | None) -> dict[str, Any]:
    """The numbers of a leaf's layers, where they are needed: on all devices that the base weight is on."""
    if not bound.data:
        return {}
    where = {} if base is None else dict.fromkeys(bound.data, NamedSharding(base.mesh, PartitionSpec()))
    return {name: LayerNumber(x) for name, x in placement_module.put_on_devices(bound.data, where).items()}


def _misfits(bounds: Sequence[sites.Site], owners: Mapping[str, Owner], collection: str) -> list[str]:
    problems: list[str] = []
    scaled = [b.leaf for b in bounds if b.method.scales_bias(b.hparams)]
    count = collections.Counter(id(owners[leaf][0]) for leaf in scaled)
    several = [leaf for leaf in scaled if count[id(m := owners[leaf][0])] > 1 and "bias" in vars(m)]
    problems += [f"{leaf}: its module has one bias for several adapted weights" for leaf in several]
    problems += contradictions(bounds, owners)
    for bound in bounds:
        if collection in (held := vars(owners[bound.leaf][0])) and ACTIVE not in held:
            problems.append(f"{bound.leaf}: its module has an attribute {collection!r} of its own")
    return problems


def contradictions(bounds: Sequence[sites.Site], owners: Mapping[str, Owner]) -> list[str]:
    """The sites of which a table says something else than their layer's class."""
    problems: list[str] = []
    for bound in bounds:
        module, attr = owners[bound.leaf]
        try:
            by_class = None if bound.method.replaces else survey.kernel_roles(module, attr)
        except AttachError as error:
            problems.append(f"{bound.leaf}: {error}")
            continue
        if by_class is not None:
            axes, mine = by_class.axes, bound.axes
            # A table may order axes otherwise, or know that an output axis is a fused one; never which is an input.
            if set(axes.in_axes) != set(mine.in_axes):
                problems.append(f"{bound.leaf}: {find_contradiction(mine, axes)}")
    return problems


def _dropout(rate: float, rngs: nnx.Rngs | None, sizes: Sequence[int]) -> nnx.Dropout:
    """Dropout with a random state of its own for each stacked layer: a key has no other axis to be stacked on."""
    if rngs is None:
        return nnx.Dropout(rate, deterministic=True)
    drop = nnx.Dropout(rate, rngs=rngs)
    stream: Any = drop.rngs
    if sizes:
        shape = tuple(sizes)
        stream.key.set_value(jax.random.split(stream.key.get_value(), shape))
        stream.count.set_value(jnp.broadcast_to(stream.count.get_value(), shape))
    return drop


def install_adapters(layer: nnx.Module) -> None:
    """Give a layer the run-time subclass that applies its adapters and dequantises its weights."""
    if not isinstance(type(layer), AdaptedMeta):
        swap(layer, adapted_class(type(layer)))


def uninstall_adapters(layer: nnx.Module) -> None:
    """Give a layer its own class back, where it has neither adapters nor quantised weights."""
    if isinstance(type(layer), AdaptedMeta) and ACTIVE not in vars(layer) and not survey.quantized_params(layer):
        swap(layer, base_class(layer))


def adapted_layers(model: nnx.Module, owners: Mapping[str, Owner] | None = None) -> list[tuple[str, Any]]:
    """`(path, layer)` of every adapted layer. Each owns a base leaf: where `owners` are at hand no walk is needed."""
    nodes: Iterable[tuple[str, Any]] = ((paths.join(*map(str, path)), node) for path, node in nnx.iter_graph(model))
    if owners is not None:
        nodes = {id(module): (leaf.rpartition(".")[0], module) for leaf, (module, _) in owners.items()}.values()
    return [(path, node) for path, node in nodes if isinstance(type(node), AdaptedMeta) and ACTIVE in vars(node)]


def adapter_names(model: nnx.Module, owners: Mapping[str, Owner] | None = None) -> tuple[str, ...]:
    """The names of the adapters a model carries."""
    return _names(adapted_layers(model, owners))


def _names(layers: Layers) -> tuple[str, ...]:
    found: dict[str, None] = {}
    for _, layer in layers:
        for collection in methods.COLLECTIONS:
            found |= dict.fromkeys(vars(layer).get(collection, ()))
    return tuple(found)


def activate(model: nnx.Module, chosen: Sequence[str]) -> None:
    """Make exactly these adapters active, wherever they sit."""
    layers = adapted_layers(model)
    present = _names(layers)
    unknown = [n for n in chosen if n not in present]
    if unknown:
        raise AttachError(f"no adapter is called {', '.join(map(repr, unknown))}; this model has {list(present)}")
    _set_active(layers, tuple(chosen))


def _set_active(layers: Layers, chosen: tuple[str, ...]) -> None:
    held: dict[str, dict[str, Method]] = {}
    for path, layer in layers if len(chosen) > 1 else ():
        for name, collection in itertools.product(chosen, methods.COLLECTIONS):
            for leaf, tensors in vars(layer).get(collection, {}).get(name, {}).items():
                attached = attached_to(tensors)
                held.setdefault(paths.join(path, leaf), {})[name] = attached.method
    methods.refuse_rivals(held)
    for _, layer in layers:
        if getattr(layer, ACTIVE) != chosen:
            setattr(layer, ACTIVE, chosen)


def active_names(model: nnx.Module) -> tuple[str, ...]:
    """The names of the active adapters."""
    return _active(adapted_layers(model))


def _active(layers: Layers) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for _, layer in layers for name in getattr(layer, ACTIVE)))


def delete(model: nnx.Module, *gone: str) -> None:
    """Remove these adapters; a layer that carries no other gets its own class back."""
    layers = adapted_layers(model)
    need_own(layer for _, layer in layers)
    _set_active(layers, tuple(n for n in _active(layers) if n not in gone))
    for _, layer in layers:
        own = vars(layer)
        for name, attr in itertools.product(gone, (*methods.COLLECTIONS, DROPOUT)):
            if name in own.get(attr, ()):
                del own[attr][name]
                if not own[attr]:
                    delattr(layer, attr)
        if own.keys().isdisjoint(methods.COLLECTIONS):
            delattr(layer, ACTIVE)
            uninstall_adapters(layer)


# ---------------------------------------------------------------- values out and in


def _parameters(tree: Tree) -> Iterator[tuple[Any, AdapterParam]]:
    # (`nnx.state` would leave a cycle that keeps the whole model alive until the gc comes.)
    held = nnx.to_flat_state(tree) if isinstance(tree, nnx.State) else nnx.iter_graph(tree)
    return ((path, v) for path, v in held if isinstance(v, AdapterParam) and "adapter" in v.get_metadata())


def has_adapters(tree: Tree) -> bool:
    """Whether there is any adapter in a model or a state."""
    return any(True for _ in _parameters(tree))


def adapter_variables(tree: Tree) -> dict[str, dict[str, Any]]:
    """`{adapter name: {path: AdapterParam}}` of a model or a state."""
    out: dict[str, dict[str, Any]] = {}
    for path, var in _parameters(tree):
        *module, _, name, leaf, tensor = map(str, path)
        out.setdefault(name, {})[paths.join(*module, leaf, tensor)] = var
    return out


def extract(tree: Tree, name: str) -> Adapter:
    """The adapter called `name`, as a value."""
    found = adapter_variables(tree)
    if name not in found:
        raise AttachError(f"there is no adapter {name!r} here; found {sorted(found) or 'none'}")
    recipes = {var.get_metadata()["adapter"].recipe for var in found[name].values()}
    if len(recipes) > 1:
        raise AttachError(f"the adapter {name!r} carries {len(recipes)} different configurations; attach it anew")
    recipe = recipes.pop()
    values = {path: found[name][path].get_value() for path in sorted(found[name], key=natural_key)}
    adapter = Adapter(recipe.config, paths.unflatten(values), recipe.keymap)
    recipe.check_complete(len(adapter.sites), name)
    return adapter


def inject(adapter: Adapter, tree: Tree, name: str) -> None:
    """Set the values of an attached adapter; structure, shapes and configuration must agree."""
    present = adapter_variables(tree).get(name)
    if present is None:
        raise AttachError(f"there is no adapter {name!r} to inject into; adapt the model first, or use load")
    new = adapter.flat()
    problems = [f"{p}: missing" for p in present if p not in new]
    problems += [f"{p}: unexpected" for p in new if p not in present]
    problems += [
        f"{p}: expected {tuple(present[p].shape)}, found {tuple(v.shape)}"
        for p, v in new.items()
        if p in present and tuple(v.shape) != tuple(present[p].shape)
    ]
    recipe = next(iter(present.values())).get_metadata()["adapter"].recipe
    if recipe.config != adapter.config:
        problems.append(f"another configuration: {recipe.config.differences(adapter.config, 'given')}")
    if problems:
        raise AttachError(f"the adapter does not fit {name!r}:\n" + paths.bullets(problems))
    for path, value in new.items():
        present[path].set_value(value)
