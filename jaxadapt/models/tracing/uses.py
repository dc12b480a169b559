"""What the uses of a weight say: which of its axes are inputs and which outputs, and which uses an adapter follows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from jaxadapt.arrays.axes import Axes
from jaxadapt.core.errors import AttachError
from jaxadapt.models.tracing.rewrite import Contraction, Function, Hook, Other, uses


def strays(found: Iterable[Contraction | Other], hook: Hook) -> list[str]:
    """The uses that only the effective weight can follow, in a few words each."""
    axes = hook.axes
    along = (set(axes.inn), set(axes.out))
    return [
        use.primitive if isinstance(use, Other) else f"a sum over axes {list(use.inn)}"
        for use in found
        if (isinstance(use, Other) and not hook.follows(use.primitive))
        or (isinstance(use, Contraction) and (set(use.inn) not in along or not set(use.batch) <= set(axes.batch)))
    ]


def note(what: str, found: Iterable[Contraction | Other], hook: Hook) -> str:
    """In a few words, whether `what` uses a weight along its roles, or needs the effective weight, and for what."""
    dear = strays(found, hook)
    return f"effective weight in {what} ({', '.join(dict.fromkeys(dear))})" if dear else f"traced {what}"


def roles(f: Function, weights: Mapping[str, Any], name: str, *args: Any) -> Axes:
    """The roles of the axes of `weights[name]`, from the one way in which `f` contracts it.

    Inputs and outputs come in the weight's own axis order. A trace cannot tell a fused axis (k and v in
    one array) from an output axis.

    Raises:
        AttachError: the weight is not used, used in several ways, or not (only) by a `dot_general`.

    >>> import jax, jax.numpy as jnp
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
