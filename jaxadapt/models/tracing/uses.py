"""What the uses of a weight say: which of its axes are inputs and which outputs, and which uses an adapter follows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from jaxadapt.arrays.axes import Axes
from jaxadapt.core.errors import AttachError
from jaxadapt.models.tracing.rewrite import Contraction, Function, Hook, OtherUse, uses


def unfollowed_uses(found: Iterable[Contraction | OtherUse], hook: Hook) -> list[str]:
    """The uses that only the effective weight can follow, in a few words each."""
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


def describe_uses(what: str, found: Iterable[Contraction | OtherUse], hook: Hook) -> str:
    """In a few words, whether `what` uses a weight along its roles, or needs the effective weight, and for what."""
    dear = unfollowed_uses(found, hook)
    return f"effective weight in {what} ({', '.join(dict.fromkeys(dear))})" if dear else f"traced {what}"


def infer_axes(f: Function, weights: Mapping[str, Any], name: str, *args: Any) -> Axes:
    """The roles of the axes of `weights[name]`, from the one way in which `f` contracts it.

    Inputs and outputs come in the weight's own axis order. A trace cannot tell a fused axis (k and v in
    one array) from an output axis.

    Raises:
        AttachError: the weight is not used, used in several ways, or not (only) by a `dot_general`.

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
            problem = f"is used by {primitive}, not by a matrix product, which alone tells inputs from outputs"
        case _:
            listed = "; ".join(_spoken(use) for use in distinct)
            problem = f"is used in several ways ({listed}), which leave open what its inputs and outputs are"
    raise AttachError(
        f"the axis roles of {name!r} do not follow from its use: it {problem}; give a KeyMap with a line for it"
    )


def _spoken(use: Contraction | OtherUse) -> str:
    if isinstance(use, OtherUse):
        return f"by {use.primitive}"
    shared = f", with {list(use.batch_axes)} in both" if use.batch_axes else ""
    return f"summed over axes {list(use.in_axes)}, leaving {list(use.out_axes)}{shared}"
