"""Operations other than a matrix product that are linear in a weight and keep its output axis apart: a
convolution, a lookup. What `trace` knows of such an equation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend import core
from jax.extend.core import primitives

from jaxadapt.axes import Axes, Operation
from jaxadapt.layout import Layout

Make = Callable[[core.JaxprEqn, Axes], Operation | None]


def operation(eqn: core.JaxprEqn, layouts: Sequence[Layout | None], axes: Axes) -> tuple[int, Operation] | None:
    """Which operand is the weight, and the equation as a function of another weight; None if it is no such thing."""
    side, make = _SIDES.get(eqn.primitive, (0, None))
    others = [layout for i, layout in enumerate(layouts) if i != side]
    layout = layouts[side] if side < len(layouts) else None
    if make is None or layout is None or any(others) or len(axes.out) != 1 or axes.batch:
        return None
    if layout.groups != tuple((i,) for i in range(len(layout.sizes))):
        return None  # seen through a transpose or reshape: an adapter's factors lie otherwise
    found = make(eqn, axes)
    return None if found is None else (side, found)


def _convolution(eqn: core.JaxprEqn, axes: Axes) -> Operation | None:
    given = dict(eqn.params)
    numbers = given["dimension_numbers"]
    (out,) = axes.out
    if numbers.rhs_spec[0] != out or given["batch_group_count"] != 1:
        return None
    kept = ("window_strides", "padding", "lhs_dilation", "rhs_dilation", "precision", "preferred_element_type")

    def run(x: Any, w: Any) -> Any:
        # A's channels are never grouped, as PEFT has it; B's are, by whoever applies it.
        groups = x.shape[numbers.lhs_spec[1]] // w.shape[numbers.rhs_spec[1]]
        options: Any = {name: given[name] for name in kept}
        if options["preferred_element_type"] is not None:
            options["preferred_element_type"] = x.dtype
        return jax.lax.conv_general_dilated(
            x, w, dimension_numbers=numbers, feature_group_count=groups, **options
        )

    return Operation(run, numbers.out_spec[1], axes)


def _lookup(eqn: core.JaxprEqn, axes: Axes) -> Operation | None:
    given = dict(eqn.params)
    numbers, sizes = given["dimension_numbers"], list(given["slice_sizes"])
    (out,) = axes.out
    weight: Any = eqn.invars[0].aval
    inside = [i for i in range(len(sizes)) if i not in (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)]
    if out not in inside or out in numbers.start_index_map or sizes[out] != weight.shape[out]:
        return None
    kept = ("mode", "fill_value", "indices_are_sorted", "unique_indices")

    def run(x: Any, w: Any) -> Any:
        options: Any = {name: given[name] for name in kept}
        window = [w.shape[i] if i == out else size for i, size in enumerate(sizes)]
        return jax.lax.gather(w, x, dimension_numbers=numbers, slice_sizes=tuple(window), **options)

    return Operation(run, numbers.offset_dims[inside.index(out)], axes)


_SIDES: dict[Any, tuple[int, Make]] = {
    primitives.conv_general_dilated_p: (1, _convolution),
    primitives.gather_p: (0, _lookup),
}
NAMES = frozenset(primitive.name for primitive in _SIDES)
"""What these operations are called in a trace."""
