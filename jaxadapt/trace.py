"""Changes how a function uses some of its weights, by interpreting the function's jaxpr.

`rewrite` evaluates `f(weights, *args)` and follows each hooked weight through what only moves or casts
it (a transpose, a reshape, a cast, a nested `jit` or `checkpoint`). Where the weight then meets a
`dot_general` along its own roles, the hook sees that one contraction: LoRA adds a low-rank product
beside it, at the price a hand-written layer pays. Any other consumer (a convolution, a gather, a scan)
is given the hook's effective weight: exact, but dearer. `uses` tells beforehand which of the two it will
be, and `roles` reads from it which axes of a weight are inputs and which are outputs.

Knows jax through its public names only, and neither Flax nor any method.
"""

from __future__ import annotations

import dataclasses
import math
from collections import ChainMap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.extend.core import primitives

from jaxadapt.axes import LETTERS, Axes, Use
from jaxadapt.errors import AttachError

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

    def output(self, use: Use, x: jax.Array, y: jax.Array) -> jax.Array:
        """`y` as it should leave the contraction, in y's shape and dtype; `x` is what `input` returned."""
        ...

    def weight(self, w: jax.Array) -> jax.Array:
        """The effective weight, in w's shape and dtype; may raise `AttachError` (dropout needs an input)."""
        ...


@dataclasses.dataclass(frozen=True)
class Contraction:
    """A use as one `dot_general`: the weight axes summed over, those free in the result, those in all three.

    Each is in the weight's own axis order.
    """

    inn: tuple[int, ...]
    out: tuple[int, ...]
    batch: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Other:
    """Any other use, named after the primitive that consumes the weight (`"return"`: the function itself)."""

    primitive: str


def rewrite(f: Function, weights: Mapping[str, jax.Array], hooks: Mapping[str, Hook], *args: Any) -> Any:
    """`f(weights, *args)`, with every use of a hooked weight as its hook wants it.

    `args` are trees; their jax arrays are traced, everything else reaches `f` as it is. `f` may close over
    arrays and tracers. Works inside jit, grad, vmap, scan and remat.

    Raises:
        AttachError: a hook's roles do not fit its weight, a hook returns another shape or dtype than it
            was given, or `Hook.weight` raised it.

    >>> class Double:
    ...     axes = Axes(inn=(0,), out=(1,))
    ...     def input(self, use, x): return x
    ...     def output(self, use, x, y): return 2 * y
    ...     def weight(self, w): return 2 * w
    >>> w, x = jnp.eye(2), jnp.arange(2.0)
    >>> rewrite(lambda weights, x: x @ weights["w"] + 1, {"w": w}, {"w": Double()}, x).tolist()
    [1.0, 3.0]
    """
    for name, hook in hooks.items():
        if name not in weights:
            raise AttachError(f"a hook is for the weight {name!r}, and the function has only {sorted(weights)}")
        shape, axes = jnp.shape(weights[name]), hook.axes
        if sorted(axes.inn + axes.out + axes.batch) != list(range(len(shape))):
            raise AttachError(f"{name!r} has shape {shape}, which the roles {axes} do not cover axis by axis")
    traced = _trace(f, weights, args)
    views = [_View(_Layout.of(name, jnp.shape(w)), w) if name in hooks else w for name, w in weights.items()]
    scope = _Scope(hooks, weights, ChainMap())
    outs = _run(traced.closed.jaxpr, traced.closed.consts, [*views, *traced.arrays], scope)
    return traced.result([scope.plain(out) for out in outs])


def uses(f: Function, weights: Mapping[str, Any], *args: Any) -> dict[str, tuple[Contraction | Other, ...]]:
    """How `f(weights, *args)` uses each weight, in the order of the uses; nothing is computed.

    Weights and the arrays in `args` may be `jax.ShapeDtypeStruct`s.

    >>> w, x = jax.ShapeDtypeStruct((3, 4), "float32"), jax.ShapeDtypeStruct((2, 3), "float32")
    >>> uses(lambda weights, x: x @ weights["w"], {"w": w}, x)
    {'w': (Contraction(inn=(0,), out=(1,), batch=()),)}
    """
    traced = _trace(f, weights, args)
    found: dict[str, list[Contraction | Other]] = {name: [] for name in weights}
    layouts = [_Layout.of(name, tuple(w.shape)) for name, w in weights.items()]
    for out in _follow(traced.closed.jaxpr, [*layouts, *(None for _ in traced.arrays)], found):
        if out is not None:
            found[out.name].append(Other("return"))
    return {name: tuple(those) for name, those in found.items()}


