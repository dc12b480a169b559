"""LoRA with one A for each head and one B for all heads (keras' EinsumDense), converted to PyTorch's one A.

    a (d, n, r), b (r, h) ──widen──► A (d, R), B (R, n, h)
                          ◄─narrow──

If all heads have the same A, R is r and B is repeated for each head. Otherwise the ranks of the heads are concatenated:
R is n · r, and B is block diagonal over the heads. Both conversions are exact, and so are their inverses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxadapt.adapters.adapter import is_array
from jaxadapt.core import paths
from jaxadapt.core.errors import MismatchError, raise_listed
from jaxadapt.keymaps.keymap import KeyMap
from jaxadapt.keymaps.weight import Weight
from jaxadapt.models.foreign.dialect import Dialect

Array = Any
Leaves = Mapping[str, Array]
Several = dict[str, tuple[str, str, Weight]]
"""`{base leaf: (path of a, path of b, keymap entry)}` of the leaves whose a has head axes and whose b has none."""


def find_leaves(dialect: Dialect, keymap: KeyMap, leaves: Leaves) -> Several:
    """Return the LoRA leaves of a tree that have one A for each head."""
    return find_pairs(dialect, keymap, leaves, head_axes)


def find_pairs(dialect: Dialect, keymap: KeyMap, leaves: Leaves, heads: Callable[[Weight], tuple[str, ...]]) -> Several:
    """Return the LoRA leaves of the weights with head axes, which `heads` returns."""
    out: Several = {}
    for leaf, ((a, b, _), *_) in dialect.claim(leaves).items():
        site = keymap.match(leaf)
        if site is not None and heads(site.weight) and len(leaves[a].shape) == len(site.weight.left):
            out[leaf] = a, b, site.weight
    return out


def rescaled_alphas(dialect: Dialect, old: Leaves, new: Leaves, alpha: float) -> dict[str, float]:
    """Return `{base leaf: alpha}` that keeps alpha/r when the rank changes from the `old` to the `new` leaves.

    Where a pair is not scaled, alpha is the rank.
    """
    ranks = {leaf: (a, number, new[a].shape[-1]) for leaf, ((a, _, number), *_) in dialect.claim(old).items()}
    return {
        leaf: float(rank) if dialect.pairs[number].unscaled else alpha * rank / old[a].shape[-1]
        for leaf, (a, number, rank) in ranks.items()
    }


def widen_leaves(dialect: Dialect, found: Several, leaves: Leaves, on_shared: str | None) -> dict[str, Array]:
    """Return the leaves with one A for all heads; raise `MismatchError` if heads differ, unless "concat" is passed."""
    agree = {leaf: heads_agree(leaves[a], w) for leaf, (a, _, w) in found.items()}
    require_one_a(dialect, [a for leaf, (a, _, _) in found.items() if not agree[leaf]], on_shared)
    out = dict(leaves)
    for leaf, (a, b, w) in found.items():
        out[a], out[b] = widen(leaves[a], leaves[b], w, agree[leaf])
    return out


def require_one_a(dialect: Dialect, unequal: Sequence[str], on_shared: str | None) -> None:
    """Raise `MismatchError` if the As of heads differ (paths `unequal`), unless "concat" is passed."""
    if unequal and on_shared != "concat":
        raise MismatchError(
            "cannot convert these leaves: PyTorch has one A for all heads of a weight, and the A of their"
            f" {dialect.name} heads differ (or cannot be compared, inside jit):\n{paths.bullets(unequal)}\nPass"
            ' jaxadapt.models.LoraTree(tree, on_shared="concat") instead of the tree: it concatenates the ranks of the'
            " heads, which is exact, and multiplies the rank by their number"
        )


def reserve_rank(found: Several, leaves: Leaves, tensors: Mapping[str, Any]) -> dict[str, Array]:
    """Return the leaves with those of heads replaced by specs of one A and one B, of a file's largest rank."""
    rank = max((x.shape[0] for key, x in tensors.items() if key.endswith("lora_A.weight")), default=1)
    out = dict(leaves)
    for a, b, w in found.values():
        sizes = dict(zip(w.left, (*leaves[a].shape[:-1], leaves[b].shape[-1]), strict=True))
        inputs, outputs = ([sizes[axis] for axis in w.left if axis in w.roles[role]] for role in ("in", "out"))
        lead = [sizes[axis] for axis in w.left if axis not in (*w.roles["in"], *w.roles["out"])]
        out[a] = jax.ShapeDtypeStruct((*lead, *inputs, rank), leaves[a].dtype)
        out[b] = jax.ShapeDtypeStruct((*lead, rank, *outputs), leaves[b].dtype)
    return out


