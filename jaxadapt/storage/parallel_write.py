"""One safetensors file from many processes at once: each writes its own parts, one of them commits.

Where every tensor lies follows from names and shapes alone, so nobody waits for anybody's data. Process 0 makes the
temporary file, at its full size, and names it; who finds a file of that name has the file system in common. Each
writes and flushes its parts; when all have, process 0 flushes and renames. If one fails or dies, nothing is renamed
and all end with an error. Without a common file system process 0 writes everything.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from jaxadapt.core import paths
from jaxadapt.core.errors import FileError, MismatchError
from jaxadapt.storage import atomic, local_files, safetensors, strided
from jaxadapt.storage import flush as flush_module
from jaxadapt.storage.coordination import Group
from jaxadapt.storage.safetensors_header import Header, TensorInfo, encode

if TYPE_CHECKING:
    import numpy as np

__all__ = ["Parts", "TensorPart", "digest", "write_as_follower", "write_as_leader"]

# The disk is set to work on what lies so many bytes of this process' own behind, an eighth of all within these bounds.
_NEAR, _FAR = 4 << 20, 64 << 20
_LOTS = 4  # each time a part of that has gathered


class TensorPart(NamedTuple):
    """A box of one tensor: `shape` is the tensor's (or another for the same bytes in C order), `array` any layout."""

    key: str
    shape: Sequence[int]
    box: Sequence[tuple[int, int]]
    array: np.ndarray


Parts = Callable[[bool], Iterator[TensorPart]]
"""What this process is to write: its own parts of a shared file, or (False) process 0 everything, the others nothing.

It is called while others are waited for: what takes an array off its device is best done before the iterator begins.
That is always run to its end in all processes, since gathering for process 0 takes them all."""

Specs = Mapping[str, tuple[str, Sequence[int]]]


