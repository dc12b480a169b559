"""Reading a small file in the background, while the caller plans."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING

from jaxadapt.core.errors import AdapterError
from jaxadapt.storage import local_files

if TYPE_CHECKING:
    from concurrent.futures import Future

    import numpy as np


READ_BYTES = 5 * local_files.BLOCK  # 15 MB
"""Bytes of one read. After each read the thread waits for Python's lock, and a caller that needs bytes waits for a
whole read. 50 MB took 18 ms in four reads, and 23 ms in one."""


class Prefetch:
    """The bytes after a file's header, read in the background."""

    def __init__(self, source: local_files.Source, start: int) -> None:
        from concurrent.futures import ThreadPoolExecutor

        size = source.size - start
        self._blocks = [
            local_files.aligned_empty(min(local_files.BLOCK, size - at)) for at in range(0, size, local_files.BLOCK)
        ]
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(1)
        self._reads: list[Future[None]] = []
        for first in range(0, size, READ_BYTES):
            blocks = self._blocks[first // local_files.BLOCK : (first + READ_BYTES) // local_files.BLOCK]
            parts = [("its tensors", block.data) for block in blocks]
            self._reads.append(self._pool.submit(source.read_into, parts, start + first))
        self.waiting: set[str] = set()
        """The names of the tensors that were not taken yet."""

    def take(self, spans: Mapping[str, tuple[int, int]]) -> bool:
        """Wait for tensors and return True, unless one of them was taken before or could not be read.

        Args:
            spans: by tensor, its first byte and the byte after its last.
        """
        with self._lock:
            if not self.waiting.issuperset(spans):
                return False
            self.waiting.difference_update(spans)
        try:
            for start, stop in spans.values():
                for read in self._reads[start // READ_BYTES : -(-stop // READ_BYTES)]:
                    read.result()
        except AdapterError:  # reading the tensor directly gives an error with its name
            return False
        return True

    def bytes_of(self, start: int, stop: int, memory: np.ndarray | None) -> np.ndarray:
        """Return the bytes of a tensor: a view if they are aligned and in one block, else a copy (in `memory`)."""
        block, first = divmod(start, local_files.BLOCK)
        if first % local_files.ALIGNED == 0 and stop - start <= local_files.BLOCK - first:
            return self._blocks[block][first : first + stop - start]
        out = local_files.aligned_empty(stop - start) if memory is None else memory[: stop - start]
        done = 0
        while done < stop - start:
            block, first = divmod(start + done, local_files.BLOCK)
            part = self._blocks[block][first : first + stop - start - done]
            out[done : done + len(part)] = part
            done += len(part)
        return out

    def close(self) -> None:
        self._pool.shutdown()
