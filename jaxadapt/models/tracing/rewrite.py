"""Changes how a function uses some of its weights, by interpreting the function's jaxpr.

`rewrite` evaluates `f(weights, *args)` and follows each hooked weight through what only moves or casts
it (a transpose, a reshape, a cast, a nested `jit` or `checkpoint`). Where the weight then meets a
`dot_general` along its own roles, the hook sees that one contraction: LoRA adds a low-rank product
beside it, at the price a hand-written layer pays. A convolution, a lookup or a ragged product is left to a hook
that follows it. Any other consumer (a scan, a cond) is given the hook's effective weight: exact, but dearer. `uses`
tells beforehand which of them it will be.

Knows jax through its public names only, and neither Flax nor any method.
"""

from __future__ import annotations

import dataclasses
from collections import ChainMap
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.extend.core import primitives

from jaxadapt.arrays.axes import Axes, Operation, Use, find_contradiction, transposed_axes
from jaxadapt.core.errors import AttachError
from jaxadapt.models.tracing.axis_layout import BARRIER, AxisLayout, move_layouts, spell_contraction
from jaxadapt.models.tracing.operations import find_operation

Function = Callable[..., Any]


class Hook(Protocol):
    """What a method wants done with one weight."""

    @property
    def axes(self) -> Axes:
        """The roles of the weight's axes."""
        ...

    def input(self, use: Use, x: jax.Array) -> jax.Array:
        """`x` as the contraction should see it, in x's shape and dtype."""
        ...

    def follows(self, primitive: str) -> bool:
        """Whether `output` takes part in this operation ("conv_general_dilated", "gather", …) of the weight."""
        ...

    def output(self, use: Use | Operation, x: jax.Array, y: jax.Array, w: jax.Array) -> jax.Array:
        """`y` as it should leave the contraction, in y's shape and dtype.

        `x` is what `input` returned, `w` the weight itself.
        """
        ...

    def weight(self, w: jax.Array) -> jax.Array:
        """The effective weight, in w's shape and dtype; may raise `AttachError` (dropout needs an input)."""
        ...


@dataclasses.dataclass(frozen=True)
class Contraction:
    """A use as one `dot_general`: the weight axes summed over, those free in the result, those in all three.

    Each is in the weight's own axis order.
    """

    in_axes: tuple[int, ...]
    out_axes: tuple[int, ...]
    batch_axes: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class OtherUse:
    """Any other use, named after the primitive that consumes the weight (`"return"`: the function itself)."""

    primitive: str


def rewrite(
    f: Function,
    weights: Mapping[str, jax.Array],
    hooks: Mapping[str, Hook],
    *args: Any,
    forward: Collection[str] = (),
) -> Any:
    """`f(weights, *args)`, with every use of a hooked weight as its hook wants it.

    `args` are trees; their jax arrays are traced, everything else reaches `f` as it is. `f` may close over
    arrays and tracers. Works inside jit, grad, vmap, scan and remat.

    Args:
        forward: the weights of which some product, if there is any, must run over the inputs.

    Raises:
        AttachError: a hook's roles do not fit its weight or what `f` does with it, a hook returns another shape
            or dtype than it was given, or `Hook.weight` raised it.

    >>> class Double:
    ...     axes = Axes(in_axes=(0,), out_axes=(1,))
    ...     def input(self, use, x): return x
    ...     def follows(self, primitive): return False
    ...     def output(self, use, x, y, w): return 2 * y
    ...     def weight(self, w): return 2 * w
    >>> w, x = jnp.eye(2), jnp.arange(2.0)
    >>> rewrite(lambda weights, x: x @ weights["w"] + 1, {"w": w}, {"w": Double()}, x).tolist()
    [1.0, 3.0]
    """
    for name, hook in hooks.items():
        if name not in weights:
            raise AttachError(f"a hook is for the weight {name!r}, and the function has only {sorted(weights)}")
        shape, axes = jnp.shape(weights[name]), hook.axes
        if sorted(axes.in_axes + axes.out_axes + axes.batch_axes) != list(range(len(shape))):
            raise AttachError(f"{name!r} has shape {shape}, which the roles {axes} do not cover axis by axis")
    traced = _trace(f, weights, args)
    views = [_View(AxisLayout.identity(name, jnp.shape(w)), w) if name in hooks else w for name, w in weights.items()]
    scope = _Scope(hooks, weights, ChainMap(), {})
    outs = _run(traced.closed.jaxpr, traced.closed.consts, [*views, *traced.arrays], scope)
    for name in forward:
        axes = hooks[name].axes
        if (own := transposed_axes(axes, scope.products.get(name, ()), jnp.shape(weights[name]))) is not None:
            raise AttachError(f"{name!r}: {find_contradiction(axes, own)}")
    return traced.result([scope.plain(out) for out in outs])


