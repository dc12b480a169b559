"""Changes of a model: attach, extract, inject and remove adapters, choose the active ones, and quantize the base.

`rescale` multiplies the trained values at run time, so that jitted functions are not recompiled. `invoke` sets the
data of a call that some adapters need: tokens for aLoRA, tasks for a prompt of several tasks, noise for PVERA.
`adapter_gradient` returns gradients with respect to some adapter parameters of an NNX model. `quantize` stores a base
in 4 or 8 bits for QLoRA (Dettmers et al. 2023, arXiv:2305.14314), and `dequantize` undoes it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer

from jaxadapt.adapters.adapter import SHARED_NODE, Adapter, Site, collection_name, is_array, not_an_adapter
from jaxadapt.adapters.sites import sites_of
from jaxadapt.arrays import quantized, regions
from jaxadapt.configs.base import Config
from jaxadapt.configs.lora import LoraConfig
from jaxadapt.configs.matching import ALL_LINEAR
from jaxadapt.core import paths
from jaxadapt.core.errors import AttachError, met, raise_listed
from jaxadapt.keymaps.keymap import KeyMap
from jaxadapt.methods.base import Array, get_method
from jaxadapt.models import graph, nnx_adapters, planning, trees
from jaxadapt.models.carriers import DEFAULT, Model, Wrapper, base_params, carrier, lora_carrier
from jaxadapt.models.linen_call import repeat_on_stack

# ---------------------------------------------------------------- attachment


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
    deterministic: bool | None = None,
    key: Any = None,
) -> Any:
    """Attach a new adapter to a model.

    By default most new adapters do not change the output; a prompt, and FourierFT, do. NNX: changes the model in place
    and returns it; the new parameters are `AdapterParam`s. Linen: returns a wrapper with the module's `init` and
    `apply`, and the adapter's parameters in a collection "lora" (or "ia3") beside "params". A pytree that is called,
    such as an Equinox module or a `jaxadapt.models.Function`: returns an `AdaptedTree`, called as the model is; pass
    `key` and `example`.

    Args:
        name: the adapter's name. A second `adapt` under another name adds an adapter and activates it.
        keymap: the model's family ("llama"), a `KeyMap`, or None to recognize the family.
        rngs: NNX: `nnx.Rngs` for the initial values and dropout. On a model of shapes (`nnx.eval_shape`) the adapter
            has shapes without `rngs`, and values with it. Dropout starts in training mode, as in new Flax layers,
            even if the model is in `eval()` mode. (Linen: pass keys to `init`, and `rngs={"dropout": key}` to each
            `apply` in training.)
        dtype: the dtype of the adapter's parameters; float32 by default, whatever the dtype of the base. "base" gives
            each parameter the dtype of the weight it adapts, as PEFT's `autocast_adapter_dtype=False` does.
        stack_axes: NNX: the axes on which scanned layers are stacked, if the shapes do not show them.
        example: NNX: the inputs of one call, used to trace the axis roles of custom layers' weights. A pytree:
            likewise, of all weights; needed unless `keymap` has an entry for each.
        deterministic: Linen: True turns the adapters' dropout off. None: it is on in calls whose `rngs` have a stream
            "dropout", with one warning if no call has it. False: it is on, and a call without the stream is an error.
            Switch it with `model.clone(deterministic=True)`, for example for evaluation. The module's own
            `deterministic` argument is independent; `apply` passes it on. (NNX: `model.train()`, `model.eval()`.) A
            pytree: likewise, with `model.clone(dropout_key=key)` in place of the stream.
        key: a pytree: the JAX random key of the initial values. A model of shapes gets an adapter of shapes without it.

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
    get_method(config)
    return carrier(model).adapt(
        config,
        name,
        keymap,
        dtype,
        {"rngs": rngs, "stack_axes": stack_axes, "example": example, "deterministic": deterministic, "key": key},
    )