def refuse_traced(dialect: Dialect, leaves: Leaves) -> None:
    """Raise `MismatchError` for traced leaves, whose heads cannot be compared."""
    if any(isinstance(x, Tracer) for x in leaves.values()):
        raise MismatchError(
            f"cannot fill this {dialect.name} tree inside jit, where heads cannot be compared; fill it outside jit"
        )


def require_rank(small: Sequence[str], need: int) -> None:
    """Raise `MismatchError` for leaves whose rank is too small."""
    raise_listed(
        MismatchError, "the target's rank is too small:", small, f"\nBuild it with rank={need}; unused rows are zero"
    )


def narrow_leaves(dialect: Dialect, found: Several, leaves: Leaves, new: Leaves, concat: bool) -> dict[str, Array]:
    """Convert leaves filled after `reserve_rank` to the layout of the tree's `leaves`; keep A where B is zero.

    Raises one `MismatchError` with every leaf whose heads differ in B, unless `concat` is True, or with every leaf
    whose rank is too small.
    """
    refuse_traced(dialect, new)
    made = {b: (a, *narrow(np.asarray(new[a]), np.asarray(new[b]), w)) for a, b, w in found.values()}
    need = max((len(rows) for _, _, rows, _ in made.values()), default=0)
    differ = [b for b, (_, _, _, alike) in made.items() if not alike]
    if differ and not concat:
        raise MismatchError(
            f"cannot fill these {dialect.name} leaves: they have one B for all heads of a weight, and the file"
            " has one for"
            " each head:\n"
            + paths.bullets(differ)
            + f'\nBuild the target with rank={need}, and pass jaxadapt.models.LoraTree(target, on_shared="concat"),'
            " which concatenates the heads"
        )
    ranks = {b: leaves[b].shape[0] for b in made}
    small = [f"{b}: rank {ranks[b]}, needed {len(rows)}" for b, (_, _, rows, _) in made.items() if len(rows) > ranks[b]]
    require_rank(small, need)
    out: dict[str, Array] = {}
    for b, (a, columns, rows, _) in made.items():
        padding, current = (0, ranks[b] - len(rows)), leaves[a]
        out[a] = np.pad(columns, [*((0, 0) for _ in columns.shape[:-1]), padding])
        out[b] = np.pad(rows, [padding, (0, 0)])
        if not len(rows) and is_array(current) and not isinstance(current, jax.ShapeDtypeStruct):
            out[a] = np.asarray(current, columns.dtype)
    return out


def needed_rank(a: np.ndarray, b: np.ndarray, weight: Weight, shape: tuple[int, ...]) -> int:
    """Return the rank that a tree needs for one A and one B of all heads; `shape` is that of the tree's B."""
    return len(narrow(a, b, weight)[1])


def head_axes(weight: Weight) -> tuple[str, ...]:
    """Return the head axes of a weight, which B lacks: its output axes but the last; () for an ordinary A and B.

    >>> q, o = Weight("q.kernel", "q.weight", "d n h -> (n h) d"), Weight("o.kernel", "o.weight", "n h d -> d (n h)")
    >>> head_axes(q), head_axes(o)
    (('n',), ())
    """
    out = weight.roles["out"]
    own = [axis for axis in weight.left if axis in out]
    return tuple(own[:-1]) if own and own[-1] == weight.left[-1] else ()


