"""Parallel writing of one safetensors file: each process writes its own parts, and process 0 commits the file.

The position of every tensor follows from names and shapes, so no process waits for another's data. Process 0 creates
the temporary file at its full size and sends its name; a process that finds the file shares the file system. Each
process writes and flushes its parts; then process 0 flushes and renames the file. If a process fails or dies, the file
is not renamed and all processes raise an error. Without a shared file system, process 0 writes the whole file.

The processes of a job send short messages through JAX's coordination service, with timeouts. Process 0 is the leader,
the others are followers. No message passes through devices, so a process that has died delays the others by at most the
timeout. (JAX itself ends the others when it misses heartbeats of one process.)
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxadapt.core.errors import FileError, MismatchError, Report, byte_counter, raise_listed
from jaxadapt.core.lazy import jax, np
from jaxadapt.storage import atomic, local_files, safetensors

# ---------------------------------------------------------------- coordination


_MAX_ERROR = 4000  # characters of an error that is sent to other processes


class Group:
    """One exchange of messages between all processes. The n-th `Group` of each process belongs to the same exchange.

    It may be used from another thread than the one that created it, and several may be in use at once.
    """

    def __init__(
        self, action: str | os.PathLike[str], timeout: float, stages: Sequence[str] = ("plan", "mode", "result")
    ) -> None:
        """Start the exchange. Every process does so in the same order as for its other exchanges.

        Args:
            action: the file or folder that is written, or another action, for messages.
            timeout: the longest wait for one answer, in seconds.
            stages: the names of the messages of process 0, in order; by default those of one `write`.

        Raises:
            FileError: JAX's distributed service is not initialized.
        """
        # A private name: the client of `jax.distributed.initialize` has no public one, and device collectives, the
        # public alternative, wait without a timeout. Orbax uses the same name.
        from jax._src.distributed import global_state

        client: Any = global_state.client
        if client is None:
            raise FileError(
                f"{os.fspath(action)}: cannot use arrays of several processes without JAX's distributed service; call"
                " jax.distributed.initialize() in each process"
            )
        self.index: int = jax.process_index()
        self.count: int = jax.process_count()
        self._client, self._action, self._timeout = client, os.fspath(action), timeout
        self._pending = list(stages) if self.index == 0 else []
        self._final = stages[-1]
        number = client.key_value_increment(f"jaxadapt/conversations/{self.index}", 1)
        self._prefix = f"jaxadapt/conversation/{number}"

    def send(self, name: str, value: Any = None) -> None:
        """Send a JSON value: from process 0 to all others, from any other process to process 0."""
        if self.index == 0:
            self._pending.remove(name)
        self._publish(name, {"value": value})

    @contextlib.contextmanager
    def announce_failure(self, name: str | None = None) -> Generator[None]:
        """Send an error of the block in place of the message `name`; without a name, of process 0's next message."""
        try:
            yield
        except BaseException as error:
            if name is not None or self._pending:
                with contextlib.suppress(FileError):  # the error itself is raised
                    self._publish(
                        self._pending.pop(0) if name is None else name,
                        {"error": (str(error) or repr(error))[:_MAX_ERROR]},
                    )
            raise

    def _publish(self, name: str, message: Any) -> None:
        try:
            self._client.key_value_set(f"{self._prefix}/{name}/{self.index}", json.dumps(message))
        except RuntimeError as error:  # jax.errors.JaxRuntimeError
            raise FileError(
                f"{self._action}: process 0 no longer answers; see its log ({str(error).splitlines()[0][:200]})"
            ) from error

    def receive(self, name: str) -> Any:
        """Return the value that process 0 sent. Raises `FileError` if it failed, or sent nothing within 2 x timeout.

        (Process 0 may itself wait one timeout for a dead process before it can report it.)
        """
        value = self._wait_for(name, 0, 2 * self._timeout)
        if name == self._final:  # the last process deletes the messages; process 0 has finished with this one
            with contextlib.suppress(RuntimeError):
                if self._client.key_value_increment(f"{self._prefix}/heard", 1) == self.count - 1:
                    self._client.key_value_delete(self._prefix)
        return value

    def receive_all(self, name: str) -> dict[int, Any]:
        """Return the value of each other process. Raises one `FileError` naming all that failed or were too late."""
        deadline = time.monotonic() + self._timeout
        values: dict[int, Any] = {}
        problems: list[str] = []
        for process in range(1, self.count):
            try:
                values[process] = self._wait_for(name, process, deadline - time.monotonic())
            except FileError as error:
                problems.append(str(error))
        if problems:
            raise FileError("; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if problems[8:] else ""))
        return values

    def _wait_for(self, name: str, process: int, wait: float) -> Any:
        started = time.monotonic()
        try:
            key = f"{self._prefix}/{name}/{process}"
            message = json.loads(self._client.blocking_key_value_get(key, max(1, int(1000 * wait))))
        except RuntimeError as error:  # jax.errors.JaxRuntimeError: too late, or the service does not answer
            raise FileError(
                f"{self._action}: process {process} sent nothing for {time.monotonic() - started:.0f} s; check"
                f" that it is alive, and that every process makes this call ({str(error).splitlines()[0][:200]})"
            ) from error
        if "error" in message:
            raise FileError(f"process {process}: {message['error']}")
        return message["value"]


# ---------------------------------------------------------------- sharded write


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

Put = Callable[[atomic.Writer, Mapping[str, str]], safetensors.Header]
"""Writes the file of all processes with this metadata into an open replacement, and returns its header."""


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
        group: the messages.
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
    layout = safetensors.named_specs(specs)
    if group.index > 0:
        _follow(os.fspath(path), layout, parts, group, shared, alike, report, shares)
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
) -> safetensors.Header:
    path = writer.path
    first, header = safetensors.encode(path, layout, metadata)
    with atomic.write_errors(path):
        os.ftruncate(writer.fd, header.size)
    atomic.write_at(writer.fd, memoryview(first), 0, path)
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
    _write_parts(writer.fd, path, header.data_start, header.tensors, own_parts or parts(False), report)
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
        _, header = safetensors.encode(path, layout, {})
        ours = {"specs": _layout_digest(layout), "alike": alike}
    plan = group.receive("plan")
    with contextlib.ExitStack() as stack:
        with group.announce_failure("sees"):
            _compare(path, ours, plan)
            # Write-only: a client of a network file system that has read a page may later write back the whole page,
            # and overwrite new bytes of another machine with old ones.
            flags = os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK
            try:
                fd = stack.enter_context(atomic.opened(Path(path).parent / plan["file"], flags))
                sees = os.fstat(fd).st_size == plan["size"]
            except OSError:  # missing or not writable here; process 0 writes instead
                fd, sees = -1, False  # no descriptor: there are then no parts to write
        group.send("sees", sees)
        common = group.receive("mode")
        with group.announce_failure("written"):
            if not common:
                own_parts = None  # release them before all parts are gathered
            _write_parts(fd, path, plan["start"], header.tensors, own_parts or parts(False), report)
            if common and sees:
                atomic.flush_file(fd, path)
        group.send("written", shares)


