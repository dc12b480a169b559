"""LoRA with one A and one B for each head (openpi's einsum layers), converted to PyTorch's one A and one B.

    a (n, d, r), b (n, r, h) ──widen──► A (d, n·r), B (n·r, n, h)     heads of the output: q, k, v
    a (n, h, r), b (n, r, d) ──widen──► A (n, h, r), B (r, d)         heads of the input: the output projection
                             ◄─narrow──

Axes of stacked layers and of fused parts (k and v) stay in front. With heads of the output, the ranks of the heads are
concatenated, and B is block diagonal over the heads; if all heads have the same A, the rank stays r. With heads of the
input, all heads share the hidden vector, so that B is the sum over the heads. Both are exact, but for the rounding of
that sum.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxadapt.keymaps.keymap import KeyMap
from jaxadapt.keymaps.weight import Weight
from jaxadapt.models.foreign.dialect import Dialect
from jaxadapt.models.foreign.per_head import Leaves, Several, find_pairs, refuse_traced, require_one_a, require_rank

Array = Any


def find_leaves(dialect: Dialect, keymap: KeyMap, leaves: Leaves) -> Several:
    """Return the LoRA leaves of a tree that have head axes: `{base leaf: (path of a, path of b, keymap entry)}`."""
    return find_pairs(dialect, keymap, leaves, _heads)


def _lead(weight: Weight) -> tuple[str, ...]:
    """Return the axes of layers and fused parts, which are in front."""
    return tuple(n for n in weight.left[:-2] if n.startswith("{"))


def _heads(weight: Weight) -> tuple[str, ...]:
    return tuple(n for n in weight.left[:-2] if not n.startswith("{"))


def _is_input(weight: Weight) -> bool:
    """Return True if the heads are axes of the input."""
    return all(n in weight.roles["in"] for n in _heads(weight))


def widen_leaves(dialect: Dialect, found: Several, leaves: Leaves, on_shared: str | None) -> dict[str, Array]:
    """Return the leaves with one A and one B for all heads.

    Raise `MismatchError` if the As of heads differ, unless "concat" is passed.
    """
    agree = {leaf: _is_input(w) or _agree(leaves[a], w) for leaf, (a, _, w) in found.items()}
    require_one_a(dialect, [found[leaf][0] for leaf, same in agree.items() if not same], on_shared)
    out = dict(leaves)
    for leaf, (a, b, w) in found.items():
        out[a], out[b] = widen(leaves[a], leaves[b], w, agree[leaf])
    return out


def _agree(a: Array, weight: Weight) -> bool:
    if isinstance(a, Tracer):
        return False
    lead = len(_lead(weight))
    x = np.asarray(a)
    by_head = x.reshape(*x.shape[:lead], -1, *x.shape[-2:])
    return all(np.array_equal(by_head[..., 0, :, :], by_head[..., i, :, :]) for i in range(by_head.shape[-3]))


def widen(a: Array, b: Array, weight: Weight, agree: bool) -> tuple[Array, Array]:
    """Return one A (lead…, inputs…, R) and one B (lead…, R, heads…, last)."""
    xp: Any = jnp if isinstance(a, jax.Array) else np
    lead, heads = len(_lead(weight)), len(_heads(weight))
    axes = tuple(range(lead, lead + heads))
    if _is_input(weight):
        return a, b.sum(axes, dtype=b.dtype)
    front, sizes, (d, r) = a.shape[:lead], a.shape[lead : lead + heads], a.shape[-2:]
    flat_a, flat_b = a.reshape(*front, -1, d, r), b.reshape(*front, -1, r, b.shape[-1])
    n = flat_a.shape[lead]
    if agree:
        return flat_a[..., 0, :, :], xp.moveaxis(flat_b, -3, -2).reshape(*front, r, *sizes, -1)
    wide_a = xp.moveaxis(flat_a, -3, -2).reshape(*front, d, n * r)
    eye = xp.eye(n, dtype=b.dtype)[:, None, :, None]
    wide_b = (eye * flat_b[..., :, :, None, :]).reshape(*front, n * r, *sizes, b.shape[-1])
    return wide_a, wide_b


def narrow_leaves(dialect: Dialect, found: Several, leaves: Leaves, new: Leaves, concat: bool) -> dict[str, Array]:
    """Convert leaves filled after `per_head.reserve_rank` to the layout of the tree's `leaves`.

    Raise `MismatchError` with every leaf whose rank is too small.
    """
    refuse_traced(dialect, new)
    out: dict[str, Array] = {}
    small: list[str] = []
    need = 0
    for a, b, w in found.values():
        narrow_a, narrow_b = narrow(np.asarray(new[a]), np.asarray(new[b]), w, leaves[b].shape)
        need = max(need, narrow_a.shape[-1])
        if narrow_a.shape[-1] > leaves[a].shape[-1]:
            small.append(f"{a}: rank {leaves[a].shape[-1]}, needed {narrow_a.shape[-1]}")
            continue
        missing = leaves[a].shape[-1] - narrow_a.shape[-1]
        pad_a, pad_b = [(0, 0)] * (narrow_a.ndim - 1), [(0, 0)] * (narrow_b.ndim - 2)
        out[a] = np.pad(narrow_a, [*pad_a, (0, missing)])
        out[b] = np.pad(narrow_b, [*pad_b, (0, missing), (0, 0)])
    require_rank(small, need)
    return out


def needed_rank(a: np.ndarray, b: np.ndarray, weight: Weight, shape: tuple[int, ...]) -> int:
    """Return the rank that a tree needs for one A and one B of all heads; `shape` is that of the tree's B."""
    return narrow(a, b, weight, shape)[0].shape[-1]


