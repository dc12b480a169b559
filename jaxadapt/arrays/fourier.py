"""Fourier transforms of arrays that may be sharded.

XLA's transforms on the CPU need the layout in which the last axis is contiguous, and do not ask the compiler for it: a
program in which the operand is gathered from several devices fails at run time. A list of all numbers has one layout
only, so each operand becomes one first. This costs nothing where the layout is right already.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Array = Any


def transform(function: Callable[[Array], Array], x: Array) -> Array:
    """Return `function(x)` for a transform over the last axes, also in the gradient.

    >>> transform(jnp.fft.rfft, jnp.ones(4)).shape
    (3,)
    """
    return _row_major(function(_row_major(x)))


def _row_major(x: Array) -> Array:
    return jax.lax.optimization_barrier(jnp.ravel(x)).reshape(x.shape)
