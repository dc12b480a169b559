"""Rewriting of a function's use of some of its weights, by interpreting the function's jaxpr.

`rewrite` evaluates `f(weights, *args)` and tracks each hooked weight through equations that only move or cast it (a
transpose, a reshape, a cast, a nested `jit` or `checkpoint`). If a `dot_general` contracts the weight along its roles,
the hook receives that contraction: LoRA adds a low-rank product beside it, at the cost of a hand-written layer. A
convolution, a lookup or a ragged product goes to the hook if it follows that primitive. Any other consumer (a scan, a
cond) receives the hook's effective weight: exact, but more expensive. `uses` reports these cases beforehand.

Uses only public names of jax; independent of Flax and of the methods.
"""

from __future__ import annotations

import dataclasses
from collections import ChainMap
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.extend.core import primitives

from jaxadapt.arrays.axes import Axes, contradiction_message, transposed_axes
from jaxadapt.core.errors import AttachError
from jaxadapt.models.tracing.operations import (
    BARRIER,
    AxisLayout,
    Hook,
    find_operation,
    move_layouts,
    spell_contraction,
)

Function = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Contraction:
    """A use as one `dot_general`: the weight's summed, free and shared axes, each in the weight's axis order."""

    in_axes: tuple[int, ...]
    out_axes: tuple[int, ...]
    batch_axes: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class OtherUse:
    """Any other use, named after the primitive that consumes the weight (`"return"`: the function itself)."""

    primitive: str

WeightUse = Contraction | OtherUse


def rewrite(
    f: Function,
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

    >>> from jaxadapt.arrays.axes import Axes
    >>> class Double:
    ...     axes = Axes(in_axes=(0,), out_axes=(1,))
    ...     def input(self, use, x): return x
    ...     def operand(self, use, x, w): return x
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
        shape, axes = jnp.shape(weights[name]), hook.axes
        if sorted(axes.in_axes + axes.out_axes + axes.batch_axes) != list(range(len(shape))):
            raise AttachError(
                f"cannot hook the weight {name!r} of shape {shape}: the roles {axes} must cover each axis once"
            )
    traced = trace(f, weights, args)
    views = [_View(AxisLayout.identity(name, jnp.shape(w)), w) if name in hooks else w for name, w in weights.items()]
    scope = _Scope(hooks, weights, ChainMap(), {})
    outs = _evaluate(traced.closed.jaxpr, traced.closed.consts, [*views, *traced.arrays], scope)
    for name in forward:
        axes = hooks[name].axes
        if (own := transposed_axes(axes, scope.products.get(name, ()), jnp.shape(weights[name]))) is not None:
            raise AttachError(f"{name!r}: {contradiction_message(axes, own)}")
    return traced.result([scope.plain(out) for out in outs])


def uses(f: Function, weights: Mapping[str, Any], *args: Any) -> dict[str, tuple[WeightUse, ...]]:
    """Return the uses of each weight in `f(weights, *args)`, in order, without computing anything.

    Weights and the arrays in `args` may be `jax.ShapeDtypeStruct`s.

    >>> w, x = jax.ShapeDtypeStruct((3, 4), "float32"), jax.ShapeDtypeStruct((2, 3), "float32")
    >>> uses(lambda weights, x: x @ weights["w"], {"w": w}, x)
    {'w': (Contraction(in_axes=(0,), out_axes=(1,), batch_axes=()),)}
    """
    traced = trace(f, weights, args)
    by_weight: dict[str, list[WeightUse]] = {name: [] for name in weights}
    layouts = [AxisLayout.identity(name, tuple(w.shape)) for name, w in weights.items()]
    for out in _collect_uses(traced.closed.jaxpr, [*layouts, *(None for _ in traced.arrays)], by_weight):
        if out is not None:
            by_weight[out.name].append(OtherUse("return"))
    return {name: tuple(uses_of) for name, uses_of in by_weight.items()}


# ---------------------------------------------------------------- tracing


@dataclasses.dataclass(frozen=True)
class Traced:
    closed: core.ClosedJaxpr
    arrays: list[Any]  # the arguments that became inputs of the jaxpr, after the weights
    result: Callable[[list[Any]], Any]  # from the jaxpr's outputs to what `f` returns


def trace(f: Function, weights: Mapping[str, Any], args: tuple[Any, ...]) -> Traced:
    leaves, tree = jax.tree.flatten(args)
    moving = [i for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct)]
    results: list[Any] = []

    def flat(weights: list[Any], arrays: list[Any]) -> list[Any]:
        filled = leaves.copy()
        for i, array in zip(moving, arrays, strict=True):
            filled[i] = array
        outs, out_tree = jax.tree.flatten(f(dict(zip(names, weights, strict=True)), *tree.unflatten(filled)))
        computed = [isinstance(out, jax.Array) for out in outs]
        # The traced outputs are left out: outside this trace they would be leaked tracers.
        results[:] = [None if c else out for c, out in zip(computed, outs, strict=True)], computed, out_tree
        return [out for c, out in zip(computed, outs, strict=True) if c]

    names, arrays = list(weights), [leaves[i] for i in moving]
    closed = jax.make_jaxpr(flat)(list(weights.values()), arrays)
    outs, computed, out_tree = results

    def result(values: list[Any]) -> Any:
        rest = iter(values)
        return out_tree.unflatten([next(rest) if c else out for c, out in zip(computed, outs, strict=True)])

    return Traced(closed, arrays, result)


