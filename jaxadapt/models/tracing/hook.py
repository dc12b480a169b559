"""The interface of an adapter on one weight, as the interpreter of jaxprs calls it."""

from __future__ import annotations

from typing import Protocol

import jax

from jaxadapt.arrays.axes import Axes, Operation, Use


class Hook(Protocol):
    """The changes that a method makes to the uses of one weight."""

    @property
    def axes(self) -> Axes:
        """The roles of the weight's axes."""
        ...

    def input(self, use: Use, x: jax.Array) -> jax.Array:
        """Return the `x` that the contraction receives, in x's shape and dtype."""
        ...

    def operand(self, use: Operation, x: jax.Array, w: jax.Array) -> jax.Array:
        """Return the `x` that an operation receives, in x's shape and dtype."""
        ...

    def follows_use(self, use: Use) -> bool:
        """Return True if `input` and `output` handle this product of the weight; else it gets the effective weight."""
        ...

    def follows(self, primitive: str) -> bool:
        """Return True if `output` handles this operation ("conv_general_dilated", "gather", …) of the weight."""
        ...

    def output(self, use: Use | Operation, x: jax.Array, y: jax.Array, w: jax.Array) -> jax.Array:
        """Return the `y` that replaces the result of the contraction, in y's shape and dtype.

        `x` is the array that `input` returned, `w` the weight itself.
        """
        ...

    def weight(self, w: jax.Array) -> jax.Array:
        """Return the effective weight, in w's shape and dtype; may raise `AttachError` (dropout needs an input)."""
        ...
