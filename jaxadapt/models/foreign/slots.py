"""Trees whose arrays hold several adapters: one of them taken out, and put back.

Beside each A lie, slot by slot, the rank in use (what is beyond it is zero) and the scale. Pure: arrays in, arrays out.
"""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from jaxadapt.core import paths
from jaxadapt.core.errors import MismatchError
from jaxadapt.models.foreign.dialect import Dialect

Leaves = Mapping[str, Any]


def slot_arrays(
    dialect: Dialect, leaves: Leaves, slot: int, room: bool = False
) -> tuple[dict[str, Any], dict[str, float]]:
    """The arrays of one slot, `{path: array}`, and `{base leaf: alpha}`.

    Args:
        leaves: of the whole tree, those with the ranks and scales included.
        room: all the rank that there is, and every module; by default what is in use.

    Raises `MismatchError` if there is no such slot, or nothing in it.
    """
    out: dict[str, Any] = {}
    alphas: dict[str, float] = {}
    problems: list[str] = []
    for leaf, ((a, b, _), *_) in dialect.claim(leaves).items():
        marks = _marks(dialect, a)
        missing = [path for path in marks if path not in leaves]
        unread = [p for p in marks if isinstance(leaves.get(p), Tracer | jax.ShapeDtypeStruct)]
        if missing or unread:
            problems += [f"{path}: missing" for path in missing]
            problems += [f"{path}: needed as a value, outside jit; found its shape alone" for path in unread]
            continue
        ranks, scales = (np.asarray(leaves[path]) for path in marks)
        axis, count = ranks.ndim - 1, ranks.shape[-1]
        if not isinstance(slot, numbers.Integral) or not 0 <= slot < count:
            problems.append(f"{marks[0]}: there are slots 0 to {count - 1}, and none is {slot}")
            continue
        used, scale = set(ranks[..., slot].flat), set(scales[..., slot].flat)
        if len(used) > 1 or len(scale) > 1:
            problems.append(f"{leaf}: its layers have the ranks {sorted(used)} and scales {sorted(scale)} in one array")
            continue
        at = (*[slice(None)] * axis, slot)
        rank = int(leaves[a].shape[-1] if room else used.pop())
        whole_a, whole_b = leaves[a][at], leaves[b][at]
        if rank and _nonzero(whole_a[..., rank:]) and _nonzero(whole_b[..., rank:, :]):
            problems.append(f"{a}, {b}: they are not zero beyond the rank {rank} that {marks[0]} says")
        if rank:
            out[a], out[b] = whole_a[..., :rank], whole_b[..., :rank, :]
            alphas[leaf] = _alpha(scale.pop(), rank)
    if problems:
        raise MismatchError(f"slot {slot} of this {dialect.name} tree cannot be used:\n" + paths.bullets(problems))
    if not out:
        raise MismatchError(f"slot {slot} of this {dialect.name} tree is empty: its ranks are all 0")
    return out, alphas


def with_slot(
    dialect: Dialect, leaves: Leaves, slot: int, new: Mapping[str, Any], used: Mapping[str, tuple[int, float]]
) -> dict[str, Any]:
    """The whole arrays with one slot replaced, ranks and scales too.

    Args:
        new: the slot's arrays, with all the rank that there is.
        used: `{path of A: (the rank in use, the scale)}`.
    """
    out: dict[str, Any] = {}
    for pairs in dialect.claim(leaves).values():
        for a, b, _ in pairs[:1]:
            ranks, scales = _marks(dialect, a)
            at = (*[slice(None)] * (leaves[ranks].ndim - 1), slot)
            rank, scale = used.get(a, (0, 0.0))
            for path, value in ((a, new[a]), (b, new[b]), (ranks, rank), (scales, scale)):
                out[path] = _set(leaves[path], at, value)
    return out


def _nonzero(x: Any) -> bool:
    return not isinstance(x, Tracer) and bool(np.any(np.asarray(x)))


def _marks(dialect: Dialect, a: str) -> tuple[str, str]:
    ranks, scales = dialect.slot_paths(a)
    return ranks, scales


def _alpha(scale: Any, rank: int) -> float:
    """The shortest alpha whose alpha/rank is this scale, as far as its dtype tells float32 numbers apart."""
    exact = float(scale) * rank
    if scale.dtype != np.float32:
        return exact
    return next(alpha for n in range(18) if np.float32((alpha := round(exact, n)) / rank) == scale or n == 17)


def _set(leaf: Any, at: tuple[Any, ...], value: Any) -> Any:
    if isinstance(leaf, jax.Array):
        return jax.device_put(leaf.at[at].set(value), leaf.sharding)
    out = np.array(leaf)
    out[at] = value
    return out
