"""LoRA whose A has an axis for each head and whose B serves all of them (keras' EinsumDense), as PyTorch has one.

    a (d, n, r), b (r, h) ──wide──► A (d, R), B (R, n, h)
                          ◄─narrow─

If all heads have one A, R is r and B the same for each head. Else the ranks of the heads go side by side: R is n · r,
and each head's rows of B are zero but for its own. Either way the same numbers, and back from there as well. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxadapt.adapters.adapter import is_array
from jaxadapt.core import paths
from jaxadapt.core.errors import MismatchError
from jaxadapt.keymaps.keymap import KeyMap
from jaxadapt.keymaps.weight import Weight
from jaxadapt.models.foreign.dialect import Dialect

Array = Any
Leaves = Mapping[str, Array]
Several = dict[str, tuple[str, str, Weight]]
"""`{base leaf: (path of a, path of b, its line)}` of the leaves whose a has heads that b has not."""


def per_head_leaves(dialect: Dialect, table: KeyMap, leaves: Leaves) -> Several:
    """Which of a tree's LoRA leaves are so."""
    out: Several = {}
    for leaf, ((a, b, _), *_) in dialect.claim(leaves).items():
        site = table.match(leaf)
        if site is not None and head_axes(site.weight) and len(leaves[a].shape) == len(site.weight.left):
            out[leaf] = a, b, site.weight
    return out


def rescaled_alphas(dialect: Dialect, old: Leaves, new: Leaves, alpha: float) -> dict[str, float]:
    """`{base leaf: alpha}` that keeps alpha/r where the rank of some leaves has become another."""
    claimed = dialect.claim(old)
    return {leaf: alpha * new[b].shape[0] / old[b].shape[0] for leaf, ((_, b, _), *_) in claimed.items()}


def widen_leaves(dialect: Dialect, found: Several, leaves: Leaves, on_shared: str | None) -> dict[str, Array]:
    """The leaves with one A for all heads of a weight; `MismatchError` where theirs differ, unless "concat"."""
    one = {leaf: heads_agree(leaves[a], w) for leaf, (a, _, w) in found.items()}
    apart = [a for leaf, (a, _, _) in found.items() if not one[leaf]]
    if apart and on_shared != "concat":
        raise MismatchError(
            f"PyTorch has one A for all heads of a weight, and {dialect.name} one for each; these differ (or nobody can"
            f' tell, inside jit):\n{paths.bullets(apart)}\nPass on_shared="concat" to save or to_peft: with their'
            " ranks side by side the file computes exactly the same, at as many times the rank"
        )
    out = dict(leaves)
    for leaf, (a, b, w) in found.items():
        out[a], out[b] = widen(leaves[a], leaves[b], w, one[leaf])
    return out


def reserve_rank(found: Several, leaves: Leaves, tensors: Mapping[str, Any]) -> dict[str, Array]:
    """The leaves with, where they have heads, specs of one A for all of them, of a file's largest rank."""
    rank = max((x.shape[0] for key, x in tensors.items() if key.endswith("lora_A.weight")), default=1)
    out = dict(leaves)
    for a, b, w in found.values():
        sizes = dict(zip(w.left, (*leaves[a].shape[:-1], leaves[b].shape[-1]), strict=True))
        inputs = [sizes[axis] for axis in w.left if axis not in w.roles["out"]]
        outs = [sizes[axis] for axis in w.left if axis in w.roles["out"]]
        out[a] = jax.ShapeDtypeStruct((*inputs, rank), leaves[a].dtype)
        out[b] = jax.ShapeDtypeStruct((rank, *outs), leaves[b].dtype)
    return out


def narrow_leaves(dialect: Dialect, found: Several, leaves: Leaves, new: Leaves, concat: bool) -> dict[str, Array]:
    """What was filled where there was `reserve_rank`, as the tree's own `leaves` are; unchanged A where B is zero.

    Raises one `MismatchError` with every leaf whose heads share less than a tree without "concat" says, or else with
    every one whose rank is too small.
    """
    if any(isinstance(x, Tracer) for x in new.values()):
        raise MismatchError(
            f"inside jit nobody can tell which heads share what; put the file into the {dialect.name} tree outside"
        )
    made = {b: (a, *narrow(np.asarray(new[a]), np.asarray(new[b]), w)) for a, b, w in found.values()}
    need = max((len(rows) for _, _, rows, _ in made.values()), default=0)
    differ = [b for b, (_, _, _, alike) in made.items() if not alike]
    if differ and not concat:
        raise MismatchError(
            f"{dialect.name} has one B for all heads of a weight where the file has one for each:\n"
            + paths.bullets(differ)
            + f'\nBuild the target with rank={need}, and pass on_shared="concat", which puts them side by side'
        )
    ranks = {b: leaves[b].shape[0] for b in made}
    small = [f"{b}: rank {ranks[b]}, needed {len(rows)}" for b, (_, _, rows, _) in made.items() if len(rows) > ranks[b]]
    if small:
        raise MismatchError(
            f"the target's rank is too small:\n{paths.bullets(small)}\nBuild it with rank={need}: what the file does"
            " not fill is zero"
        )
    out: dict[str, Array] = {}
    for b, (a, columns, rows, _) in made.items():
        more, current = (0, ranks[b] - len(rows)), leaves[a]
        out[a] = np.pad(columns, [*((0, 0) for _ in columns.shape[:-1]), more])
        out[b] = np.pad(rows, [more, (0, 0)])
        if not len(rows) and is_array(current) and not isinstance(current, jax.ShapeDtypeStruct):
            out[a] = np.asarray(current, columns.dtype)
    return out


