"""Coordination of the processes of one job: short messages through JAX's coordination service, with timeouts.

Process 0 is the leader, the others are followers. No message passes through devices, so a process that has died delays
the others by at most the timeout. (JAX itself ends the others when it misses heartbeats of one process.)
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Generator, Sequence
from typing import Any

from jaxadapt.core.errors import FileError

__all__ = ["Group"]

_MAX_ERROR = 4000  # characters of an error that is sent to other processes


class Group:
    """One exchange of messages between all processes. The n-th `Group` of each process belongs to the same exchange.

    It may be used from another thread than the one that created it, and several may be in use at once.
    """

    def __init__(self, action: str, timeout: float, stages: Sequence[str]) -> None:
        """Start the exchange.

        Args:
            action: the action, for messages.
            timeout: the longest wait for one answer, in seconds.
            stages: the names of the messages of process 0, in order.

        Raises:
            FileError: JAX's distributed service is not initialised.
        """
        import jax

        # A private name: the client of `jax.distributed.initialize` has no public one, and device collectives, the
        # public alternative, wait without a timeout. Orbax uses the same name.
        from jax._src.distributed import global_state

        client: Any = global_state.client
        if client is None:
            raise FileError(
                f"{action}: cannot use arrays of several processes without JAX's distributed service; call"
                " jax.distributed.initialize() in each process"
            )
        self.index, self.count = jax.process_index(), jax.process_count()
        self._client, self._action, self._timeout = client, action, timeout
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
                message = {"error": (str(error) or repr(error))[:_MAX_ERROR]}
                with contextlib.suppress(FileError):  # the error itself is raised
                    self._publish(self._pending.pop(0) if name is None else name, message)
            raise

    def _publish(self, name: str, message: Any) -> None:
        try:
            self._client.key_value_set(self._key(name, self.index), json.dumps(message))
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

    def _key(self, name: str, process: int) -> str:
        return f"{self._prefix}/{name}/{process}"

    def _wait_for(self, name: str, process: int, wait: float) -> Any:
        started = time.monotonic()
        try:
            message = json.loads(
                self._client.blocking_key_value_get(self._key(name, process), max(1, int(1000 * wait)))
            )
        except RuntimeError as error:  # jax.errors.JaxRuntimeError: too late, or the service does not answer
            waited = time.monotonic() - started
            raise FileError(
                f"{self._action}: process {process} sent nothing for {waited:.0f} s; check that it is alive, and that"
                f" every process makes this call ({str(error).splitlines()[0][:200]})"
            ) from error
        if "error" in message:
            raise FileError(f"process {process}: {message['error']}")
        return message["value"]