def roles(f: Function, weights: Mapping[str, Any], name: str, *args: Any) -> Axes:
    """The roles of the axes of `weights[name]`, from the one way in which `f` contracts it.

    Inputs and outputs come in the weight's own axis order. A trace cannot tell a fused axis (k and v in
    one array) from an output axis.

    Raises:
        AttachError: the weight is not used, used in several ways, or not (only) by a `dot_general`.

    >>> w, x = jax.ShapeDtypeStruct((3, 4, 5), "float32"), jax.ShapeDtypeStruct((2, 3), "float32")
    >>> roles(lambda weights, x: jnp.einsum("bd,dnh->bnh", x, weights["w"]), {"w": w}, "w", x)
    Axes(inn=(0,), out=(1, 2), batch=(), parts=None)
    """
    distinct = list(dict.fromkeys(uses(f, weights, *args)[name]))
    match distinct:
        case [Contraction(inn, out, batch)]:
            return Axes(inn, out, batch)
        case []:
            problem = "is never used"
        case [Other(primitive)]:
            problem = f"is used by {primitive}, not by a matrix product, which alone tells inputs from outputs"
        case _:
            listed = "; ".join(_spoken(use) for use in distinct)
            problem = f"is used in several ways ({listed}), which leave open what its inputs and outputs are"
    raise AttachError(
        f"the axis roles of {name!r} do not follow from its use: it {problem}; give a KeyMap with a line for it"
    )


def _spoken(use: Contraction | Other) -> str:
    if isinstance(use, Other):
        return f"by {use.primitive}"
    shared = f", with {list(use.batch)} in both" if use.batch else ""
    return f"summed over axes {list(use.inn)}, leaving {list(use.out)}{shared}"


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
        results[:] = jax.tree.flatten(f(dict(zip(names, weights, strict=True)), *tree.unflatten(filled)))
        return [out for out in results[0] if isinstance(out, jax.Array)]

    names, arrays = list(weights), [leaves[i] for i in moving]
    closed = jax.make_jaxpr(flat)(list(weights.values()), arrays)
    outs, out_tree = results
    computed = [isinstance(out, jax.Array) for out in outs]

    def result(values: list[Any]) -> Any:
        rest = iter(values)
        return out_tree.unflatten([next(rest) if c else out for c, out in zip(computed, outs, strict=True)])

    return _Traced(closed, arrays, result)


# ---------------------------------------------------------------- where a weight's axes are


@dataclasses.dataclass(frozen=True)
class _Layout:
    """How a view of a weight lies: for each of its axes, the weight's axes that are merged in it.

    Weight axes of size 1 come and go in reshapes; they are listed only where they can be followed.
    """

    name: str
    sizes: tuple[int, ...]  # the weight's own shape
    groups: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, name: str, shape: tuple[int, ...]) -> _Layout:
        return cls(name, shape, tuple((i,) for i in range(len(shape))))

    def among(self, axes: Iterable[int]) -> tuple[int, ...]:
        """The weight's axes found in these axes of the view."""
        return tuple(a for i in axes for a in self.groups[i])

    def reshaped(self, shape: Sequence[int]) -> _Layout | None:
        """The same elements in row-major order under another shape, if that keeps the weight's axes whole."""
        rest = list(self.among(range(len(self.groups))))
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
_BARRIER = "optimization_barrier"  # which alone has several operands, one result for each


def _moved(eqn: core.JaxprEqn, before: list[_Layout | None]) -> list[_Layout | None] | None:
    """The layouts of an equation's results if it only moves, casts or passes on what it gets, else None."""
    kind, params = eqn.primitive, eqn.params
    if kind.name == _BARRIER:
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


def _body(eqn: core.JaxprEqn) -> tuple[core.Jaxpr, Sequence[Any]] | None:
    """The jaxpr and constants inside an equation that merely calls it."""
    if eqn.primitive is primitives.jit_p:
        return eqn.params["jaxpr"].jaxpr, eqn.params["jaxpr"].consts
    if eqn.primitive is primitives.closed_call_p:
        return eqn.params["call_jaxpr"].jaxpr, eqn.params["call_jaxpr"].consts
    if eqn.primitive is primitives.remat_p and not eqn.params["differentiated"]:
        return eqn.params["jaxpr"], ()
    return None


def _side(eqn: core.JaxprEqn, layouts: Sequence[_Layout | None]) -> int | None:
    """Which operand of a `dot_general` is the weight, if exactly one is."""
    if eqn.primitive is not primitives.dot_general_p or (layouts[0] is None) == (layouts[1] is None):
        return None
    return 0 if layouts[1] is None else 1