def init(
    model: Any,
    config: Config,
    *,
    key: Any = None,
    keymap: KeyMap | str | None = None,
    dtype: Any = None,
    example: Sequence[Any] | None = None,
) -> Adapter:
    """Return a new adapter for a tree of base parameters, with the tensors that `adapt` would attach.

    Args:
        model: nested mappings of arrays or `ShapeDtypeStruct`s (Linen's `variables["params"]`), or an NNX model. If
            the weights are in Linen's boxes (`nn.Partitioned`, …), so are the adapter's tensors, as in `adapt`.
        key: a JAX random key; None returns an abstract adapter, specs only.
        keymap: the family's name, a `KeyMap`, or None to recognize the family. Without a keymap, 2-D kernels are
            (in, out), and a target with more axes is an error.
        dtype, example: as in `adapt`.

    Raises the errors of `adapt`.

    >>> import jax, jaxadapt
    >>> base = {"q": {"kernel": jax.ShapeDtypeStruct((4, 6), "float32")}}
    >>> adapter = init(base, jaxadapt.LoraConfig(r=2, target_modules=["q"]), key=jax.random.key(0))
    >>> {path: x.shape for path, x in adapter.flat().items()}
    {'q.kernel.lora_A': (2, 4), 'q.kernel.lora_B': (6, 2)}
    """
    get_method(config)  # raises if the arguments are exchanged
    if key is not None and not is_array(key):
        raise AttachError(f"key: expected a JAX random key such as jax.random.key(0), found {type(key).__name__}")
    base = base_params(model)
    recipe, sites = planning.plan_adapter(base, config, keymap, example=example)
    adapter = Adapter.of_leaves(recipe.config, base.new_values(recipe, sites, key, dtype), recipe.keymap)
    return trees.box_like_base(adapter, base.held)


# ---------------------------------------------------------------- extract and inject


def extract(
    model: Any,
    *,
    name: str = DEFAULT,
    keymap: KeyMap | str | None = None,
) -> Adapter:
    """Return the adapter called `name` of a model, state or variables.

    Args:
        model: an NNX model or `nnx.State`, Linen variables (or their adapter collection), an `Adapter`, or any pytree
            with the LoRA leaves of another library, which are recognized by their paths. A `LoraTree` wraps a tree
            that does not store its configuration or its alpha.
        keymap: needed only if the tree has lost it; for another library's tree the default is the family recognized
            from its base weights.

    Raises `AttachError` if the tree has no adapter of that name, or its configuration is lost and not passed.
    Raises `KeyMapError` listing the leaves of another library that have no exact equivalent.

    >>> import jax, jaxadapt
    >>> base = {"q": {"kernel": jax.numpy.ones((4, 6))}}
    >>> config = jaxadapt.LoraConfig(r=2, target_modules=["q"])
    >>> adapter = jaxadapt.init(base, config, key=jax.random.key(0))
    >>> variables = {"params": base, **adapter.collection}
    >>> extract(variables).config.r
    2
    """
    return lora_carrier(model).extract(name, keymap)


def inject(model: Any, adapter: Adapter, *, name: str = DEFAULT) -> Any:
    """Write an adapter's values into the attached adapter of that name.

    NNX models are changed in place. Any other tree is copied, and keeps its `jax.tree.structure`: the same boxes,
    recipe and mapping types. In a tree with another library's LoRA leaves the values go into those leaves; a `LoraTree`
    wraps a tree that does not store its alpha.

    Raises `AttachError` if the shapes or the configurations differ.

    >>> import jax, jaxadapt
    >>> base = {"q": {"kernel": jax.numpy.ones((4, 6))}}
    >>> config = jaxadapt.LoraConfig(r=2, target_modules=["q"])
    >>> adapter = jaxadapt.init(base, config, key=jax.random.key(0))
    >>> ones = jax.tree.map(jax.numpy.ones_like, adapter)
    >>> variables = inject({"params": base, **adapter.collection}, ones)
    >>> variables["lora"]["default"]["q"]["kernel"]["lora_B"].sum()
    Array(12., dtype=float32)
    """
    if not isinstance(adapter, Adapter):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise not_an_adapter(adapter)
    arrays = {path: x for path, x in adapter.flat().items() if isinstance(x, jax.Array) and not isinstance(x, Tracer)}
    # Otherwise the model's next call would fail without naming them.
    raise_listed(
        AttachError,
        "cannot inject the adapter: these arrays were donated to a jitted function and are deleted. Keep a copy,"
        " jax.tree.map(jnp.copy, adapter):",
        (path for path, x in arrays.items() if x.is_deleted()),
    )
    return lora_carrier(model, takes=()).inject(adapter, name)


