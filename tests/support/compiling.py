"""Compilation for tests that ask what is computed, not how fast."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import jax


@contextlib.contextmanager
def without_optimizations() -> Iterator[None]:
    """Compile without optimisations inside the block, in half the time.

    JAX keeps a program after the flag is reset, and its results can differ in their last bits. So the block ends by
    dropping every program.
    """
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)
        jax.clear_caches()