def uses(f: Function, weights: Mapping[str, Any], *args: Any) -> dict[str, tuple[Contraction | OtherUse, ...]]:
    """How `f(weights, *args)` uses each weight, in the order of the uses; nothing is computed.

    Weights and the arrays in `args` may be `jax.ShapeDtypeStruct`s.

    >>> w, x = jax.ShapeDtypeStruct((3, 4), "float32"), jax.ShapeDtypeStruct((2, 3), "float32")
    >>> uses(lambda weights, x: x @ weights["w"], {"w": w}, x)
    {'w': (Contraction(in_axes=(0,), out_axes=(1,), batch_axes=()),)}
    """
    traced = _trace(f, weights, args)
    found: dict[str, list[Contraction | OtherUse]] = {name: [] for name in weights}
    layouts = [AxisLayout.identity(name, tuple(w.shape)) for name, w in weights.items()]
    for out in _follow(traced.closed.jaxpr, [*layouts, *(None for _ in traced.arrays)], found):
        if out is not None:
            found[out.name].append(OtherUse("return"))
    return {name: tuple(those) for name, those in found.items()}


# ---------------------------------------------------------------- tracing


@dataclasses.dataclass(frozen=True)
class _Traced:
    closed: core.ClosedJaxpr
    arrays: list[Any]  # the arguments that became inputs of the jaxpr, after the weights
    result: Callable[[list[Any]], Any]  # from the jaxpr's outputs to what `f` returns


def _trace(f: Function, weights: Mapping[str, Any], args: tuple[Any, ...]) -> _Traced:
    leaves, tree = jax.tree.flatten(args)
    moving = [i for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct)]
    results: list[Any] = []

    def flat(weights: list[Any], arrays: list[Any]) -> list[Any]:
        filled = leaves.copy()
        for i, array in zip(moving, arrays, strict=True):
            filled[i] = array
        outs, out_tree = jax.tree.flatten(f(dict(zip(names, weights, strict=True)), *tree.unflatten(filled)))
        computed = [isinstance(out, jax.Array) for out in outs]
        # Without the traced ones, which outside this trace would be leaks.
        results[:] = [None if c else out for c, out in zip(computed, outs, strict=True)], computed, out_tree
        return [out for c, out in zip(computed, outs, strict=True) if c]

    names, arrays = list(weights), [leaves[i] for i in moving]
    closed = jax.make_jaxpr(flat)(list(weights.values()), arrays)
    outs, computed, out_tree = results

    def result(values: list[Any]) -> Any:
        rest = iter(values)
        return out_tree.unflatten([next(rest) if c else out for c, out in zip(computed, outs, strict=True)])

    return _Traced(closed, arrays, result)


def _body(eqn: core.JaxprEqn) -> tuple[core.Jaxpr, Sequence[Any]] | None:
    """The jaxpr and constants inside an equation that merely calls it."""
    if eqn.primitive is primitives.jit_p:
        return eqn.params["jaxpr"].jaxpr, eqn.params["jaxpr"].consts
    if eqn.primitive is primitives.closed_call_p:
        return eqn.params["call_jaxpr"].jaxpr, eqn.params["call_jaxpr"].consts
    if eqn.primitive is primitives.remat_p and not eqn.params["differentiated"]:
        return eqn.params["jaxpr"], ()
    return None


def side_of(eqn: core.JaxprEqn, layouts: Sequence[AxisLayout | None]) -> int | None:
    """Which operand of a `dot_general` is the weight, if exactly one is."""
    if eqn.primitive is not primitives.dot_general_p or (layouts[0] is None) == (layouts[1] is None):
        return None
    return 0 if layouts[1] is None else 1