def delete(model: Any, *, name: str) -> Any:
    """Remove one adapter. NNX in place; Linen: return a wrapper without it, or variables without its parameters.

    Raises `AttachError` if no adapter is called `name`.

    >>> import flax.linen, jaxadapt
    >>> config = jaxadapt.LoraConfig(r=2, target_modules=["layers_0"])
    >>> module = jaxadapt.adapt(flax.linen.Sequential([flax.linen.Dense(2)]), config, name="a")
    >>> delete(jaxadapt.adapt(module, config, name="b"), name="a").active
    ('b',)
    """
    return carrier(model).delete(name)


def detach(model: Any) -> Any:
    """Remove all adapters and return the base model.

    NNX: in place, with the graphdef and the arrays it had before. Linen: the module inside the wrapper, or the
    variables without the adapters' collections. Raises `AttachError` for any other object.

    >>> import jax, jaxadapt
    >>> base = {"q": {"kernel": jax.numpy.ones((4, 6))}}
    >>> config = jaxadapt.LoraConfig(r=2, target_modules=["q"])
    >>> adapter = jaxadapt.init(base, config, key=jax.random.key(0))
    >>> sorted(detach({"params": base, **adapter.collection}))
    ['params']
    """
    return carrier(model).detach()


# ---------------------------------------------------------------- activation


def activate(model: Any, *names: Any) -> Any:
    """Activate these adapters, and deactivate all others; NNX in place, Linen returns a new wrapper.

    Args:
        names: names, or one list of names. The updates of several adapters add up; without a name, only the base is
            left.

    Raises `AttachError` for a name that the model does not have, and for a model without adapters.

    >>> import flax.linen, jaxadapt
    >>> config = jaxadapt.LoraConfig(r=2, target_modules=["layers_0"])
    >>> module = jaxadapt.adapt(flax.linen.Sequential([flax.linen.Dense(2)]), config, name="a")
    >>> activate(jaxadapt.adapt(module, config, name="b"), "a").active
    ('a',)
    """
    if len(names) == 1 and isinstance(names[0], list | tuple):
        names = tuple(names[0])
    if any(not isinstance(n, str) for n in names):
        raise AttachError(
            f"expected names, as in activate(model, 'a', 'b') or activate(model, ['a', 'b']); found {names!r}"
        )
    held = carrier(model)
    if names and not held.names():
        raise AttachError(
            f"cannot activate {', '.join(map(repr, names))}: the model has no adapter; attach one with"
            " jaxadapt.adapt(model, config) or jaxadapt.load(path, model)"
        )
    return held.activate(tuple(dict.fromkeys(names)))


@contextlib.contextmanager
def disable(model: Any) -> Generator[Any]:
    """Deactivate all adapters within a context: `with disable(model) as base: base(x)`.

    The model then computes what the base does, also without the biases that the adapter trained (`bias="all"`,
    "lora_only"). PEFT's `disable_adapter` keeps these biases, with a warning.

    NNX: changes the model and restores it at the end, also after an error. Linen: the context's value is the wrapper
    without an active adapter. Raises `AttachError` for any other object.

    >>> import flax.linen, jaxadapt
    >>> config = jaxadapt.LoraConfig(r=2, target_modules=["layers_0"])
    >>> module = jaxadapt.adapt(flax.linen.Sequential([flax.linen.Dense(2)]), config, name="a")
    >>> with disable(module) as base:
    ...     base.active
    ()
    """
    held = carrier(model)
    before = held.active()
    base = held.activate(())
    try:
        yield base
    finally:
        held = carrier(model)
        held.activate([name for name in before if name in held.names()])  # the context may have deleted some


# ---------------------------------------------------------------- adapter scale


