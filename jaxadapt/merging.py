"""Adapters into the base weights and out again. PEFT calls it merge and unmerge."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxadapt import bind, nnx, paths, plan
from jaxadapt.adapter import Adapter
from jaxadapt.errors import AttachError, MismatchError
from jaxadapt.linen import meta
from jaxadapt.methods import Applied, Method

Change = Callable[[Applied, Any], Any]


def merge(params: Any, adapter: Adapter) -> Any:
    """The base parameters with the adapter in them: W + s·B·A for LoRA, W·l (and bias·l) for IA3.

    Args:
        params: nested mappings of base parameters (FrozenDicts, boxes such as `nn.Partitioned` and numpy
            arrays stay what they are), a new tree is returned; or an NNX model without active adapters
            (`detach` first), changed in place and returned.

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
    if not isinstance(adapter, Adapter):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise AttachError(
            f"expected an Adapter (from extract, init or from_peft), found {type(adapter).__name__};"
            " jaxadapt.from_peft(tensors, params) makes one of PeftTensors"
        )
    if isinstance(params, nnx.nnx.Module):
        return _on_model(params, adapter, weight, bias)
    leaves = {
        _path(keys): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(params, is_leaf=_is_box)
    }
    new = _new_leaves({p: _opened(leaf) for p, leaf in leaves.items()}, adapter, weight, bias)

    def put(keys: Any, leaf: Any) -> Any:
        path = _path(keys)
        return _filled(leaf, new[path]) if path in new else leaf

    return jax.tree_util.tree_map_with_path(put, params, is_leaf=_is_box)


def _path(keys: Sequence[Any]) -> str:
    return paths.join(*(jax.tree_util.keystr((key,), simple=True) for key in keys))


def _is_box(leaf: Any) -> bool:
    """Whether a node wraps one array with what belongs to it: `nn.Partitioned`, an NNX variable."""
    return isinstance(leaf, meta.AxisMetadata | nnx.nnx.Variable)


def _opened(leaf: Any) -> Any:
    return leaf.get_value() if isinstance(leaf, nnx.nnx.Variable) else meta.unbox(leaf)


def _filled(leaf: Any, value: Any) -> Any:
    if isinstance(leaf, nnx.nnx.Variable):
        return leaf.replace(value)
    return leaf.replace_boxed(value) if isinstance(leaf, meta.AxisMetadata) else value


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


def _new_leaves(leaves: Mapping[str, Any], adapter: Adapter, weight: Change, bias: Change) -> dict[str, Any]:
    shapes = {leaf: {t: tuple(a.shape) for t, a in ts.items()} for leaf, ts in adapter.sites.items()}
    bounds = bind.recover(adapter.config, adapter.keymap, shapes)
    missing = [b.leaf for b in bounds if b.leaf not in leaves]
    if missing:
        raise MismatchError(
            "the adapter adapts weights that these parameters lack:\n" + paths.listing(missing)
        )
    wrong = [
        f"{b.leaf}: for a weight of shape {tuple(leaves[b.leaf].shape)} expected {want}, found {b.shapes}"
        for b in bounds
        if (want := _expected(b, tuple(leaves[b.leaf].shape))) != b.shapes
    ]
    if wrong:
        raise MismatchError("the adapter does not fit these parameters:\n" + paths.listing(wrong))
    sites = adapter.sites
    out: dict[str, Any] = {}
    for bound in bounds:
        # The sum is made in float32, also where weight and adapter are both of 16 bits.
        params = {t: x.astype(jnp.promote_types(x.dtype, "float32")) for t, x in sites[bound.leaf].items()}
        out[bound.leaf] = _over_stack(bound, weight, params, leaves[bound.leaf])
        beside = paths.join(bound.leaf.rpartition(".")[0], "bias")
        if beside in leaves and type(bound.method).bias is not Method.bias:
            out[beside] = _over_stack(bound, bias, params, leaves[beside])
    return out


def _expected(bound: bind.Bound, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    sizes = plan.sizes_of(bound.site, shape)
    return {t.name: plan.entry_shape(bound.site, t, sizes) for t in bound.tensors}


def _over_stack(bound: bind.Bound, change: Change, params: Mapping[str, Any], w: Any) -> Any:
    new = bind.over_stack(bound, change, params, w)
    return np.array(new) if isinstance(w, np.ndarray) else new  # a copy: numpy arrays can be written to
