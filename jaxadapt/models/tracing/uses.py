"""Conclusions from the uses of a weight: the roles of its axes, and the uses that an adapter follows.

The dependence of a function's outputs on its weights is determined without running the function.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
from jax.interpreters.partial_eval import dce_jaxpr

from jaxadapt.arrays.axes import Axes
from jaxadapt.core.errors import AttachError, raise_listed
from jaxadapt.models.tracing.operations import Hook
from jaxadapt.models.tracing.rewrite import Contraction, Function, OtherUse, uses

# ---------------------------------------------------------------- uses


def unfollowed_uses(found: Iterable[Contraction | OtherUse], hook: Hook) -> list[str]:
    """Return the uses that need the effective weight, in a few words each."""
    axes = hook.axes
    along = (set(axes.in_axes), set(axes.out_axes))
    return [
        use.primitive if isinstance(use, OtherUse) else f"a sum over axes {list(use.in_axes)}"
        for use in found
        if (isinstance(use, OtherUse) and not hook.follows(use.primitive))
        or (
            isinstance(use, Contraction)
            and (set(use.in_axes) not in along or not set(use.batch_axes) <= set(axes.batch_axes))
        )
    ]


def describe_uses(function: str, found: Iterable[Contraction | OtherUse], hook: Hook) -> str:
    """Say in a few words if `function` contracts a weight along its roles, or which uses need the effective weight."""
    unfollowed = unfollowed_uses(found, hook)
    return (
        f"effective weight in {function} ({', '.join(dict.fromkeys(unfollowed))})"
        if unfollowed
        else f"traced {function}"
    )


def infer_axes(f: Function, weights: Mapping[str, Any], name: str, *args: Any) -> Axes:
    """Infer the axis roles of `weights[name]` from the contraction in `f`.

    Inputs and outputs are in the weight's axis order. A trace cannot distinguish a fused axis (k and v in one array)
    from an output axis.

    Raises:
        AttachError: `f` does not use the weight, uses it in several ways, or in an operation other than `dot_general`.

    >>> import jax, jax.numpy as jnp
    >>> w, x = jax.ShapeDtypeStruct((3, 4, 5), "float32"), jax.ShapeDtypeStruct((2, 3), "float32")
    >>> infer_axes(lambda weights, x: jnp.einsum("bd,dnh->bnh", x, weights["w"]), {"w": w}, "w", x)
    Axes(in_axes=(0,), out_axes=(1, 2), batch_axes=(), parts=None)
    """
    distinct = list(dict.fromkeys(uses(f, weights, *args)[name]))
    match distinct:
        case [Contraction(inputs, out, batch)]:
            return Axes(inputs, out, batch)
        case []:
            problem = "is never used"
        case [OtherUse(primitive)]:
            problem = f"is used by {primitive}, and only a matrix product shows which axes are inputs"
        case _:
            listed = "; ".join(_describe_use(use) for use in distinct)
            problem = f"is used in several ways ({listed}), so that its inputs and outputs are ambiguous"
    raise AttachError(f"cannot infer the axis roles of {name!r}: it {problem}. Pass a KeyMap with an entry for it")


def _describe_use(use: Contraction | OtherUse) -> str:
    if isinstance(use, OtherUse):
        return f"by {use.primitive}"
    shared = f", with {list(use.batch_axes)} in both" if use.batch_axes else ""
    return f"summed over axes {list(use.in_axes)}, leaving {list(use.out_axes)}{shared}"


# ---------------------------------------------------------------- liveness


def refuse_reads_outside(leaves: Iterable[str]) -> None:
    """Raise `AttachError` if there are weights that the model reads outside their own module's call."""
    raise_listed(
        AttachError,
        "these weights are read outside their own module's call, where an adapter cannot follow:",
        leaves,
        "\nExclude them with exclude_modules, or change the reader to call the module",
    )


def live_weights(f: Callable[[Any], Any], weights: Mapping[str, Any]) -> dict[str, bool]:
    """Return `{name: True if the outputs of f(weights) depend on it}`; weights may be `ShapeDtypeStruct`s.

    >>> import jax.numpy as jnp
    >>> live_weights(lambda w: w["a"] * 2, {"a": jnp.ones(3), "b": jnp.ones(3)})
    {'a': True, 'b': False}
    """
    names = list(weights)
    closed = jax.make_jaxpr(lambda *ws: f(dict(zip(names, ws, strict=True))))(*(weights[n] for n in names))
    _, used = dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
    return dict(zip(names, used, strict=True))
