"""Operations that are linear in a weight, and the interface of an adapter on one weight, for the interpreter of jaxprs.

Beside a `dot_general` of a rearranged view of the weight, these are a convolution, a lookup, and a product of tokens
with their experts' matrices, which keep the weight's output axis as a separate axis. The positions of a weight's axes
follow from the shapes and axis numbers of an equation; nothing is evaluated. `Hook` is the interface of an adapter on
one weight.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.extend.core import primitives

from jaxadapt.arrays.axes import LETTERS, Axes, Operation, Use

# ---------------------------------------------------------------- axis layout


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

    def spell(self, axes: Iterable[int], unit: bool = False) -> list[tuple[str, int]]:
        """Return the letters and sizes of some of the weight's axes: of those of size 1, or of all others."""
        return [(LETTERS[a], self.sizes[a]) for a in axes if (self.sizes[a] == 1) == unit]

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
    roles = _matching_roles(layout, axes, summed_w, shared_w)
    if roles is None:
        return None
    reads, writes = roles
    view = [layout.spell(group) for group in layout.groups]
    w_axis_of = dict(zip([*summed_x, *shared_x], [*summed_w, *shared_w], strict=True))
    fresh = iter(LETTERS[len(layout.sizes) :])
    own = {i: [(next(fresh), size)] for i, size in enumerate(x_shape) if i not in w_axis_of}
    x = [pair for i in range(len(x_shape)) for pair in (own[i] if i in own else view[w_axis_of[i]])]
    free_w = [pair for i, pairs in enumerate(view) if i not in (*summed_w, *shared_w) for pair in pairs]
    free_x = [pair for pairs in own.values() for pair in pairs]
    # dot_general's result: batch axes, then the free axes of the left operand, then those of the right
    y = [pair for i in shared_w for pair in view[i]] + (free_w + free_x if side == 0 else free_x + free_w)
    x += layout.spell((*reads, *axes.batch_axes), unit=True)
    y += layout.spell((*writes, *axes.batch_axes), unit=True)
    spelled = Use("".join(c for c, _ in x), LETTERS[: len(layout.sizes)], "".join(c for c, _ in y), axes)
    return spelled, [n for _, n in x], [n for _, n in y]


