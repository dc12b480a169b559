"""Dependence of a function's outputs on its weights, determined without running it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
from jax.interpreters.partial_eval import dce_jaxpr

from jaxadapt.core.errors import AttachError, raise_listed


def refuse_reads_outside(leaves: Iterable[str]) -> None:
    """Raise `AttachError` if there are weights that the model reads outside their own module's call."""
    raise_listed(
        AttachError,
        "these weights are read outside their own module's call, where an adapter cannot follow:",
        leaves,
        "\nExclude them with exclude_modules, or change the reader to call the module",
    )


def live_weights(f: Callable[[Any], Any], weights: Mapping[str, Any]) -> dict[str, bool]:
    """Return `{name: True if the outputs of f(weights) depend on it}`; weights may be `ShapeDtypeStruct`s.

    >>> import jax.numpy as jnp
    >>> live_weights(lambda w: w["a"] * 2, {"a": jnp.ones(3), "b": jnp.ones(3)})
    {'a': True, 'b': False}
    """
    names = list(weights)
    closed = jax.make_jaxpr(lambda *ws: f(dict(zip(names, ws, strict=True))))(*(weights[n] for n in names))
    _, used = dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
    return dict(zip(names, used, strict=True))