def narrow(a: np.ndarray, b: np.ndarray, weight: Weight, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Invert `widen` at the smallest exact rank; `shape` is that of the tree's B.

    Rows of a head's B that are zero are dropped, with the columns of A that they multiply. With heads of the input, the
    first head gets B, and the others zero.
    """
    lead, heads = len(_lead(weight)), len(_heads(weight))
    front, sizes, rank, n = shape[:lead], shape[lead : lead + heads], a.shape[-1], math.prod(shape[lead : lead + heads])
    if _is_input(weight):
        new_a, one_b = _compress(a.reshape(math.prod(front), -1, rank), b.reshape(math.prod(front), rank, 1, -1))
        most = new_a.shape[-1]
        new_b = np.zeros((len(one_b), n, most, b.shape[-1]), b.dtype)
        new_b[:, 0] = one_b[:, 0]
        return new_a.reshape(*a.shape[:-1], most), new_b.reshape(*front, *sizes, most, -1)
    d = a.shape[-2]
    new_a, new_b = _compress(a.reshape(-1, d, rank), b.reshape(-1, rank, n, b.shape[-1]))
    most = new_a.shape[-1]
    return new_a.reshape(*front, *sizes, d, most), new_b.reshape(*front, *sizes, most, -1)


def _compress(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return A (layers, heads, d, r) and B (layers, heads, r, last) of (layers, d, R) and (layers, R, heads, last)."""
    layers, d, rank = a.shape
    heads = b.shape[2]
    used: np.ndarray = np.any(b != 0, axis=-1)  # (layer, rank, head)
    most = max(int(used.sum(1).max(initial=0)), 1)
    if most == rank:  # nothing to drop: all heads keep the whole A, in its order
        return np.broadcast_to(a[:, None], (layers, heads, d, rank)).copy(), np.moveaxis(b, 1, 2).copy()
    new_a = np.zeros((layers, heads, d, most), a.dtype)
    new_b = np.zeros((layers, heads, most, b.shape[-1]), b.dtype)
    for layer, head in np.ndindex(layers, heads):
        rows = np.flatnonzero(used[layer, :, head])
        new_a[layer, head, :, : len(rows)] = a[layer][:, rows]
        new_b[layer, head, : len(rows)] = b[layer, rows, head]
    return new_a, new_b
