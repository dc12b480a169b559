"""The strength of an adapter as run-time data: its trained values are multiplied, so nothing is compiled anew."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxadapt import methods
from jaxadapt.adapters.adapter import CONFIG_NODE, Adapter
from jaxadapt.core import paths
from jaxadapt.core.errors import AttachError
from jaxadapt.models import attachment
from jaxadapt.models.linen import collections, wrapper
from jaxadapt.models.nnx import attach as nnx

Array = Any


@contextlib.contextmanager
def rescale(tree: Any, factor: Any, name: str | None = None) -> Generator[Any]:
    """Within the context an adapter's change of the weights is `factor` times what it is.

    NNX: the model itself, restored at the end, also after an error. Linen: the context's value is the variables to use.
    The factor may be a traced array: a function jitted over the model or the variables is not traced again for another
    one, and a plain call costs what it cost. For inference (PEFT's `rescale_adapter_scale`): what is trained inside is
    refused at the end, and undone; what is saved or extracted inside has the change as it is there.

    Args:
        tree: an NNX model, Linen variables, or an `Adapter`.
        factor: a number; 0 switches the change off, a negative one takes it away.
        name: of the adapter; by default the active ones of a model, all of other trees.

    LoRA's B is multiplied, in float32, and rounded to B's dtype; so in 16 bits a factor that is no power of two costs
    one rounding. Raises `AttachError` for adapters that have no scale (IA3), or none of that name.

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
        raise AttachError(f"factor: expected a number, found an array of shape {np.shape(factor)}")
    if isinstance(tree, wrapper.Adapted | wrapper.nn.Module):
        raise AttachError(
            "a Linen module holds no parameters; rescale its variables: with rescale(variables, 0.5) as v"
        )
    if not isinstance(tree, nnx.nnx.Module):
        yield _scaled_tree(tree, factor, name)
        return
    held = _of_model(tree, name)
    before = {path: var.get_value() for path, var in held.items()}
    scaled = [p for p, v in held.items() if p.rpartition(".")[2] in v.get_metadata()["adapter"].method.scaled]
    inside = {**before, **{path: _times(before[path], factor) for path in scaled}}
    try:
        for path in scaled:
            held[path].set_value(inside[path])
        yield tree
        changed = [path for path, var in held.items() if _differs(var.get_value(), inside[path])]
    finally:
        for path, var in held.items():
            var.set_value(before[path])
    if changed:
        raise AttachError(
            "these values were changed within rescale, where they are not the adapter's own, and are now as they were"
            " before; train outside the context:\n" + paths.bullets(changed)
        )


def _times(value: Array, factor: Any) -> Array:
    return (value * jnp.asarray(factor, jnp.float32)).astype(value.dtype)


def _differs(now: Array, then: Array) -> bool:
    """Whether a value is another; one that a jitted function handed through is equal, not identical."""
    if now is then or isinstance(now, Tracer) or isinstance(then, Tracer):
        return False
    return not bool(jnp.array_equal(now, then, equal_nan=True))


def _of_model(model: Any, name: str | None) -> dict[str, Any]:
    """The variables of these adapters, by adapter and path."""
    present = nnx.adapter_variables(model)
    chosen = nnx.active_names(model) if name is None else (name,)
    missing = [n for n in chosen if n not in present]
    if missing or not chosen:
        raise AttachError(f"no active adapter of that name to rescale; this model has {sorted(present) or 'none'}")
    out: dict[str, Any] = {}
    for n in chosen:
        of = {path: var.get_metadata()["adapter"] for path, var in present[n].items()}
        scaled = [path for path, said in of.items() if path.rpartition(".")[2] in said.method.scaled]
        _need_scale(scaled, n, next(iter(of.values())).recipe.config)
        out |= {f"{n}: {path}": var for path, var in present[n].items()}
    return out


def _need_scale(found: Any, name: str, config: Any) -> None:
    if not found:
        raise AttachError(f"the adapter {name!r} is of type {config.peft_type}, which has no scale")


def _scaled_tree(tree: Any, factor: Any, name: str | None) -> Any:
    if isinstance(tree, Adapter):
        return Adapter(tree.config, _scaled(tree.params, tree, factor, "default"), tree.keymap)
    if not isinstance(tree, Mapping):
        raise AttachError(f"expected an NNX model, Linen variables or an Adapter, found {type(tree).__name__}")
    out, seen = dict(tree), 0
    for collection in methods.COLLECTIONS:
        held = tree.get(collection)
        if not isinstance(held, Mapping):
            continue
        new = dict(held)
        for n, inner in held.items():
            if isinstance(inner, Mapping) and CONFIG_NODE in inner and name in (None, n):
                new[n] = _scaled(inner, collections.read_collection(inner, n), factor, n)
                seen += 1
        out[collection] = new
    if not seen:
        attachment.extract(tree, name or attachment.DEFAULT)  # says what is wrong with it
        raise AttachError("these variables hold no adapter with its configuration to rescale")
    return out


def _scaled(tree: Mapping[str, Any], adapter: Adapter, factor: Any, name: str) -> dict[str, Any]:
    scaled = methods.get_method(adapter.config).scaled
    _need_scale(scaled & {t for tensors in adapter.sites.values() for t in tensors}, name, adapter.config)

    def walk(node: Mapping[str, Any]) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for key, value in node.items():
            if key in scaled:
                out[key] = jax.tree.map(lambda x: _times(x, factor), value)  # through boxes
            else:
                out[key] = walk(value) if isinstance(value, Mapping) else value
        return out

    return walk(tree)
