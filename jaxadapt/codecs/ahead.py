"""Reading the bytes of a small file while the caller is busy with something else."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

from jaxadapt.codecs import files
from jaxadapt.errors import AdapterError

if TYPE_CHECKING:
    import numpy as np


class Ahead:
    """The bytes after a header, which are being read in the background while the caller plans."""

    def __init__(self, source: files.Source, start: int) -> None:
        from concurrent.futures import ThreadPoolExecutor

        self._memory = files.aligned(source.size - start)
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(1)
        # One call: after each the thread would wait for Python's lock, which whoever plans has.
        self._read = self._pool.submit(source.read_into, [("its tensors", self._memory.data)], start)
        self.waiting: set[str] = set()
        """The tensors that nobody asked for yet."""

    def take(self, keys: Sequence[str]) -> np.ndarray | None:
        """All that is read, for those who are the first to ask for these; None if they are not, or reading failed."""
        with self._lock:
            if not self.waiting.issuperset(keys):
                return None
            self.waiting.difference_update(keys)
        try:
            self._read.result()
        except AdapterError:  # read by itself, a tensor says that it is the one which is cut off
            return None
        return self._memory

    def close(self) -> None:
        self._pool.shutdown()
