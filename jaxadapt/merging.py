"""Adapters into the base weights and out again. PEFT calls it merge and unmerge."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from jaxadapt import bind, methods, nnx, paths
from jaxadapt.adapter import Adapter
from jaxadapt.errors import AttachError, MismatchError
from jaxadapt.linen import meta
from jaxadapt.methods import Applied

Change = Callable[[Applied, Any], Any]


def merge(params: Any, adapter: Adapter) -> Any:
    """The base parameters with the adapter in them: W + s·B·A for LoRA, W·l (and bias·l) for IA3.

    Args:
        params: nested mappings of base parameters, a new tree is returned; or an NNX model without this
            adapter attached (`detach` first), changed in place and returned.

    The sum is made in float32 and rounded once to the weight's dtype. Raises `MismatchError` if the
    adapter does not fit.

    >>> import numpy as np, jax, jaxadapt
    >>> base = {"q": {"kernel": np.ones((4, 6), "float32")}}
    >>> adapter = jaxadapt.init(jaxadapt.LoraConfig(r=2, target_modules=["q"]), base, key=jax.random.key(0))
    >>> bool((merge(base, adapter)["q"]["kernel"] == 1).all())
    True
    """
    return _changed(params, adapter, lambda a, w: a.weight(w), lambda a, b: a.bias(b))


def unmerge(params: Any, adapter: Adapter) -> Any:
    """The inverse of `merge`, within the rounding of the weight's dtype."""
    return _changed(params, adapter, lambda a, w: a.unweight(w), lambda a, b: a.unbias(b))


def _changed(params: Any, adapter: Adapter, weight: Change, bias: Change) -> Any:
    if isinstance(params, nnx.nnx.Module):
        return _on_model(params, adapter, weight, bias)
    leaves = paths.flatten(params)
    new = _new_leaves({p: meta.unbox(v) for p, v in leaves.items()}, adapter, weight, bias)
    return _rebuilt(params, {**leaves, **new})


def _on_model(model: Any, adapter: Adapter, weight: Change, bias: Change) -> Any:
    if nnx.active(model):
        raise AttachError(
            "this model has active adapters, which would count twice; take the adapter out and detach first:"
            " adapter = extract(model); detach(model); merge(model, adapter)"
        )
    owners = nnx.base_leaves(model)
    new = _new_leaves({p: vars(m)[a].get_value() for p, (m, a) in owners.items()}, adapter, weight, bias)
    for path, value in new.items():
        module, attr = owners[path]
        vars(module)[attr].set_value(value)
    return model


def _rebuilt(like: Any, flat: Mapping[str, Any], prefix: str = "") -> Any:
    return {
        key: _rebuilt(value, flat, paths.join(prefix, str(key)))
        if isinstance(value, Mapping)
        else flat[paths.join(prefix, str(key))]
        for key, value in like.items()
    }


def _new_leaves(leaves: Mapping[str, Any], adapter: Adapter, weight: Change, bias: Change) -> dict[str, Any]:
    shapes = {leaf: {t: tuple(a.shape) for t, a in ts.items()} for leaf, ts in adapter.sites.items()}
    bounds = bind.recover(adapter.config, adapter.keymap, shapes)
    missing = [b.leaf for b in bounds if b.leaf not in leaves]
    if missing:
        raise MismatchError("the adapter adapts weights that these parameters lack:\n" + paths.listing(missing))
    method = methods.of(adapter.config)
    out: dict[str, Any] = {}
    for bound in bounds:
        w = leaves[bound.leaf]
        want = _expected(bound, tuple(w.shape))
        if want != bound.shapes:
            raise MismatchError(
                f"{bound.leaf}: for a weight of shape {tuple(w.shape)} expected {want}, found {bound.shapes}"
            )
        params = adapter.sites[bound.leaf]
        out[bound.leaf] = _over_stack(bound, method, weight, params, w)
        beside = paths.join(bound.leaf.rpartition(".")[0], "bias")
        if beside in leaves:
            out[beside] = _over_stack(bound, method, bias, params, leaves[beside])
    return out


def _expected(bound: bind.Bound, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    from jaxadapt import plan

    sizes = plan.sizes_of(bound.site, shape)
    return {t.name: plan.entry_shape(bound.site, t, sizes) for t in bound.tensors}


def _over_stack(bound: bind.Bound, method: methods.Method, change: Change, params: Mapping[str, Any], w: Any) -> Any:
    def one(params: Mapping[str, Any], w: Any) -> Any:
        return change(Applied(method, bound.static, params, bound.axes), w)

    run: Callable[..., Any] = one
    for axis in bound.site.stack:  # ascending, so the outermost vmap takes the last axis and moves no other
        run = jax.vmap(run, in_axes=axis, out_axes=axis)
    new = run(dict(params), w)
    return np.asarray(new) if isinstance(w, np.ndarray) else new
