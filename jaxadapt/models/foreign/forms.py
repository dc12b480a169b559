"""Arrays that hold several As or Bs of a weight, as one A and one B of PyTorch, and back: of heads, and of slots.

Two dialects have an A for each head:

    keras   a (d, n, r), b (r, h)        ──widen──►  A (d, R), B (R, n, h)   B is shared by the heads
    openpi  a (n, d, r), b (n, r, h)     ──widen──►  A (d, R), B (R, n, h)   heads of the output: q, k, v
            a (n, h, r), b (n, r, d)     ──widen──►  A (n, h, r), B (r, d)   heads of the input: the output projection
                                         ◄─narrow──

If all heads have the same A, R is r. Otherwise the ranks of the heads are concatenated: R is n · r, and B is block
diagonal over the heads. Heads of the input share the hidden vector, so that B is the sum over them. All is exact, but
for the rounding of that sum. Axes of stacked layers and of fused parts (k and v) stay in front.

Arrays with slots hold several adapters: one slot is read or replaced. Two arrays beside each A hold the used rank (rows
beyond it are zero) and the scale of each slot. Other libraries store one alpha or one scale beside each A.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from jaxadapt.core.errors import MismatchError, raise_listed
from jaxadapt.keymaps.keymap import KeyMap
from jaxadapt.keymaps.weight import Weight
from jaxadapt.models.foreign import Dialect, Pair

Array = Any
Leaves = Mapping[str, Array]

# ---------------------------------------------------------------- heads


@dataclasses.dataclass(frozen=True)
class HeadPair:
    """The two arrays of a weight with heads: their paths, the weight's entry and the sizes of its axes.

    `shares_b`: the heads share one B, (r, last). Inside this class arrays are (layers, heads, inputs, r) and
    (layers, heads, r, last); heads of the input count as inputs.
    """

    a: str
    b: str
    weight: Weight
    sizes: Mapping[str, int]
    shares_b: bool

    @functools.cached_property
    def heads(self) -> list[str]:
        """The head axes."""
        return [*head_axes(self.weight, self.shares_b)]

    @functools.cached_property
    def is_input(self) -> bool:
        """True if the heads are axes of the input."""
        return all(axis in self.weight.roles["in"] for axis in self.heads)

    @functools.cached_property
    def _axes(self) -> tuple[list[str], list[str], list[str]]:
        """The axes of A but the rank: of layers, of heads of the output, of the input."""
        own = self.weight.left[:-1]
        lead = [] if self.shares_b else [axis for axis in own if axis.startswith("{")]
        heads = [] if self.is_input else self.heads
        return lead, heads, [axis for axis in own if axis not in (*lead, *heads)]

    @functools.cached_property
    def _shapes(self) -> list[tuple[int, ...]]:
        """The sizes of these axes."""
        return [tuple(self.sizes[axis] for axis in axes) for axes in self._axes]

    def wide_shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of one A and one B of all heads."""
        lead, heads, inputs = self._shapes
        return (*lead, *inputs, rank), (*lead, rank, *heads, self.sizes[self.weight.left[-1]])

    def _split_heads(self, a: Array) -> Array:
        """Return A as (layers, heads, inputs, r)."""
        order = [self.weight.left.index(axis) for axes in self._axes for axis in axes]
        return a.transpose(*order, a.ndim - 1).reshape(*map(math.prod, self._shapes), a.shape[-1])

    def heads_agree(self, a: Array) -> bool:
        """Return True if all heads have the same A; False for traced arrays, which cannot be compared."""
        if self.is_input or isinstance(a, Tracer):
            return self.is_input
        by_head = np.moveaxis(self._split_heads(np.asarray(a)), 1, 0)
        return all(np.array_equal(by_head[0], other) for other in by_head[1:])

    def widen(self, a: Array, b: Array, agree: bool) -> tuple[Array, Array]:
        """Return one A (layers…, inputs…, R) and one B (layers…, R, heads…, last); `agree`: the heads have one A."""
        xp: Any = jax.numpy if isinstance(a, jax.Array) else np
        a = self._split_heads(a)
        layers, count, inputs, rank = a.shape
        if self.shares_b:  # b may be traced beside a constant a
            b = (jax.numpy if isinstance(b, jax.Array) else np).broadcast_to(b[None, None], (layers, count, *b.shape))
        elif self.is_input:
            first = len(self._axes[0])
            b = b.sum(tuple(range(first, first + len(self.heads))), dtype=b.dtype)
        b = b.reshape(layers, count, rank, b.shape[-1])
        if agree:
            wide_a, wide_b = a[:, 0], xp.moveaxis(b, 1, 2)
        else:
            wide_a = xp.moveaxis(a, 1, 2).reshape(layers, inputs, count * rank)
            wide_b = xp.eye(count, dtype=b.dtype)[:, None, :, None] * b[:, :, :, None, :]
        shape_a, shape_b = self.wide_shapes(wide_a.shape[-1])
        return wide_a.reshape(shape_a), wide_b.reshape(shape_b)

    def narrow(self, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray, bool]:
        """Invert `widen` at the smallest exact rank; also return False if the heads share one B and differ in it.

        Rows of a head's B that are zero are dropped, with the columns of A that they multiply. Of heads of the input
        the first gets B, and the others zero.
        """
        lead, heads, inputs = self._shapes
        layers, rank, last = math.prod(lead), a.shape[-1], b.shape[-1]
        by_head, rows = _compress(a.reshape(layers, -1, rank), b.reshape(layers, rank, -1, last))
        alike = True
        if self.shares_b:
            by_head, new_b, alike = _share_rows(by_head[0], rows[0])
        else:
            sizes = [self.sizes[axis] for axis in self.heads]
            new_b = np.zeros((layers, math.prod(sizes), *rows.shape[2:]), b.dtype)
            new_b[:, : rows.shape[1]] = rows
            new_b = new_b.reshape(*lead, *sizes, *rows.shape[2:])
        axes = [axis for axes in self._axes for axis in axes]
        new_a = by_head.reshape(*lead, *heads, *inputs, by_head.shape[-1])
        return new_a.transpose(*(axes.index(axis) for axis in self.weight.left[:-1]), len(axes)), new_b, alike


