"""Flat `{dotted path: array}` leaves into the shapes that Linen and NNX models keep them in."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

Leaves = Mapping[str, np.ndarray]


def nest(leaves: Leaves) -> dict[str, Any]:
    """`{"a.b": x}` -> `{"a": {"b": x}}` of jax arrays: a Linen `params` tree."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *head, last = path.split(".")
        node = tree
        for part in head:
            node = node.setdefault(part, {})
        node[last] = jnp.asarray(leaf)
    return tree


def stack(leaves: Leaves, axis: int) -> dict[str, np.ndarray]:
    """Layers numbered in the path (`….h.0.…`, `….h.1.…`) put together on `axis` of one leaf each."""
    layers: dict[str, dict[int, np.ndarray]] = {}
    out: dict[str, np.ndarray] = {}
    for path, leaf in leaves.items():
        found = re.fullmatch(r"(.+?)\.(\d+)\.(.+)", path)
        if found is None:
            out[path] = leaf
        else:
            layers.setdefault(f"{found[1]}.{found[3]}", {})[int(found[2])] = leaf
    for path, entries in layers.items():
        out[path] = np.stack([entries[i] for i in range(len(entries))], axis)
    return out


def nnx_leaves(model: nnx.Module, kind: Any = nnx.Param) -> dict[str, nnx.Variable[Any]]:
    """Every `nnx.Param` of a model at its dotted path."""
    flat = nnx.to_flat_state(nnx.state(model, kind))
    return {".".join(map(str, path)): leaf for path, leaf in flat}


def fill(model: nnx.Module, leaves: Leaves, kind: Any = nnx.Param) -> None:
    """Put `leaves` into an NNX model; paths and shapes have to be exactly the model's."""
    state = nnx.state(model, kind)
    mine = {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(state)}
    assert set(mine) == set(leaves), sorted(set(mine) ^ set(leaves))
    for path, variable in mine.items():
        assert variable.shape == leaves[path].shape, (path, variable.shape, leaves[path].shape)
        variable.set_value(jnp.asarray(leaves[path]))
    nnx.update(model, state)