def _contraction(eqn: core.JaxprEqn, side: int, layout: AxisLayout) -> Contraction:
    summed, shared = (d[side] for d in eqn.params["dimension_numbers"])
    inputs, batch = sorted(layout.weight_axes(summed)), sorted(layout.weight_axes(shared))
    out = [a for a in range(len(layout.sizes)) if a not in inputs + batch]
    return Contraction(tuple(inputs), tuple(out), tuple(batch))


def _follow(
    jaxpr: core.Jaxpr, given: Sequence[AxisLayout | None], found: dict[str, list[Contraction | OtherUse]]
) -> list[AxisLayout | None]:
    """Collects the uses of the given views in `found`; returns the layouts of the jaxpr's results."""
    env = dict(zip(jaxpr.invars, given, strict=True))

    def read(atom: Any) -> AxisLayout | None:
        return None if isinstance(atom, core.Literal) else env.get(atom)

    for eqn in jaxpr.eqns:
        seen = [read(a) for a in eqn.invars]
        if not any(seen):
            continue
        outs: list[AxisLayout | None] | None = None
        if (body := _body(eqn)) is not None:
            outs = _follow(body[0], seen, found)
        elif (side := side_of(eqn, seen)) is not None and (layout := seen[side]) is not None:
            found[layout.name].append(_contraction(eqn, side, layout))
        elif (outs := move_layouts(eqn, seen)) is None:
            for layout in filter(None, seen):
                found[layout.name].append(OtherUse(eqn.primitive.name))
        env.update(zip(eqn.outvars, outs or (), strict=outs is not None))
    return [read(a) for a in jaxpr.outvars]


# ---------------------------------------------------------------- evaluating


@dataclasses.dataclass(frozen=True)
class _View:
    """A moved or cast base weight, and how to move and cast the effective one the same way."""

    layout: AxisLayout
    array: Any
    replay: tuple[Callable[[Any], Any], ...] = ()


@dataclasses.dataclass(frozen=True)
class _Scope:
    """The hooks, the weights, and the effective weights computed so far.

    Inside a `checkpoint` it is a child's: what was computed outside may be used, what is computed there
    (a tracer of that trace) is not seen outside.
    """

    hooks: Mapping[str, Hook]
    weights: Mapping[str, Any]
    effective: ChainMap[str, Any]
    products: dict[str, list[Contraction]]
    """What the weights were found in, inside a `checkpoint` too."""

    def plain(self, value: Any) -> Any:
        """A value for a consumer that knows no views: of a view, the effective weight."""
        if not isinstance(value, _View):
            return value
        name = value.layout.name
        if name not in self.effective:
            w = self.weights[name]
            self.effective[name] = _checked(f"weight of {name!r}", self.hooks[name].weight(w), w)
        whole = self.effective[name]
        for step in value.replay:
            whole = step(whole)
        return whole


def _checked(what: str, got: Any, like: Any) -> Any:
    have, want = (jnp.shape(got), jnp.result_type(got)), (jnp.shape(like), jnp.result_type(like))
    if have != want:
        raise AttachError(f"the hook's {what} returned {have[1]}{have[0]} where {want[1]}{want[0]} was expected")
    return got


def _bind(eqn: core.JaxprEqn, values: Sequence[Any]) -> list[Any]:
    """Evaluates one equation unchanged, in its own context, as a jaxpr of just that equation."""
    operands = {a: v for a, v in zip(eqn.invars, values, strict=True) if not isinstance(a, core.Literal)}
    # The same variable twice is one input, and a view's base stands in for its variable.
    about = core.DebugInfo("rewrite", eqn.primitive.name, ("",) * len(operands), ("",) * len(eqn.outvars))
    alone = core.Jaxpr((), list(operands), eqn.outvars, [eqn], eqn.effects, about)
    return core.jaxpr_as_fun(core.ClosedJaxpr(alone, ()))(*operands.values())


def _run(jaxpr: core.Jaxpr, consts: Sequence[Any], values: Sequence[Any], scope: _Scope) -> list[Any]:
    """Evaluates a jaxpr some of whose inputs are views; some of its results may be."""
    env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *values], strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, core.Literal) else env[atom]

    for eqn in jaxpr.eqns:
        operands = [read(a) for a in eqn.invars]
        viewed = any(isinstance(v, _View) for v in operands)
        outs = _equation(eqn, operands, scope) if viewed else _bind(eqn, operands)
        env.update(zip(eqn.outvars, outs, strict=True))
    return [read(a) for a in jaxpr.outvars]


