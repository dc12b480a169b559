"""Rewriting of a function's use of some of its weights, by interpreting the function's jaxpr.

`rewrite` evaluates `f(weights, *args)` and tracks each hooked weight through equations that only move or cast it (a
transpose, a reshape, a cast, a nested `jit` or `checkpoint`). If a `dot_general` contracts the weight along its roles,
the hook receives that contraction: LoRA adds a low-rank product beside it, at the cost of a hand-written layer. A
convolution, a lookup or a ragged product goes to the hook if it follows that primitive. A scan is entered: a weight
that all its steps share is followed in its body, and one that stacks layers, `Stacked`, is followed layer by layer. Any
other consumer (a cond, a loop) receives the hook's effective weight: exact, but more expensive. `uses` reports these
cases beforehand.

Operations that are linear in a weight are a `dot_general` of a rearranged view, a convolution, a lookup, and a product
of tokens with their experts' matrices. The positions of a weight's axes follow from the shapes and axis numbers of an
equation; nothing is evaluated for them.

A `Hook` is an adapter on one weight. `input` and `output` return what replaces the x and the y of a contraction, in
their shapes and dtypes, if `follows_use` accepts it, and of an operation that `follows` accepts. `weight` returns the
effective weight, which all other uses get, in the weight's shape and dtype.

Uses only public names of jax; independent of Flax.
"""

from __future__ import annotations

import dataclasses
from collections import ChainMap
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr, JaxprEqn, primitives

from jaxadapt.arrays.layout import Axes
from jaxadapt.arrays.products import LETTERS, AxisLayout, Operation, Use, contradiction_message, transposed_axes
from jaxadapt.core.errors import AttachError
from jaxadapt.models.jaxprs import (
    called_jaxpr,
    evaluate_scan,
    evaluate_unchanged,
    interpret,
    rematerialized,
    scan_sizes,
    trace,
)

if TYPE_CHECKING:
    from jaxadapt.methods.applied import Hook

# ---------------------------------------------------------------- moves


_RESHAPES = {primitives.reshape_p, primitives.squeeze_p, primitives.broadcast_in_dim_p}
_SAME = {primitives.copy_p, primitives.sharding_constraint_p, primitives.name_p}
BARRIER = "optimization_barrier"  # the only one with several operands; it has one result for each


def move_layouts(eqn: JaxprEqn, before: list[AxisLayout | None]) -> list[AxisLayout | None] | None:
    """Return the layouts of an equation's results if it only moves, casts or passes its operands, else None."""
    kind = eqn.primitive
    if kind.name == BARRIER:
        return before
    if len(before) != 1 or (layout := before[0]) is None:
        return None
    old: Any = eqn.invars[0].aval
    new: Any = eqn.outvars[0].aval
    if kind in _SAME:
        return [layout]
    if kind is primitives.convert_element_type_p:
        return [layout] if all(jnp.issubdtype(x.dtype, jnp.floating) for x in (old, new)) else None
    if kind is primitives.transpose_p:
        return [dataclasses.replace(layout, groups=tuple(layout.groups[i] for i in eqn.params["permutation"]))]
    permutes = kind is primitives.reshape_p and eqn.params["dimensions"] is not None
    if kind not in _RESHAPES or permutes or old.size != new.size:
        return None
    after = layout.reshaped(new.shape)
    return None if after is None else [after]


