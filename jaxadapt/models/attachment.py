"""Adapters on a model, Linen or NNX alike: attach, take out, put in, switch, remove, list."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Generator, Mapping, Sequence
from typing import Any

import jax
from jax.core import Tracer

from jaxadapt import methods
from jaxadapt.adapters import initial_values, sites
from jaxadapt.adapters.adapter import Adapter, collection_name, is_array
from jaxadapt.configs import Config
from jaxadapt.core import paths
from jaxadapt.core.errors import AttachError, ConfigError
from jaxadapt.keymaps.keymap import KeyMap
from jaxadapt.models import planning
from jaxadapt.models.foreign import tree as foreign
from jaxadapt.models.linen import collections, wrapper
from jaxadapt.models.nnx import attach, survey

DEFAULT = "default"


def adapt(
    model: Any,
    config: Config,
    *,
    name: str = DEFAULT,
    keymap: KeyMap | str | None = None,
    rngs: Any = None,
    dtype: Any = None,
    stack_axes: Sequence[int] | None = None,
    example: Sequence[Any] | None = None,
    autocast_adapter_dtype: bool = True,
    deterministic: bool | None = None,
) -> Any:
    """Attach a fresh adapter to a model; its output stays what it was.

    NNX: in place, and the model is returned; the new parameters are `AdapterParam`s. Linen: returns a
    wrapper whose `init` and `apply` work as the module's own, with the parameters in a collection
    "lora" (or "ia3") beside "params".

    Args:
        name: of the adapter; a second `adapt` under another name adds one and makes it the active one.
        keymap: the model's family ("llama"), a `KeyMap`, or None to recognise it.
        rngs: NNX: `nnx.Rngs`, for the initial values and dropout. A model of shapes (`nnx.eval_shape`) gets an adapter
            of shapes without it, and one of values with it. Dropout begins in training mode, as in Flax's own new
            layers, also on a model after its `eval()`. (Linen: `init` takes the keys of the initial values, and each
            `apply` in training takes `rngs={"dropout": key}`.)
        dtype: of the adapter parameters; float32 by default, whatever the base's is.
        autocast_adapter_dtype: as in PEFT; false gives each parameter the dtype of the weight that it adapts.
        stack_axes: NNX: the axes on which scanned layers are stacked, where shapes alone do not tell.
        example: NNX: inputs of one call, from which the roles of custom layers' weights are traced.
        deterministic: Linen: whether the adapters' dropout is off. None: it is on in calls whose `rngs` have a stream
            "dropout", with one warning if no call has it. False: it is on, and a call without the stream is an error.
            True: it is off. `model.clone(deterministic=True)` switches it, for evaluation say; the module's own
            `deterministic` argument is another one, which `apply` hands on. (NNX: `model.train()`, `model.eval()`.)

    Raises `TargetError` if `target_modules` names nothing adaptable, `ConfigError` for a field that would
    not be honoured, `AttachError` for a layer that cannot carry the adapter.

    >>> from flax import nnx as fnnx
    >>> import jaxadapt
    >>> class Net(fnnx.Module):
    ...     def __init__(self, rngs):
    ...         self.q_proj = fnnx.Linear(4, 6, rngs=rngs)
    >>> net = adapt(Net(fnnx.Rngs(0)), jaxadapt.LoraConfig(r=2, target_modules=["q_proj"]), rngs=fnnx.Rngs(1))
    >>> net.q_proj.lora["default"]["kernel"]["lora_A"].shape
    (2, 4)
    """
    _need_config(config)
    dtype = _kind(dtype, autocast_adapter_dtype)
    if isinstance(model, wrapper.nn.Module | wrapper.Adapted):
        given = {"rngs": rngs, "stack_axes": stack_axes, "example": example}
        unused = [what for what, value in given.items() if value is not None]
        if unused:
            raise AttachError(
                f"{', '.join(unused)}: for NNX models only; a Linen wrapper takes keys and inputs in its init"
            )
    if isinstance(model, wrapper.nn.Module):
        return wrapper.Adapted(model, ((name, config),), (name,), keymap, dtype, deterministic=deterministic)
    if isinstance(model, wrapper.Adapted):
        if name in dict(model.adapters):
            raise AttachError(f"there is an adapter {name!r} already; choose another name=, or delete it first")
        shared = {"keymap": keymap, "dtype": dtype, "deterministic": deterministic}
        for what, given in shared.items():
            mine = getattr(model, what)
            if given is not None and given != mine:
                raise AttachError(f"{what}={given!r}: all adapters of a wrapper share one, and this has {mine!r}")
        return dataclasses.replace(model, adapters=(*model.adapters, (name, config)), active=(name,))
    _need_nnx(model)
    if deterministic is not None:
        raise AttachError("deterministic: for Linen modules only; an NNX model has train() and eval()")
    base = planning.BaseParams.from_tree(model)
    owners = base.held
    if name in attach.adapter_names(model, owners):
        raise AttachError(f"there is an adapter {name!r} already; choose another name=, or delete it first")
    recipe, bounds = planning.plan_adapter(base, config, keymap, stack_axes, example)
    abstract = rngs is None and survey.is_abstract(owners)
    if rngs is None and not abstract:
        raise AttachError("adapt needs rngs=nnx.Rngs(seed) for the adapter's initial values")
    if rngs is not None:
        attach.require_stream(rngs, "params")
    key = None if rngs is None else attach.next_key(rngs)
    values = initial_values.init_values(recipe.config, bounds, key, dtype, abstract, base.leaves, base.shardings)
    attach.attach(model, recipe, bounds, name, values, rngs, base.walked)
    return model


def _kind(dtype: Any, autocast: bool) -> Any:
    if autocast:
        return dtype
    if dtype is not None:
        raise AttachError(f"dtype={dtype!r} and autocast_adapter_dtype=False contradict each other; give one of them")
    return initial_values.BASE


def _need_config(config: Any) -> None:
    if not isinstance(config, Config):
        kind = f"{type(config).__module__}.{type(config).__name__}".removeprefix("builtins.")
        raise ConfigError(f"expected a configuration such as jaxadapt.LoraConfig(…), found {kind}")
    methods.get_method(config)


def _need_nnx(model: Any) -> None:
    if not isinstance(model, attach.nnx.Module):
        raise AttachError(
            f"expected an NNX module, a Linen module or an adapted Linen module, found {type(model).__name__};"
            " for bare parameters use jaxadapt.init"
        )


def init(
    config: Config,
    params: Any,
    *,
    key: Any = None,
    keymap: KeyMap | str | None = None,
    dtype: Any = None,
    autocast_adapter_dtype: bool = True,
) -> Adapter:
    """A fresh adapter for a tree of base parameters, with the specs `adapt` would give.

    Args:
        params: nested mappings of arrays or `ShapeDtypeStruct`s (Linen's `variables["params"]`), or an NNX model. For
            weights in Linen's boxes (`nn.Partitioned`, …) the adapter's tensors are in boxes too, as in `adapt`.
        key: a JAX random key; None gives an abstract adapter, specs only.
        keymap: the family's name, a `KeyMap`, or None to recognise it. Without a table, 2-D kernels are
            (in, out); what has more axes is refused if it is targeted.
        dtype, autocast_adapter_dtype: as in `adapt`.

    >>> import jax, jaxadapt
    >>> base = {"q": {"kernel": jax.ShapeDtypeStruct((4, 6), "float32")}}
    >>> adapter = init(jaxadapt.LoraConfig(r=2, target_modules=["q"]), base, key=jax.random.key(0))
    >>> {path: x.shape for path, x in adapter.flat().items()}
    {'q.kernel.lora_A': (2, 4), 'q.kernel.lora_B': (6, 2)}
    """
    _need_config(config)
    dtype = _kind(dtype, autocast_adapter_dtype)
    if key is not None and not is_array(key):
        raise AttachError(f"key: expected a JAX random key such as jax.random.key(0), found {type(key).__name__}")
    base = planning.BaseParams.from_tree(params)
    recipe, bounds = planning.plan_adapter(base, config, keymap)
    values = initial_values.init_values(recipe.config, bounds, key, dtype, key is None, base.leaves, base.shardings)
    return collections.boxed(Adapter(recipe.config, paths.unflatten(values), recipe.keymap), base.held)


# ---------------------------------------------------------------- values out and in


def extract(
    tree: Any,
    name: str = DEFAULT,
    *,
    config: Config | None = None,
    keymap: KeyMap | str | None = None,
    lora_alpha: float | None = None,
) -> Adapter:
    """The adapter called `name` out of a model, state or variables, as a value.

    Args:
        tree: an NNX model or `nnx.State`, Linen variables (or their collection), or an `Adapter`; or such a tree, or
            any other pytree, with the LoRA leaves of another library, which is recognised by them.
        config: needed where the tree has lost its configuration on the way, or never had one (another library's).
        keymap: likewise; for another library's tree by default the family that its base weights show.
        lora_alpha: of another library's tree, where it stores none; instead of `config`.

    Raises `AttachError` if there is none of that name, or its configuration was lost and not given; `KeyMapError`
    listing another library's leaves that have no exact place.

    >>> import jax, jaxadapt
    >>> base = {"q": {"kernel": jax.numpy.ones((4, 6))}}
    >>> config = jaxadapt.LoraConfig(r=2, target_modules=["q"])
    >>> adapter = jaxadapt.init(config, base, key=jax.random.key(0))
    >>> variables = {"params": base, **adapter.collection}
    >>> extract(variables).config.r
    2
    """
    if isinstance(tree, Adapter):
        return tree
    guest = find_foreign(tree)
    if guest is not None:
        return foreign.extract_adapter(guest, config, keymap, lora_alpha)
    if lora_alpha is not None:
        raise AttachError("lora_alpha is for other libraries' trees, and this is none that is known: pass config=")
    if isinstance(tree, attach.nnx.Module | attach.nnx.State):
        if not attach.has_adapters(tree) and (what := foreign.describe_unknown(tree)):
            raise AttachError(f"there is no adapter {name!r} here{what}")
        return attach.extract(tree, name)
    if not isinstance(tree, Mapping):
        raise AttachError(f"expected an NNX model or state, Linen variables or an Adapter, found {type(tree).__name__}")
    found = collections.adapter_tree(tree, name)
    if found is not None and (config is None or (keymap is None and collections.has_config(found))):
        adapter = collections.read_collection(found, name)
        return adapter if config is None else dataclasses.replace(adapter, config=config)  # the table is still its own
    present = collections.adapter_names(tree)
    if found is None and present:
        raise AttachError(f"there is no adapter {name!r} here; found {present}")
    return collections.adapter_from_arrays(tree, name, config, keymap)


def find_foreign(tree: Any) -> foreign.ForeignTree | None:
    """Another library's LoRA leaves in a tree that carries no adapter of ours; None if there are none."""
    if isinstance(tree, Adapter):
        return None
    if isinstance(tree, foreign.ForeignTree):
        return tree
    if isinstance(tree, attach.nnx.Module | attach.nnx.State):
        return None if attach.has_adapters(tree) else foreign.find_lora(tree)
    if isinstance(tree, Mapping) and collections.adapter_names(tree):
        return None
    return foreign.find_lora(tree)


def inject(
    adapter: Adapter,
    tree: Any,
    name: str = DEFAULT,
    *,
    lora_alpha: float | None = None,
    on_shared: str | None = None,
) -> Any:
    """Put an adapter's values where one of that name is attached; shapes and configuration must agree.

    Into a tree with another library's LoRA leaves they go under the names its family has for them; `lora_alpha` and
    `on_shared` as in `load`.

    NNX models are changed in place; anything else is returned anew, with the structure that it had (as
    `jax.tree.structure` has it: the same boxes, recipe and types of mappings). Raises `AttachError` otherwise.

    >>> import jax, jaxadapt
    >>> base = {"q": {"kernel": jax.numpy.ones((4, 6))}}
    >>> config = jaxadapt.LoraConfig(r=2, target_modules=["q"])
    >>> adapter = jaxadapt.init(config, base, key=jax.random.key(0))
    >>> ones = jax.tree.map(jax.numpy.ones_like, adapter)
    >>> variables = inject(ones, {"params": base, **adapter.collection})
    >>> variables["lora"]["default"]["q"]["kernel"]["lora_B"].sum()
    Array(12., dtype=float32)
    """
    if not isinstance(adapter, Adapter):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise AttachError(
            f"expected an Adapter (from extract, init or from_peft), found {type(adapter).__name__};"
            " jaxadapt.from_peft(tensors, tree) makes one of PeftTensors"
        )
    guest, leaves = find_foreign(tree), adapter.flat()
    kept = {path: leaf for path, leaf in leaves.items() if isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer)}
    gone = [path for path, leaf in kept.items() if leaf.is_deleted()]
    if gone:  # else the model's next call would say so, and not of what
        raise AttachError(
            "these arrays of the adapter were donated to a jitted function, and are deleted; keep a copy,"
            " jax.tree.map(jnp.copy, adapter):\n" + paths.bullets(gone)
        )
    if guest is not None:
        bounds = sites.sites_of(adapter)
        host = not any(isinstance(leaf, Tracer) for leaf in leaves.values())
        tensors = sites.make_file_plan(bounds).encode(leaves, host=host)
        same = all(adapter.keymap.match(leaf) for leaf in guest.dialect.claim(guest.leaves))
        return foreign.fill_tree(
            guest, adapter.config, tensors, keymap=adapter.keymap if same else None, lora_alpha=lora_alpha,
            on_shared=on_shared, source="this adapter", call="inject(adapter, tree",
        )  # fmt: skip
    if isinstance(tree, attach.nnx.Module | attach.nnx.State):
        attach.inject(adapter, tree, name)
        return tree
    present = extract(tree, name)
    want = {p: tuple(v.shape) for p, v in present.flat().items()}
    have = {p: tuple(v.shape) for p, v in adapter.flat().items()}
    problems = [
        f"{p}: {want.get(p, 'absent')} attached, {have.get(p, 'absent')} given"
        for p in want | have
        if want.get(p) != have.get(p)
    ]
    if present.config != adapter.config:
        problems.append(f"another configuration: {present.config.differences(adapter.config, 'given')}")
    if problems:
        raise AttachError(f"the adapter does not fit {name!r}:\n" + paths.bullets(problems))
    if isinstance(tree, Adapter):
        return dataclasses.replace(tree, params=collections.refilled(tree.params, leaves))
    return collections.with_values(tree, name, leaves)


def with_adapter(variables: Mapping[str, Any], adapter: Adapter, name: str) -> Any:
    """Linen variables with this adapter under `name`, whatever was there."""
    held = collections.boxed(adapter, variables.get("params", {})).named(name)
    for collection, tree in held.items():
        present: Any = variables.get(collection, {})
        variables = collections.with_entry(variables, collection, collections.with_entry(present, name, tree[name]))
    return variables


# ---------------------------------------------------------------- several on one base


def activate(model: Any, *names: Any) -> Any:
    """Make these adapters the active ones; NNX in place, Linen returns a new wrapper.

    Args:
        names: one or several, whose changes add up; none leaves the base alone. A list of names does as well.

    Raises `AttachError` for a name the model does not carry.

    >>> import flax.linen, jaxadapt
    >>> config = jaxadapt.LoraConfig(r=2, target_modules=["layers_0"])
    >>> module = jaxadapt.adapt(flax.linen.Sequential([flax.linen.Dense(2)]), config, name="a")
    >>> activate(jaxadapt.adapt(module, config, name="b"), "a").active
    ('a',)
    """
    if len(names) == 1 and isinstance(names[0], list | tuple):
        names = tuple(names[0])
    if any(not isinstance(n, str) for n in names):
        raise AttachError(f"expected names, activate(model, 'a', 'b') or activate(model, ['a', 'b']); found {names!r}")
    names = tuple(dict.fromkeys(names))
    if isinstance(model, wrapper.Adapted):
        present = dict(model.adapters)
        unknown = [n for n in names if n not in present]
        if unknown:
            raise AttachError(f"no adapter is called {', '.join(map(repr, unknown))}; this model has {list(present)}")
        return dataclasses.replace(model, active=tuple(names))
    _need_nnx(model)
    attach.activate(model, names)
    return model


@contextlib.contextmanager
def disable(model: Any) -> Generator[Any]:
    """Within the context the model is its base alone: `with disable(model) as base: base(x)`.

    NNX: the model itself, restored at the end, also after an error. Linen: the context's value is the
    wrapper with nothing active. Raises `AttachError` for what is neither.

    >>> import flax.linen, jaxadapt
    >>> config = jaxadapt.LoraConfig(r=2, target_modules=["layers_0"])
    >>> module = jaxadapt.adapt(flax.linen.Sequential([flax.linen.Dense(2)]), config, name="a")
    >>> with disable(module) as base:
    ...     base.active
    ()
    """
    if isinstance(model, wrapper.Adapted):
        yield dataclasses.replace(model, active=())
        return
    _need_nnx(model)
    before = attach.active_names(model)
    attach.activate(model, ())
    try:
        yield model
    finally:
        present = attach.adapter_names(model)  # of those that were active some may have been deleted
        attach.activate(model, [name for name in before if name in present])


def delete(model: Any, name: str) -> Any:
    """Remove one adapter. NNX in place; Linen: a wrapper without it, or variables without its parameters.

    Raises `AttachError` if there is none called `name`.

    >>> import flax.linen, jaxadapt
    >>> config = jaxadapt.LoraConfig(r=2, target_modules=["layers_0"])
    >>> module = jaxadapt.adapt(flax.linen.Sequential([flax.linen.Dense(2)]), config, name="a")
    >>> delete(jaxadapt.adapt(module, config, name="b"), "a").active
    ('b',)
    """
    if isinstance(model, wrapper.Adapted):
        if name not in dict(model.adapters):
            raise AttachError(f"no adapter is called {name!r}; this model has {list(dict(model.adapters))}")
        kept = tuple(a for a in model.adapters if a[0] != name)
        return dataclasses.replace(model, adapters=kept, active=tuple(n for n in model.active if n != name))
    if isinstance(model, Mapping) and not isinstance(model, attach.nnx.Module):
        collection = collection_name(extract(model, name).config)
        kept = {k: v for k, v in model[collection].items() if k != name}
        rest = {k: v for k, v in model.items() if k != collection}
        return {**rest, collection: kept} if kept else rest
    _need_nnx(model)
    present = attach.adapter_names(model)
    if name not in present:
        raise AttachError(f"no adapter is called {name!r}; this model has {list(present)}")
    attach.delete(model, name)
    return model


def detach(model: Any) -> Any:
    """The very same base model: NNX in place (an equal graphdef, identical arrays), Linen the module inside.

    Of Linen variables, those without the adapters' collections. Raises `AttachError` for what is none of these.

    >>> import jax, jaxadapt
    >>> base = {"q": {"kernel": jax.numpy.ones((4, 6))}}
    >>> config = jaxadapt.LoraConfig(r=2, target_modules=["q"])
    >>> adapter = jaxadapt.init(config, base, key=jax.random.key(0))
    >>> sorted(detach({"params": base, **adapter.collection}))
    ['params']
    """
    if isinstance(model, wrapper.Adapted):
        return model.module
    if isinstance(model, Mapping) and not isinstance(model, attach.nnx.Module):
        return {k: v for k, v in model.items() if k not in methods.COLLECTIONS}
    _need_nnx(model)
    attach.delete(model, *attach.adapter_names(model))
    return model
