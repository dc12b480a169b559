"""Reading ranges of objects of a store, with the interface of `local_files`."""

from __future__ import annotations

import io
import threading
from typing import TYPE_CHECKING

from jaxadapt.core.errors import FileError, FormatError
from jaxadapt.storage import location
from jaxadapt.storage.local_files import file_error
from jaxadapt.storage.store_errors import translate_errors

if TYPE_CHECKING:
    from concurrent.futures import Future

__all__ = ["RemoteObject", "fetch_object"]

_HEAD = 512 << 10  # bytes read when an object is opened: most headers, and all of a small adapter
_BLOCK = 4 << 20  # bytes; fetching them takes about as long as a store's latency
_MAX_BLOCKS = 16  # blocks; tensors are read in the order of the file


class RemoteObject:
    """An object open for reading in ranges. Several threads may read at once.

    Small reads share blocks, and each block is fetched once. A large read is one request.
    """

    def __init__(self, address: location.Address) -> None:
        """Query the object and read its head. Raises `FileError`."""
        self.path = str(address)
        self.closed = False
        self._address = address
        try:
            info = address.info()
        except FileNotFoundError as error:
            raise file_error("read", self.path, error) from error
        if info["type"] != "file" or info.get("size") is None:
            raise FileError(f"{self.path}: cannot read: expected a file of known size, found a folder or a stream")
        self.size = int(info["size"])
        self._stamp = location.object_stamp(info)
        self._fetched = False
        self._blocks: dict[int, Future[bytes]] = {}
        self._lock = threading.Lock()
        self._head = self._fetch(0, min(self.size, _HEAD)) if self.size else b""

    def read_into(self, label: str, view: memoryview, offset: int) -> None:
        """Fill a view, as `local_files.read_into` does."""
        stop = offset + len(view)
        if stop > self.size:
            raise FormatError(f"{self.path}: {label}: expected {stop} bytes, found {self.size}")
        if len(view) >= _BLOCK or stop <= len(self._head):
            view[:] = self._head[offset:stop] if stop <= len(self._head) else self._fetch(offset, stop)
            return
        while len(view):
            number, within = divmod(offset, _BLOCK)
            piece = self._block(number)[within : within + len(view)]
            view[: len(piece)] = piece
            view, offset = view[len(piece) :], offset + len(piece)

    def _block(self, number: int) -> bytes:
        from concurrent.futures import Future

        with self._lock:
            block = self._blocks.get(number)
            is_new = block is None
            if block is None:
                block = self._blocks[number] = Future[bytes]()
                while len(self._blocks) > _MAX_BLOCKS:
                    self._blocks.pop(next(iter(self._blocks)))
        if is_new:
            try:
                block.set_result(self._fetch(number * _BLOCK, min((number + 1) * _BLOCK, self.size)))
            except BaseException as error:
                block.set_exception(error)
        return block.result()

    def _fetch(self, start: int, stop: int) -> bytes:
        fs, inner = self._address.store()
        self._fetched = self._fetched or start > 0 or stop < self.size
        try:
            with translate_errors(self.path, "read"):
                data = fs.cat_file(inner, start=start, end=stop)
        except FileNotFoundError as error:
            raise FileError(f"{self.path}: the object was deleted while it was read") from error
        if len(data) != stop - start:
            raise FormatError(f"{self.path}: expected {stop - start} bytes at offset {start}, found {len(data)}")
        return data

    def check(self) -> None:
        """Raise `FormatError` if the object was replaced during reading, since its parts may be of two versions."""
        if self._fetched and location.object_stamp(self._address.info()) != self._stamp:
            raise FormatError(f"{self.path}: the object was replaced while it was read; read it again")

    def close(self) -> None:
        self.closed = True
        self._blocks.clear()


def fetch_object(address: location.Address) -> tuple[io.FileIO, int]:
    """Download an object into a temporary file. Return the open file and its size in bytes. Raises `FileError`."""
    import tempfile

    remote = RemoteObject(address)
    fs, inner = address.store()
    try:
        with tempfile.NamedTemporaryFile(prefix="jaxadapt-") as copy:
            with translate_errors(str(address), "read"):
                fs.get_file(inner, copy.name)
            return io.FileIO(copy.name, "rb"), remote.size
    except OSError as error:
        raise file_error("read", f"{address} (through {tempfile.gettempdir()})", error) from error