def called_jaxpr(eqn: core.JaxprEqn) -> tuple[core.Jaxpr, Sequence[Any]] | None:
    """Return the jaxpr and constants of an equation that only calls a jaxpr, else None."""
    if eqn.primitive is primitives.jit_p:
        return eqn.params["jaxpr"].jaxpr, eqn.params["jaxpr"].consts
    if eqn.primitive is primitives.closed_call_p:
        return eqn.params["call_jaxpr"].jaxpr, eqn.params["call_jaxpr"].consts
    if eqn.primitive is primitives.remat_p and not eqn.params["differentiated"]:
        return eqn.params["jaxpr"], ()
    return None


def side_of(eqn: core.JaxprEqn, layouts: Sequence[AxisLayout | None]) -> int | None:
    """Return the position of the weight in a `dot_general`; None unless exactly one operand is a weight."""
    if eqn.primitive is not primitives.dot_general_p or (layouts[0] is None) == (layouts[1] is None):
        return None
    return 0 if layouts[1] is None else 1


def _describe_contraction(eqn: core.JaxprEqn, side: int, layout: AxisLayout) -> Contraction:
    summed, shared = (d[side] for d in eqn.params["dimension_numbers"])
    inputs, batch = sorted(layout.weight_axes(summed)), sorted(layout.weight_axes(shared))
    out = [a for a in range(len(layout.sizes)) if a not in inputs + batch]
    return Contraction(tuple(inputs), tuple(out), tuple(batch))


def _collect_uses(
    jaxpr: core.Jaxpr, given: Sequence[AxisLayout | None], found: dict[str, list[WeightUse]]
) -> list[AxisLayout | None]:
    """Append the uses of the given views to `found`; return the layouts of the jaxpr's results."""
    env = dict(zip(jaxpr.invars, given, strict=True))

    def read(atom: Any) -> AxisLayout | None:
        return None if isinstance(atom, core.Literal) else env.get(atom)

    for eqn in jaxpr.eqns:
        seen = [read(a) for a in eqn.invars]
        if not any(seen):
            continue
        outs: list[AxisLayout | None] | None = None
        if (body := called_jaxpr(eqn)) is not None:
            outs = _collect_uses(body[0], seen, found)
        elif (side := side_of(eqn, seen)) is not None and (layout := seen[side]) is not None:
            found[layout.name].append(_describe_contraction(eqn, side, layout))
        elif (outs := move_layouts(eqn, seen)) is None:
            for layout in filter(None, seen):
                found[layout.name].append(OtherUse(eqn.primitive.name))
        env.update(zip(eqn.outvars, outs or (), strict=outs is not None))
    return [read(a) for a in jaxpr.outvars]


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
    products: dict[str, list[Contraction]]
    """The contractions of each weight, those inside a `checkpoint` included."""

    def plain(self, value: Any) -> Any:
        """Return a value for a consumer that does not accept views: for a view, the effective weight."""
        if not isinstance(value, _View):
            return value
        name = value.layout.name
        if name not in self.effective:
            w = self.weights[name]
            self.effective[name] = _check_like(f"weight of {name!r}", self.hooks[name].weight(w), w)
        array = self.effective[name]
        for step in value.replay:
            array = step(array)
        return array


def _check_like(call: str, got: Any, like: Any) -> Any:
    """Return `got`; raise `AttachError` if its shape or dtype is not that of `like`."""
    have, want = (jnp.shape(got), jnp.result_type(got)), (jnp.shape(like), jnp.result_type(like))
    if have != want:
        raise AttachError(
            f"the hook's {call} returned a wrong array: expected {want[1]}{want[0]}, found {have[1]}{have[0]}"
        )
    return got


def evaluate_unchanged(eqn: core.JaxprEqn, values: Sequence[Any]) -> list[Any]:
    """Evaluate one equation unchanged, as a jaxpr of only that equation, which keeps its context."""
    operands = {a: v for a, v in zip(eqn.invars, values, strict=True) if not isinstance(a, core.Literal)}
    # A variable used twice is one input.
    debug_info = core.DebugInfo("rewrite", eqn.primitive.name, ("",) * len(operands), ("",) * len(eqn.outvars))
    single = core.Jaxpr((), list(operands), eqn.outvars, [eqn], eqn.effects, debug_info)
    return core.jaxpr_as_fun(core.ClosedJaxpr(single, ()))(*operands.values())


def interpret(
    jaxpr: core.Jaxpr,
    consts: Sequence[Any],
    values: Sequence[Any],
    step: Callable[[core.JaxprEqn, list[Any]], Sequence[Any]],
) -> list[Any]:
    """Evaluate a jaxpr, each of its equations by `step(equation, operands)`."""
    env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *values], strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, core.Literal) else env[atom]

    for eqn in jaxpr.eqns:
        env.update(zip(eqn.outvars, step(eqn, [read(a) for a in eqn.invars]), strict=True))
    return [read(a) for a in jaxpr.outvars]


