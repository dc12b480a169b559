"""Gradients of a function of an NNX model, with respect to some of its adapter parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from jaxadapt.models.nnx import attach


def adapter_gradient(
    f: Callable[[Any, Any], Any], name: str, tensor: str
) -> Callable[[Any, Any], dict[str, dict[str, Any]]]:
    """Return `run(model, batch)`, which returns `{adapter: {path: gradient}}` of the scalar `f(model, batch)`.

    The gradients are those of the tensor called `tensor` in the adapter called `name`. `run` compiles once.
    """

    def is_wanted(path: Any, value: Any) -> bool:
        return isinstance(value, attach.AdapterParam) and path[-1] == tensor and name in path

    def gradient(graphdef: Any, wanted: Any, rest: Any, batch: Any) -> Any:
        def value(wanted: Any) -> Any:
            copies = jax.tree.map(lambda x: x, rest)  # variables belong to the trace that creates them
            return f(nnx.merge(graphdef, wanted, copies), batch)

        return jax.grad(value)(wanted)

    jitted = jax.jit(gradient, static_argnums=0)

    def run(model: Any, batch: Any) -> dict[str, dict[str, Any]]:
        variables = attach.adapter_variables(jitted(*nnx.split(model, is_wanted, ...), batch))
        return {name: {path: var.get_value() for path, var in each.items()} for name, each in variables.items()}

    return run