@contextlib.contextmanager
def rescale(model: Any, factor: Any, *, name: str | None = None) -> Generator[Any]:
    """Multiply an adapter's weight update by `factor` within a context (PEFT's `rescale_adapter_scale`).

    NNX: changes the model and restores it at the end, also after an error. Linen: the context's value is the variables
    to use. The factor may be a traced array: a function jitted over the model or the variables is not retraced for
    another factor, and a call costs no more than without `rescale`. For inference only: values trained inside the
    context are restored at its end, and an error is raised. An adapter saved or extracted inside is the rescaled one.

    Args:
        model: an NNX model, Linen variables, or an `Adapter`.
        factor: a number; 0 switches the update off, a negative number subtracts it.
        name: the adapter's name; by default the active adapters of a model, and all adapters of other trees.

    LoRA's B is multiplied in float32 and rounded to B's dtype. So in 16 bits a factor that is not a power of two costs
    one rounding. Raises `AttachError` for adapters without a scale (IA3), or if no adapter has that name.

    >>> import jax.numpy as jnp, jaxadapt
    >>> from flax import nnx as fnnx
    >>> class Net(fnnx.Module):
    ...     def __init__(self, rngs):
    ...         self.q_proj = fnnx.Linear(4, 6, rngs=rngs)
    >>> config = jaxadapt.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    >>> net = jaxadapt.adapt(Net(fnnx.Rngs(0)), config, rngs=fnnx.Rngs(1))
    >>> x, base = jnp.ones((1, 4)), jaxadapt.detach(fnnx.clone(net)).q_proj
    >>> with rescale(net, 0.5):
    ...     half = net.q_proj(x) - base(x)
    >>> bool(jnp.allclose(2 * half, net.q_proj(x) - base(x), atol=1e-6))
    True
    """
    if np.ndim(factor):
        raise AttachError(f"cannot rescale by factor: expected a number, found an array of shape {np.shape(factor)}")
    held = carrier(model)
    if (walk := held.walked) is None:
        if name is not None or not held.names():
            held.extract(DEFAULT if name is None else name)  # raises if there is no such adapter
        names = None if name is None else (name,)
        yield held.map_adapters(lambda name, adapter: _multiply(name, adapter.config, adapter.params, factor), names)
        return
    present = walk.adapters
    chosen = _chosen(held.active(), present, name)
    variables = {f"{each}: {path}": var for each in chosen for path, var in present[each].items()}
    before = graph.values_of(variables)
    recipes = {each: next(iter(present[each].values())).get_metadata("adapter").recipe for each in chosen}
    products = {n: _multiply(n, recipe.config, graph.values_of(present[n]), factor) for n, recipe in recipes.items()}
    scaled = {f"{each}: {path}": x for each, by_path in products.items() for path, x in by_path.items()}
    try:
        graph.set_values(variables, scaled)
        yield model
        changed = [path for path, var in variables.items() if _values_differ(var.get_value(), scaled[path])]
    finally:
        graph.set_values(variables, before)
    raise_listed(
        AttachError,
        "these adapter parameters were changed inside rescale, where they are multiplied by the factor; the changes"
        " were discarded. Train outside the context:",
        changed,
    )


def _chosen(active: list[str], present: Mapping[str, Any], name: str | None) -> list[str]:
    """Return the names of the adapters to rescale; raise `AttachError` if there are none."""
    if not (chosen := active if name is None else [name]) or not present.keys() >= set(chosen):
        raise AttachError(
            f"cannot rescale: expected {'an active adapter' if name is None else repr(name)}, this model has"
            f" {sorted(present) or 'none'}"
        )
    return chosen


def _multiply(name: str, config: Config, params: Mapping[str, Any], factor: Any) -> dict[str, Any]:
    """Return the `{path: array}` of an adapter, or of its part in a module, with its update multiplied.

    Refuses a method without a scale.
    """
    leaves = paths.flatten(params)
    scaled = [path for path in leaves if path.rpartition(".")[2] in get_method(config).scaled]
    if not scaled:
        raise AttachError(f"cannot rescale the adapter {name!r}: its type {config.peft_type} has no scale")
    factor = jnp.asarray(factor, jnp.float32)
    return leaves | {path: jax.tree.map(lambda x: (x * factor).astype(x.dtype), leaves[path]) for path in scaled}


def _values_differ(new: Any, old: Any) -> bool:
    """Return True if two arrays differ; an array that a jitted function returned unchanged is equal, not identical."""
    if new is old or isinstance(new, Tracer) or isinstance(old, Tracer):
        return False
    return not bool(jnp.array_equal(new, old, equal_nan=True))


# ---------------------------------------------------------------- invocation


