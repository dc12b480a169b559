"""The data of calls with virtual tokens: the rows' tasks, and whether a cache holds the virtual tokens already."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Generator, Mapping
from typing import Any

import jax.numpy as jnp
from jax.core import Tracer

from jaxadapt.configs import Config
from jaxadapt.core.errors import AttachError
from jaxadapt.models.linen import wrapper
from jaxadapt.models.nnx import attach, prompt


@contextlib.contextmanager
def prompting(model: Any, *, task_ids: Any = None, prefilled: bool = False) -> Generator[Any]:
    """Set the data of the calls of a model with virtual tokens within a context.

    NNX: changes the model and restores it at the end, also after an error. Linen: the context's value is the wrapper to
    use. A jitted function that takes `task_ids` as an argument is not recompiled for other tasks.

    Args:
        model: an NNX model, or a Linen module adapted with `adapt`.
        task_ids: the task of each row, integers (batch,), for MULTITASK_PROMPT_TUNING. Inside jit a task that does not
            exist gives NaN.
        prefilled: True for decoding with a cache, after a first call with the virtual tokens: they are then not put
            before the tokens again, and only positions and mask count them. (A prefix of keys and values is in no cache
            and needs no such data.)

    Raises `AttachError` if a task does not exist, or if `task_ids` has another shape or dtype.

    >>> import jax, jaxadapt
    >>> from flax import nnx as fnnx
    >>> class Net(fnnx.Module):
    ...     def __init__(self, rngs):
    ...         self.embed, self.head = fnnx.Embed(9, 8, rngs=rngs), fnnx.Linear(8, 9, rngs=rngs)
    ...     def __call__(self, tokens=None, embeddings=None):
    ...         return self.head(self.embed(tokens) if embeddings is None else embeddings)
    >>> config = jaxadapt.MultitaskPromptTuningConfig(num_virtual_tokens=2, token_dim=8, num_tasks=3)
    >>> net = jaxadapt.adapt(Net(fnnx.Rngs(0)), config, rngs=fnnx.Rngs(1))
    >>> with prompting(net, task_ids=jnp.array([0, 2])):
    ...     net(jnp.zeros((2, 3), jnp.int32)).shape
    (2, 5, 9)
    """
    ids = None if task_ids is None else jnp.asarray(task_ids)
    if ids is not None and not (ids.ndim == 1 and jnp.issubdtype(ids.dtype, jnp.integer)):
        raise AttachError(f"task_ids: expected integers of shape (batch,), found {ids.dtype} of {list(ids.shape)}")
    if isinstance(model, wrapper.Adapted):
        configs = dict(model.adapters)
        _check_tasks({name: configs[name] for name in model.active}, ids)
        yield dataclasses.replace(model, task_ids=ids, prefilled=prefilled)
        return
    if not isinstance(model, attach.nnx.Module):
        raise AttachError(f"expected an NNX model, or a Linen module that adapt returned, found {type(model).__name__}")
    _check_tasks({name: attach.extract(model, name).config for name in attach.active_names(model)}, ids)
    with prompt.call_data(model, ids, prefilled):
        yield model


def _check_tasks(configs: Mapping[str, Config], ids: Any) -> None:
    """Raise `AttachError` if a task does not exist in an active adapter."""
    if ids is None or isinstance(ids, Tracer):
        return
    for name, config in configs.items():
        count = config.get("num_tasks")
        if count is not None and not bool(((ids >= 0) & (ids < count)).all()):
            raise AttachError(
                f"task_ids: expected tasks from 0 to {count - 1}, because the adapter {name!r} has num_tasks={count},"
                f" found {ids.tolist()}"
            )
