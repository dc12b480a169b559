"""A bank on a model, and the route that gives each row of a batch its adapter."""

from __future__ import annotations

import abc
import contextlib
import dataclasses
from collections.abc import Generator, Mapping, Sequence
from typing import Any

from jaxadapt.core.errors import AttachError
from jaxadapt.models.call import Rows
from jaxadapt.models.carriers import Model, Module, Wrapper, carrier
from jaxadapt.models.linen.wrapper import Adapted
from jaxadapt.models.nnx import attach as nnx_rows
from jaxadapt.serving.bank import Bank

_EXPECTED = "an NNX model or a Linen module"


class RowsByName(abc.ABC):
    """Adapters by name, such as an `AdapterPool`."""

    @abc.abstractmethod
    def rows(
        self, adapter_names: Sequence[str | Mapping[str, float] | None], *, wait: float = 0.0
    ) -> contextlib.AbstractContextManager[Rows]:
        """Return a context with the tensors of the adapters of a batch's rows; see `AdapterPool.rows`."""


def attach(model: Any, bank: Bank) -> Any:
    """Let a model take its adapters from a bank, row by row.

    NNX: changes the model in place and returns it. Linen: returns a wrapper with the module's `init` and `apply`. Until
    `route` gives it rows, a call raises `AttachError`. Adapters that are attached otherwise act in every row.

    Raises `AttachError` if the model lacks a weight of the bank, or has a bank already.

    >>> from flax import nnx as fnnx
    >>> import jaxadapt
    >>> net = fnnx.Dict(q_proj=fnnx.Linear(4, 6, rngs=fnnx.Rngs(0)))
    >>> bank = jaxadapt.serving.create(net, jaxadapt.LoraConfig(r=2, target_modules=["q_proj"]), slots=2)
    >>> type(attach(net, bank).q_proj).__name__
    'AdaptedLinear'
    """
    held, layout = carrier(model), bank.layout.rows
    if isinstance(held, Model):
        nnx_rows.attach_rows(model, layout)
        return model
    if not isinstance(held, Module):
        raise held.unsupported(_EXPECTED)
    wrapper = model if isinstance(held, Wrapper) else Adapted(model, (), ())
    if wrapper.layout is not None:
        raise AttachError("these layers cannot take a bank: the module has a bank already; call detach first")
    return dataclasses.replace(wrapper, layout=layout)


def detach(model: Any) -> Any:
    """Remove the bank of a model, and return the model: NNX in place, Linen the module or wrapper before `attach`.

    A model without a bank raises no error and is returned unchanged.

    >>> import flax.linen, jaxadapt, numpy
    >>> base = {"kernel": numpy.zeros((4, 6))}
    >>> bank = jaxadapt.serving.create({"q": base}, jaxadapt.LoraConfig(r=2, target_modules=["q"]), slots=2)
    >>> detach(attach(flax.linen.Dense(6), bank)).features
    6
    """
    held = carrier(model)
    if isinstance(held, Model):
        nnx_rows.detach_rows(model)
        return model
    if not isinstance(held, Wrapper):
        raise held.unsupported(_EXPECTED + " with a bank")
    return dataclasses.replace(model, layout=None, rows=None) if model.adapters else model.module


@contextlib.contextmanager
def route(
    model: Any, rows: Rows | RowsByName, *, adapter_names: Sequence[str | Mapping[str, float] | None] | None = None
) -> Generator[Any]:
    """Give each row of a batch its adapter within a context. The context's value is the model to call.

    NNX: stores the rows beside the weights, and removes them at the end, also after an error. Linen: returns a wrapper
    with the rows. Under `jax.jit`, make `rows` an argument and enter the context inside the function; other rows of as
    many adapters then do not compile it again. The rows are the first axis of the model's inputs.

    Args:
        model: a model that `attach` prepared.
        rows: the result of `Bank.select`, or an `AdapterPool` with `adapter_names`.
        adapter_names: the adapters of the rows, as in PEFT's `forward(adapter_names=…)` and `AdapterPool.rows`. They
            are leased for the time of the context, which must be outside `jax.jit`.

    Raises `AttachError` if the model has no bank, or another one.

    >>> import jax.numpy as jnp, jaxadapt
    >>> from flax import nnx as fnnx
    >>> net, x = fnnx.Dict(q_proj=fnnx.Linear(4, 6, rngs=fnnx.Rngs(0))), jnp.ones((2, 4))
    >>> y = net.q_proj(x)
    >>> bank = jaxadapt.serving.create(net, jaxadapt.LoraConfig(r=2, target_modules=["q_proj"]), slots=2)
    >>> with route(attach(net, bank), bank.select([0, 0])):
    ...     bool((net.q_proj(x) == y).all())
    True
    """
    if isinstance(rows, RowsByName):
        if adapter_names is None:
            raise AttachError("adapter_names: expected the name of each row's adapter, found None; pass it with a pool")
        with rows.rows(adapter_names) as leased, route(model, leased) as routed:
            yield routed
        return
    if not isinstance(rows, Rows) or adapter_names is not None:  # pyright: ignore[reportUnnecessaryIsInstance]
        found = type(rows).__name__ + ("" if adapter_names is None else " with adapter_names")
        raise AttachError(f"rows: expected the result of Bank.select, or a pool with adapter_names, found {found}")
    held = carrier(model)
    if isinstance(held, Wrapper):
        if model.layout is None:
            raise AttachError("the module has no bank; call attach(module, bank) first")
        rows.check_layout(model.layout)
        yield dataclasses.replace(model, rows=rows)
        return
    if not isinstance(held, Model):
        raise held.unsupported(_EXPECTED + " with a bank")
    nnx_rows.set_rows(model, rows)
    try:
        yield model
    finally:
        nnx_rows.set_rows(model, None)