def heads_agree(a: Array, weight: Weight) -> bool:
    """Return True if all heads have the same A, bitwise; False for traced arrays, which cannot be compared."""
    if isinstance(a, Tracer):
        return False
    by_head = np.asarray(_heads_first(a, weight))
    return all(np.array_equal(by_head[0], other) for other in by_head[1:])


def widen(a: Array, b: Array, weight: Weight, agree: bool) -> tuple[Array, Array]:
    """Return one A (inputs…, R) and one B (R, heads…, last); `agree`: all heads have the same A."""
    xp = jnp if isinstance(a, jax.Array) else np
    by_head = _heads_first(a, weight)
    count, rank = by_head.shape[0], by_head.shape[-1]
    heads = _head_sizes(a, weight)
    if agree:
        return by_head[0], xp.broadcast_to(b.reshape(rank, *(1 for _ in heads), -1), (rank, *heads, b.shape[-1]))
    wide_a = xp.moveaxis(by_head, 0, -2).reshape(*by_head.shape[1:-1], count * rank)
    wide_b = xp.eye(count, dtype=b.dtype)[:, None, :, None] * b[None, :, None, :]
    return wide_a, wide_b.reshape(count * rank, *heads, b.shape[-1])


def narrow(a: np.ndarray, b: np.ndarray, weight: Weight) -> tuple[np.ndarray, np.ndarray, bool]:
    """Invert `widen` at the smallest exact rank; also return True if all heads have the same rows of B.

    Rows of B that are zero are dropped, with the columns of A they multiply. Equal rows of different heads are shared.
    """
    heads = b.shape[1:-1]
    rows = b.reshape(b.shape[0], -1, b.shape[-1])
    kept: list[np.ndarray] = []
    head_rows: list[list[tuple[int, int]]] = []  # for each head: row numbers in the shared B and in b
    alike = True
    for head in range(rows.shape[1]):
        own_rows: list[tuple[int, int]] = []
        for i in np.flatnonzero(rows[:, head].any(axis=1)):
            row, used = rows[i, head], {k for k, _ in own_rows}
            number = next(
                (k for k, other in enumerate(kept) if k not in used and np.array_equal(row, other)), len(kept)
            )
            if number == len(kept):
                alike = alike and head == 0
                kept.append(row)
            own_rows.append((number, int(i)))
        alike = alike and len(own_rows) == len(kept)
        head_rows.append(own_rows)
    by_head = np.zeros((rows.shape[1], *a.shape[:-1], len(kept)), a.dtype)
    for head, own_rows in enumerate(head_rows):
        for number, i in own_rows:
            by_head[head, ..., number] = a[..., i]
    order = _heads_first_order(weight)
    split_heads = by_head.reshape(*heads, *a.shape[:-1], len(kept))
    back = [order.index(axis) for axis in range(len(order))]
    shared = np.stack(kept) if kept else np.zeros((0, b.shape[-1]), b.dtype)
    return split_heads.transpose(*back, len(order)), shared, alike


def _heads_first_order(weight: Weight) -> list[int]:
    """Return the axes of A without the rank: heads, then inputs."""
    heads, left = head_axes(weight), weight.left[:-1]
    return [i for i, axis in enumerate(left) if axis in heads] + [i for i, axis in enumerate(left) if axis not in heads]


def _head_sizes(a: Array, weight: Weight) -> Sequence[int]:
    heads = head_axes(weight)
    return [size for axis, size in zip(weight.left, a.shape, strict=False) if axis in heads]


def _heads_first(a: Array, weight: Weight) -> Array:
    """Return A as (all heads, inputs…, r)."""
    sizes = _head_sizes(a, weight)
    transposed = a.transpose(*_heads_first_order(weight), a.ndim - 1)
    return transposed.reshape(math.prod(sizes), *transposed.shape[len(sizes) :])