def head_axes(weight: Weight, shares_b: bool) -> tuple[str, ...]:
    """Return the head axes of a weight; () for an ordinary A and B.

    If the heads share one B, it lacks them: the output axes but the last.

    >>> q, o = Weight("q.kernel", "q.weight", "d n h -> (n h) d"), Weight("o.kernel", "o.weight", "n h d -> d (n h)")
    >>> head_axes(q, True), head_axes(o, True), head_axes(o, False)
    (('n',), (), ('n',))
    """
    if not shares_b:
        return tuple(axis for axis in weight.left[:-2] if not axis.startswith("{"))
    own = [axis for axis in weight.left if axis in weight.roles["out"]]
    return tuple(own[:-1]) if own and own[-1] == weight.left[-1] else ()


def find_heads(dialect: Dialect, keymap: KeyMap, leaves: Leaves) -> list[HeadPair]:
    """Return the LoRA leaves of a tree that have head axes."""
    out, shares_b = list[HeadPair](), dialect.heads == "shared"
    for leaf, ((_, a, b, *_), *_) in dialect.claim(leaves).items():
        match = keymap.match(leaf)
        if match is None or len(leaves[a].shape) != len(match.weight.left) or not head_axes(match.weight, shares_b):
            continue
        sizes = dict(zip(match.weight.left, (*leaves[a].shape[:-1], leaves[b].shape[-1]), strict=True))
        out.append(HeadPair(a, b, match.weight, sizes, shares_b))
    return out


def widen_leaves(dialect: Dialect, found: Sequence[HeadPair], leaves: Leaves, concat: bool) -> dict[str, Array]:
    """Return the leaves with one A and one B for all heads.

    Raises `MismatchError` if the As of heads differ, unless `concat` is True.
    """
    agree = {pair.a: pair.heads_agree(leaves[pair.a]) for pair in found}
    raise_listed(
        MismatchError,
        "cannot convert these parameters: PyTorch has one A for all heads of a weight, and the A of their"
        f" {dialect.name} heads differ (or cannot be compared, inside jit):",
        [path for path, same in agree.items() if not same and not concat],
        '\nPass jaxadapt.models.LoraTree(tree, on_shared="concat") instead of the tree: it concatenates the ranks of'
        " the heads, which is exact, and multiplies the rank by their number",
    )
    out = dict(leaves)
    for pair in found:
        out[pair.a], out[pair.b] = pair.widen(leaves[pair.a], leaves[pair.b], agree[pair.a])
    return out


