"""These tests ask what is computed, not how fast: compiled without optimisation, in half the time."""

from tests.models.conftest import quickly_compiled

__all__ = ["quickly_compiled"]
