"""Rescaling of adapters at run time: the trained values are multiplied, so that jitted functions are not recompiled."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer

from jaxadapt import methods
from jaxadapt.adapters.adapter import CONFIG_NODE, Adapter
from jaxadapt.core import paths
from jaxadapt.core.errors import AttachError
from jaxadapt.models import attachment
from jaxadapt.models.linen import collections, wrapper
from jaxadapt.models.nnx import attach

Array = Any


@contextlib.contextmanager
def rescale(tree: Any, factor: Any, name: str | None = None) -> Generator[Any]:
    """Multiply an adapter's weight update by `factor` within a context (PEFT's `rescale_adapter_scale`).

    NNX: changes the model and restores it at the end, also after an error. Linen: the context's value is the variables
    to use. The factor may be a traced array: a function jitted over the model or the variables is not retraced for
    another factor, and a call costs no more than without `rescale`. For inference only: values trained inside the
    context are restored at its end, and an error is raised. An adapter saved or extracted inside is the rescaled one.

    Args:
        tree: an NNX model, Linen variables, or an `Adapter`.
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
    if isinstance(tree, wrapper.Adapted | wrapper.nn.Module):
        raise AttachError(
            "cannot rescale a Linen module, which holds no parameters; rescale its variables:"
            " with rescale(variables, 0.5) as v"
        )
    if not isinstance(tree, nnx.Module):
        yield _rescale_tree(tree, factor, name)
        return
    variables = _find_variables(tree, name)
    before = {path: var.get_value() for path, var in variables.items()}
    scaled = [p for p, v in variables.items() if p.rpartition(".")[2] in v.get_metadata()["adapter"].method.scaled]
    scaled_values = {**before, **{path: _multiply(before[path], factor) for path in scaled}}
    try:
        for path in scaled:
            variables[path].set_value(scaled_values[path])
        yield tree
        changed = [path for path, var in variables.items() if _values_differ(var.get_value(), scaled_values[path])]
    finally:
        for path, var in variables.items():
            var.set_value(before[path])
    if changed:
        raise AttachError(
            "these adapter parameters were changed inside rescale, where they are multiplied by the factor; the changes"
            " were discarded. Train outside the context:\n" + paths.bullets(changed)
        )


def _multiply(value: Array, factor: Any) -> Array:
    return (value * jnp.asarray(factor, jnp.float32)).astype(value.dtype)


def _values_differ(new: Array, old: Array) -> bool:
    """Return True if two arrays differ; an array that a jitted function returned unchanged is equal, not identical."""
    if new is old or isinstance(new, Tracer) or isinstance(old, Tracer):
        return False
    return not bool(jnp.array_equal(new, old, equal_nan=True))


def _find_variables(model: Any, name: str | None) -> dict[str, Any]:
    """Return `{"adapter: path": variable}` of the named (or active) adapters."""
    walked = attach.walked(model)
    present = walked.adapters
    chosen = attach.active_names(walked) if name is None else (name,)
    missing = [n for n in chosen if n not in present]
    if missing or not chosen:
        raise AttachError(
            f"cannot rescale: expected {'an active adapter' if name is None else repr(name)}, this model has"
            f" {sorted(present) or 'none'}"
        )
    out: dict[str, Any] = {}
    for n in chosen:
        metadata = {path: var.get_metadata()["adapter"] for path, var in present[n].items()}
        scaled = [path for path, meta in metadata.items() if path.rpartition(".")[2] in meta.method.scaled]
        _require_scale(scaled, n, next(iter(metadata.values())).recipe.config)
        out |= {f"{n}: {path}": var for path, var in present[n].items()}
    return out


def _require_scale(scaled: Any, name: str, config: Any) -> None:
    if not scaled:
        raise AttachError(f"cannot rescale the adapter {name!r}: its type {config.peft_type} has no scale")


def _rescale_tree(tree: Any, factor: Any, name: str | None) -> Any:
    if isinstance(tree, Adapter):
        return Adapter(tree.config, _scale_params(tree.params, tree, factor, "default"), tree.keymap)
    if not isinstance(tree, Mapping):
        raise AttachError(f"expected an NNX model, Linen variables or an Adapter, found {type(tree).__name__}")
    out, seen = dict(tree), 0
    for collection in methods.COLLECTIONS:
        adapters = tree.get(collection)
        if not isinstance(adapters, Mapping):
            continue
        new = dict(adapters)
        for n, inner in adapters.items():
            if isinstance(inner, Mapping) and CONFIG_NODE in inner and name in (None, n):
                new[n] = _scale_params(inner, collections.read_adapter(inner, n), factor, n)
                seen += 1
        out[collection] = new
    if not seen:
        attachment.extract(tree, name or attachment.DEFAULT)  # raises a more precise error
        raise AttachError("cannot rescale: these variables hold no adapter with its configuration")
    return out


def _scale_params(tree: Mapping[str, Any], adapter: Adapter, factor: Any, name: str) -> dict[str, Any]:
    scaled = methods.get_method(adapter.config).scaled
    _require_scale(scaled & {t for tensors in adapter.sites.values() for t in tensors}, name, adapter.config)

    def walk(node: Mapping[str, Any]) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for key, value in node.items():
            if key in scaled:
                out[key] = jax.tree.map(lambda x: _multiply(x, factor), value)  # through boxes
            else:
                out[key] = walk(value) if isinstance(value, Mapping) else value
        return out

    return walk(tree)
