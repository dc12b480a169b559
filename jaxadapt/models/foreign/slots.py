"""Slots of trees whose arrays hold several adapters: read one slot, and replace it.

Two arrays beside each A hold the used rank (rows beyond it are zero) and the scale of each slot.
"""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from jaxadapt.core.errors import MismatchError, raise_listed
from jaxadapt.models.foreign.dialect import Dialect

Leaves = Mapping[str, Any]


def slot_arrays(
    dialect: Dialect, leaves: Leaves, slot: int, room: bool = False
) -> tuple[dict[str, Any], dict[str, float]]:
    """Return the arrays of one slot, `{path: array}`, and `{base leaf: alpha}`.

    Args:
        leaves: the leaves of the tree, including the ranks and scales.
        room: return the full rank of every module; by default only the used rank of the adapted modules.

    Raises `MismatchError` if the slot does not exist or is empty.
    """
    out: dict[str, Any] = {}
    alphas: dict[str, float] = {}
    problems: list[str] = []
    for leaf, ((a, b, _), *_) in dialect.claim(leaves).items():
        slot_paths = dialect.slot_paths(a)
        if obstacles := _obstacles(leaf, slot_paths, leaves, slot):
            problems += obstacles
            continue
        ranks, scales = (np.asarray(leaves[path]) for path in slot_paths)
        index = (*[slice(None)] * (ranks.ndim - 1), slot)
        rank = int(leaves[a].shape[-1] if room else ranks[..., slot].flat[0])
        full_a, full_b = leaves[a][index], leaves[b][index]
        if rank and _nonzero(full_a[..., rank:]) and _nonzero(full_b[..., rank:, :]):
            problems.append(f"{a}, {b}: expected zeros beyond the rank {rank} of {slot_paths[0]}")
        if rank:
            out[a], out[b] = full_a[..., :rank], full_b[..., :rank, :]
            alphas[leaf] = _shortest_alpha(scales[..., slot].flat[0], rank)
    raise_listed(MismatchError, f"cannot use slot {slot} of this {dialect.name} tree:", problems)
    if not out:
        raise MismatchError(f"cannot use slot {slot} of this {dialect.name} tree: it is empty, all its ranks are 0")
    return out, alphas


def _obstacles(leaf: str, slot_paths: Sequence[str], leaves: Leaves, slot: int) -> list[str]:
    """Return why the rank and the scale of a slot cannot be read; [] if they can."""
    unread = [
        f"{path}: expected a concrete array (outside jit), found a tracer or spec"
        if path in leaves
        else f"{path}: missing"
        for path in slot_paths
        if path not in leaves or isinstance(leaves[path], Tracer | jax.ShapeDtypeStruct)
    ]
    if unread:
        return unread
    ranks, scales = (np.asarray(leaves[path]) for path in slot_paths)
    if not isinstance(slot, numbers.Integral) or not 0 <= slot < ranks.shape[-1]:
        return [f"{slot_paths[0]}: expected a slot from 0 to {ranks.shape[-1] - 1}, found {slot}"]
    used, scale = set(ranks[..., slot].flat), set(scales[..., slot].flat)
    if len(used) > 1 or len(scale) > 1:
        found = f"found the ranks {sorted(used)} and scales {sorted(scale)}"
        return [f"{leaf}: its stacked layers must have one rank and scale, {found}"]
    return []


def with_slot(
    dialect: Dialect, leaves: Leaves, slot: int, new: Mapping[str, Any], used: Mapping[str, tuple[int, float]]
) -> dict[str, Any]:
    """Return the arrays of all slots with one slot replaced, including its ranks and scales.

    Args:
        new: the slot's arrays, of the full rank.
        used: `{path of A: (used rank, scale)}`.
    """
    out: dict[str, Any] = {}
    for pairs in dialect.claim(leaves).values():
        for a, b, _ in pairs[:1]:
            ranks, scales = dialect.slot_paths(a)
            index = (*[slice(None)] * (leaves[ranks].ndim - 1), slot)
            rank, scale = used.get(a, (0, 0.0))
            for path, value in ((a, new[a]), (b, new[b]), (ranks, rank), (scales, scale)):
                out[path] = _replace_slot(leaves[path], index, value)
    return out


def _nonzero(x: Any) -> bool:
    return not isinstance(x, Tracer) and bool(np.any(np.asarray(x)))


def _shortest_alpha(scale: Any, rank: int) -> float:
    """Return the alpha with the fewest decimals whose alpha/rank is this scale in float32; exact for other dtypes."""
    exact = float(scale) * rank
    if scale.dtype != np.float32:
        return exact
    return next(alpha for n in range(18) if np.float32((alpha := round(exact, n)) / rank) == scale or n == 17)


def _replace_slot(leaf: Any, index: tuple[Any, ...], value: Any) -> Any:
    if isinstance(leaf, jax.Array):
        return jax.device_put(leaf.at[index].set(value), leaf.sharding)
    out = np.array(leaf)
    out[index] = value
    return out
