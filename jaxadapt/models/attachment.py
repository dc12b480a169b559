"""Adapters on an NNX or Linen model: attach, extract, inject and remove them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.core import Tracer

from jaxadapt import methods
from jaxadapt.adapters import initial_values
from jaxadapt.adapters.adapter import Adapter, collection_name, is_array
from jaxadapt.adapters.sites import make_file_plan, sites_of
from jaxadapt.configs import Config
from jaxadapt.core import paths
from jaxadapt.core.compare import compare, shapes_of
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
    """Attach a new adapter to a model, which does not change its output.

    NNX: changes the model in place and returns it; the new parameters are `AdapterParam`s. Linen: returns a wrapper
    with the module's `init` and `apply`, and the adapter's parameters in a collection "lora" (or "ia3") beside
    "params".

    Args:
        name: the adapter's name. A second `adapt` under another name adds an adapter and activates it.
        keymap: the model's family ("llama"), a `KeyMap`, or None to recognise the family.
        rngs: NNX: `nnx.Rngs` for the initial values and dropout. On a model of shapes (`nnx.eval_shape`) the adapter
            has shapes without `rngs`, and values with it. Dropout starts in training mode, as in new Flax layers,
            even if the model is in `eval()` mode. (Linen: pass keys to `init`, and `rngs={"dropout": key}` to each
            `apply` in training.)
        dtype: the dtype of the adapter's parameters; float32 by default, whatever the dtype of the base.
        autocast_adapter_dtype: as in PEFT; False gives each parameter the dtype of the weight it adapts.
        stack_axes: NNX: the axes on which scanned layers are stacked, if the shapes do not show them.
        example: NNX: the inputs of one call, used to trace the axis roles of custom layers' weights.
        deterministic: Linen: True turns the adapters' dropout off. None: it is on in calls whose `rngs` have a stream
            "dropout", with one warning if no call has it. False: it is on, and a call without the stream is an error.
            Switch it with `model.clone(deterministic=True)`, for example for evaluation. The module's own
            `deterministic` argument is independent; `apply` passes it on. (NNX: `model.train()`, `model.eval()`.)

    Raises `TargetError` if `target_modules` selects no adaptable weight, `ConfigError` for a field that is not
    supported here, `AttachError` for a layer that cannot carry the adapter.

    >>> from flax import nnx as fnnx
    >>> import jaxadapt
    >>> class Net(fnnx.Module):
    ...     def __init__(self, rngs):
    ...         self.q_proj = fnnx.Linear(4, 6, rngs=rngs)
    >>> net = adapt(Net(fnnx.Rngs(0)), jaxadapt.LoraConfig(r=2, target_modules=["q_proj"]), rngs=fnnx.Rngs(1))
    >>> net.q_proj.lora["default"]["kernel"]["lora_A"].shape
    (2, 4)
    """
    _require_config(config)
    dtype = _resolve_dtype(dtype, autocast_adapter_dtype)
    if isinstance(model, wrapper.nn.Module | wrapper.Adapted):
        given = {"rngs": rngs, "stack_axes": stack_axes, "example": example}
        unused = [argument for argument, value in given.items() if value is not None]
        if unused:
            raise AttachError(
                f"cannot use {', '.join(unused)} with a Linen module: for NNX models only; pass keys and inputs to the"
                " wrapper's init"
            )
    if isinstance(model, wrapper.nn.Module):
        return wrapper.Adapted(model, ((name, config),), (name,), keymap, dtype, deterministic=deterministic)
    if isinstance(model, wrapper.Adapted):
        if name in dict(model.adapters):
            raise AttachError(
                f"cannot attach the adapter {name!r}: the name is taken; pass another name=, or delete that"
                " adapter first"
            )
        shared = {"keymap": keymap, "dtype": dtype, "deterministic": deterministic}
        for argument, value in shared.items():
            present = getattr(model, argument)
            if value is not None and value != present:
                raise AttachError(
                    f"cannot use {argument}={value!r}: all adapters of a wrapper share this argument, and this wrapper"
                    f" has {present!r}; leave it out"
                )
        return dataclasses.replace(model, adapters=(*model.adapters, (name, config)), active=(name,))
    require_nnx(model)
    if deterministic is not None:
        raise AttachError(
            "cannot use deterministic with an NNX model: for Linen modules only; call model.train() or model.eval()"
        )
    walked = attach.walked(model)
    base = planning.BaseParams.from_tree(walked)
    if name in attach.adapter_names(walked):
        raise AttachError(
            f"cannot attach the adapter {name!r}: the name is taken; pass another name=, or delete that adapter first"
        )
    recipe, sites = planning.plan_adapter(base, config, keymap, stack_axes, example)
    abstract = rngs is None and survey.is_abstract(walked.leaves)
    if rngs is None and not abstract:
        raise AttachError("cannot draw the adapter's initial values without random keys: pass rngs=nnx.Rngs(seed)")
    if rngs is not None:
        attach.require_stream(rngs, "params")
    key = None if rngs is None else attach.draw_params_key(rngs)
    values = initial_values.init_values(recipe.config, sites, key, dtype, abstract, base.leaves, base.shardings)
    attach.attach(model, recipe, sites, name, values, rngs, walked)
    return model


def _resolve_dtype(dtype: Any, autocast: bool) -> Any:
    if autocast:
        return dtype
    if dtype is not None:
        raise AttachError(
            f"cannot use dtype={dtype!r} with autocast_adapter_dtype=False, which sets the dtype; pass one of them"
        )
    return initial_values.BASE


def _require_config(config: Any) -> None:
    if not isinstance(config, Config):
        kind = f"{type(config).__module__}.{type(config).__name__}".removeprefix("builtins.")
        raise ConfigError(f"expected a configuration such as jaxadapt.LoraConfig(…), found {kind}")
    methods.get_method(config)


def require_nnx(model: Any) -> None:
    """Raise `AttachError` unless `model` is an NNX module."""
    if not isinstance(model, attach.nnx.Module):
        raise AttachError(
            f"expected an NNX module, a Linen module or an adapted Linen module, found {type(model).__name__};"
            " for a tree of parameters, use jaxadapt.init"
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
    """Return a new adapter for a tree of base parameters, with the tensors that `adapt` would attach.

    Args:
        params: nested mappings of arrays or `ShapeDtypeStruct`s (Linen's `variables["params"]`), or an NNX model. If
            the weights are in Linen's boxes (`nn.Partitioned`, …), so are the adapter's tensors, as in `adapt`.
        key: a JAX random key; None returns an abstract adapter, specs only.
        keymap: the family's name, a `KeyMap`, or None to recognise the family. Without a keymap, 2-D kernels are
            (in, out), and a target with more axes is an error.
        dtype, autocast_adapter_dtype: as in `adapt`.

    Raises the errors of `adapt`.

    >>> import jax, jaxadapt
    >>> base = {"q": {"kernel": jax.ShapeDtypeStruct((4, 6), "float32")}}
    >>> adapter = init(jaxadapt.LoraConfig(r=2, target_modules=["q"]), base, key=jax.random.key(0))
    >>> {path: x.shape for path, x in adapter.flat().items()}
    {'q.kernel.lora_A': (2, 4), 'q.kernel.lora_B': (6, 2)}
    """
    _require_config(config)
    dtype = _resolve_dtype(dtype, autocast_adapter_dtype)
    if key is not None and not is_array(key):
        raise AttachError(f"key: expected a JAX random key such as jax.random.key(0), found {type(key).__name__}")
    base = planning.BaseParams.from_tree(params)
    recipe, sites = planning.plan_adapter(base, config, keymap)
    values = initial_values.init_values(recipe.config, sites, key, dtype, key is None, base.leaves, base.shardings)
    return collections.box_like_base(Adapter(recipe.config, paths.unflatten(values), recipe.keymap), base.held)


# ---------------------------------------------------------------- extract and inject


def extract(
    tree: Any,
    name: str = DEFAULT,
    *,
    config: Config | None = None,
    keymap: KeyMap | str | None = None,
    lora_alpha: float | None = None,
) -> Adapter:
    """Return the adapter called `name` of a model, state or variables.

    Args:
        tree: an NNX model or `nnx.State`, Linen variables (or their adapter collection), an `Adapter`, or any pytree
            with the LoRA leaves of another library, which are recognised by their paths.
        config: required if the tree has lost its configuration, or comes from another library.
        keymap: as `config`; for another library's tree the default is the family recognised from its base weights.
        lora_alpha: the alpha of another library's tree that stores none; an alternative to `config`.

    Raises `AttachError` if the tree has no adapter of that name, or its configuration is lost and not passed.
    Raises `KeyMapError` listing the leaves of another library that have no exact equivalent.

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
    tree = attach.walked(tree)
    foreign_tree = find_foreign(tree)
    if foreign_tree is not None:
        return foreign.extract_adapter(foreign_tree, config, keymap, lora_alpha)
    if lora_alpha is not None:
        raise AttachError(
            "cannot use lora_alpha here: it is for the trees of other libraries, and this tree is not one; pass config="
        )
    if isinstance(tree, attach.TREES):
        if not attach.has_adapters(tree) and (unknown := foreign.describe_unknown(tree)):
            raise AttachError(f"cannot extract {name!r}: the model has no adapter{unknown}")
        return attach.extract(tree, name)
    if not isinstance(tree, Mapping):
        raise AttachError(f"expected an NNX model or state, Linen variables or an Adapter, found {type(tree).__name__}")
    present = collections.adapter_tree(tree, name)
    if present is not None and (config is None or (keymap is None and collections.has_config(present))):
        adapter = collections.read_adapter(present, name)
        return adapter if config is None else dataclasses.replace(adapter, config=config)
    names = collections.adapter_names(tree)
    if present is None and names:
        raise AttachError(f"cannot extract {name!r}: no adapter has that name; found {names}")
    return collections.adapter_from_arrays(tree, name, config, keymap)


def find_foreign(tree: Any) -> foreign.ForeignTree | None:
    """Return the foreign tree in `tree`; None if `tree` has an adapter of jaxadapt, or no LoRA leaves."""
    if isinstance(tree, Adapter):
        return None
    if isinstance(tree, foreign.ForeignTree):
        return tree
    if isinstance(tree, attach.TREES):
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
    """Write an adapter's values into the attached adapter of that name.

    NNX models are changed in place. Any other tree is copied, and keeps its `jax.tree.structure`: the same boxes,
    recipe and mapping types. In a tree with another library's LoRA leaves the values go into those leaves, and
    `lora_alpha` and `on_shared` are as in `load`.

    Raises `AttachError` if the shapes or the configurations differ.

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
            " jaxadapt.from_peft(tensors, tree) converts PeftTensors to one"
        )
    walked, leaves = attach.walked(tree), adapter.flat()
    foreign_tree = find_foreign(walked)
    kept = {path: leaf for path, leaf in leaves.items() if isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer)}
    gone = [path for path, leaf in kept.items() if leaf.is_deleted()]
    if gone:  # otherwise the model's next call would fail without naming them
        raise AttachError(
            "cannot inject the adapter: these arrays were donated to a jitted function and are deleted. Keep a copy,"
            " jax.tree.map(jnp.copy, adapter):\n" + paths.bullets(gone)
        )
    if foreign_tree is not None:
        sites = sites_of(adapter)
        host = not any(isinstance(leaf, Tracer) for leaf in leaves.values())
        tensors = make_file_plan(sites).encode(leaves, host=host)
        same = all(adapter.keymap.match(leaf) for leaf in foreign_tree.dialect.claim(foreign_tree.leaves))
        return foreign.fill_tree(
            foreign_tree, adapter.config, tensors, keymap=adapter.keymap if same else None, lora_alpha=lora_alpha,
            on_shared=on_shared, source="this adapter", call="inject(adapter, tree",
        )  # fmt: skip
    if isinstance(tree, attach.nnx.Module | attach.nnx.State):
        attach.inject(adapter, walked, name)
        return tree
    present = extract(tree, name)
    problems = list(map(str, compare(shapes_of(present.flat()), shapes_of(adapter.flat()))))
    if present.config != adapter.config:
        problems.append(f"the configurations differ: {present.config.differences(adapter.config, 'passed')}")
    if problems:
        raise AttachError(
            f"cannot inject: the adapter does not match the attached adapter {name!r}:\n" + paths.bullets(problems)
        )
    if isinstance(tree, Adapter):
        return dataclasses.replace(tree, params=collections.replace_values(tree.params, leaves))
    return collections.replace_adapter_values(tree, name, leaves)


def with_adapter(variables: Mapping[str, Any], adapter: Adapter, name: str) -> Any:
    """Return Linen variables with this adapter under `name`, in place of any adapter of that name."""
    named = collections.box_like_base(adapter, variables.get("params", {})).named(name)
    for collection, tree in named.items():
        present: Any = variables.get(collection, {})
        variables = collections.with_entry(variables, collection, collections.with_entry(present, name, tree[name]))
    return variables


def delete(model: Any, name: str) -> Any:
    """Remove one adapter. NNX in place; Linen: return a wrapper without it, or variables without its parameters.

    Raises `AttachError` if no adapter is called `name`.

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
    require_nnx(model)
    walked = attach.walked(model)
    present = attach.adapter_names(walked)
    if name not in present:
        raise AttachError(f"no adapter is called {name!r}; this model has {list(present)}")
    attach.delete(walked, name)
    return model


def detach(model: Any) -> Any:
    """Remove all adapters and return the base model.

    NNX: in place, with the graphdef and the arrays it had before. Linen: the module inside the wrapper, or the
    variables without the adapters' collections. Raises `AttachError` for any other object.

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
    require_nnx(model)
    walked = attach.walked(model)
    attach.delete(walked, *attach.adapter_names(walked))
    return model
