"""Reading the bytes of a small file while the caller is busy with something else."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING

from jaxadapt.core.errors import AdapterError
from jaxadapt.storage import local_files

if TYPE_CHECKING:
    from concurrent.futures import Future

    import numpy as np


READ = 5 * local_files.BLOCK  # 15 MB
"""Bytes of one call: after each the thread waits for Python's lock, which whoever plans has, and who needs the bytes
waits for a whole call. 50 MB took 18 ms in four calls, 23 in one."""


class Prefetch:
    """The bytes after a header, which are being read in the background while the caller plans."""

    def __init__(self, source: local_files.Source, start: int) -> None:
        from concurrent.futures import ThreadPoolExecutor

        size = source.size - start
        self._blocks = [
            local_files.aligned_empty(min(local_files.BLOCK, size - at)) for at in range(0, size, local_files.BLOCK)
        ]
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(1)
        self._reads: list[Future[None]] = []
        for first in range(0, size, READ):
            blocks = self._blocks[first // local_files.BLOCK : (first + READ) // local_files.BLOCK]
            parts = [("its tensors", block.data) for block in blocks]
            self._reads.append(self._pool.submit(source.read_into, parts, start + first))
        self.waiting: set[str] = set()
        """The tensors that nobody asked for yet."""

    def take(self, spans: Mapping[str, tuple[int, int]]) -> bool:
        """Whether these are there, and the caller, who is the first to ask for them, may have them.

        Args:
            spans: by tensor, its first byte and the one after its last.
        """
        with self._lock:
            if not self.waiting.issuperset(spans):
                return False
            self.waiting.difference_update(spans)
        try:
            for start, stop in spans.values():
                for read in self._reads[start // READ : -(-stop // READ)]:
                    read.result()
        except AdapterError:  # read by itself, a tensor says that it is the one which is cut off
            return False
        return True

    def at(self, start: int, stop: int, memory: np.ndarray | None) -> np.ndarray:
        """The bytes of a tensor: where they were read to, if aligned and in one block; else copied, to `memory`."""
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