def spell_contraction(
    eqn: JaxprEqn, side: int, layout: AxisLayout, axes: Axes, x_shape: tuple[int, ...]
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
    view = list(map(layout.spell, layout.groups))
    w_axis_of = dict(zip([*summed_x, *shared_x], [*summed_w, *shared_w], strict=True))
    fresh = iter(LETTERS[len(layout.sizes) :])
    own = {i: [(next(fresh), size)] for i, size in enumerate(x_shape) if i not in w_axis_of}
    x = [pair for i in range(len(x_shape)) for pair in (own[i] if i in own else view[w_axis_of[i]])]
    free_w = [pair for i, pairs in enumerate(view) if i not in (*summed_w, *shared_w) for pair in pairs]
    free_x = [pair for (pair,) in own.values()]
    # dot_general's result: batch axes, then the free axes of the left operand, then those of the right
    y = [pair for i in shared_w for pair in view[i]] + (free_w + free_x if side == 0 else free_x + free_w)
    x += layout.spell((*reads, *axes.batch_axes), unit=True)
    y += layout.spell((*writes, *axes.batch_axes), unit=True)
    (x_letters, x_sizes), (y_letters, y_sizes) = map(_unzip, (x, y))
    return Use(x_letters, LETTERS[: len(layout.sizes)], y_letters, axes), x_sizes, y_sizes


def _unzip(axes: list[tuple[str, int]]) -> tuple[str, list[int]]:
    return "".join(letter for letter, _ in axes), [size for _, size in axes]


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


Make = Callable[[JaxprEqn, Axes, Sequence[Any]], Operation | None]


def _convolution(eqn: JaxprEqn, axes: Axes, _: Sequence[Any]) -> Operation | None:
    numbers = eqn.params["dimension_numbers"]
    (out,) = axes.out_axes
    if numbers.rhs_spec[0] != out or eqn.params["batch_group_count"] != 1 or axes.batch_axes:
        return None
    kept = ("window_strides", "padding", "lhs_dilation", "rhs_dilation", "precision", "preferred_element_type")
    options: Any = {name: eqn.params[name] for name in kept}

    def run(x: Any, w: Any) -> Any:
        # As in PEFT, A's channels are never grouped. The caller groups those of B.
        groups = x.shape[numbers.lhs_spec[1]] // w.shape[numbers.rhs_spec[1]]
        kind = {} if options["preferred_element_type"] is None else {"preferred_element_type": x.dtype}
        return jax.lax.conv_general_dilated(
            x, w, dimension_numbers=numbers, feature_group_count=groups, **(options | kind)
        )

    def slide(x: Any, w: Any) -> Any:
        return jax.lax.conv_general_dilated(
            x, w, (1,) * (x.ndim - 2), "VALID", dimension_numbers=sliding, precision=jax.lax.Precision.HIGHEST
        )

    window = sorted(range(2, len(numbers.rhs_spec)), key=lambda axis: numbers.rhs_spec[axis])
    lhs, rhs = ((*spec[:2], *(spec[axis] for axis in window)) for spec in (numbers.lhs_spec, numbers.rhs_spec))
    sliding = jax.lax.ConvDimensionNumbers(lhs, rhs, tuple(range(len(lhs))))
    is_dilated = {*eqn.params["lhs_dilation"], *eqn.params["rhs_dilation"]} != {1}
    return Operation(run, numbers.out_spec[1], axes, slide=None if is_dilated else slide)


def _lookup(eqn: JaxprEqn, axes: Axes, _: Sequence[Any]) -> Operation | None:
    numbers, sizes = eqn.params["dimension_numbers"], list(eqn.params["slice_sizes"])
    (out,) = axes.out_axes
    weight: Any = eqn.invars[0].aval
    inside = [i for i in range(len(sizes)) if i not in (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)]
    if axes.batch_axes or out not in inside or sizes[out] != weight.shape[out]:
        return None
    options: Any = {name: eqn.params[name] for name in ("mode", "fill_value", "indices_are_sorted", "unique_indices")}

    def run(x: Any, w: Any) -> Any:
        window = tuple(w.shape[i] if i == out else size for i, size in enumerate(sizes))
        return jax.lax.gather(w, x, dimension_numbers=numbers, slice_sizes=window, **options)

    return Operation(run, numbers.offset_dims[inside.index(out)], axes)


def _row(eqn: JaxprEqn, axes: Axes, operands: Sequence[Any]) -> Operation | None:
    """Return the lookup of one row, whose number is the first start of a slice."""
    sizes = list(eqn.params["slice_sizes"])
    (out,) = axes.out_axes
    weight: Any = eqn.invars[0].aval
    if axes.batch_axes or axes.in_axes != (0,) or sizes[out] != weight.shape[out]:
        return None

    def run(x: Any, w: Any) -> Any:
        window = [w.shape[i] if i == out else size for i, size in enumerate(sizes)]
        return jax.lax.dynamic_slice(w, [x, *operands[2:]], window)

    return Operation(run, out, axes)


def _other_use(eqn: JaxprEqn, layouts: Sequence[AxisLayout | None]) -> OtherUse:
    """Return a use that is no product, with the roles of the axes where a lookup or a convolution shows them."""
    name, params = eqn.primitive.name, dict(eqn.params)
    layout = layouts[_SIDES[name][0] if name in _SIDES else 0]
    if layout is None or layout != AxisLayout.identity(layout.name, layout.sizes):
        return OtherUse(name)
    if eqn.primitive is primitives.conv_general_dilated_p:
        out, *inputs = params["dimension_numbers"].rhs_spec
        return OtherUse(name, Axes(tuple(inputs), (out,)), params["feature_group_count"])
    is_rows = "slice_sizes" in params and tuple(params["slice_sizes"]) == (1, *layout.sizes[1:])
    return OtherUse(name, Axes((0,), (1,)) if is_rows and len(layout.sizes) == 2 else None)


def _ragged(eqn: JaxprEqn, axes: Axes, operands: Sequence[Any]) -> Operation | None:
    """Return the product of rows, sorted by expert, with their experts' matrices."""
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (summed_x, summed_w), shared = numbers.dot_dimension_numbers
    by_roles = len(summed_w) == 1 and tuple(summed_w) in (axes.in_axes, axes.out_axes) and not any(shared)
    by_expert = tuple(numbers.rhs_group_dimensions) == axes.batch_axes and len(operands) == 3
    ragged_sum = not set(numbers.lhs_ragged_dimensions).isdisjoint(summed_x)
    if not by_roles or not by_expert or ragged_sum or eqn.params["group_offset"] is not None:
        return None
    x: Any = eqn.invars[0].aval

    def run(x: Any, w: Any) -> Any:
        kind = None if eqn.params["preferred_element_type"] is None else x.dtype
        return jax.lax.ragged_dot_general(
            x, w, operands[2], numbers, precision=eqn.params["precision"], preferred_element_type=kind
        )

    return Operation(run, x.ndim - 1, axes, transposed=tuple(summed_w) == axes.out_axes)


RAGGED = "ragged_dot_general"  # jax.extend does not export this primitive
_SIDES: dict[str, tuple[int, Make]] = {
    primitives.conv_general_dilated_p.name: (1, _convolution),
    primitives.gather_p.name: (0, _lookup),
    primitives.dynamic_slice_p.name: (0, _row),
    RAGGED: (1, _ragged),
}
_FOLLOWED = {primitives.dynamic_slice_p.name: primitives.gather_p.name}  # a slice of one row is a lookup


# ---------------------------------------------------------------- rewriting


@dataclasses.dataclass(frozen=True)
class OtherUse:
    """Any other use, named after the primitive that consumes the weight (`"return"`: the function itself).

    Attributes:
        axes: the roles of the weight's axes that a lookup or a convolution of the whole weight shows.
        groups: the groups of a convolution.
    """

    primitive: str
    axes: Axes | None = dataclasses.field(default=None, compare=False, repr=False)
    groups: int = dataclasses.field(default=1, compare=False, repr=False)


@dataclasses.dataclass(frozen=True)
class Scanned(OtherUse):
    """A use of a weight without one axis, by a scan over that axis; `scan` tells one trace's scans apart."""

    primitive: str = dataclasses.field(default="scan", init=False)
    axis: int = dataclasses.field(kw_only=True)
    scan: int = dataclasses.field(default=0, kw_only=True)
    use: WeightUse = dataclasses.field(kw_only=True)


WeightUse = Axes | OtherUse
"""A use as one `dot_general`, with the weight's summed, free and shared axes in its axis order; or any other use."""


def rewrite(
    f: Callable[..., Any],
    weights: Mapping[str, jax.Array],
    hooks: Mapping[str, Hook],
    *args: Any,
    forward: Collection[str] = (),
) -> Any:
    """Evaluate `f(weights, *args)` with every use of a hooked weight changed by its hook.

    `args` are trees; their jax arrays are traced, all other leaves are passed to `f` unchanged. `f` may close over
    arrays and tracers. Works inside jit, grad, vmap, scan and remat.

    Args:
        forward: names of weights with at least one product that must run over the inputs, if they have products.

    Raises:
        AttachError: a hook's roles do not match its weight or its use in `f`, a hook changes a shape or dtype, or
            `Hook.weight` raised it.

    >>> from jaxadapt.arrays.layout import Axes
    >>> class Double:
    ...     axes, stack = Axes(in_axes=(0,), out_axes=(1,)), ()
    ...     def input(self, use, x, w): return x
    ...     def follows(self, primitive): return False
    ...     def follows_use(self, use): return True
    ...     def output(self, use, x, y, w): return 2 * y
    ...     def weight(self, w): return 2 * w
    >>> w, x = jnp.eye(2), jnp.arange(2.0)
    >>> rewrite(lambda weights, x: x @ weights["w"] + 1, {"w": w}, {"w": Double()}, x).tolist()
    [1.0, 3.0]
    """
    for name, hook in hooks.items():
        if name not in weights:
            raise AttachError(f"cannot hook the weight {name!r}: the function has only {sorted(weights)}")
        require_cover(name, _layer_shape(weights[name], hook), hook.axes)
    traced = trace(f, weights, args)
    scope = _Scope(hooks, weights, ChainMap(), {name: [] for name in hooks})
    views = [_View(AxisLayout.identity(name, jnp.shape(w)), w) if name in hooks else w for name, w in weights.items()]
    outs = _evaluate(traced.closed.jaxpr, traced.closed.consts, [*views, *traced.arrays], scope)
    for name in forward:
        axes = hooks[name].axes
        found = [unscan(use)[1] for use in scope.found[name]]
        products = [use for use in found if isinstance(use, Axes)]
        if (own := transposed_axes(axes, products, _layer_shape(weights[name], hooks[name]))) is not None:
            raise AttachError(f"{name!r}: {contradiction_message(axes, own)}")
    return traced.result([scope.plain(out) for out in outs])


def require_cover(name: str, shape: tuple[int, ...], axes: Axes) -> None:
    """Raise `AttachError` if the roles of a weight's axes do not cover each axis of its shape once."""
    if sorted(axes.in_axes + axes.out_axes + axes.batch_axes) != list(range(len(shape))):
        raise AttachError(
            f"cannot hook the weight {name!r} of shape {shape}: the roles {axes} must cover each axis once. If it"
            " stacks layers over which its module scans by itself, adapt a jaxadapt.models.Function of the module's"
            " call (docs/pytrees.md), or stack the layers with nnx.scan or nnx.vmap"
        )


def _layer_shape(w: Any, hook: Hook) -> tuple[int, ...]:
    """Return the shape of a weight, or of one of the layers that it stacks."""
    return tuple(size for axis, size in enumerate(jnp.shape(w)) if axis not in hook.stack)


def unscan(use: WeightUse) -> tuple[dict[int, int], WeightUse]:
    """Return `{axis of a weight: the scan that takes it layer by layer}`, in ascending order, and the use inside.

    >>> unscan(Scanned(axis=0, scan=1, use=Scanned(axis=0, scan=2, use=Axes((0,), (1,)))))
    ({0: 1, 1: 2}, Axes(in_axes=(0,), out_axes=(1,), batch_axes=(), parts=None))
    """
    if not isinstance(use, Scanned):
        return {}, use
    inside, inner = unscan(use.use)
    scans = {use.axis: use.scan} | {axis + (axis >= use.axis): scan for axis, scan in inside.items()}
    return dict(sorted(scans.items())), inner


def uses(f: Callable[..., Any], weights: Mapping[str, Any], *args: Any) -> dict[str, tuple[WeightUse, ...]]:
    """Return the uses of each weight in `f(weights, *args)`, in order, without computing anything.

    Weights and the arrays in `args` may be `jax.ShapeDtypeStruct`s.

    >>> w, x = jax.ShapeDtypeStruct((3, 4), "float32"), jax.ShapeDtypeStruct((2, 3), "float32")
    >>> uses(lambda weights, x: x @ weights["w"], {"w": w}, x)
    {'w': (Axes(in_axes=(0,), out_axes=(1,), batch_axes=(), parts=None),)}
    """
    traced = trace(f, weights, args)
    scope = _Scope({}, weights, ChainMap(), {name: [] for name in weights})

    def evaluate(values: Sequence[Any], arrays: Sequence[Any]) -> None:
        views = [_View(AxisLayout.identity(name, w.shape), w) for name, w in zip(weights, values, strict=True)]
        scope.add_use(
            OtherUse("return"), _evaluate(traced.closed.jaxpr, traced.closed.consts, [*views, *arrays], scope)
        )

    jax.eval_shape(evaluate, list(weights.values()), traced.arrays)
    return {name: tuple(found) for name, found in scope.found.items()}


def side_of(eqn: JaxprEqn, layouts: Sequence[AxisLayout | None]) -> int | None:
    """Return the position of the weight in a `dot_general`; None unless exactly one operand is a weight."""
    if eqn.primitive is not primitives.dot_general_p or (layouts[0] is None) == (layouts[1] is None):
        return None
    return 0 if layouts[1] is None else 1


def _describe_contraction(eqn: JaxprEqn, side: int, layout: AxisLayout) -> Axes:
    summed, shared = (d[side] for d in eqn.params["dimension_numbers"])
    inputs, batch = sorted(layout.weight_axes(summed)), sorted(layout.weight_axes(shared))
    return Axes(tuple(inputs), tuple([a for a in range(len(layout.sizes)) if a not in inputs + batch]), tuple(batch))


# ---------------------------------------------------------------- evaluating


@dataclasses.dataclass(frozen=True)
class _View:
    """A moved or cast base weight, and the functions that do the same to the effective weight."""

    layout: AxisLayout
    array: Any
    replay: tuple[Callable[[Any], Any], ...] = ()


@dataclasses.dataclass(frozen=True)
class _Scope:
    """The hooks, the weights, and the effective weights computed so far.

    A `checkpoint` gets a child scope: it can use effective weights computed outside, but those computed inside (tracers
    of that trace) are not visible outside.
    """

    hooks: Mapping[str, Hook]
    weights: Mapping[str, Any]
    effective: ChainMap[str, Any]
    found: dict[str, list[WeightUse]]
    """The uses of each weight so far, in order, those inside a `checkpoint` included."""

    def add_use(self, use: OtherUse, operands: Iterable[Any]) -> None:
        """Record a use of each weight among the operands."""
        for operand in operands:
            if isinstance(operand, _View):
                self.found[operand.layout.name].append(use)

    def is_taken(self, view: _View) -> bool:
        """Return True if a scan over a view takes one axis of the weight, where the weight's adapters can follow."""
        hook, group = self.hooks.get(view.layout.name), view.layout.groups[0]
        return len(group) == 1 and (hook is None or group[0] in hook.stack)

    def plain(self, value: Any) -> Any:
        """Return a value for a consumer that does not accept views: for a view, the effective weight."""
        if not isinstance(value, _View):
            return value
        name = value.layout.name
        if name not in self.hooks:
            return value.array
        if name not in self.effective:
            w = self.weights[name]
            self.effective[name] = _check_like(f"weight of {name!r}", self.hooks[name].weight(w), w)
        array = self.effective[name]
        for step in value.replay:
            array = step(array)
        return array


def _array(value: Any) -> Any:
    return value.array if isinstance(value, _View) else value


def _check_like(call: str, got: Any, like: Any) -> Any:
    """Return `got`; raise `AttachError` if its shape or dtype is not that of `like`."""
    have, want = (jnp.shape(got), jnp.result_type(got)), (jnp.shape(like), jnp.result_type(like))
    if have != want:
        raise AttachError(
            f"the hook's {call} returned a wrong array: expected {want[1]}{want[0]}, found {have[1]}{have[0]}"
        )
    return got


def _evaluate(jaxpr: Jaxpr, consts: Sequence[Any], values: Sequence[Any], scope: _Scope) -> list[Any]:
    """Evaluate a jaxpr with views among its inputs; its results may be views too."""

    def step(eqn: JaxprEqn, operands: list[Any]) -> list[Any]:
        if not any(isinstance(v, _View) for v in operands):
            return evaluate_unchanged(eqn, operands)
        return (_scan if eqn.primitive is primitives.scan_p else _evaluate_equation)(eqn, operands, scope)

    return interpret(jaxpr, consts, values, step)


def _evaluate_equation(eqn: JaxprEqn, operands: list[Any], scope: _Scope) -> list[Any]:
    """Evaluate one equation with at least one view among its operands."""
    layouts = [v.layout if isinstance(v, _View) else None for v in operands]
    if (body := called_jaxpr(eqn)) is not None:
        if eqn.primitive is primitives.remat_p and scope.hooks:  # else only the uses are wanted, also those of a result
            return _checkpoint(eqn, body[0], operands, scope)
        placed = _constrain(eqn.params.get("in_shardings"), operands)
        return _constrain(eqn.params.get("out_shardings"), _evaluate(*body, placed, scope))
    if (side := side_of(eqn, layouts)) is not None:
        if (outs := _contract(eqn, operands, side, scope)) is not None:
            return outs
    elif (outs := _evaluate_operation(eqn, operands, layouts, scope)) is not None:
        return outs
    elif (after := move_layouts(eqn, layouts)) is not None:
        arrays = evaluate_unchanged(eqn, list(map(_array, operands)))

        def step(array: Any) -> Any:
            barrier = eqn.primitive.name == BARRIER
            return jax.lax.optimization_barrier(array) if barrier else evaluate_unchanged(eqn, [array])[0]

        return [
            array if layout is None else _View(layout, array, (*view.replay, step))
            for array, layout, view in zip(arrays, after, operands, strict=True)
        ]
    else:
        scope.add_use(_other_use(eqn, layouts), operands)
    return evaluate_unchanged(eqn, [scope.plain(v) for v in operands])


def _constrain(shardings: Sequence[Any] | None, values: list[Any]) -> list[Any]:
    """Constrain the values to the shardings of an inlined `jit`, if it has any."""

    def place(value: Any, sharding: Any) -> Any:
        if not isinstance(sharding, jax.sharding.Sharding):
            return value

        def step(array: Any) -> Any:
            return jax.lax.with_sharding_constraint(array, sharding)

        if isinstance(value, _View):
            return dataclasses.replace(value, array=step(value.array), replay=(*value.replay, step))
        return step(value)

    return values if shardings is None else [place(v, s) for v, s in zip(values, shardings, strict=True)]


def _checkpoint(eqn: JaxprEqn, jaxpr: Jaxpr, operands: list[Any], scope: _Scope) -> list[Any]:
    """Evaluate a `checkpoint` under the same policy; operations added by hooks are rematerialized too."""

    def body(*arrays: Any) -> list[Any]:
        values = [
            dataclasses.replace(v, array=a) if isinstance(v, _View) else a
            for v, a in zip(operands, arrays, strict=True)
        ]
        inside = dataclasses.replace(scope, effective=scope.effective.new_child())
        return [inside.plain(out) for out in _evaluate(jaxpr, (), values, inside)]

    return rematerialized(eqn, body)(*map(_array, operands))


def _scan(eqn: JaxprEqn, operands: list[Any], scope: _Scope) -> list[Any]:
    """Evaluate a scan with the weights that all steps share, and those that it takes layer by layer, followed in it."""
    closed = eqn.params["jaxpr"]
    consts, carried = scan_sizes(eqn)
    views = _taken_views(operands, consts, consts + carried, scope)
    operands = [scope.plain(v) if i >= consts and i not in views else v for i, v in enumerate(operands)]
    axes = {view.layout.name: view.layout.groups[0][0] for view in views.values()}
    own = {name: jnp.moveaxis(scope.weights[name], axis, 0) for name, axis in axes.items()}
    followed = {v.layout.name for v in operands if isinstance(v, _View)} & scope.hooks.keys()
    hooks: dict[str, Any] = {name: scope.hooks[name].map(lambda one: one.with_key()) for name in followed}
    tensors = {name: hooks[name].tensors(axes[name]) for name in axes.keys() & followed}
    found: dict[str, list[WeightUse]] = {name: [] for name in axes}

    def step(values: list[Any], each: Any) -> list[Any]:
        own, tensors, number = each
        here = hooks | {name: hooks[name].layer(axes[name], x) for name, x in tensors.items()}
        inside = _Scope(
            {**scope.hooks, **{name: hook.map(lambda one: one.in_step(number)) for name, hook in here.items()}},
            {**scope.weights, **own},
            ChainMap({}, {name: w for name, w in scope.effective.items() if name not in axes}),
            {**scope.found, **found},
        )
        inputs = [_slice_view(views[i], x) if i in views else x for i, x in enumerate(values)]
        return [inside.plain(out) for out in _evaluate(closed.jaxpr, closed.consts, inputs, inside)]

    given = [_array(v) if i in views else v for i, v in enumerate(operands)]
    outs = evaluate_scan(eqn, given, (own, tensors, jnp.arange(eqn.params["length"])), step)
    for name, each in found.items():
        scope.found[name] += [Scanned(axis=axes[name], scan=id(eqn), use=use) for use in dict.fromkeys(each)]
    return outs


def _taken_views(operands: Sequence[Any], consts: int, first: int, scope: _Scope) -> dict[int, _View]:
    """Return the views that a scan takes layer by layer, by their places; record another use of those it cannot."""
    names = {v.layout.name for v in operands[:consts] if isinstance(v, _View)}
    views: dict[int, _View] = {}
    for i, v in enumerate(operands[consts:], consts):
        if isinstance(v, _View) and i >= first and scope.is_taken(v) and v.layout.name not in names:
            names.add(v.layout.name)
            views[i] = v
        else:
            scope.add_use(OtherUse("scan"), [v])
    return views


def _slice_view(view: _View, array: Any) -> _View:
    """Return the view of one layer in a scan over the first axis of a view, which is one axis of the weight."""
    (axis,), *groups = view.layout.groups
    sizes = view.layout.sizes
    inner = tuple(tuple(a - (a > axis) for a in group) for group in groups)

    def step(w: Any) -> Any:
        whole = jnp.broadcast_to(jnp.expand_dims(w, axis), sizes)
        for each in view.replay:
            whole = each(whole)
        return whole[0]

    layout = AxisLayout(view.layout.name, sizes[:axis] + sizes[axis + 1 :], inner)
    return _View(layout, array, (step,) if view.replay else ())


# ---------------------------------------------------------------- one contraction


def _contract(eqn: JaxprEqn, operands: list[Any], side: int, scope: _Scope) -> list[Any] | None:
    """Evaluate a contraction with its hook; return None if it does not match the hook's roles."""
    view, x = operands[side], operands[1 - side]
    scope.found[view.layout.name].append(_describe_contraction(eqn, side, view.layout))
    hook: Any = scope.hooks.get(view.layout.name)
    if hook is None or hook.stack:
        return None
    spelled = spell_contraction(eqn, side, view.layout, hook.axes, jnp.shape(x))
    if spelled is None or not hook.follows_use(spelled[0]):
        return None
    use, x_sizes, y_sizes = spelled
    return _apply_hook(eqn, operands, side, scope, use, jnp.reshape(x, x_sizes), y_sizes)


def _evaluate_operation(
    eqn: JaxprEqn, operands: list[Any], layouts: list[AxisLayout | None], scope: _Scope
) -> list[Any] | None:
    """Evaluate a convolution, lookup or ragged product with its hook; return None if the hook does not follow it."""
    name = eqn.primitive.name
    side, make = _SIDES.get(name, (0, None))
    views = [layout for layout in layouts if layout is not None]
    if make is None or views != [layouts[side]]:
        return None
    (layout,) = views
    hook: Any = scope.hooks.get(layout.name)
    # After a transpose or reshape, an adapter's factors would need another layout.
    is_whole = layout == AxisLayout.identity(layout.name, layout.sizes)
    if (
        hook is None
        or hook.stack
        or not is_whole
        or len(hook.axes.out_axes) != 1
        or not hook.follows(_FOLLOWED.get(name, name))
    ):
        return None
    use = make(eqn, hook.axes, operands)
    return None if use is None else _apply_hook(eqn, operands, side, scope, use, operands[1 - side])


def _apply_hook(
    eqn: JaxprEqn,
    operands: list[Any],
    side: int,
    scope: _Scope,
    use: Use | Operation,
    x: Any,
    y_sizes: Sequence[int] | None = None,
) -> list[Any]:
    """Evaluate an equation between its hook's changes of x and of y.

    Args:
        side: the place of the weight among the operands; that of x is 1 - side.
        x: the operand, in the shape that the use names.
        y_sizes: the shape of the result that the use names, if it is another than the equation's.
    """
    name = operands[side].layout.name
    hook: Any = scope.hooks[name]
    hooked_x = _check_like("input", hook.input(use, x, scope.weights[name]), x)
    changed = list(map(_array, operands))
    if hooked_x is not x:
        changed[1 - side] = jnp.reshape(hooked_x, jnp.shape(changed[1 - side]))
    (y,) = evaluate_unchanged(eqn, changed)
    named_y = y if y_sizes is None else jnp.reshape(y, y_sizes)
    new = _check_like("output", hook.output(use, hooked_x, named_y, scope.weights[name]), named_y)
    return [jnp.reshape(new, jnp.shape(y))]