@contextlib.contextmanager
def invoke(
    model: Any, tokens: Any = None, *, task_ids: Any = None, prefilled: bool = False, noise: Any = None
) -> Generator[Any]:
    """Set the data that active adapters need for the calls within a context.

    NNX: changes the model and restores it at the end, also after an error. Linen: the context's value is the wrapper
    to use. A jitted function that takes the data as an argument is not recompiled for other data.

    Args:
        model: an NNX model, or a Linen module adapted with `adapt`.
        tokens: for aLoRA (`alora_invocation_tokens`), the token ids (batch, time) that the model is called with. In
            each row an adapter acts from the last occurrence of its invocation sequence on; it does not act in a row
            without one (as in PEFT). Or a boolean mask (batch, time) of the tokens to adapt, for all aLoRA adapters:
            use it with a KV cache, where the invocation was in an earlier step.
        task_ids: for MULTITASK_PROMPT_TUNING, the task of each row, integers (batch,). Inside jit a task that does not
            exist gives NaN.
        prefilled: for prompts of embeddings, True while decoding with a cache, after a first call with the virtual
            tokens: they are then not put before the tokens again, and only positions and mask count them. (A prefix of
            keys and values is in no cache and needs no such data.)
        noise: for PVERA in training, the random key (`jax.random.key`) of the noise; give each step another.

    Raises `AttachError` if no active adapter needs the data, or if the data have another shape or dtype.

    >>> import jax, jaxadapt
    >>> from flax import nnx as fnnx
    >>> class Net(fnnx.Module):
    ...     def __init__(self, rngs):
    ...         self.emb, self.q = fnnx.Embed(9, 4, rngs=rngs), fnnx.Linear(4, 4, rngs=rngs)
    ...     def __call__(self, ids):
    ...         return self.q(self.emb(ids))
    >>> net, ids = Net(fnnx.Rngs(0)), jnp.array([[1, 7, 8, 2]])
    >>> config = jaxadapt.LoraConfig(target_modules=["q"], init_lora_weights=False, alora_invocation_tokens=[7, 8])
    >>> before = net(ids)
    >>> with jaxadapt.models.invoke(jaxadapt.adapt(net, config, rngs=fnnx.Rngs(1)), ids):
    ...     (net(ids) != before).any(-1).tolist()
    [[False, True, True, True]]
    """
    given = _given_data(tokens, task_ids, prefilled, noise)
    held = carrier(model)
    if isinstance(held, Wrapper):
        data = _call_data({name: config for name, config in model.adapters if name in model.active}, given)
        yield model.clone(data=data)
        return
    if not isinstance(held, Model):
        raise held.unsupported("an NNX model, or a Linen module that adapt returned")
    adapters = {name: held.extract(name) for name in held.active()}
    data = _call_data({name: adapter.config for name, adapter in adapters.items()}, given)
    places = [place for name, arrays in data.items() for place in _places(held, name, adapters[name], arrays)]
    for tensors, key, array in places:
        tensors[key] = graph.CallData(array)
    try:
        yield model
    finally:
        for tensors, key, _ in places:
            del tensors[key]


def _given_data(tokens: Any, task_ids: Any, prefilled: bool, noise: Any) -> dict[str, Array]:
    """Return the arguments of `invoke` that are given, as arrays; refuse tokens of another shape or dtype."""
    given = {name: jnp.asarray(x) for name, x in (("tokens", tokens), ("task_ids", task_ids)) if x is not None}
    given |= {"prefilled": jnp.ones((), bool)} if prefilled else {}
    given |= {} if noise is None else {"noise": jax.random.key_data(noise)}
    ids = given.get("tokens")
    if ids is not None and (ids.ndim != 2 or not (ids.dtype == bool or jnp.issubdtype(ids.dtype, jnp.integer))):
        raise AttachError(
            f"expected token ids or a boolean mask of shape (batch, time), found {ids.dtype} of shape {list(ids.shape)}"
        )
    return given


def _places(
    held: Model, name: str, adapter: Adapter, arrays: Mapping[str, Array]
) -> Iterator[tuple[dict[str, Any], str, Array]]:
    """Yield (the tensors of one place of an adapter, a name, the array that they get under it)."""
    collection = collection_name(adapter.config)
    if get_method(adapter.config).scope == "model":  # a prompt, whose tensors are the model's
        yield from ((vars(held.tree)[collection][name][SHARED_NODE], key, array) for key, array in arrays.items())
    for site in sites_of(adapter):
        module, attr = held.walked.leaves[site.leaf]
        for key, array in () if site.method.copies else arrays.items():
            repeated = repeat_on_stack(array, site.match.stack, vars(module)[attr].shape)
            yield vars(module)[collection][name][attr], key, repeated