def _compare(path: str, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    """Raise `MismatchError` if the digests of this process differ from those of process 0."""
    if theirs["specs"] != ours["specs"]:
        raise MismatchError(f"{path}: names, shapes or dtypes of the arrays differ from those of process 0")
    names = ours["alike"].keys() | theirs["alike"].keys()
    raise_listed(
        MismatchError,
        f"{path}: these differ between the processes, and only one of them can be saved; pass arrays over all"
        " processes, or gather them (jax.experimental.multihost_utils.process_allgather):",
        sorted(name for name in names if ours["alike"].get(name) != theirs["alike"].get(name)),
    )


def digest(*values: str | np.ndarray) -> str:
    """Return a hash of values, for comparison between processes."""
    result = hashlib.sha256()
    for value in values:
        if isinstance(value, str):
            result.update(value.encode())
        else:
            result.update(f"{value.dtype} {value.shape} ".encode())
            result.update(local_files.flat_bytes(value))
    return result.hexdigest()[:32]


def _layout_digest(layout: Mapping[str, tuple[str, Sequence[int]]]) -> str:
    return digest(json.dumps({key: [dtype, list(shape)] for key, (dtype, shape) in layout.items()}, sort_keys=True))


def _write_parts(
    fd: int,
    path: str,
    start: int,
    tensors: Mapping[str, safetensors.TensorInfo],
    parts: tuple[int, Iterator[TensorPart]],
    report: Report,
) -> None:
    """Write all parts into an open file whose tensors begin at `start`.

    After an error, still exhaust the iterator, since other processes may wait in it.
    """
    total, each = parts
    count = byte_counter(report, "save", total)
    failed: BaseException | None = None

    def put(begin: int, data: memoryview, offset: int) -> None:
        atomic.write_at(fd, data, begin + offset, path)

    for part in each:
        if failed is not None:
            continue
        try:
            put_part = functools.partial(put, start + tensors[part.key].start)
            local_files.write_region(put_part, part.shape, safetensors.little_bits(part.array), part.region)
            count(part.array.nbytes)
        except FileError as error:
            failed = error
    if failed is not None:
        raise failed