def _matching_roles(
    layout: AxisLayout, axes: Axes, summed: Sequence[int], shared: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Return the weight's axes that a contraction reads and writes; None if it does not match the roles.

    `summed` and `shared` are axes of the view.
    """

    def sized(weight_axes: Iterable[int]) -> set[int]:
        return {a for a in weight_axes if layout.sizes[a] != 1}

    if not sized(layout.weight_axes(shared)) <= set(axes.batch_axes):
        return None
    found = sized(layout.weight_axes(summed))
    ways = (axes.in_axes, axes.out_axes), (axes.out_axes, axes.in_axes)
    return next((way for way in ways if sized(way[0]) == found), None)


# ---------------------------------------------------------------- operations


Make = Callable[[core.JaxprEqn, Axes, Sequence[Any]], Operation | None]


def find_operation(
    eqn: core.JaxprEqn, layouts: Sequence[AxisLayout | None], axes: Axes, operands: Sequence[Any]
) -> tuple[int, Operation] | None:
    """Return the position of the weight operand, and the equation as a function of the weight; None if unsupported."""
    side, make = _SIDES.get(eqn.primitive.name, (0, None))
    others = [layout for i, layout in enumerate(layouts) if i != side]
    layout = layouts[side] if side < len(layouts) else None
    if make is None or layout is None or any(others) or len(axes.out_axes) != 1:
        return None
    if layout.groups != tuple((i,) for i in range(len(layout.sizes))):
        return None  # after a transpose or reshape, an adapter's factors would need another layout
    operation = make(eqn, axes, operands)
    return None if operation is None else (side, operation)


def _convolution(eqn: core.JaxprEqn, axes: Axes, _: Sequence[Any]) -> Operation | None:
    eqn_params = dict(eqn.params)
    numbers = eqn_params["dimension_numbers"]
    (out,) = axes.out_axes
    if numbers.rhs_spec[0] != out or eqn_params["batch_group_count"] != 1 or axes.batch_axes:
        return None
    kept = ("window_strides", "padding", "lhs_dilation", "rhs_dilation", "precision", "preferred_element_type")

    def run(x: Any, w: Any) -> Any:
        # As in PEFT, A's channels are never grouped. The caller groups those of B.
        groups = x.shape[numbers.lhs_spec[1]] // w.shape[numbers.rhs_spec[1]]
        options: Any = {name: eqn_params[name] for name in kept}
        if options["preferred_element_type"] is not None:
            options["preferred_element_type"] = x.dtype
        return jax.lax.conv_general_dilated(x, w, dimension_numbers=numbers, feature_group_count=groups, **options)

    def slide(x: Any, w: Any) -> Any:
        once, precision = (1,) * (x.ndim - 2), jax.lax.Precision.HIGHEST
        return jax.lax.conv_general_dilated(x, w, once, "VALID", dimension_numbers=sliding, precision=precision)

    window = sorted(range(2, len(numbers.rhs_spec)), key=lambda axis: numbers.rhs_spec[axis])
    lhs, rhs = ((*spec[:2], *(spec[axis] for axis in window)) for spec in (numbers.lhs_spec, numbers.rhs_spec))
    sliding = jax.lax.ConvDimensionNumbers(lhs, rhs, tuple(range(len(lhs))))
    is_dilated = {*eqn_params["lhs_dilation"], *eqn_params["rhs_dilation"]} != {1}
    return Operation(run, numbers.out_spec[1], axes, slide=None if is_dilated else slide)


def _lookup(eqn: core.JaxprEqn, axes: Axes, _: Sequence[Any]) -> Operation | None:
    eqn_params = dict(eqn.params)
    numbers, sizes = eqn_params["dimension_numbers"], list(eqn_params["slice_sizes"])
    (out,) = axes.out_axes
    weight: Any = eqn.invars[0].aval
    inside = [i for i in range(len(sizes)) if i not in (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)]
    if axes.batch_axes or out not in inside or out in numbers.start_index_map or sizes[out] != weight.shape[out]:
        return None
    kept = ("mode", "fill_value", "indices_are_sorted", "unique_indices")

    def run(x: Any, w: Any) -> Any:
        options: Any = {name: eqn_params[name] for name in kept}
        window = [w.shape[i] if i == out else size for i, size in enumerate(sizes)]
        return jax.lax.gather(w, x, dimension_numbers=numbers, slice_sizes=tuple(window), **options)

    return Operation(run, numbers.offset_dims[inside.index(out)], axes)


def _ragged(eqn: core.JaxprEqn, axes: Axes, operands: Sequence[Any]) -> Operation | None:
    """Return the product of rows, sorted by expert, with their experts' matrices."""
    eqn_params = dict(eqn.params)
    numbers = eqn_params["ragged_dot_dimension_numbers"]
    (summed_x, summed_w), shared = numbers.dot_dimension_numbers
    if tuple(summed_w) not in (axes.in_axes, axes.out_axes) or len(summed_w) != 1 or any(shared):
        return None
    if tuple(numbers.rhs_group_dimensions) != axes.batch_axes:
        return None
    if (
        set(numbers.lhs_ragged_dimensions) & set(summed_x)
        or len(operands) != 3
        or eqn_params["group_offset"] is not None
    ):
        return None
    x: Any = eqn.invars[0].aval

    def run(x: Any, w: Any) -> Any:
        kind = None if eqn_params["preferred_element_type"] is None else x.dtype
        return jax.lax.ragged_dot_general(
            x, w, operands[2], numbers, precision=eqn_params["precision"], preferred_element_type=kind
        )

    return Operation(run, x.ndim - 1, axes, transposed=tuple(summed_w) == axes.out_axes)


RAGGED = "ragged_dot_general"  # jax.extend does not export this primitive
_SIDES: dict[str, tuple[int, Make]] = {
    primitives.conv_general_dilated_p.name: (1, _convolution),
    primitives.gather_p.name: (0, _lookup),
    RAGGED: (1, _ragged),
}


# ---------------------------------------------------------------- hook


class Hook(Protocol):
    """The changes that a method makes to the uses of one weight."""

    @property
    def axes(self) -> Axes:
        """The roles of the weight's axes."""
        ...

    def input(self, use: Use, x: jax.Array) -> jax.Array:
        """Return the `x` that the contraction receives, in x's shape and dtype."""
        ...

    def operand(self, use: Operation, x: jax.Array, w: jax.Array) -> jax.Array:
        """Return the `x` that an operation receives, in x's shape and dtype."""
        ...

    def follows_use(self, use: Use) -> bool:
        """Return True if `input` and `output` handle this product of the weight; else it gets the effective weight."""
        ...

    def follows(self, primitive: str) -> bool:
        """Return True if `output` handles this operation ("conv_general_dilated", "gather", …) of the weight."""
        ...

    def output(self, use: Use | Operation, x: jax.Array, y: jax.Array, w: jax.Array) -> jax.Array:
        """Return the `y` that replaces the result of the contraction, in y's shape and dtype.

        `x` is the array that `input` returned, `w` the weight itself.
        """
        ...

    def weight(self, w: jax.Array) -> jax.Array:
        """Return the effective weight, in w's shape and dtype; may raise `AttachError` (dropout needs an input)."""
        ...