def write_as_leader(
    writer: atomic.Writer,
    specs: Specs,
    metadata: Mapping[str, str],
    parts: Parts,
    group: Group,
    shared: bool | None,
    alike: Mapping[str, str],
) -> Header:
    """Writes a file together with the `write_as_follower` of every other process. For process 0, which then commits it.

    Args:
        writer: of the file, in which everything that the others write is on the disk when this returns.
        specs: (safetensors dtype, shape) by key, equal in all processes.
        parts: see `Parts`.
        shared: whether all processes see one file; None: find out.
        alike: the `digest` of what each process has of its own and only process 0 writes, by name: it must be the
            same in all.

    Raises:
        FileError: this process, or another, could not write, or did not answer in time.
    """
    path = writer.path
    first, header = encode(path, specs, metadata)
    try:
        os.ftruncate(writer.fd, header.size)
    except OSError as error:
        raise _error(path, error) from error
    place = _SharedFile(writer.fd, path, header.data_start, header.tensors, header.size // group.count)
    place.write_at(memoryview(first), 0)
    name = writer.temporary.name
    plan = {"file": name, "size": header.size, "start": header.data_start}
    group.send("plan", plan | {"specs": _specs_digest(specs), "alike": dict(alike)})
    mine = None if shared is False else parts(True)
    blind = [process for process, sees in group.receive_all("sees").items() if not sees]
    if shared and blind:
        raise FileError(
            f"{path}: processes {blind} do not see the file that process 0 has made there; give a path on a file"
            " system that all processes have in common"
        )
    common = not blind if shared is None else shared
    group.send("mode", common)
    if not common:
        mine = None  # before others are gathered
    place.write(parts(False) if mine is None else mine)
    group.receive_all("written")
    return header


def write_as_follower(
    path: str, specs: Specs, parts: Parts, group: Group, shared: bool | None, alike: Mapping[str, str]
) -> None:
    """Takes part in the `write_as_leader` of process 0; returns when this process' parts are on the disk.

    Raises:
        MismatchError: the tensors, or what should be alike, are not those of process 0.
        FileError: as `write_as_leader`.
    """
    fd = None
    try:  # what can be done before process 0 has spoken
        mine = None if shared is False else parts(True)
        _, header = encode(path, specs, {})
        ours = _specs_digest(specs)
    except BaseException as error:
        group.send_failure(error, "sees")
        raise
    plan = group.receive("plan")
    try:
        if plan["specs"] != ours:
            raise MismatchError(f"{path}: the names, shapes or dtypes of its arrays are not those of process 0's")
        theirs = plan["alike"]
        differ = sorted(name for name in alike.keys() | theirs.keys() if alike.get(name) != theirs.get(name))
        if differ:
            raise MismatchError(
                f"{path}: these differ between the processes, and only one could be saved; give arrays over all"
                " processes, or gather what each has (jax.experimental.multihost_utils.process_allgather):\n"
                + paths.bullets(differ)
            )
        fd = _open(Path(path).parent / plan["file"], plan["size"])
    except BaseException as error:
        group.send_failure(error, "sees")
        raise
    try:
        group.send("sees", fd is not None)
        common = group.receive("mode")
        try:
            if not common:
                mine = None  # before others are gathered
            place = _SharedFile(
                -1 if fd is None else fd, path, plan["start"], header.tensors, header.size // group.count
            )
            place.write(parts(False) if mine is None else mine)
            if common:
                place.flush()
        except BaseException as error:
            group.send_failure(error, "written")
            raise
        group.send("written")
    finally:
        if fd is not None:
            with contextlib.suppress(OSError):  # what was written was flushed
                os.close(fd)


def _open(temporary: Path, size: int) -> int | None:
    """The file of process 0, if it is to be seen from here. (Not read: see below.)"""
    # Write-only: a network file system's client that has read a page may later write all of it back, and with it old
    # bytes where another machine has written new ones.
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:  # not there, or not for this process to write: process 0 can
        return None
    with contextlib.suppress(OSError):
        if os.fstat(fd).st_size == size:
            return fd
    with contextlib.suppress(OSError):  # nothing was written to it
        os.close(fd)
    return None


def digest(*values: str | np.ndarray) -> str:
    """What stands for values when they are compared between processes."""
    import numpy as np

    found = hashlib.sha256()
    for value in values:
        if isinstance(value, str):
            found.update(value.encode())
        else:
            found.update(f"{value.dtype} {value.shape} ".encode())
            found.update(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
    return found.hexdigest()[:32]


def _specs_digest(specs: Specs) -> str:
    return digest(json.dumps({key: [dtype, list(shape)] for key, (dtype, shape) in specs.items()}, sort_keys=True))


def _error(path: str, error: OSError) -> FileError:
    return local_files.file_error("write", path, error, "what the path held before is untouched")


class _SharedFile:
    """An open file of known layout.

    The disk is set to work on what lies some way behind, where the other processes, which go through the file in the
    same order, will have been as well: with gaps that they have still to fill it would get thousands of fragments,
    which took three times as long to write and seconds to delete. In a small file there are few, and the processes do
    not get far from each other. What lies `_FAR` behind leaves the cache, as in `atomic.Writer`.
    """

    def __init__(self, fd: int, path: str, start: int, tensors: Mapping[str, TensorInfo], share: int) -> None:
        """`share` is how many bytes this process is to write, or about that."""
        self._fd, self._path, self._start, self._tensors = fd, path, start, tensors
        lag = min(_FAR, max(_NEAR, share // 8))
        self._lot, self._cached = lag // _LOTS, max(_LOTS + 1, _FAR * _LOTS // lag)
        self._fresh = 0  # bytes since the last of these
        self._behind: deque[tuple[int, int]] = deque()  # where one lot after the other was written, first and last
        self._low, self._high = sys.maxsize, 0

    def write(self, parts: Iterator[TensorPart]) -> None:
        """Writes all parts. If that fails the rest is still made, and not written: others may be waiting for it."""
        failed: BaseException | None = None
        for part in parts:
            if failed is not None:
                continue
            try:
                self._write(part)
            except FileError as error:
                failed = error
        if failed is not None:
            raise failed

    def _write(self, part: TensorPart) -> None:
        begin = self._start + self._tensors[part.key].start
        bits = safetensors.little_bits(part.array)
        strided.write_region(lambda data, at, *cut: self.write_at(data, begin + at, *cut), part.shape, bits, part.box)

    def write_at(self, data: memoryview, offset: int, run: int = 0, step: int = 0) -> None:
        """Writes all of `data` at an offset in the file; in runs of so many bytes, which begin so far apart."""
        run = run or len(data)
        self._low = min(self._low, offset)
        self._fresh += len(data)
        fd, pwrite = self._fd, os.pwrite
        try:
            for start in range(0, len(data), run):
                done = pwrite(fd, data[start : start + run], offset)
                while done < run:
                    done += pwrite(fd, data[start + done : start + run], offset + done)
                self._high = max(self._high, offset + run)
                offset += step
            if self._fresh >= self._lot:
                self._set_to_work()
        except OSError as error:
            raise _error(self._path, error) from error

    def _set_to_work(self) -> None:
        self._behind.append((self._low, self._high))
        self._fresh, self._low, self._high = 0, sys.maxsize, 0
        if len(self._behind) >= _LOTS:
            self._start_writeback(self._behind[-_LOTS])
        if len(self._behind) >= self._cached:  # what began long ago is done, and leaves
            self._start_writeback(self._behind.popleft())

    def _start_writeback(self, lot: tuple[int, int]) -> None:
        low, high = lot
        atomic.start_writeback(self._fd, low, high - low)

    def flush(self) -> None:
        """Waits until everything is on the disk."""
        try:
            flush_module.flush_fd(self._fd)
            os.close(os.dup(self._fd))  # as in `atomic`: some file systems report a failed write on closing only
        except OSError as error:
            raise _error(self._path, error) from error
