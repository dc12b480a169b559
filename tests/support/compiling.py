"""Compilation for tests that ask what is computed, not how fast."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import jax

_FLAG = "jax_disable_most_optimizations"
ENV = {_FLAG.upper(): "1"}  # for a process of its own
# Tests whose programs are compiled without optimizations, in half the time: folders and files. Not those that train
# for long, read the compiled program, compare bit for bit with another process, or compare closely large values.
QUICK = (
    "jaxadapt/", "tests/demo/", "tests/initializers/", "tests/keymaps/", "tests/merging/", "tests/methods/",
    "tests/models/", "tests/reference/", "tests/server/", "tests/serving/", "tests/storage/hub/test_notebooks.py",
    "tests/system/test_examples.py", "tests/system/test_readme.py", "tests/system/test_troubleshooting.py",
    "tests/training/test_optim.py",
)  # fmt: skip


def is_quick(nodeid: str) -> bool:
    """True for a test that runs without optimizations."""
    return nodeid.startswith(QUICK)


def optimize(on: bool) -> None:
    """Compile with optimizations or without from now on.

    JAX keeps a program after the flag is reset, and its results can differ in their last bits. So a change drops every
    program.
    """
    if jax.config.read(_FLAG) == on:
        jax.config.update(_FLAG, not on)
        jax.clear_caches()


@contextlib.contextmanager
def without_optimizations() -> Iterator[None]:
    """Compile without optimizations inside the block."""
    before = jax.config.read(_FLAG)
    optimize(False)
    try:
        yield
    finally:
        optimize(not before)