def reserve_rank(found: Sequence[HeadPair], leaves: Leaves, tensors: Mapping[str, Any]) -> dict[str, Array]:
    """Return the leaves with those of heads replaced by specs of one A and one B, of a file's largest rank."""
    rank = max((x.shape[0] for key, x in tensors.items() if key.endswith("lora_A.weight")), default=1)
    specs = {
        path: shape for pair in found for path, shape in zip((pair.a, pair.b), pair.wide_shapes(rank), strict=True)
    }
    return {**leaves, **{path: jax.ShapeDtypeStruct(shape, leaves[path].dtype) for path, shape in specs.items()}}


def narrow_leaves(
    dialect: Dialect, found: Sequence[HeadPair], leaves: Leaves, new: Leaves, concat: bool
) -> dict[str, Array]:
    """Convert leaves filled after `reserve_rank` to the layout of the tree's `leaves`; keep A where B is zero.

    Raises one `MismatchError` with every leaf whose heads share a B and differ in it, unless `concat` is True, or with
    every leaf whose rank is too small.
    """
    if any(isinstance(x, Tracer) for x in new.values()):
        raise MismatchError(
            f"cannot fill this {dialect.name} tree inside jit, where heads cannot be compared; fill it outside jit"
        )
    made = [(pair, *pair.narrow(np.asarray(new[pair.a]), np.asarray(new[pair.b]))) for pair in found]
    need = max((a.shape[-1] for _, a, _, _ in made), default=0)
    raise_listed(
        MismatchError,
        f"cannot fill these {dialect.name} parameters: they have one B for all heads of a weight, and the file has one"
        " for each head:",
        [pair.b for pair, _, _, alike in made if not alike and not concat],
        f"\nBuild the target with rank={need}, and pass"
        ' jaxadapt.models.LoraTree(target, on_shared="concat"), which concatenates the heads',
    )
    require_rank({pair.a: (leaves[pair.a].shape[-1], a.shape[-1]) for pair, a, _, _ in made})
    out: dict[str, Array] = {}
    for pair, a, b, _ in made:
        current = leaves[pair.a]
        padding = 0, current.shape[-1] - a.shape[-1]
        keeps = not a.shape[-1] and not isinstance(current, jax.ShapeDtypeStruct)
        out[pair.a] = np.asarray(current, a.dtype) if keeps else np.pad(a, [*[(0, 0)] * (a.ndim - 1), padding])
        out[pair.b] = np.pad(b, [*[(0, 0)] * (b.ndim - 2), padding, (0, 0)])
    return out


def require_rank(ranks: Mapping[str, tuple[int, int]]) -> None:
    """Raise one `MismatchError` for leaves whose rank is too small; `ranks` are `{path: (rank, needed rank)}`."""
    raise_listed(
        MismatchError,
        "the target's rank is too small:",
        [f"{path}: rank {have}, needed {need}" for path, (have, need) in ranks.items() if need > have],
        f"\nBuild it with rank={max((need for _, need in ranks.values()), default=0)}; unused rows are zero",
    )


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


def _share_rows(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray, bool]:
    """Return A (heads, d, k) and one B (k, last) of (heads, d, r) and (heads, r, last); True if no head lacks a row.

    Equal rows of different heads are shared; two equal rows of one head stay apart.
    """
    kept: list[np.ndarray] = []
    columns: dict[tuple[int, int], np.ndarray] = {}  # by the head and the number of the row
    for head, rows in enumerate(b):
        for i in np.flatnonzero(rows.any(axis=1)):
            free = (k for k, row in enumerate(kept) if (head, k) not in columns and np.array_equal(row, rows[i]))
            number = next(free, len(kept))
            kept += [rows[i]] if number == len(kept) else []
            columns[head, number] = a[head, :, i]
    new_a = np.zeros((*a.shape[:2], len(kept)), a.dtype)
    for (head, number), column in columns.items():
        new_a[head, :, number] = column
    return new_a, np.stack(kept) if kept else np.zeros((0, b.shape[-1]), b.dtype), len(columns) == len(a) * len(kept)


# ---------------------------------------------------------------- scales and slots


