"""Python's cyclic garbage collector, told to wait."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Generator


@contextlib.contextmanager
def waiting() -> Generator[None]:
    """A block in which the collector does not run, for making many objects that all stay.

    It counts new objects, not garbage: some thousand arrays call it a dozen times, and one of these goes through all
    that the program has, which takes 0.1 s where JAX is imported. Afterwards it runs as before, unless it was off.

    >>> with waiting():
    ...     gc.isenabled()
    False
    >>> gc.isenabled()
    True
    """
    if not gc.isenabled():  # another thread's block ends it
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