def head_axes(weight: Weight) -> tuple[str, ...]:
    """The axes of a weight that B has not: its outputs but the last axis. None of them: A and B are as everywhere.

    >>> q, o = Weight("q.kernel", "q.weight", "d n h -> (n h) d"), Weight("o.kernel", "o.weight", "n h d -> d (n h)")
    >>> head_axes(q), head_axes(o)
    (('n',), ())
    """
    out = weight.roles["out"]
    own = [axis for axis in weight.left if axis in out]
    return tuple(own[:-1]) if own and own[-1] == weight.left[-1] else ()


def heads_agree(a: Array, weight: Weight) -> bool:
    """Whether all heads have one A, bit for bit; of traced arrays nobody can tell."""
    if isinstance(a, Tracer):
        return False
    apart = np.asarray(_heads_first(a, weight))
    return all(np.array_equal(apart[0], other) for other in apart[1:])


def widen(a: Array, b: Array, weight: Weight, one: bool) -> tuple[Array, Array]:
    """One A (inputs…, R) and one B (R, heads…, last); `one`: the first head's A is that of all."""
    xp = jnp if isinstance(a, jax.Array) else np
    apart = _heads_first(a, weight)
    count, rank = apart.shape[0], apart.shape[-1]
    heads = _sizes(a, weight)
    if one:
        return apart[0], xp.broadcast_to(b.reshape(rank, *(1 for _ in heads), -1), (rank, *heads, b.shape[-1]))
    wide_a = xp.moveaxis(apart, 0, -2).reshape(*apart.shape[1:-1], count * rank)
    wide_b = xp.eye(count, dtype=b.dtype)[:, None, :, None] * b[None, :, None, :]
    return wide_a, wide_b.reshape(count * rank, *heads, b.shape[-1])


def narrow(a: np.ndarray, b: np.ndarray, weight: Weight) -> tuple[np.ndarray, np.ndarray, bool]:
    """The inverse at the smallest rank that needs no sum, and whether all heads have the same rows of B.

    Rows of B that are zero are left out with what they multiply. Of the others heads that have equal ones share them.
    """
    heads = b.shape[1:-1]
    rows = b.reshape(b.shape[0], -1, b.shape[-1])
    kept: list[np.ndarray] = []
    found: list[list[tuple[int, int]]] = []  # of each head: the row of the shared B, and that of the whole one
    alike = True
    for head in range(rows.shape[1]):
        mine: list[tuple[int, int]] = []
        for i in np.flatnonzero(rows[:, head].any(axis=1)):
            row, used = rows[i, head], {at for at, _ in mine}
            at = next((k for k, other in enumerate(kept) if k not in used and np.array_equal(row, other)), len(kept))
            if at == len(kept):
                alike = alike and head == 0
                kept.append(row)
            mine.append((at, int(i)))
        alike = alike and len(mine) == len(kept)
        found.append(mine)
    apart = np.zeros((rows.shape[1], *a.shape[:-1], len(kept)), a.dtype)
    for head, mine in enumerate(found):
        for at, i in mine:
            apart[head, ..., at] = a[..., i]
    order = _order(weight)
    whole = apart.reshape(*heads, *a.shape[:-1], len(kept))
    back = [order.index(axis) for axis in range(len(order))]
    shared = np.stack(kept) if kept else np.zeros((0, b.shape[-1]), b.dtype)
    return whole.transpose(*back, len(order)), shared, alike


def _order(weight: Weight) -> list[int]:
    """Positions of the axes of A without the rank: heads, then inputs."""
    heads, left = head_axes(weight), weight.left[:-1]
    return [i for i, axis in enumerate(left) if axis in heads] + [i for i, axis in enumerate(left) if axis not in heads]


def _sizes(a: Array, weight: Weight) -> Sequence[int]:
    heads = head_axes(weight)
    return [size for axis, size in zip(weight.left, a.shape, strict=False) if axis in heads]


def _heads_first(a: Array, weight: Weight) -> Array:
    """(all heads, inputs…, r)."""
    sizes = _sizes(a, weight)
    turned = a.transpose(*_order(weight), a.ndim - 1)
    return turned.reshape(math.prod(sizes), *turned.shape[len(sizes) :])
