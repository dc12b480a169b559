"""Parallel writing of one safetensors file: each process writes its own parts, and process 0 commits the file.

The position of every tensor follows from names and shapes, so no process waits for another's data. Process 0 creates
the temporary file at its full size and sends its name; a process that finds the file shares the file system. Each
process writes and flushes its parts; then process 0 flushes and renames the file. If a process fails or dies, the file
is not renamed and all processes raise an error. Without a shared file system, process 0 writes the whole file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from jaxadapt.core import paths
from jaxadapt.core.errors import FileError, MismatchError
from jaxadapt.storage import atomic, safetensors, strided
from jaxadapt.storage.coordination import Group
from jaxadapt.storage.flush import flush_fd, write_error
from jaxadapt.storage.local_files import MAX_CALL
from jaxadapt.storage.safetensors_header import Header, TensorInfo, encode

if TYPE_CHECKING:
    import numpy as np

__all__ = ["Parts", "TensorPart", "digest", "write_as_follower", "write_as_leader"]


class TensorPart(NamedTuple):
    """One region: `shape` is the tensor's (or another for the same bytes in C order), `array` has any strides."""

    key: str
    shape: Sequence[int]
    region: Sequence[tuple[int, int]]
    array: np.ndarray


Parts = Callable[[bool], Iterator[TensorPart]]
"""A function that yields the parts this process writes. Its argument is True for a shared file: each process yields its
own parts. For False, process 0 yields all parts and the others none.

The function is called while other processes are awaited, so it should start device transfers before it returns. Every
process exhausts the iterator, since gathering for process 0 is collective."""

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
    """Write a file in process 0, while every other process calls `write_as_follower`. The caller then commits the file.

    When this returns, the bytes of the other processes are on the disk.

    Args:
        writer: the writer of the file.
        specs: (safetensors dtype, shape) by key, equal in all processes.
        metadata: strings by key.
        parts: see `Parts`.
        group: the messages between the processes.
        shared: True if all processes see the same file; None to find out.
        alike: by name, the `digest` of values that each process has and only process 0 writes. They must be equal in
            all processes.

    Raises:
        FileError: a process could not write, or did not answer in time.
    """
    path = writer.path
    first, header = encode(path, specs, metadata)
    try:
        os.ftruncate(writer.fd, header.size)
    except OSError as error:
        raise write_error(path, error) from error
    file = _SharedFile(writer.fd, path, header.data_start, header.tensors)
    file.write_at(memoryview(first), 0)
    name = writer.temporary.name
    plan = {"file": name, "size": header.size, "start": header.data_start}
    group.send("plan", plan | {"specs": _specs_digest(specs), "alike": dict(alike)})
    own_parts = None if shared is False else parts(True)
    blind = [process for process, sees in group.receive_all("sees").items() if not sees]
    if shared and blind:
        raise FileError(
            f"{path}: processes {blind} do not see the file that process 0 created there; pass a path on a file system"
            " that all processes share"
        )
    common = not blind if shared is None else shared
    group.send("mode", common)
    if not common:
        own_parts = None  # release them before all parts are gathered
    file.write(parts(False) if own_parts is None else own_parts)
    group.receive_all("written")
    return header


def write_as_follower(
    path: str, specs: Specs, parts: Parts, group: Group, shared: bool | None, alike: Mapping[str, str]
) -> None:
    """Join the `write_as_leader` of process 0. Return when the parts of this process are on the disk.

    Raises:
        MismatchError: the tensors, or the values in `alike`, differ from those of process 0.
        FileError: as in `write_as_leader`.
    """
    fd = None
    try:  # work that does not need the plan of process 0
        own_parts = None if shared is False else parts(True)
        _, header = encode(path, specs, {})
        ours = _specs_digest(specs)
    except BaseException as error:
        group.send_failure(error, "sees")
        raise
    plan = group.receive("plan")
    try:
        if plan["specs"] != ours:
            raise MismatchError(f"{path}: names, shapes or dtypes of the arrays differ from those of process 0")
        theirs = plan["alike"]
        differ = sorted(name for name in alike.keys() | theirs.keys() if alike.get(name) != theirs.get(name))
        if differ:
            raise MismatchError(
                f"{path}: these differ between the processes, and only one of them can be saved; pass arrays over all"
                " processes, or gather them (jax.experimental.multihost_utils.process_allgather):\n"
                + paths.bullets(differ)
            )
        fd = _open_shared(Path(path).parent / plan["file"], plan["size"])
    except BaseException as error:
        group.send_failure(error, "sees")
        raise
    try:
        group.send("sees", fd is not None)
        common = group.receive("mode")
        try:
            if not common:
                own_parts = None  # release them before all parts are gathered
            file = _SharedFile(-1 if fd is None else fd, path, plan["start"], header.tensors)
            file.write(parts(False) if own_parts is None else own_parts)
            if common:
                file.flush()
        except BaseException as error:
            group.send_failure(error, "written")
            raise
        group.send("written")
    finally:
        if fd is not None:
            with contextlib.suppress(OSError):  # all writes were flushed
                os.close(fd)


def _open_shared(temporary: Path, size: int) -> int | None:
    """Open the file of process 0 for writing, or return None if this process does not see it."""
    # Write-only: a client of a network file system that has read a page may later write back the whole page, and
    # overwrite new bytes of another machine with old ones.
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:  # missing or not writable here; process 0 writes instead
        return None
    with contextlib.suppress(OSError):
        if os.fstat(fd).st_size == size:
            return fd
    with contextlib.suppress(OSError):  # it has no unflushed writes
        os.close(fd)
    return None


def digest(*values: str | np.ndarray) -> str:
    """Return a hash of values, for comparison between processes."""
    import numpy as np

    result = hashlib.sha256()
    for value in values:
        if isinstance(value, str):
            result.update(value.encode())
        else:
            result.update(f"{value.dtype} {value.shape} ".encode())
            result.update(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
    return result.hexdigest()[:32]


def _specs_digest(specs: Specs) -> str:
    return digest(json.dumps({key: [dtype, list(shape)] for key, (dtype, shape) in specs.items()}, sort_keys=True))


class _SharedFile:
    """An open file of known layout."""

    def __init__(self, fd: int, path: str, start: int, tensors: Mapping[str, TensorInfo]) -> None:
        self._fd, self._path, self._start, self._tensors = fd, path, start, tensors

    def write(self, parts: Iterator[TensorPart]) -> None:
        """Write all parts. After an error, still exhaust the iterator, since other processes may wait in it."""
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
        strided.write_region(lambda data, offset: self.write_at(data, begin + offset), part.shape, bits, part.region)

    def write_at(self, data: memoryview, offset: int) -> None:
        """Write all of `data` at an offset in the file."""
        try:
            while len(data):
                count = os.pwrite(self._fd, data[:MAX_CALL], offset)
                data, offset = data[count:], offset + count
        except OSError as error:
            raise write_error(self._path, error) from error

    def flush(self) -> None:
        """Wait until all bytes are on the disk."""
        try:
            flush_fd(self._fd)
            os.close(os.dup(self._fd))  # as in `atomic`: some file systems report a failed write only on close
        except OSError as error:
            raise write_error(self._path, error) from error
