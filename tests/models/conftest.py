"""These tests ask what is computed, not how fast: compiled without optimisation, in half the time."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.compiling import without_optimizations


# (A package must have an __init__.py: in a mere folder the scope would be the session, and all tests after it.)
@pytest.fixture(scope="package", autouse=True)
def quickly_compiled() -> Iterator[None]:
    with without_optimizations():
        yield