def _equation(eqn: core.JaxprEqn, operands: list[Any], scope: _Scope) -> list[Any]:
    """One equation with at least one view among its operands."""
    layouts = [v.layout if isinstance(v, _View) else None for v in operands]
    if (body := _body(eqn)) is not None:
        if eqn.primitive is primitives.remat_p:
            return _checkpoint(eqn, body[0], operands, scope)
        placed = _placed(eqn.params.get("in_shardings"), operands)
        return _placed(eqn.params.get("out_shardings"), _run(*body, placed, scope))
    if (side := side_of(eqn, layouts)) is not None:
        outs = _contract(eqn, operands, side, scope)
        if outs is not None:
            return outs
    elif (outs := _operate(eqn, operands, layouts, scope)) is not None:
        return outs
    elif (after := move_layouts(eqn, layouts)) is not None:
        arrays = _bind(eqn, [v.array if isinstance(v, _View) else v for v in operands])

        def step(whole: Any) -> Any:
            return jax.lax.optimization_barrier(whole) if eqn.primitive.name == BARRIER else _bind(eqn, [whole])[0]

        return [
            array if layout is None else _View(layout, array, (*view.replay, step))
            for array, layout, view in zip(arrays, after, operands, strict=True)
        ]
    return _bind(eqn, [scope.plain(v) for v in operands])


def _placed(shardings: Sequence[Any] | None, values: list[Any]) -> list[Any]:
    """The values under the shardings that an inlined `jit` asked for, where it did."""

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
    """A rematerialised body stays one, under the same policy; what the hooks add is rematerialised too."""

    def body(*arrays: Any) -> list[Any]:
        values = [
            dataclasses.replace(v, array=a) if isinstance(v, _View) else a
            for v, a in zip(operands, arrays, strict=True)
        ]
        inside = dataclasses.replace(scope, effective=scope.effective.new_child())
        return [inside.plain(out) for out in _run(jaxpr, (), values, inside)]

    again = jax.checkpoint(body, policy=eqn.params["policy"], prevent_cse=eqn.params["prevent_cse"])
    return again(*(v.array if isinstance(v, _View) else v for v in operands))


# ---------------------------------------------------------------- one contraction


def _contract(eqn: core.JaxprEqn, operands: list[Any], side: int, scope: _Scope) -> list[Any] | None:
    """The contraction with its hook around it, or None if it does not run along the hook's roles."""
    view, x = operands[side], operands[1 - side]
    scope.products.setdefault(view.layout.name, []).append(_contraction(eqn, side, view.layout))
    hook = scope.hooks[view.layout.name]
    spelled = spell_contraction(eqn, side, view.layout, hook.axes, jnp.shape(x))
    if spelled is None:
        return None
    use, x_sizes, y_sizes = spelled
    split = jnp.reshape(x, x_sizes)
    fed = _checked("input", hook.input(use, split), split)
    pair = [view.array, view.array]
    pair[1 - side] = x if fed is split else jnp.reshape(fed, jnp.shape(x))
    (y,) = _bind(eqn, pair)
    whole = jnp.reshape(y, y_sizes)
    new = hook.output(use, fed, whole, scope.weights[view.layout.name])
    return [jnp.reshape(_checked("output", new, whole), jnp.shape(y))]


def _operate(
    eqn: core.JaxprEqn, operands: list[Any], layouts: list[AxisLayout | None], scope: _Scope
) -> list[Any] | None:
    """A convolution, lookup or ragged product with its hook beside it, or None if the hook does not follow it."""
    (name,) = {layout.name for layout in layouts if layout is not None} if sum(map(bool, layouts)) == 1 else ("",)
    if not name or not scope.hooks[name].follows(eqn.primitive.name):
        return None
    found = find_operation(eqn, layouts, scope.hooks[name].axes, operands)
    if found is None:
        return None
    side, use = found
    (y,) = _bind(eqn, [v.array if isinstance(v, _View) else v for v in operands])
    new = scope.hooks[name].output(use, operands[1 - side], y, scope.weights[name])
    return [_checked("output", new, y)]