def _evaluate(jaxpr: core.Jaxpr, consts: Sequence[Any], values: Sequence[Any], scope: _Scope) -> list[Any]:
    """Evaluate a jaxpr with views among its inputs; its results may be views too."""

    def step(eqn: core.JaxprEqn, operands: list[Any]) -> list[Any]:
        viewed = any(isinstance(v, _View) for v in operands)
        return _evaluate_equation(eqn, operands, scope) if viewed else evaluate_unchanged(eqn, operands)

    return interpret(jaxpr, consts, values, step)


def _evaluate_equation(eqn: core.JaxprEqn, operands: list[Any], scope: _Scope) -> list[Any]:
    """Evaluate one equation with at least one view among its operands."""
    layouts = [v.layout if isinstance(v, _View) else None for v in operands]
    if (body := called_jaxpr(eqn)) is not None:
        if eqn.primitive is primitives.remat_p:
            return _checkpoint(eqn, body[0], operands, scope)
        placed = _constrain(eqn.params.get("in_shardings"), operands)
        return _constrain(eqn.params.get("out_shardings"), _evaluate(*body, placed, scope))
    if (side := side_of(eqn, layouts)) is not None:
        outs = _contract(eqn, operands, side, scope)
        if outs is not None:
            return outs
    elif (outs := _evaluate_operation(eqn, operands, layouts, scope)) is not None:
        return outs
    elif (after := move_layouts(eqn, layouts)) is not None:
        arrays = evaluate_unchanged(eqn, [v.array if isinstance(v, _View) else v for v in operands])

        def step(array: Any) -> Any:
            return (
                jax.lax.optimization_barrier(array)
                if eqn.primitive.name == BARRIER
                else evaluate_unchanged(eqn, [array])[0]
            )

        return [
            array if layout is None else _View(layout, array, (*view.replay, step))
            for array, layout, view in zip(arrays, after, operands, strict=True)
        ]
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


def _checkpoint(eqn: core.JaxprEqn, jaxpr: core.Jaxpr, operands: list[Any], scope: _Scope) -> list[Any]:
    """Evaluate a `checkpoint` under the same policy; operations added by hooks are rematerialised too."""

    def body(*arrays: Any) -> list[Any]:
        values = [
            dataclasses.replace(v, array=a) if isinstance(v, _View) else a
            for v, a in zip(operands, arrays, strict=True)
        ]
        inside = dataclasses.replace(scope, effective=scope.effective.new_child())
        return [inside.plain(out) for out in _evaluate(jaxpr, (), values, inside)]

    again = jax.checkpoint(body, policy=eqn.params["policy"], prevent_cse=eqn.params["prevent_cse"])
    return again(*(v.array if isinstance(v, _View) else v for v in operands))


# ---------------------------------------------------------------- one contraction


def _contract(eqn: core.JaxprEqn, operands: list[Any], side: int, scope: _Scope) -> list[Any] | None:
    """Evaluate a contraction with its hook; return None if it does not match the hook's roles."""
    view, x = operands[side], operands[1 - side]
    scope.products.setdefault(view.layout.name, []).append(_describe_contraction(eqn, side, view.layout))
    hook = scope.hooks[view.layout.name]
    spelled = spell_contraction(eqn, side, view.layout, hook.axes, jnp.shape(x))
    if spelled is None:
        return None
    use, x_sizes, y_sizes = spelled
    if not hook.follows_use(use):
        return None
    split = jnp.reshape(x, x_sizes)
    hooked_x = _check_like("input", hook.input(use, split), split)
    pair = [view.array, view.array]
    pair[1 - side] = x if hooked_x is split else jnp.reshape(hooked_x, jnp.shape(x))
    (y,) = evaluate_unchanged(eqn, pair)
    split_y = jnp.reshape(y, y_sizes)
    new = hook.output(use, hooked_x, split_y, scope.weights[view.layout.name])
    return [jnp.reshape(_check_like("output", new, split_y), jnp.shape(y))]


def _evaluate_operation(
    eqn: core.JaxprEqn, operands: list[Any], layouts: list[AxisLayout | None], scope: _Scope
) -> list[Any] | None:
    """Evaluate a convolution, lookup or ragged product with its hook; return None if the hook does not follow it."""
    (name,) = {layout.name for layout in layouts if layout is not None} if sum(map(bool, layouts)) == 1 else ("",)
    if not name or not scope.hooks[name].follows(eqn.primitive.name):
        return None
    operation = find_operation(eqn, layouts, scope.hooks[name].axes, operands)
    if operation is None:
        return None
    side, use = operation
    x = operands[1 - side]
    hooked_x = _check_like("input", scope.hooks[name].operand(use, x, scope.weights[name]), x)
    changed = [hooked_x if i == 1 - side else v.array if isinstance(v, _View) else v for i, v in enumerate(operands)]
    (y,) = evaluate_unchanged(eqn, changed)
    new = scope.hooks[name].output(use, hooked_x, y, scope.weights[name])
    return [_check_like("output", new, y)]
