"""The tests' own switch for quick compilation leaves nothing behind."""

from __future__ import annotations

import jax
import numpy as np

from tests.support.compiling import without_optimizations


def test_a_program_compiled_without_optimizations_is_not_used_afterwards():
    """Bit for bit: a shape that no other test draws, so that the block is the first to compile it."""

    def draw() -> np.ndarray:
        return np.asarray(jax.random.normal(jax.random.key(0), (4, 8, 13)))

    with without_optimizations():
        unoptimized = draw()
    after = draw()
    jax.clear_caches()
    expected = draw()
    assert np.array_equal(after.view(np.uint32), expected.view(np.uint32))
    assert np.allclose(unoptimized, expected, rtol=1e-6)
