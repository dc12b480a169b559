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
from typing import TYPE_CHECKING, Any, NamedTuple

from jaxadapt.core.errors import FileError, MismatchError, raise_listed
from jaxadapt.core.progress import Report, byte_counter
from jaxadapt.storage import atomic, safetensors, strided
from jaxadapt.storage.coordination import Group
from jaxadapt.storage.flush import close_fd, flush_fd, write_error
from jaxadapt.storage.local_files import MAX_CALL
from jaxadapt.storage.safetensors_header import Header, TensorInfo, encode

if TYPE_CHECKING:
    import numpy as np

__all__ = ["Parts", "Put", "TensorPart", "digest", "start", "write"]


class TensorPart(NamedTuple):
    """One region: `shape` is the tensor's (or another for the same bytes in C order), `array` has any strides."""

    key: str
    shape: Sequence[int]
    region: Sequence[tuple[int, int]]
    array: np.ndarray


Parts = Callable[[bool], tuple[int, Iterator[TensorPart]]]
"""A function that returns the parts that this process writes: their bytes in all, and an iterator. Its argument is True
for a shared file: each process returns its own parts. For False, process 0 returns all parts and the others none.

The function is called while other processes are awaited, so it should start device transfers before it returns. Every
process exhausts the iterator, since gathering for process 0 is collective."""

Specs = Mapping[str, tuple[Any, Sequence[int]]]

Put = Callable[[atomic.Writer, Mapping[str, str]], Header]
"""Writes the file of all processes with this metadata into an open replacement, and returns its header."""


def start(action: str | os.PathLike[str], timeout: float) -> Group:
    """Start the messages of one `write`. Every process calls this in the same order as for its other writes.

    Args:
        action: the file or folder, for messages.
        timeout: in seconds, for each answer of another process.
    """
    return Group(os.fspath(action), timeout, ("plan", "mode", "result"))


def write(
    path: str | os.PathLike[str],
    specs: Specs,
    parts: Parts,
    group: Group,
    commit: Callable[[Put], object],
    *,
    shared: bool | None,
    alike: Mapping[str, str],
    report: Report,
    shares: dict[str, int] | None = None,
) -> None:
    """Write one file from all processes; each of them calls this.

    Args:
        path: the file.
        specs: (dtype, shape) by key, equal in all processes.
        parts: see `Parts`.
        group: the messages, from `start`.
        commit: called in process 0 with a `Put`. It opens the replacement of the file, calls the `Put` once, and
            replaces the file. When the `Put` returns, the bytes of the other processes are on the disk.
        shared: True if all processes see the same file; None to find out.
        alike: by name, the `digest` of values that each process has and only process 0 writes. They must be equal in
            all processes.
        report: called with ("save", bytes, bytes in all) for the bytes that this process writes.
        shares: shares of CRCs by key (see `checksum`), which `parts` fills. When the `Put` returns, those of process 0
            are joined with those of all others.

    Raises:
        FileError: in all processes, if one of them could not write, or did not answer in time. The file is then
            unchanged.
        MismatchError: the tensors, or the values in `alike`, differ from those of process 0.
    """
    name, layout = os.fspath(path), safetensors.named_specs(specs)
    if group.index > 0:
        _follow(name, layout, parts, group, shared, alike, report, shares)
        group.receive("result")
        return
    with group.announce_failure():
        commit(lambda writer, metadata: _lead(writer, layout, metadata, parts, group, shared, alike, report, shares))
    group.send("result")


def _lead(
    writer: atomic.Writer,
    layout: Mapping[str, tuple[str, Sequence[int]]],
    metadata: Mapping[str, str],
    parts: Parts,
    group: Group,
    shared: bool | None,
    alike: Mapping[str, str],
    report: Report,
    shares: dict[str, int] | None,
) -> Header:
    path = writer.path
    first, header = encode(path, layout, metadata)
    try:
        os.ftruncate(writer.fd, header.size)
    except OSError as error:
        raise write_error(path, error) from error
    file = _SharedFile(writer.fd, path, header.data_start, header.tensors)
    file.write_at(memoryview(first), 0)
    plan = {"file": writer.temporary.name, "size": header.size, "start": header.data_start}
    group.send("plan", plan | {"specs": _layout_digest(layout), "alike": dict(alike)})
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
    file.write(own_parts or parts(False), report)
    for others in group.receive_all("written").values():
        if shares is not None:
            shares.update({key: shares.get(key, 0) ^ value for key, value in others.items()})
    return header


def _follow(
    path: str,
    layout: Mapping[str, tuple[str, Sequence[int]]],
    parts: Parts,
    group: Group,
    shared: bool | None,
    alike: Mapping[str, str],
    report: Report,
    shares: dict[str, int] | None,
) -> None:
    with group.announce_failure("sees"):  # work that does not need the plan of process 0
        own_parts = None if shared is False else parts(True)
        _, header = encode(path, layout, {})
        ours = {"specs": _layout_digest(layout), "alike": alike}
    plan = group.receive("plan")
    with contextlib.ExitStack() as stack:
        with group.announce_failure("sees"):
            _compare(path, ours, plan)
            fd = _open_shared(Path(path).parent / plan["file"], plan["size"])
            if fd is not None:
                stack.callback(close_fd, fd)  # all writes are flushed before
        group.send("sees", fd is not None)
        common = group.receive("mode")
        with group.announce_failure("written"):
            if not common:
                own_parts = None  # release them before all parts are gathered
            file = _SharedFile(-1 if fd is None else fd, path, plan["start"], header.tensors)
            file.write(own_parts or parts(False), report)
            if common:
                file.flush()
        group.send("written", shares)


def _compare(path: str, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    """Raise `MismatchError` if the digests of this process differ from those of process 0."""
    if theirs["specs"] != ours["specs"]:
        raise MismatchError(f"{path}: names, shapes or dtypes of the arrays differ from those of process 0")
    names = ours["alike"].keys() | theirs["alike"].keys()
    differ = sorted(name for name in names if ours["alike"].get(name) != theirs["alike"].get(name))
    raise_listed(
        MismatchError,
        f"{path}: these differ between the processes, and only one of them can be saved; pass arrays over all"
        " processes, or gather them (jax.experimental.multihost_utils.process_allgather):",
        differ,
    )


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
    close_fd(fd)
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


def _layout_digest(layout: Mapping[str, tuple[str, Sequence[int]]]) -> str:
    return digest(json.dumps({key: [dtype, list(shape)] for key, (dtype, shape) in layout.items()}, sort_keys=True))


class _SharedFile:
    """An open file of known layout."""

    def __init__(self, fd: int, path: str, start: int, tensors: Mapping[str, TensorInfo]) -> None:
        self._fd, self._path, self._start, self._tensors = fd, path, start, tensors

    def write(self, parts: tuple[int, Iterator[TensorPart]], report: Report) -> None:
        """Write all parts. After an error, still exhaust the iterator, since other processes may wait in it."""
        total, each = parts
        count = byte_counter(report, "save", total)
        failed: BaseException | None = None
        for part in each:
            if failed is not None:
                continue
            try:
                self._write(part)
                count(part.array.nbytes)
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
