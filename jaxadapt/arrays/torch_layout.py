"""One layer's weight and adapter tensors in PyTorch's layout, converted from the model's and back inside a computation.

The leading axes of a converted array are the weight's batch axes (fused parts, experts): in PyTorch, each entry is a
weight of its own. The other axes are those of the file.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

from jaxadapt.arrays import pattern
from jaxadapt.arrays.layout import FileLayout

Array = Any
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

    @property
    def names(self) -> Names:
        """The names of the tensors that differ between sites."""
        return tuple(self._tensors)

    def factor(self, shape: Sequence[int]) -> float:
        """Return the factor by which a weight of this shape is PyTorch's weight."""
        return pattern.scale_factor(self.scale, zip(self.left, shape, strict=True), dict(self.sizes))

    def weight_to_torch(self, w: Array) -> Array:
        """Return a weight in PyTorch's layout and scale, (batch..., *file axes)."""
        return self._to_torch(self._weight_form(w.shape), w)

    def weight_from_torch(self, shape: Sequence[int], matrix: Array) -> Array:
        """Return a weight of this shape in the model's layout and scale."""
        form = self._weight_form(shape)
        return form.from_rows(matrix.reshape(form.count, *form.file_shape))

    def to_torch(self, name: str, x: Array) -> Array:
        """Return a tensor in the file's layout, (batch..., *file axes); a shared tensor as it is."""
        if name not in self._tensors:
            return x
        left, right = self._tensors[name]
        return self._to_torch(self._form(left, right, x.shape), x)

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

    def _to_torch(self, form: FileLayout, x: Array) -> Array:
        rows = form.to_rows(x)
        return rows.reshape(*(form.shape[axis] for axis in form.split), *form.file_shape)

    def _axes_over(
        self, role: str, letters: Mapping[str, str], over: str
    ) -> tuple[Names, list[str], list[int], list[int], list[int]]:
        """Return the names and axes of a role, and the positions in `over` of these axes, the batch and the rest."""
        names = self.inputs if role == "in" else self.outputs
        axes = [axis for axis in self.left if set(pattern.axis_parts(axis)) & set(names)]
        ends = [over.index(letters[axis]) for axis in axes]
        batch = [over.index(letters[axis]) for axis in self.batch if letters[axis] in over]
        return names, axes, ends, batch, [i for i in range(len(over)) if i not in (*ends, *batch)]

    def rows_to_torch(self, role: str, letters: Mapping[str, str], x: Array, over: str) -> tuple[Array, Names]:
        """Return values over the weight's inputs ("in") or outputs ("out") as rows.

        Args:
            letters: the letter of each axis of the weight, by its name.
            x: the array, whose axes are the letters `over`.

        Returns the array with the axes (batch..., rest..., features), and the letters of `rest`.
        """
        names, axes, ends, batch, rest = self._axes_over(role, letters, over)
        x = x.transpose(*batch, *rest, *ends)
        lead = x.shape[: len(batch) + len(rest)]
        split = pattern.split_sizes(zip(axes, x.shape[len(lead) :], strict=True), dict(self.sizes))
        x = x.reshape(*lead, *split.values())
        order = [len(lead) + list(split).index(n) for n in names]
        x = x.transpose(*range(len(lead)), *order).reshape(*lead, -1)
        return x, tuple(over[i] for i in rest)

    def rows_from_torch(self, role: str, letters: Mapping[str, str], like: Array, over: str, rows: Array) -> Array:
        """Return rows in the layout of `like`: the inverse of `rows_to_torch`."""
        names, axes, ends, batch, rest = self._axes_over(role, letters, over)
        split = pattern.split_sizes(zip(axes, (like.shape[i] for i in ends), strict=True), dict(self.sizes))
        lead = rows.shape[:-1]
        x = rows.reshape(*lead, *(split[n] for n in names))
        x = x.transpose(*range(len(lead)), *(len(lead) + names.index(n) for n in split))
        front = [*batch, *rest, *ends]
        x = x.reshape([like.shape[i] for i in front])
        return x.transpose([front.index(i) for i in range(len(front))])