def _follow(
    jaxpr: core.Jaxpr, given: Sequence[_Layout | None], found: dict[str, list[Contraction | Other]]
) -> list[_Layout | None]:
    """Collects the uses of the given views in `found`; returns the layouts of the jaxpr's results."""
    env = dict(zip(jaxpr.invars, given, strict=True))

    def read(atom: Any) -> _Layout | None:
        return None if isinstance(atom, core.Literal) else env.get(atom)

    for eqn in jaxpr.eqns:
        seen = [read(a) for a in eqn.invars]
        if not any(seen):
            continue
        outs: list[_Layout | None] | None = None
        if (body := _body(eqn)) is not None:
            outs = _follow(body[0], seen, found)
        elif (side := _side(eqn, seen)) is not None and (layout := seen[side]) is not None:
            summed, shared = (d[side] for d in eqn.params["dimension_numbers"])
            inn, batch = sorted(layout.among(summed)), sorted(layout.among(shared))
            out = [a for a in range(len(layout.sizes)) if a not in inn + batch]
            found[layout.name].append(Contraction(tuple(inn), tuple(out), tuple(batch)))
        elif (outs := _moved(eqn, seen)) is None:
            for layout in filter(None, seen):
                found[layout.name].append(Other(eqn.primitive.name))
        env.update(zip(eqn.outvars, outs or (), strict=outs is not None))
    return [read(a) for a in jaxpr.outvars]


# ---------------------------------------------------------------- evaluating


@dataclasses.dataclass(frozen=True)
class _View:
    """A moved or cast base weight, and how to move and cast the effective one the same way."""

    layout: _Layout
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
    if (side := _side(eqn, layouts)) is not None:
        outs = _contract(eqn, operands, side, scope)
        if outs is not None:
            return outs
    elif (after := _moved(eqn, layouts)) is not None:
        arrays = _bind(eqn, [v.array if isinstance(v, _View) else v for v in operands])

        def step(whole: Any) -> Any:
            return jax.lax.optimization_barrier(whole) if eqn.primitive.name == _BARRIER else _bind(eqn, [whole])[0]

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
    hook = scope.hooks[view.layout.name]
    spelled = _spell(eqn, side, view.layout, hook.axes, jnp.shape(x))
    if spelled is None:
        return None
    use, x_sizes, y_sizes = spelled
    split = jnp.reshape(x, x_sizes)
    fed = _checked("input", hook.input(use, split), split)
    pair = [view.array, view.array]
    pair[1 - side] = x if fed is split else jnp.reshape(fed, jnp.shape(x))
    (y,) = _bind(eqn, pair)
    whole = jnp.reshape(y, y_sizes)
    return [jnp.reshape(_checked("output", hook.output(use, fed, whole), whole), jnp.shape(y))]


def _spell(
    eqn: core.JaxprEqn, side: int, layout: _Layout, axes: Axes, x_shape: tuple[int, ...]
) -> tuple[Use, list[int], list[int]] | None:
    """The contraction letter by letter, and the split shapes of x and y; None if the roles do not fit it.

    Weight axes of size 1 are put where their role says, as an extra axis of x or y: they may have been
    squeezed out of the view, and no result depends on where they stand.
    """
    (summed_w, summed_x), (shared_w, shared_x) = ((d[side], d[1 - side]) for d in eqn.params["dimension_numbers"])
    unit = {a for a, size in enumerate(layout.sizes) if size == 1}
    summed, shared = set(layout.among(summed_w)) - unit, set(layout.among(shared_w)) - unit
    ways = [way for way in ((axes.inn, axes.out), (axes.out, axes.inn)) if summed == set(way[0]) - unit]
    if not ways or not shared <= set(axes.batch):
        return None
    reads, writes = ways[0]

    def letters(view_axis: int) -> list[tuple[str, int]]:
        return [(LETTERS[a], layout.sizes[a]) for a in layout.groups[view_axis] if a not in unit]

    def units(role: Iterable[int]) -> list[tuple[str, int]]:
        return [(LETTERS[a], 1) for a in role if a in unit]

    met = dict(zip([*summed_x, *shared_x], [*summed_w, *shared_w], strict=True))
    fresh = iter(LETTERS[len(layout.sizes) :])
    own = {i: [(next(fresh), size)] for i, size in enumerate(x_shape) if i not in met}
    x = [pair for i in range(len(x_shape)) for pair in (own[i] if i in own else letters(met[i]))]
    free_w = [p for i in range(len(layout.groups)) if i not in (*summed_w, *shared_w) for p in letters(i)]
    free_x = [pair for pairs in own.values() for pair in pairs]
    # dot_general's result: what both share, then what is free in its left operand, then in its right one
    y = [p for i in shared_w for p in letters(i)] + (free_w + free_x if side == 0 else free_x + free_w)
    x, y = x + units((*reads, *axes.batch)), y + units((*writes, *axes.batch))
    spelled = Use("".join(c for c, _ in x), LETTERS[: len(layout.sizes)], "".join(c for c, _ in y), axes)
    return spelled, [n for _, n in x], [n for _, n in y]
