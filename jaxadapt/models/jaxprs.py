"""Jaxprs: the trace of a function, and the evaluation of its equations one by one.

Uses only public names of jax.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, DebugInfo, Jaxpr, JaxprEqn, Literal, jaxpr_as_fun, primitives


@dataclasses.dataclass(frozen=True)
class Traced:
    closed: ClosedJaxpr
    arrays: list[Any]  # the arguments that became inputs of the jaxpr, after the weights
    result: Callable[[list[Any]], Any]  # from the jaxpr's outputs to what `f` returns


def trace(f: Callable[..., Any], weights: Mapping[Any, Any], args: Sequence[Any]) -> Traced:
    leaves, tree = jax.tree.flatten(args)
    moving = [i for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct)]
    results: list[Any] = []

    def flat(weights: list[Any], arrays: list[Any]) -> list[Any]:
        given = dict(zip(moving, arrays, strict=True))
        filled = tree.unflatten([given.get(i, leaf) for i, leaf in enumerate(leaves)])
        outs, out_tree = jax.tree.flatten(f(dict(zip(names, weights, strict=True)), *filled))
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


def called_jaxpr(eqn: JaxprEqn) -> tuple[Jaxpr, Sequence[Any]] | None:
    """Return the jaxpr and constants of an equation that only calls a jaxpr, else None."""
    if eqn.primitive in (primitives.jit_p, primitives.closed_call_p):
        body = eqn.params["jaxpr" if eqn.primitive is primitives.jit_p else "call_jaxpr"]
        return body.jaxpr, body.consts
    if eqn.primitive is primitives.remat_p and not eqn.params["differentiated"]:
        return eqn.params["jaxpr"], ()
    return None


def scan_sizes(eqn: JaxprEqn) -> tuple[int, int]:
    """Return how many operands a scan's steps share, and how many arrays one step hands to the next."""
    if "ft_in" in eqn.params:  # jax 0.12
        consts, carried, _ = map(len, eqn.params["ft_in"].unpack())
        return consts, carried
    return eqn.params["num_consts"], eqn.params["num_carry"]


def evaluate_scan(
    eqn: JaxprEqn, operands: Sequence[Any], own: Any, step: Callable[[list[Any], Any], list[Any]]
) -> list[Any]:
    """Evaluate a scan with another body, and with further arrays that it slices.

    Args:
        operands: of the equation. Only those that all steps share may be other values than arrays.
        own: a tree of arrays, sliced on their first axes.
        step: `step(operands, own)` returns the results of one step.
    """
    consts, carried = scan_sizes(eqn)

    def body(carry: list[Any], sliced: tuple[list[Any], Any]) -> tuple[list[Any], list[Any]]:
        outs = step([*operands[:consts], *carry, *sliced[0]], sliced[1])
        return outs[:carried], outs[carried:]

    options = {name: eqn.params[name] for name in ("length", "reverse", "unroll")}
    carry, ys = jax.lax.scan(
        body, list(operands[consts : consts + carried]), (list(operands[consts + carried :]), own), **options
    )
    return [*carry, *ys]


def rematerialized(eqn: JaxprEqn, f: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    """Return a function under the same `checkpoint` as an equation."""
    return jax.checkpoint(f, policy=eqn.params["policy"], prevent_cse=eqn.params["prevent_cse"])


def evaluate_unchanged(eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
    """Evaluate one equation unchanged, as a jaxpr of only that equation, which keeps its context."""
    operands = {a: v for a, v in zip(eqn.invars, values, strict=True) if not isinstance(a, Literal)}
    # A variable used twice is one input.
    debug_info = DebugInfo("rewrite", eqn.primitive.name, ("",) * len(operands), ("",) * len(eqn.outvars))
    single = Jaxpr((), list(operands), eqn.outvars, [eqn], eqn.effects, debug_info)
    return jaxpr_as_fun(ClosedJaxpr(single, ()))(*operands.values())


def interpret(
    jaxpr: Jaxpr,
    consts: Sequence[Any],
    values: Sequence[Any],
    step: Callable[[JaxprEqn, list[Any]], Sequence[Any]],
) -> list[Any]:
    """Evaluate a jaxpr, each of its equations by `step(equation, operands)`."""
    env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *values], strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else env[atom]

    for eqn in jaxpr.eqns:
        env.update(zip(eqn.outvars, step(eqn, [read(a) for a in eqn.invars]), strict=True))
    return [read(a) for a in jaxpr.outvars]
