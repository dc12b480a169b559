"""How one array of a model holds tensors of a file: PyTorch's axes, from the model's, and back.

Pure: it works on shapes, and on anything that has `transpose`, `reshape` and indexing (numpy or JAX).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxadapt.arrays import pattern

Array = Any

RANK = "~r"
"""The axis of a method's own whose size may differ between the tensors of one array."""


@dataclasses.dataclass(frozen=True)
class FileLayout:
    """How one array of the model holds tensors of the file: the same for every layer of a line.

    `left` names the array's axes with `shape`; `right` groups them into PyTorch's axes; `split` are the
    positions of the axes PyTorch lacks: one tensor for each of their entries, row-major. The array is `factor`
    times what the file holds, plus `shift`; `sizes` are those of the parts of axes in parentheses.

    `held` are the numbers of those entries that have a tensor in the file, None if all have one; the array is zero at
    the others. `ranks` are the sizes of the axis "~r" in these tensors where they differ: the array is zero behind.

    >>> some = FileLayout((3, 4, 2), ("{l}", "~r", "i"), (("~r",), ("i",)), (0,), held=(0, 2), ranks=(4, 3))
    >>> [some.shape_of(i) for i in range(some.count)], some.encode(np.zeros((3, 4, 2)), 1).shape
    ([(4, 2), (3, 2)], (3, 2))
    """

    shape: tuple[int, ...]
    left: tuple[str, ...]
    right: tuple[tuple[str, ...], ...]
    split: tuple[int, ...]
    factor: float = 1.0
    sizes: tuple[tuple[str, int], ...] = ()
    shift: float = 0.0
    held: tuple[int, ...] | None = None
    ranks: tuple[int, ...] | None = None

    @functools.cached_property
    def size(self) -> int:
        """How many numbers the array holds."""
        return math.prod(self.shape)

    @property
    def exact(self) -> bool:
        """Whether the two ways round give back every bit: a sum rounds, and a factor that is no power of two."""
        return math.frexp(self.factor)[0] == 0.5 and not self.shift

    @functools.cached_property
    def _coarse(self) -> tuple[int, ...]:
        """The shape of one tensor's part of the array."""
        return tuple(size for i, size in enumerate(self.shape) if i not in self.split)

    @functools.cached_property
    def _inner(self) -> dict[str, int]:
        """The axes of one tensor and their sizes, in the model's order, split ones by their parts."""
        keep = (i for i in range(len(self.left)) if i not in self.split)
        parts = (pattern.part_sizes(self.left[i], self.shape[i], dict(self.sizes)) for i in keep)
        return {name: size for part in parts for name, size in part.items()}

    @functools.cached_property
    def _flat(self) -> dict[str, int]:
        """The same in PyTorch's order."""
        return {n: self._inner[n] for group in self.right for n in group}

    @functools.cached_property
    def file_shape(self) -> tuple[int, ...]:
        """The shape of each file tensor, in PyTorch's layout; where `ranks` differ, of the largest."""
        return tuple(math.prod(self._inner[n] for n in group) for group in self.right)

    def shape_of(self, i: int) -> tuple[int, ...]:
        """The shape of the tensor number `i`."""
        return self.part(i).file_shape if self.ranks else self.file_shape

    @property
    def partial(self) -> bool:
        """Whether some of the array is in no tensor of the file, and zero."""
        return self.held is not None or self.ranks is not None

    @functools.cached_property
    def rank_axis(self) -> int:
        """The position of the axis whose size differs between tensors."""
        return self.left.index(RANK)

    @functools.cached_property
    def _by_rank(self) -> dict[int, FileLayout]:
        return {}

    def part(self, i: int) -> FileLayout:
        """How tensor number `i` lies in its own part of the array, taken out by `index`."""
        if self.ranks is None:
            return self.single
        rank = self.ranks[i]
        found = self._by_rank.get(rank)
        if found is None:
            shape = tuple(rank if axis == self.rank_axis else n for axis, n in enumerate(self.shape))
            found = self._by_rank[rank] = dataclasses.replace(self, shape=shape, held=None, ranks=None).single
        return found

    def by_tensor(self, values: Sequence[float]) -> np.ndarray:
        """One number of each tensor where it lies, 0 where none does: to multiply the array by."""
        own = {*self.split, *([self.rank_axis] if self.ranks else [])}
        out = np.zeros([n if axis in own else 1 for axis, n in enumerate(self.shape)], np.float32)
        for i, value in enumerate(values):
            out[self.index(i)] = value
        return out

    def cleared(self, leaf: Array) -> Array:
        """The array with zeros where no tensor of the file lies."""
        return leaf * self.by_tensor([1] * self.count).astype(leaf.dtype) if self.partial else leaf

    @functools.cached_property
    def is_verbatim(self) -> bool:
        """Whether the array is one tensor of the file, byte for byte in its order."""
        return not self.split and list(self._flat) == list(self._inner) and self.factor == 1 and not self.shift

    @functools.cached_property
    def _orders(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The transposes from the model's axes to PyTorch's, and back."""
        ours, theirs = list(self._inner), list(self._flat)
        return tuple(ours.index(n) for n in theirs), tuple(theirs.index(n) for n in ours)

    def index(self, i: int) -> tuple[Any, ...]:
        """Where in the array the tensor number `i` lies."""
        where: list[Any] = [slice(None)] * len(self.left)
        if self.ranks is not None:
            where[self.rank_axis] = slice(self.ranks[i])
        i = i if self.held is None else self.held[i]
        for axis in reversed(self.split):
            i, where[axis] = divmod(i, self.shape[axis])
        return tuple(where)

    @functools.cached_property
    def single(self) -> FileLayout:
        """The same for one tensor's part of the array, taken out by `index`."""
        left = tuple(name for i, name in enumerate(self.left) if i not in self.split)
        return dataclasses.replace(self, shape=self._coarse, left=left, split=(), held=None)

    def encode(self, leaf: Array, i: int) -> Array:
        """The tensor number `i`, a view of `leaf` wherever its memory allows.

        >>> form = FileLayout((4, 2, 3), ("r", "n", "h"), (("n", "h"), ("r",)), ())
        >>> form.encode(np.zeros((4, 2, 3)), 0).shape
        (6, 4)
        """
        if self.ranks is not None:
            return self.part(i).encode(leaf[self.index(i)], 0)
        piece = leaf[self.index(i)] if self.split else leaf
        piece = to_file_scale(piece, self.factor, self.shift)
        if self._merged is not None:  # neighbours only: merge first, and the transpose stays a view
            order, shape = self._merged
            return piece.reshape(shape).transpose(order)
        return piece.reshape(tuple(self._inner.values())).transpose(self._orders[0]).reshape(self.file_shape)

    @functools.cached_property
    def _merged(self) -> tuple[list[int], tuple[int, ...]] | None:
        names = tuple(self._inner)
        groups = [g for g in self.right if g]
        starts: list[tuple[int, int]] = []
        for at, group in enumerate(groups):
            first = names.index(group[0])
            if names[first : first + len(group)] != group:
                return None
            starts.append((first, at))
        order = [at for _, at in sorted(starts)]
        shape = [self.file_shape[self.right.index(groups[at])] for at in order]
        perm = [order.index(at) for at in range(len(groups))]
        for axis, group in enumerate(self.right):  # size-1 axes PyTorch has and JAX lacks
            if not group:
                perm = [*perm[:axis], len(shape), *perm[axis:]]
                shape.append(1)
        return perm, tuple(shape)

    def decode(self, tensor: Array) -> Array:
        """The part of the array that one tensor makes, a view where its memory allows."""
        part = tensor.reshape(tuple(self._flat.values())).transpose(self._orders[1]).reshape(self._coarse)
        return to_model_scale(part, self.factor, self.shift)

    @functools.cached_property
    def count(self) -> int:
        """How many tensors the array holds."""
        return self._entries if self.held is None else len(self.held)

    @functools.cached_property
    def _entries(self) -> int:
        return math.prod(self.shape[axis] for axis in self.split)

    @functools.cached_property
    def _front(self) -> tuple[int, ...]:
        return (*self.split, *(i for i in range(len(self.shape)) if i not in self.split))

    def to_rows(self, leaf: Array) -> Array:
        """All the tensors at once, `(count, *file_shape)`; smaller ones end in zeros."""
        pieces = leaf.transpose(self._front).reshape((self._entries, *self._inner.values()))
        pieces = pieces if self.held is None else pieces[np.array(self.held)]
        out = pieces.transpose((0, *(1 + i for i in self._orders[0]))).reshape((self.count, *self.file_shape))
        return to_file_scale(out, self.factor, self.shift)

    def from_rows(self, rows: Array) -> Array:
        """The array whose `rows` these are."""
        pieces = rows.reshape((self.count, *self._flat.values())).transpose((0, *(1 + i for i in self._orders[1])))
        if self.held is not None:  # (each entry's row, or the zeros behind them)
            at = dict(zip(self.held, range(self.count), strict=True))
            xp = rows.__array_namespace__()
            pieces = xp.concat([pieces, xp.zeros_like(pieces[:1])])
            pieces = pieces[np.array([at.get(i, self.count) for i in range(self._entries)])]
        leaf = pieces.reshape([self.shape[i] for i in self._front]).transpose(np.argsort(self._front))
        return self.cleared(to_model_scale(leaf, self.factor, self.shift))


def to_model_scale(x: Array, factor: float, shift: float) -> Array:
    """x · factor + shift in x's dtype, rounded once: 16-bit numbers are computed with in float32."""
    if factor == 1 and not shift:
        return x
    wide = x.astype(np.promote_types(x.dtype, np.float32))
    product = wide if factor == 1 else wide * wide.dtype.type(factor)
    return (product + wide.dtype.type(shift) if shift else product).astype(x.dtype)


def to_file_scale(x: Array, factor: float, shift: float) -> Array:
    """The inverse, (x - shift) / factor."""
    if factor == 1 and not shift:
        return x
    wide = x.astype(np.promote_types(x.dtype, np.float32))
    wide = wide - wide.dtype.type(shift) if shift else wide
    return (wide if factor == 1 else wide * wide.dtype.type(1 / factor)).astype(x.dtype)
