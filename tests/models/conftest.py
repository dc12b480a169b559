"""These tests ask what is computed, not how fast: compiled without optimisation, in half the time."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import pytest


# (A package must have an __init__.py: in a mere folder the scope would be the session, and all tests after it.)
@pytest.fixture(scope="package", autouse=True)
def quickly_compiled() -> Iterator[None]:
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
