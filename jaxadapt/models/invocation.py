"""Which tokens an aLoRA adapts, as data of a call."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Generator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from jaxadapt.adapters import sites
from jaxadapt.adapters.adapter import collection_name
from jaxadapt.configs import Config
from jaxadapt.core.errors import AttachError
from jaxadapt.methods.lora import alora
from jaxadapt.models.linen import wrapper
from jaxadapt.models.nnx import attach, params, survey

Array = Any


@contextlib.contextmanager
def invoke(model: Any, tokens: Any) -> Generator[Any]:
    """Within the context, active aLoRA adapters (`alora_invocation_tokens`) adapt these tokens.

    NNX: the model itself, as it was before at the end, also after an error. Linen: the context's value is the wrapper
    to use. Inside a jitted function, where `tokens` is one of its arguments, nothing is compiled anew for others.

    Args:
        model: an NNX model, or what `adapt` made of a Linen module.
        tokens: the token ids (batch, time) that the model is called with: an adapter acts from the last place of its
            sequence on, and not in a row without it (as in PEFT). Or a mask (batch, time) of booleans, for every such
            adapter: with a cache a step's tokens are those behind an invocation that was seen before.

    Raises `AttachError` if there is no active aLoRA, for tokens of another shape or kind, and for a call outside.

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
    ids = jnp.asarray(tokens)
    if ids.ndim != 2 or not (ids.dtype == bool or jnp.issubdtype(ids.dtype, jnp.integer)):
        raise AttachError(
            f"expected token ids or a mask of booleans, (batch, time), found {ids.dtype} of shape {list(ids.shape)}"
        )
    if isinstance(model, wrapper.Adapted):
        configs = dict(model.adapters)
        masks = _masks({name: configs[name] for name in model.active}, ids)
        yield dataclasses.replace(model, tokens=masks)
        return
    if not isinstance(model, attach.nnx.Module):
        raise AttachError(f"expected an NNX model, or a Linen module as adapt returns it, found {type(model).__name__}")
    found = {name: attach.extract(model, name) for name in attach.active_names(model)}
    masks = _masks({name: adapter.config for name, adapter in found.items()}, ids)
    owners = survey.base_leaves(model)
    held: list[dict[str, Any]] = []
    for name, mask in masks.items():
        for bound in sites.sites_of(found[name]):
            module, attr = owners[bound.leaf]
            if not bound.method.copies:
                at = vars(module)[collection_name(found[name].config)][name][attr]
                shape = vars(module)[attr].shape
                at[alora.MASK] = params.TokenMask(alora.stacked(mask, bound.match.stack, shape))
                held.append(at)
    try:
        yield model
    finally:
        for at in held:
            del at[alora.MASK]


def _masks(configs: Mapping[str, Config], ids: Array) -> dict[str, Array]:
    sequences: dict[str, Sequence[int]] = {
        name: found for name, config in configs.items() if (found := config.get("alora_invocation_tokens"))
    }
    if not sequences:
        raise AttachError(f"none of the active adapters is an aLoRA: {sorted(configs) or 'none'}")
    return {name: ids if ids.dtype == bool else alora.invoked(found, ids) for name, found in sequences.items()}
