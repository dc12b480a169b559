"""A registry of small modules: every way a weight is held and used that attaching has to know.

    from tests.support.twins import layers
    @pytest.mark.parametrize("case", layers.params(layers.NNX, how="exact"))

`layers_nnx.py` and `layers_linen.py` hold the modules; each `Case` says what an adapter may count on.
"""

from __future__ import annotations

import dataclasses
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxadapt.arrays.layout import Axes

EXACT, EFFECTIVE, EITHER, REFUSED = "exact", "effective", "either", "refused"
# Leaf names that are not part of a module's name in `target_modules`.
PLAIN = ("kernel", "w", "weight", "embedding")


@dataclasses.dataclass(frozen=True)
class Case:
    """One small module.

    Args:
        name: the test id.
        make: a new module: built with seeded rngs and in eval mode (NNX), or unbound (Linen).
        inputs: example arguments of its call.
        roles: the base leaves that may be adapted, at their dotted paths, each with its axes as the
            module itself sees them (stacked axes left out).
        how: "exact": the low-rank product is added to the layer's own; "effective": W + s·BA has to be
            formed; "either"; "refused": no adapter can be exact here, `adapt` or the call has to say so.
        stack: the axis on which a leaf (and its adapter tensors) is stacked over layers.
        rngs: rng streams that a Linen `apply` needs.
        mutable: collections that the call writes.
        why: for "effective" and "refused", what stands in the way.
    """

    name: str
    make: Callable[[], Any]
    inputs: Callable[[], tuple[Any, ...]]
    roles: Mapping[str, Axes]
    how: str = EXACT
    stack: Mapping[str, int] = dataclasses.field(default_factory=dict)
    rngs: tuple[str, ...] = ()
    mutable: tuple[str, ...] = ()
    why: str = ""

    @property
    def targets(self) -> list[str]:
        """What `target_modules` calls the adaptable leaves; a leaf with a name of its own is part of it."""
        out = []
        for leaf in self.roles:
            head, _, last = leaf.rpartition(".")
            name = head if last in PLAIN else leaf
            out += [name] if name not in out else []
        return out


def params(cases: Sequence[Case], *, how: str | Sequence[str] | None = None, **having: bool) -> list[Any]:
    """Cases as pytest params with their names as ids.

    `how` selects by kind (one or several); `stack=True` or `mutable=False` and so on by whether that
    field is set.
    """
    kinds = None if how is None else {how} if isinstance(how, str) else set(how)
    return [
        pytest.param(case, id=case.name)
        for case in cases
        if (kinds is None or case.how in kinds)
        and all(bool(getattr(case, field)) == wanted for field, wanted in having.items())
    ]


def effective(
    weight: jax.Array, a: jax.Array, b: jax.Array, axes: Axes, scale: float, stack: int | None = None
) -> jax.Array:
    """`W + scale · B·A` written out: the reference that every path has to agree with.

    `a` is (batch..., r, in...), `b` (batch..., out..., r); where the leaf is stacked, all three are, on
    the axis `stack`.
    """
    if stack is not None:
        mapped = jax.vmap(lambda w, a, b: effective(w, a, b, axes, scale), in_axes=(stack,) * 3, out_axes=stack)
        return mapped(weight, a, b)
    letters = string.ascii_lowercase[: weight.ndim]
    batch, ins, out = ("".join(letters[i] for i in role) for role in (axes.batch_axes, axes.in_axes, axes.out_axes))
    return weight + scale * jnp.einsum(f"{batch}Z{ins},{batch}{out}Z->{letters}", a, b)


def x() -> jax.Array:
    """(2, 5, 8) float32."""
    return jax.random.normal(jax.random.key(7), (2, 5, 8))


def ids() -> jax.Array:
    """(2, 5) int32 below 11."""
    return jax.random.randint(jax.random.key(8), (2, 5), 0, 11)


def one() -> tuple[Any, ...]:
    return (x(),)


def tokens() -> tuple[Any, ...]:
    return (ids(),)


# Roles that many cases share.
IO = Axes(in_axes=(0,), out_axes=(1,))  # i o
SPLIT = Axes(in_axes=(0,), out_axes=(1, 2))  # d -> n h
JOIN = Axes(in_axes=(0, 1), out_axes=(2,))  # n h -> d
CONV = Axes(in_axes=(1, 0), out_axes=(2,))  # window, in, out

MHA = {f"attn.{p}.kernel": SPLIT for p in ("query", "key", "value")} | {"attn.out.kernel": JOIN}


def conv(x: jax.Array, w: jax.Array) -> jax.Array:
    """A "same" convolution of (batch, time, in) with (window, in, out)."""
    return jax.lax.conv_general_dilated(x, w, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))


@jax.custom_vjp
def opaque_matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    """x @ w whose derivative is written by hand, so that its inside may not be rewritten."""
    return x @ w


opaque_matmul.defvjp(
    lambda x, w: (x @ w, (x, w)),
    lambda saved, g: (g @ saved[1].T, jnp.einsum("bti,bto->io", saved[0], g)),
)


def switched_matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    """The weight goes into a branch as an operand."""
    return jax.lax.cond(x.sum() > -1e9, lambda x, w: x @ w, lambda x, w: 2 * (x @ w), x, w)


def __getattr__(name: str) -> list[Case]:
    # The two files import this one for `Case`; so their lists are looked up when asked for.
    if name == "NNX":
        from tests.support.twins.layers_nnx import NNX

        return NNX
    if name == "LINEN":
        from tests.support.twins.layers_linen import LINEN

        return LINEN
    raise AttributeError(name)
