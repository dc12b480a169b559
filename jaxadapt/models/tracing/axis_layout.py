"""Positions of a weight's axes in a rearranged view of it, and in the `dot_general` that contracts the view.

Uses only the shapes and axis numbers of an equation; evaluates nothing.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax.numpy as jnp
from jax.extend import core
from jax.extend.core import primitives

from jaxadapt.arrays.axes import LETTERS, Axes, Use


@dataclasses.dataclass(frozen=True)
class AxisLayout:
    """The layout of a view of a weight: for each axis of the view, the axes of the weight merged in it.

    Reshapes add and remove axes of size 1, so such weight axes are listed only if they can be tracked.
    """

    name: str
    sizes: tuple[int, ...]  # the weight's own shape
    groups: tuple[tuple[int, ...], ...]

    @classmethod
    def identity(cls, name: str, shape: tuple[int, ...]) -> AxisLayout:
        """Return the layout of the weight itself."""
        return cls(name, shape, tuple((i,) for i in range(len(shape))))

    def weight_axes(self, axes: Iterable[int]) -> tuple[int, ...]:
        """Return the weight's axes that these axes of the view contain."""
        return tuple(a for i in axes for a in self.groups[i])

    def reshaped(self, shape: Sequence[int]) -> AxisLayout | None:
        """Return the layout after a row-major reshape to `shape`; None if that splits an axis of the weight."""
        rest = list(self.weight_axes(range(len(self.groups))))
        groups: list[tuple[int, ...]] = []
        for size in shape:
            group: list[int] = []
            if size == 1 and rest and self.sizes[rest[0]] == 1:
                group.append(rest.pop(0))
            while rest and math.prod(self.sizes[a] for a in group) < size:
                axis = rest.pop(0)
                if self.sizes[axis] != 1:
                    group.append(axis)
            if math.prod(self.sizes[a] for a in group) != size:
                return None
            groups.append(tuple(group))
        return dataclasses.replace(self, groups=tuple(groups))


_RESHAPES = {primitives.reshape_p, primitives.squeeze_p, primitives.broadcast_in_dim_p}
_SAME = {primitives.copy_p, primitives.sharding_constraint_p, primitives.name_p}
BARRIER = "optimization_barrier"  # the only one with several operands; it has one result for each


def move_layouts(eqn: core.JaxprEqn, before: list[AxisLayout | None]) -> list[AxisLayout | None] | None:
    """Return the layouts of an equation's results if it only moves, casts or passes its operands, else None."""
    kind, params = eqn.primitive, eqn.params
    if kind.name == BARRIER:
        return before
    if len(before) != 1 or (layout := before[0]) is None:
        return None
    old: Any = eqn.invars[0].aval
    new: Any = eqn.outvars[0].aval
    if kind in _SAME:
        return [layout]
    if kind is primitives.convert_element_type_p:
        floats = jnp.issubdtype(old.dtype, jnp.floating) and jnp.issubdtype(new.dtype, jnp.floating)
        return [layout] if floats else None
    if kind is primitives.transpose_p:
        return [dataclasses.replace(layout, groups=tuple(layout.groups[i] for i in params["permutation"]))]
    if kind in _RESHAPES and math.prod(old.shape) == math.prod(new.shape):
        permutes = kind is primitives.reshape_p and params["dimensions"] is not None
        after = None if permutes else layout.reshaped(new.shape)
        return None if after is None else [after]
    return None


def spell_contraction(
    eqn: core.JaxprEqn, side: int, layout: AxisLayout, axes: Axes, x_shape: tuple[int, ...]
) -> tuple[Use, list[int], list[int]] | None:
    """Return the contraction as a `Use`, and the split shapes of x and y; None if it does not match the roles.

    A weight axis of size 1 becomes an extra axis of x or y, according to its role: it may have been squeezed out of
    the view, and its position does not affect the result.
    """
    (summed_w, summed_x), (shared_w, shared_x) = ((d[side], d[1 - side]) for d in eqn.params["dimension_numbers"])
    unit = {a for a, size in enumerate(layout.sizes) if size == 1}
    summed, shared = set(layout.weight_axes(summed_w)) - unit, set(layout.weight_axes(shared_w)) - unit
    matches = [
        way for way in ((axes.in_axes, axes.out_axes), (axes.out_axes, axes.in_axes)) if summed == set(way[0]) - unit
    ]
    if not matches or not shared <= set(axes.batch_axes):
        return None
    reads, writes = matches[0]

    def letters(view_axis: int) -> list[tuple[str, int]]:
        return [(LETTERS[a], layout.sizes[a]) for a in layout.groups[view_axis] if a not in unit]

    def units(role: Iterable[int]) -> list[tuple[str, int]]:
        return [(LETTERS[a], 1) for a in role if a in unit]

    w_axis_of = dict(zip([*summed_x, *shared_x], [*summed_w, *shared_w], strict=True))
    fresh = iter(LETTERS[len(layout.sizes) :])
    own = {i: [(next(fresh), size)] for i, size in enumerate(x_shape) if i not in w_axis_of}
    x = [pair for i in range(len(x_shape)) for pair in (own[i] if i in own else letters(w_axis_of[i]))]
    free_w = [p for i in range(len(layout.groups)) if i not in (*summed_w, *shared_w) for p in letters(i)]
    free_x = [pair for pairs in own.values() for pair in pairs]
    # dot_general's result: batch axes, then the free axes of the left operand, then those of the right
    y = [p for i in shared_w for p in letters(i)] + (free_w + free_x if side == 0 else free_x + free_w)
    x, y = x + units((*reads, *axes.batch_axes)), y + units((*writes, *axes.batch_axes))
    spelled = Use("".join(c for c, _ in x), LETTERS[: len(layout.sizes)], "".join(c for c, _ in y), axes)
    return spelled, [n for _, n in x], [n for _, n in y]