def read_stored(
    dialect: Dialect, leaves: Leaves, numbers: Mapping[str, Any], known: Collection[str] = ()
) -> tuple[dict[str, Any], list[str]]:
    """Return `{base leaf: the alpha or scale beside its arrays}`, and why those of other base leaves cannot be read.

    Args:
        leaves: the leaves of the tree.
        numbers: the arrays and numbers to read, by path.
        known: the base leaves whose number is known already.

    Raises `MismatchError` for an array with several numbers, which no alpha expresses.
    """
    stored: dict[str, Any] = {}
    problems: list[str] = []
    several: list[str] = []
    for leaf, (claim, *_) in dialect.claim(leaves).items():
        path = claim.alpha or claim.scale
        found, unread = _read_numbers(numbers, [path] if path and leaf not in known else ())
        (several if found else problems).extend(unread)
        if found and not unread:
            stored[leaf] = found[path]
    raise_listed(
        MismatchError,
        f"cannot use this {dialect.name} tree, because PEFT has one scale for each of its matrices:",
        several,
        "\nMultiply B by these numbers, and set all of them to 1",
    )
    return stored, problems


def stored_alpha(pair: Pair, number: Any, rank: int) -> float:
    """Return the alpha of a site whose arrays have this rank, by the number that `read_stored` found."""
    return float(number) if pair.alpha_leaf else _shortest_alpha(np.asarray(number), rank)


def _read_numbers(
    leaves: Mapping[str, Any], paths: Iterable[str], slot: int | None = None
) -> tuple[dict[str, Any], list[str]]:
    """Return the one number of each array, or of a slot of it, and why other numbers cannot be read."""
    found: dict[str, Any] = {}
    problems: list[str] = []
    for path in paths:
        if path not in leaves:
            problems.append(f"{path}: missing")
        elif isinstance(leaves[path], Tracer | jax.ShapeDtypeStruct):
            problems.append(f"{path}: expected a concrete array (outside jit), found a tracer or spec")
        elif slot is not None and not (isinstance(slot, numbers.Integral) and 0 <= slot < leaves[path].shape[-1]):
            problems.append(f"{path}: expected a slot from 0 to {leaves[path].shape[-1] - 1}, found {slot}")
        else:
            values = set(np.asarray(leaves[path])[... if slot is None else (..., slot)].flat)
            found[path] = next(iter(values), None)
            if len(values) != 1:
                problems.append(
                    f"{path}: expected one number for all stacked layers, found {[x.item() for x in sorted(values)]}"
                )
    return found, problems


def slot_arrays(dialect: Dialect, leaves: Leaves, slot: int, room: bool = False) -> dict[str, Any]:
    """Return the arrays and scales of one slot, `{path: array}`.

    Args:
        leaves: the leaves of the tree, including the ranks and scales.
        room: return the full rank of every module; by default only the used rank of the adapted modules.

    Raises `MismatchError` if the slot does not exist or is empty.
    """
    out: dict[str, Any] = {}
    problems: list[str] = []
    for claim, *_ in dialect.claim(leaves).values():
        found, unread = _read_numbers(leaves, (claim.rank, claim.scale), slot)
        problems += unread
        if unread:
            continue
        index = (*[slice(None)] * (leaves[claim.rank].ndim - 1), slot)
        full_a, full_b = leaves[claim.a][index], leaves[claim.b][index]
        rank = full_a.shape[-1] if room else int(found[claim.rank])
        if rank and _nonzero(full_a[..., rank:]) and _nonzero(full_b[..., rank:, :]):
            problems.append(f"{claim.a}, {claim.b}: expected zeros beyond the rank {rank} of {claim.rank}")
        if rank:
            out |= {claim.a: full_a[..., :rank], claim.b: full_b[..., :rank, :], claim.scale: found[claim.scale]}
    raise_listed(MismatchError, f"cannot use slot {slot} of this {dialect.name} tree:", problems)
    if not out:
        raise MismatchError(f"cannot use slot {slot} of this {dialect.name} tree: it is empty, all its ranks are 0")
    return out


def with_slot(
    dialect: Dialect, leaves: Leaves, slot: int, new: Mapping[str, Any], used: Mapping[str, tuple[int, float]]
) -> dict[str, Any]:
    """Return the arrays of all slots with one slot replaced, including its ranks and scales.

    Args:
        new: the slot's arrays, of the full rank.
        used: `{path of A: (used rank, scale)}`.
    """
    out: dict[str, Any] = {}
    for claim, *_ in dialect.claim(leaves).values():
        index = (*[slice(None)] * (leaves[claim.rank].ndim - 1), slot)
        rank, scale = used.get(claim.a, (0, 0.0))
        values = {claim.a: new[claim.a], claim.b: new[claim.b], claim.rank: rank, claim.scale: scale}
        out |= {path: _replace_slot(leaves[path], index, value) for path, value in values.items()}
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
