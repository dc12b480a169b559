"""The layouts of one tensor: its axes in a model's leaf, in PyTorch's file, and for one layer inside a computation.

A pattern of a keymap's entry, such as "d {l} n h -> (n h) d", names a leaf's axes, then PyTorch's. A layout converts
file tensors to one array of a model and back; its functions work on shapes, and on NumPy or JAX arrays alike.

`TorchLayout` converts the weight and the adapter tensors of one layer to PyTorch's layout and back inside a
computation. The leading axes of a converted array are the weight's batch axes (fused parts, experts): in PyTorch,
each entry is a weight of its own. The other axes are those of the file. `Axes` assigns the roles input, output and
batch to the axes of a weight, in the shape that its module uses.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxadapt.core.errors import MismatchError, repeated
from jaxadapt.core.lazy import np

# ---------------------------------------------------------------- pattern


_TOKEN = re.compile(r"\(([^()]*)\)|(\{?\w+\}?)")


class Pattern(NamedTuple):
    """A parsed pattern.

    Attributes:
        left: the leaf's axes. Braced axes keep their braces, and a split axis its parentheses.
        right: PyTorch's axes, each as the group of names that are flattened into it.
        plain: the names on the left without braces.
        braced: the names on the left in braces, without the braces.
        problems: the errors in the pattern.
    """

    left: tuple[str, ...]
    right: tuple[tuple[str, ...], ...]
    plain: frozenset[str]
    braced: frozenset[str]
    problems: tuple[str, ...]


@functools.lru_cache(maxsize=4096)  # all families together have a few hundred patterns
def parse_pattern(text: str) -> Pattern:
    """Parse a pattern; `problems` lists its errors.

    >>> parse_pattern("{p} n d h -> (n h) d")[:2]
    (('{p}', 'n', 'd', 'h'), (('n', 'h'), ('d',)))
    """
    if text.count("->") != 1:
        none = frozenset[str]()
        problem = "a pattern must have exactly one '->', with JAX axes on the left and PyTorch axes on the right"
        return Pattern((), (), none, none, (problem,))
    ours, theirs = map(_axes, text.split("->"))
    names, flat = ([name for _, group in side for name in group] for side in (ours, theirs))
    rest = re.sub(_TOKEN, "", text.replace("->", " ")).strip()
    problems = [f"{rest!r} is no axis name"] * bool(rest)
    problems += [
        f"axis {n!r} occurs twice on the {side}"
        for side, side_names in (("left", names), ("right", flat))
        for n in repeated(side_names)
    ]
    plain = frozenset(n for n in names if not n.startswith("{"))
    problems += [
        f"axis {n!r} is only on the left (put an axis that PyTorch lacks in braces)" for n in sorted(plain - set(flat))
    ] + [f"axis {n!r} is only on the right" for n in sorted(set(flat) - plain)]
    return Pattern(
        left=tuple(axis for axis, _ in ours),
        right=tuple(names for _, names in theirs),
        plain=plain,
        braced=frozenset(n.strip("{}") for n in names if n.startswith("{")),
        problems=tuple(problems),
    )


def _axes(text: str) -> list[tuple[str, tuple[str, ...]]]:
    """Return the axes on one side of a pattern, each with its names."""
    found = ((match[2], tuple((match[1] or match[2] or "").split())) for match in _TOKEN.finditer(text))
    return [(name or f"({' '.join(names)})", names) for name, names in found]


def axis_parts(axis: str) -> tuple[str, ...]:
    """Return the names in a parenthesised axis of a leaf, or the axis itself."""
    return tuple(axis[1:-1].split()) if axis.startswith("(") else (axis,)


def part_sizes(axis: str, size: int, fixed: Mapping[str, int]) -> dict[str, int]:
    """Return the sizes of the parts of an axis. Raises `MismatchError` if the fixed sizes do not divide its size.

    >>> part_sizes("(c p)", 8, {"p": 2}), part_sizes("h", 8, {})
    ({'c': 4, 'p': 2}, {'h': 8})
    """
    names = axis_parts(axis)
    if names == (axis,):
        return {axis: size}
    known = math.prod(fixed[n] for n in names if n in fixed)
    if size % known:
        raise MismatchError(f"an axis of size {size} cannot be split as {axis} with the sizes {dict(fixed)}")
    return {n: fixed.get(n, size // known) for n in names}


def split_sizes(sizes: Iterable[tuple[str, int]], fixed: Mapping[str, int]) -> dict[str, int]:
    """Return the sizes of the parts of several axes, given as `(axis, size)`; see `part_sizes`."""
    return {name: part for axis, size in sizes for name, part in part_sizes(axis, size, fixed).items()}


def scale_factor(scale: tuple[str, float] | None, sizes: Iterable[tuple[str, int]], fixed: Mapping[str, int]) -> float:
    """Return the product of the sizes of the axes that `scale` names, to its power; 1 without a scale.

    >>> scale_factor(("c p", -0.5), [("d", 3), ("(c p)", 4)], {"p": 2})
    0.5
    """
    if scale is None:
        return 1.0
    parts = split_sizes(sizes, fixed)
    return float(math.prod(parts[name] for name in scale[0].split()) ** scale[1])


# ---------------------------------------------------------------- layout


Array = Any

RANK = "~r"
"""The name of the rank axis, whose size may differ between the tensors of one array."""


@dataclasses.dataclass(frozen=True)
class FileLayout:
    """The layout of file tensors in one array of the model; the same for every layer of a keymap entry.

    Attributes:
        shape: the shape of the array.
        left: the names of the array's axes.
        right: PyTorch's axes, each as the group of names that are flattened into it.
        split: the positions of the axes that PyTorch lacks. The file has one tensor per entry of them, row-major.
        factor: the array holds `factor` times the file's values, plus `shift`.
        sizes: the sizes of the parts of parenthesised axes.
        shift: see `factor`.
        file_entries: the indices of the entries that have a tensor in the file; None if all have one. The array is zero
            at the others.
        ranks: the size of the axis "~r" in each tensor; None if they are equal. The array is zero beyond it.

    >>> import numpy as np
    >>> some = FileLayout((3, 4, 2), ("{l}", "~r", "i"), (("~r",), ("i",)), (0,), file_entries=(0, 2), ranks=(4, 3))
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
    file_entries: tuple[int, ...] | None = None
    ranks: tuple[int, ...] | None = None

    @functools.cached_property
    def size(self) -> int:
        """The number of elements of the array."""
        return math.prod(self.shape)

    @functools.cached_property
    def axis_sizes(self) -> dict[str, int]:
        """The sizes of the array's axes, by name."""
        return dict(zip(self.left, self.shape, strict=True))

    @property
    def is_exact(self) -> bool:
        """True if a round trip keeps every bit: there is no shift, and the factor is a power of two."""
        return math.frexp(self.factor)[0] == 0.5 and not self.shift

    @functools.cached_property
    def is_identity(self) -> bool:
        """True if the array holds the bytes of its only tensor, in their order."""
        return not self.split and self.factor == 1 and self.shift == 0 and self.orders[0] == (*range(len(self.flat)),)

    @functools.cached_property
    def _part_shape(self) -> tuple[int, ...]:
        """The shape of the part of the array that holds one tensor."""
        return tuple(size for i, size in enumerate(self.shape) if i not in self.split)

    @functools.cached_property
    def inner(self) -> dict[str, int]:
        """{axis: size} of one tensor in the model's order; a parenthesised axis appears as its parts."""
        kept = [(self.left[i], self.shape[i]) for i in range(len(self.left)) if i not in self.split]
        return split_sizes(kept, dict(self.sizes))

    @functools.cached_property
    def flat(self) -> dict[str, int]:
        """{axis: size} of one tensor in PyTorch's order."""
        return {n: self.inner[n] for group in self.right for n in group}

    @functools.cached_property
    def file_shape(self) -> tuple[int, ...]:
        """The shape of each file tensor in PyTorch's layout; the largest one if the ranks differ."""
        return tuple(math.prod(self.inner[n] for n in group) for group in self.right)

    def shape_of(self, i: int) -> tuple[int, ...]:
        """Return the shape of tensor `i`."""
        return self.part_layout(i).file_shape if self.ranks else self.file_shape

    @functools.cached_property
    def is_partial(self) -> bool:
        """True if parts of the array are in no tensor of the file; they are zero."""
        return self.file_entries is not None or self.ranks is not None

    @functools.cached_property
    def rank_axis(self) -> int:
        """The position of the rank axis."""
        return self.left.index(RANK)

    def part_layout(self, i: int) -> FileLayout:
        """Return the layout of tensor `i` in its part of the array, as `index` selects it."""
        return self.single_layout if self.ranks is None else with_rank(self._whole, self.ranks[i]).single_layout

    @functools.cached_property
    def _whole(self) -> FileLayout:
        """The layout without `file_entries` and `ranks`, whose hash would take a time that grows with the tensors."""
        return dataclasses.replace(self, file_entries=None, ranks=None)

    def expand_by_tensor(self, values: Sequence[float]) -> np.ndarray:
        """Return a factor for the array: one number per tensor, broadcast over its part, and 0 elsewhere."""
        full_axes = {*self.split, *([self.rank_axis] if self.ranks else [])}
        out = np.zeros([n if axis in full_axes else 1 for axis, n in enumerate(self.shape)], np.float32)
        for i, value in enumerate(values):
            out[self.index(i)] = value
        return out

    def clear_gaps(self, leaf: Array) -> Array:
        """Set the parts of the array that are in no tensor of the file to zero."""
        return leaf * self.expand_by_tensor([1] * self.count).astype(leaf.dtype) if self.is_partial else leaf

    @functools.cached_property
    def orders(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The axis permutations from the model to PyTorch, and back."""
        model_axes, file_axes = list(self.inner), list(self.flat)
        return tuple(model_axes.index(n) for n in file_axes), tuple(file_axes.index(n) for n in model_axes)

    def index(self, i: int) -> tuple[Any, ...]:
        """Return the index of tensor `i` in the array."""
        index: list[Any] = [slice(None)] * len(self.left)
        if self.ranks is not None:
            index[self.rank_axis] = slice(self.ranks[i])
        i = i if self.file_entries is None else self.file_entries[i]
        for axis in reversed(self.split):
            i, index[axis] = divmod(i, self.shape[axis])
        return tuple(index)

    @functools.cached_property
    def single_layout(self) -> FileLayout:
        """The layout of one tensor in its part of the array, if the ranks are equal."""
        left = tuple(name for i, name in enumerate(self.left) if i not in self.split)
        return dataclasses.replace(self, shape=self._part_shape, left=left, split=(), file_entries=None)

    def encode(self, leaf: Array, i: int) -> Array:
        """Return tensor `i`, as a view of `leaf` if its memory layout allows it.

        >>> import numpy as np
        >>> form = FileLayout((4, 2, 3), ("r", "n", "h"), (("n", "h"), ("r",)), ())
        >>> form.encode(np.zeros((4, 2, 3)), 0).shape
        (6, 4)
        """
        if self.split or self.ranks is not None:
            return self.part_layout(i).encode(leaf[self.index(i)], 0)
        # Not by `to_torch`, which takes several times as long: a save calls this for each tensor.
        part = to_file_scale(leaf, self.factor, self.shift)
        return part.reshape(tuple(self.inner.values())).transpose(self.orders[0]).reshape(self.file_shape)

    def locate(self, i: int, positions: Iterable[Sequence[int]]) -> list[tuple[int, ...]]:
        """Return the indices in the array of the elements at `positions` of tensor `i`; all ranks must be equal.

        >>> import numpy as np
        >>> form = FileLayout((4, 2, 3), ("r", "n", "h"), (("n", "h"), ("r",)), ())
        >>> form.locate(0, [(5, 3)]), bool(np.arange(24).reshape(4, 2, 3)[3, 1, 2] == form.encode(
        ...     np.arange(24).reshape(4, 2, 3), 0)[5, 3])
        ([(3, 1, 2)], True)
        """
        points = np.reshape([*positions], (-1, len(self.right))).T
        flat = np.unravel_index(np.ravel_multi_index(tuple(points), self.file_shape), (*self.flat.values(),))
        inner = np.ravel_multi_index(tuple(flat[axis] for axis in self.orders[1]), (*self.inner.values(),))
        part = iter(np.unravel_index(inner, self._part_shape))
        axes = [next(part) if isinstance(at, slice) else np.full(points.shape[1:], at) for at in self.index(i)]
        return [tuple(map(int, index)) for index in zip(*axes, strict=True)]

    def decode(self, tensor: Array) -> Array:
        """Return the part of the array for one tensor, as a view if its memory layout allows it."""
        part = tensor.reshape(tuple(self.flat.values())).transpose(self.orders[1]).reshape(self._part_shape)
        return to_model_scale(part, self.factor, self.shift)

    @functools.cached_property
    def count(self) -> int:
        """The number of file tensors in the array."""
        return self._entries if self.file_entries is None else len(self.file_entries)

    @functools.cached_property
    def number_of(self) -> dict[int, int]:
        """`{entry: number of its tensor}` of the entries that have a tensor in the file."""
        entries = range(self._entries) if self.file_entries is None else self.file_entries
        return {entry: number for number, entry in enumerate(entries)}

    @functools.cached_property
    def _entries(self) -> int:
        return math.prod(self.shape[axis] for axis in self.split)

    @functools.cached_property
    def _front(self) -> tuple[int, ...]:
        return (*self.split, *(i for i in range(len(self.shape)) if i not in self.split))

    def to_torch(self, leaf: Array) -> Array:
        """Return the tensors of all entries as one array (*split axes, *file_shape).

        The split axes stay apart, because an array on an explicit mesh cannot merge sharded axes.
        """
        lead = [self.shape[axis] for axis in self.split]
        order = (*range(len(lead)), *(len(lead) + axis for axis in self.orders[0]))
        pieces = leaf.transpose(self._front).reshape((*lead, *self.inner.values())).transpose(order)
        return to_file_scale(pieces.reshape((*lead, *self.file_shape)), self.factor, self.shift)

    def from_torch(self, tensors: Array) -> Array:
        """Return the array for the tensors of all entries: the inverse of `to_torch`."""
        lead = [self.shape[axis] for axis in self.split]
        order = (*range(len(lead)), *(len(lead) + axis for axis in self.orders[1]))
        pieces = tensors.reshape((*lead, *self.flat.values())).transpose(order)
        back = [self._front.index(axis) for axis in range(len(self.shape))]
        leaf = pieces.reshape([self.shape[i] for i in self._front]).transpose(back)
        return to_model_scale(leaf, self.factor, self.shift)

    def to_rows(self, leaf: Array) -> Array:
        """Return all tensors as one array (count, *file_shape); smaller tensors are padded with zeros."""
        rows = self.to_torch(leaf).reshape((self._entries, *self.file_shape))
        return rows if self.file_entries is None else rows[np.array(self.file_entries)]

    def from_rows(self, rows: Array) -> Array:
        """Return the array for all tensors `rows`: the inverse of `to_rows`."""
        if self.file_entries is not None:  # an entry without a tensor takes the row of zeros at the end
            xp = rows.__array_namespace__()
            rows = xp.concat([rows, xp.zeros_like(rows[:1])])
            rows = rows[np.array([self.number_of.get(i, self.count) for i in range(self._entries)])]
        return self.clear_gaps(self.from_torch(rows))


@functools.lru_cache(maxsize=1024)
def with_rank(form: FileLayout, rank: int) -> FileLayout:
    """Return the layout of an array whose tensors all have this rank and are in the file."""
    shape = tuple(rank if axis == form.rank_axis else n for axis, n in enumerate(form.shape))
    return dataclasses.replace(form, shape=shape, file_entries=None, ranks=None)


def to_model_scale(x: Array, factor: float, shift: float) -> Array:
    """Return x · factor + shift in the dtype of x, computed in at least float32 and rounded once."""
    if factor == 1 and not shift:
        return x
    wide = x.astype(np.promote_types(x.dtype, np.float32))
    product = wide if factor == 1 else wide * wide.dtype.type(factor)
    return (product + wide.dtype.type(shift) if shift else product).astype(x.dtype)


def to_file_scale(x: Array, factor: float, shift: float) -> Array:
    """Return (x - shift) / factor in the dtype of x: the inverse of `to_model_scale`."""
    if factor == 1 and not shift:
        return x
    wide = x.astype(np.promote_types(x.dtype, np.float32))
    wide = wide - wide.dtype.type(shift) if shift else wide
    return (wide if factor == 1 else wide * wide.dtype.type(1 / factor)).astype(x.dtype)


# ---------------------------------------------------------------- torch layout


Names = tuple[str, ...]
Groups = tuple[Names, ...]


@dataclasses.dataclass(frozen=True)
class TorchLayout:
    """The layouts of one site, without the axes of stacked layers.

    Attributes:
        left: the names of the weight's axes.
        right: PyTorch's axes of the weight, each as the group of names that are flattened into it.
        batch: the names of the batch axes, in the weight's order.
        inputs: the names of PyTorch's input axis, split.
        outputs: the names of PyTorch's output axis, split.
        sizes: the sizes of the parts of parenthesised axes.
        scale: as `Weight.scale`.
        shift: as `Weight.shift`.
        tensors: `(name, left, right)` of the site's tensors.
    """

    left: Names
    right: Groups
    batch: Names
    inputs: Names
    outputs: Names
    sizes: tuple[tuple[str, int], ...] = ()
    scale: tuple[str, float] | None = None
    shift: float = 0.0
    tensors: tuple[tuple[str, Names, Groups], ...] = ()

    @functools.cached_property
    def _tensors(self) -> dict[str, tuple[Names, Groups]]:
        return {name: (left, right) for name, left, right in self.tensors}

    @functools.cached_property
    def _hash(self) -> int:
        return hash((self.left, self.right, self.batch, self.sizes, self.scale, self.shift, self.tensors))

    def __hash__(self) -> int:
        return self._hash

    def factor(self, shape: Sequence[int]) -> float:
        """Return the factor by which a weight of this shape is PyTorch's weight."""
        return scale_factor(self.scale, zip(self.left, shape, strict=True), dict(self.sizes))

    def weight_to_torch(self, w: Array) -> Array:
        """Return a weight in PyTorch's layout and scale, (batch..., *file axes)."""
        return self._weight_form(w.shape).to_torch(w)

    def weight_from_torch(self, shape: Sequence[int], matrix: Array) -> Array:
        """Return a weight of this shape in the model's layout and scale."""
        return self._weight_form(shape).from_torch(matrix)

    def to_torch(self, name: str, x: Array) -> Array:
        """Return a tensor in the file's layout, (batch..., *file axes); a shared tensor as it is."""
        if name not in self._tensors:
            return x
        left, right = self._tensors[name]
        return self._form(left, right, x.shape).to_torch(x)

    def has_batch(self, name: str) -> bool:
        """Return True if a tensor has the batch axes."""
        return name in self._tensors and bool(self.batch) and set(self.batch) <= set(self._tensors[name][0])

    def _weight_form(self, shape: Sequence[int]) -> FileLayout:
        return dataclasses.replace(
            self._form(self.left, self.right, shape), factor=self.factor(shape), shift=self.shift
        )

    def _form(self, left: Names, right: Groups, shape: Sequence[int]) -> FileLayout:
        split = tuple(left.index(name) for name in self.batch if name in left)
        return FileLayout(tuple(shape), left, right, split, sizes=self.sizes)

    def _rows_form(self, role: str, letters: Mapping[str, str], over: str, shape: Sequence[int]) -> FileLayout:
        """Return the layout of values over the inputs or outputs; the names of other axes are "~" and their letter."""
        features = self.inputs if role == "in" else self.outputs
        known = {
            letters[axis]: axis for axis in self.left if axis in self.batch or set(axis_parts(axis)) & set(features)
        }
        left = tuple(known.get(letter, f"~{letter}") for letter in over)
        return self._form(left, (*((name,) for name in left if name.startswith("~")), features), shape)

    def rows_to_torch(self, role: str, letters: Mapping[str, str], x: Array, over: str) -> Array:
        """Return values over the weight's inputs ("in") or outputs ("out") as rows (batch..., rest..., features).

        Args:
            letters: the letter of each axis of the weight, by its name.
            x: the array, whose axes are the letters `over`.
        """
        return self._rows_form(role, letters, over, x.shape).to_torch(x)

    def rows_from_torch(self, role: str, letters: Mapping[str, str], like: Array, over: str, rows: Array) -> Array:
        """Return rows in the layout of `like`: the inverse of `rows_to_torch`."""
        return self._rows_form(role, letters, over, like.shape).from_torch(rows)


# ---------------------------------------------------------------- axes


@dataclasses.dataclass(frozen=True)
class Axes:
    """The roles of the axes of one weight, in the shape that its module uses.

    Attributes:
        in_axes: the input axes, in PyTorch's flattening order.
        out_axes: the output axes, in PyTorch's flattening order.
        batch_axes: the axes that index independent matrices (fused parts, experts). Each entry has its own A and B.
        parts: the adapted entries of the first batch axis, such as `(1,)` if k and v are fused and only v is a
            target; None if all entries are adapted.
        torch: PyTorch's layout of the weight and of the adapter's tensors, for methods that compute in it.

    >>> Axes(in_axes=(0,), out_axes=(1, 2)).sizes("in", (16, 4, 8))
    (16,)
    """

    in_axes: tuple[int, ...]
    out_axes: tuple[int, ...]
    batch_axes: tuple[int, ...] = ()
    parts: tuple[int, ...] | None = None
    torch: TorchLayout | None = dataclasses.field(default=None, repr=False)

    @property
    def rank(self) -> int:
        """The number of axes."""
        return len(self.in_axes) + len(self.out_axes) + len(self.batch_axes)

    def sizes(self, role: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the sizes of the axes of `role` ("in", "out" or "batch") in a weight of `shape`."""
        sizes = tuple(shape[i] for i in getattr(self, f"{role}_axes"))
        return (len(self.parts), *sizes[1:]) if role == "batch" and self.parts is not None else sizes
