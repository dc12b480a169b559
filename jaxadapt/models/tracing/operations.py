"""Operations other than a matrix product that are linear in a weight and keep its output axis as a separate axis.

These are a convolution, a lookup, and a product of tokens with their experts' matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend import core
from jax.extend.core import primitives

from jaxadapt.arrays.axes import Axes, Operation
from jaxadapt.models.tracing.axis_layout import AxisLayout

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