def _call_data(configs: Mapping[str, Config], given: Mapping[str, Array]) -> dict[str, dict[str, Array]]:
    """Return `{adapter: {name: array}}` of the data that the adapters' methods need."""
    data = {name: get_method(config).call_data(config, given) for name, config in configs.items()}
    data = {name: arrays for name, arrays in data.items() if arrays}
    unused = [name for name in given if name != "tokens" and not any(name in arrays for arrays in data.values())]
    if not data or unused:
        names, users = " and ".join(unused or given) or "tokens", " or ".join(_USERS[n] for n in unused or ["tokens"])
        raise AttachError(f"cannot set {names}: no active adapter is {users}; active are {sorted(configs) or 'none'}")
    return data


_USERS = {
    "tokens": "an aLoRA",
    "task_ids": "one of MULTITASK_PROMPT_TUNING",
    "prefilled": "a prompt of embeddings",
    "noise": "a PVERA",
}


# ---------------------------------------------------------------- gradients


def adapter_gradient(
    f: Callable[[Any, Any], Any], name: str, tensor: str
) -> Callable[[Any, Any], dict[str, dict[str, Any]]]:
    """Return `run(model, batch)`, which returns `{adapter: {path: gradient}}` of the scalar `f(model, batch)`.

    The gradients are those of the tensor called `tensor` in the adapter called `name`. `run` compiles once.
    """

    def is_wanted(path: Any, value: Any) -> bool:
        return isinstance(value, graph.AdapterParam) and path[-1] == tensor and name in path

    @functools.partial(jax.jit, static_argnums=0)
    def gradient(graphdef: Any, wanted: Any, rest: Any, batch: Any) -> Any:
        def value(wanted: Any) -> Any:
            copies = jax.tree.map(lambda x: x, rest)  # variables belong to the trace that creates them
            return f(nnx.merge(graphdef, wanted, copies), batch)

        return jax.grad(value)(wanted)  # nnx.grad takes a filter in Flax's graph mode only

    def run(model: Any, batch: Any) -> dict[str, dict[str, Any]]:
        gradients = graph.adapter_variables(gradient(*nnx.split(model, is_wanted, ...), batch))
        return {name: graph.values_of(variables) for name, variables in gradients.items()}

    return run


# ---------------------------------------------------------------- quantization of the base


def quantize(
    model: Any,
    kind: str = "nf4",
    *,
    modules: Any = ALL_LINEAR,
    block: int | None = None,
    keymap: KeyMap | str | None = None,
) -> Any:
    """Quantize the weights of a base's linear layers; `adapt`, `init`, `load` and `save` work as on the dense base.

    Each call of a layer dequantizes its weight, in the forward and again in the backward pass, so a training step never
    holds all dense weights. Adapters stay in full precision, and PEFT loads a saved adapter on the dense base. The
    codes and scales of a sharded weight are sharded too, and adapters are sharded as on the dense base.

    Args:
        model: nested mappings of base parameters (returns a new tree; apply it through `adapt`'s wrapper), or an NNX
            model, which is changed in place and returned.
        kind: "nf4" (blocks of 64 numbers with one scale each, in the order and with the levels of bitsandbytes) or
            "int8" (one scale for each output).
        modules: as `target_modules`; by default every linear layer except the output layer.
        block: the number of weights per scale, instead of the default.
        keymap: as in `adapt`.

    Raises `AttachError` for a weight that is already quantized, is a spec without values, has values that are not
    finite, or stacks its layers on any axes but the first.

    >>> import jax, numpy as np, jaxadapt
    >>> base = {"q": {"kernel": np.random.default_rng(0).standard_normal((64, 32)).astype("float32")}}
    >>> small = quantize(base, modules=["q"])
    >>> small["q"]["kernel"].shape, small["q"]["kernel"].nbytes
    ((64, 32), 1152)
    >>> adapter = jaxadapt.init(small, jaxadapt.LoraConfig(r=2, target_modules=["q"]), key=jax.random.key(0))
    """
    params = base_params(model)
    sites = planning.plan_adapter(params, LoraConfig(target_modules=modules), keymap)[1]
    leaves = [site.leaf for site in sites]
    problems = [] if params.walked is None else list(planning.find_obstacles(params.walked, leaves).values())
    problems += [f"{site.leaf}: {why}" for site in sites for why in _obstacles(site, params.leaves[site.leaf])]
    raise_listed(AttachError, "cannot quantize these weights:", problems)
    new: dict[str, Any] = {}
    for site in sites:
        order = (
            *site.axes.batch_axes,
            *site.axes.out_axes,
            *site.axes.in_axes,
        )  # PyTorch's order: the inputs of one output are contiguous
        size = site.fan_in if kind == "int8" and block is None else block
        new[site.leaf] = quantized.quantize_weight(params.leaves[site.leaf], kind, order, len(site.match.stack), size)
    raise_listed(
        AttachError,
        "cannot quantize these weights, whose values are not all finite:",
        (x for x, q in new.items() if not isinstance(q.absmax, Tracer) and not jnp.isfinite(q.absmax).all()),
    )
    model = carrier(model).replace(new, boxes=False)  # the axes of a box do not match those of codes and scales
    for leaf in new if params.walked is not None else ():
        nnx_adapters.install_adapters(params.held[leaf][0])
    return model


