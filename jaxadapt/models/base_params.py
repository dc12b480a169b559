"""Base parameters of a model or tree by dotted path: read them, and replace some of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax import nnx

from jaxadapt.core import paths
from jaxadapt.models.nnx import attach, survey
from jaxadapt.models.trees import is_box, rebox, unbox


def base_leaves(params: Any) -> dict[str, Any]:
    """Return `{path: array}` of an NNX model's base, or of a tree of base parameters, without boxes."""
    if isinstance(params, nnx.Module):
        return survey.base_values(survey.base_leaves(params))
    flat = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_box)
    return {dotted_path(keys): unbox(leaf) for keys, leaf in flat}


def replace_leaves(params: Any, new: Mapping[str, Any]) -> Any:
    """Replace the arrays at some paths: return a new tree, or change an NNX model in place."""
    if isinstance(params, nnx.Module):
        owners = survey.base_leaves(params)
        others = {} if new.keys() <= owners.keys() else survey.layer_state(params)
        for path, value in new.items():
            if path not in owners:
                others[path].set_value(value)
                continue
            module, attr = owners[path]
            vars(module)[attr].set_value(value)
            attach.uninstall_adapters(module)  # removes the dequantisation of a quantised weight
        return params

    def put(keys: Any, leaf: Any) -> Any:
        path = dotted_path(keys)
        return rebox(leaf, new[path]) if path in new else leaf

    return jax.tree_util.tree_map_with_path(put, params, is_leaf=is_box)


def dotted_path(keys: Sequence[Any]) -> str:
    """Return a JAX key path as a dotted path."""
    return paths.join(*(jax.tree_util.keystr((key,), simple=True) for key in keys))
