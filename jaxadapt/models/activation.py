"""Which adapters of a model are active, and how strongly.

`rescale` multiplies the trained values at run time, so that jitted functions are not recompiled.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxadapt.adapters.adapter import Adapter
from jaxadapt.core import paths
from jaxadapt.core.errors import AttachError, raise_listed
from jaxadapt.methods.registry import get_method
from jaxadapt.models.carriers import carrier
from jaxadapt.models.carriers import DEFAULT
from jaxadapt.models.nnx import graph

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
    if names and not held.has_adapters():
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
        present = held.names()  # the context may have deleted some
        held.activate([name for name in before if name in present])


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
    if (walk := held.walk()) is None:
        if name is not None or not held.has_adapters():
            held.extract(DEFAULT if name is None else name)  # raises if there is no such adapter
        names = None if name is None else (name,)
        yield held.map_adapters(lambda name, adapter: _multiply(name, adapter, factor), names)
        return
    present = walk.adapters
    chosen = held.active() if name is None else [name]
    if not chosen or not present.keys() >= set(chosen):
        raise AttachError(
            f"cannot rescale: expected {'an active adapter' if name is None else repr(name)}, this model has"
            f" {sorted(present) or 'none'}"
        )
    before = {each: {path: var.get_value() for path, var in present[each].items()} for each in chosen}
    scaled = {each: _multiply(each, held.extract(each), factor) for each in chosen}
    try:
        for each in chosen:
            graph.set_values(present[each], scaled[each])
        yield model
        values = [(each, path, var.get_value()) for each in chosen for path, var in present[each].items()]
        changed = [f"{each}: {path}" for each, path, x in values if _values_differ(x, scaled[each][path])]
    finally:
        for each in chosen:
            graph.set_values(present[each], before[each])
    raise_listed(
        AttachError,
        "these adapter parameters were changed inside rescale, where they are multiplied by the factor; the changes"
        " were discarded. Train outside the context:",
        changed,
    )


def _multiply(name: str, adapter: Adapter, factor: Any) -> dict[str, Any]:
    """Return an adapter's `{path: array}` with its update multiplied; raise `AttachError` if its method has no scale."""
    leaves = paths.flatten(adapter.params)
    scaled = [path for path in leaves if path.rpartition(".")[2] in get_method(adapter.config).scaled]
    if not scaled:
        raise AttachError(f"cannot rescale the adapter {name!r}: its type {adapter.config.peft_type} has no scale")

    def multiply(x: Any) -> Any:
        return (x * jnp.asarray(factor, jnp.float32)).astype(x.dtype)

    return leaves | {path: jax.tree.map(multiply, leaves[path]) for path in scaled}


def _values_differ(new: Any, old: Any) -> bool:
    """Return True if two arrays differ; an array that a jitted function returned unchanged is equal, not identical."""
    if new is old or isinstance(new, Tracer) or isinstance(old, Tracer):
        return False
    return not bool(jnp.array_equal(new, old, equal_nan=True))