def _obstacles(site: Site, w: Any) -> list[str]:
    """Return the reasons why a weight cannot be quantized."""
    if quantized.is_quantized(w):
        return ["already quantized"]
    stack, sharding = site.match.stack, regions.sharding_of(w)
    has_values = not isinstance(w, jax.ShapeDtypeStruct) and jnp.issubdtype(w.dtype, jnp.floating)
    return met(
        {
            "expected the weight of a linear layer": site.match.weight.kind != "linear",
            f"expected floating-point values, found {type(w).__name__} of {w.dtype}": not has_values,
            "sharded on a mesh with explicit axes, which does not allow slicing into blocks; use Auto axes": (
                sharding is not None and jax.sharding.AxisType.Explicit in sharding.mesh.axis_types
            ),
            f"its layers are stacked on axis {stack}; expected the first axes": stack != tuple(range(len(stack))),
        }
    )


def dequantize(model: Any) -> Any:
    """Dequantize every quantized weight of a base: the inverse of `quantize` except for rounding.

    Takes an NNX model (changed in place) or nested mappings, with weights of `quantize` or QArrays of Qwix. A base
    without quantized weights is returned unchanged. It raises nothing of its own.

    >>> import numpy as np
    >>> base = {"q": {"kernel": np.eye(64, dtype="float32")}}
    >>> bool((dequantize(quantize(base, modules=["q"]))["q"]["kernel"] == base["q"]["kernel"]).all())
    True
    """
    held = carrier(model)
    if not held.in_place:
        return jax.tree.map(quantized.to_dense, model, is_leaf=quantized.is_quantized)
    return held.replace({p: quantized.to_dense(w) for p, w in held.leaves().items() if quantized.is_quantized(w)})


def from_qwix(model: Any) -> Any:
    """Convert a model of `qwix.quantize_model` (weights only) to one that adapters can be attached to.

    Qwix replaces functions of JAX while the model runs, and would quantize an adapter's inputs too. After the
    conversion the weights are still QArrays, and each call of a layer dequantizes its weight.

    Args:
        model: NNX: changed in place and returned. Linen: returns the module without Qwix; use it with the parameters
            of `qwix.quantize_params` unchanged.

    Raises `AttachError` if Qwix also quantizes activations (static scales).

        model = jaxadapt.models.from_qwix(qwix.quantize_model(model, qwix.PtqProvider(rules), x))
    """
    if isinstance(model, nn.Module):
        plain: Any = model.copy()
        object.__setattr__(plain, "__class__", _without_qwix(type(model)))
        return plain
    if not isinstance(model, nnx.Module):
        raise AttachError(f"expected an NNX or Linen module, found {type(model).__name__}")
    qwix_params = {
        (path, attr): (node, value)
        for path, node in graph.walk_model(model).modules
        for attr, value in vars(node).items()
        if quantized.is_qwix_parameter(value)
    }
    is_variable = graph.instance_test(nnx.Variable)
    new = {
        at: jax.tree.map(lambda x: x.get_value() if is_variable(x) else x, value, is_leaf=is_variable)
        for at, (_, value) in qwix_params.items()
    }
    raise_listed(
        AttachError,
        "cannot convert this model: Qwix also quantizes activations, with static scales, at:",
        (paths.join(*at) for at, value in new.items() if not quantized.is_quantized(value.array)),
    )
    for at, (node, _) in qwix_params.items():
        delattr(node, at[1])
        setattr(node, at[1], nnx.Param(new[at].array))
        nnx_adapters.install_adapters(node)
    graph.set_class(model, _without_qwix(type(model)))
    return model


def _without_qwix(cls: Any) -> Any:
    return vars(cls).get("_unquantized_type", cls)
