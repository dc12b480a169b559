"""Data of a call that some adapters need: tokens for aLoRA, tasks for a prompt of several tasks, noise for PVERA.

It also has the gradients of a function of an NNX model with respect to some of its adapter parameters.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxadapt.adapters.adapter import SHARED_NODE, Adapter, collection_name
from jaxadapt.adapters.sites import sites_of
from jaxadapt.configs.base import Config
from jaxadapt.core.errors import AttachError
from jaxadapt.methods.registry import get_method
from jaxadapt.models.carriers import carrier
from jaxadapt.models.carriers import Model
from jaxadapt.models.carriers import Wrapper
from jaxadapt.models.linen.overlay import repeat_on_stack
from jaxadapt.models.nnx import graph

# ---------------------------------------------------------------- invocation


Array = Any


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
    given = {name: jnp.asarray(x) for name, x in (("tokens", tokens), ("task_ids", task_ids)) if x is not None}
    given |= {"prefilled": jnp.ones((), bool)} if prefilled else {}
    given |= {} if noise is None else {"noise": jax.random.key_data(noise)}
    ids = given.get("tokens")
    if ids is not None and (ids.ndim != 2 or not (ids.dtype == bool or jnp.issubdtype(ids.dtype, jnp.integer))):
        raise AttachError(
            f"expected token ids or a boolean mask of shape (batch, time), found {ids.dtype} of shape {list(ids.shape)}"
        )
    held = carrier(model)
    if isinstance(held, Wrapper):
        data = _call_data({name: config for name, config in model.adapters if name in model.active}, given)
        yield dataclasses.replace(model, data=data)
        return
    if not isinstance(held, Model):
        raise held.unsupported("an NNX model, or a Linen module that adapt returned")
    adapters = {name: held.extract(name) for name in held.active()}
    data = _call_data({name: adapter.config for name, adapter in adapters.items()}, given)
    extended: list[tuple[dict[str, Any], str]] = []
    for name, arrays in data.items():
        for tensors, key, array in _places(held, name, adapters[name], arrays):
            tensors[key] = graph.CallData(array)
            extended.append((tensors, key))
    try:
        yield model
    finally:
        for tensors, key in extended:
            del tensors[key]


def _places(
    held: Model, name: str, adapter: Adapter, arrays: Mapping[str, Array]
) -> Iterator[tuple[dict[str, Any], str, Array]]:
    """Yield (the tensors of one place of an adapter, a name, the array that they get under it)."""
    collection, owners = collection_name(adapter.config), held.walk().leaves
    if get_method(adapter.config).scope == "model":  # a prompt, whose tensors are the model's
        tensors = vars(held.tree)[collection][name][SHARED_NODE]
        yield from ((tensors, key, array) for key, array in arrays.items())
    for site in sites_of(adapter):
        module, attr = owners[site.leaf]
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

    def gradient(graphdef: Any, wanted: Any, rest: Any, batch: Any) -> Any:
        def value(wanted: Any) -> Any:
            copies = jax.tree.map(lambda x: x, rest)  # variables belong to the trace that creates them
            return f(nnx.merge(graphdef, wanted, copies), batch)

        return jax.grad(value)(wanted)

    jitted = jax.jit(gradient, static_argnums=0)

    def run(model: Any, batch: Any) -> dict[str, dict[str, Any]]:
        variables = graph.adapter_variables(jitted(*nnx.split(model, is_wanted, ...), batch))
        return {name: {path: var.get_value() for path, var in each.items()} for name, each in variables.items()}

    return run
