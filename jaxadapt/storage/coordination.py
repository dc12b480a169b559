"""The processes of one job talking: short messages through JAX's own coordination service, awaited in bounded time.

Process 0 leads, the others follow. Nothing passes through devices, so a process that has died cannot hold up the rest
longer than the timeout (and JAX itself ends the others when it misses the heartbeats of one).
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Sequence
from typing import Any

from jaxadapt.core.errors import FileError

__all__ = ["Group"]

_LONGEST = 4000  # characters of an error that is passed on


class Group:
    """One conversation, in which every process takes part once: the n-th of each process belong together.

    It may go on in another thread than the one it was begun in, beside others.
    """

    def __init__(self, what: str, timeout: float, stages: Sequence[str]) -> None:
        """`what` is being done, for messages.

        `timeout` is how long one answer may take, in seconds; `stages` what process 0 will say, in this order.
        """
        import jax

        # The one place with a private name: what `jax.distributed.initialize` sets up has no public one, and device
        # collectives, the public way, wait for ever. Orbax does the same.
        from jax._src.distributed import global_state

        client: Any = global_state.client
        if client is None:
            raise FileError(f"{what}: arrays of several processes need jax.distributed.initialize() in each of them")
        self.index, self.count = jax.process_index(), jax.process_count()
        self._client, self._what, self._timeout = client, what, timeout
        self._due = list(stages) if self.index == 0 else []
        self._last = stages[-1]
        number = client.key_value_increment(f"jaxadapt/conversations/{self.index}", 1)
        self._prefix = f"jaxadapt/conversation/{number}"

    def send(self, name: str, value: Any = None) -> None:
        """Says something (any JSON value): to all from process 0, to process 0 from any other."""
        if self.index == 0:
            self._due.remove(name)
        self._say(name, {"value": value})

    def send_failure(self, error: BaseException, name: str | None = None) -> None:
        """Says that it failed, in the place of `name`, or of what process 0 would have said next."""
        if name is None and not self._due:
            return
        message = {"error": (str(error) or repr(error))[:_LONGEST]}
        with contextlib.suppress(FileError):  # the error itself is raised
            self._say(self._due.pop(0) if name is None else name, message)

    def _say(self, name: str, message: Any) -> None:
        try:
            self._client.key_value_set(self._key(name, self.index), json.dumps(message))
        except RuntimeError as error:  # jax.errors.JaxRuntimeError
            raise FileError(f"{self._what}: process 0 is gone ({str(error).splitlines()[0][:200]})") from error

    def receive(self, name: str) -> Any:
        """What process 0 says. Raises `FileError` if it failed, or says nothing in twice the time.

        (It may have to wait for one that is gone itself, before it can tell the rest which it is.)
        """
        value = self._hear(name, 0, 2 * self._timeout)
        if name == self._last:  # who leaves last switches off the light; process 0 has left with this
            with contextlib.suppress(RuntimeError):
                if self._client.key_value_increment(f"{self._prefix}/heard", 1) == self.count - 1:
                    self._client.key_value_delete(self._prefix)
        return value

    def receive_all(self, name: str) -> dict[int, Any]:
        """What each of the others says. Raises one `FileError` naming all that failed or say nothing in time."""
        deadline = time.monotonic() + self._timeout
        heard: dict[int, Any] = {}
        problems: list[str] = []
        for process in range(1, self.count):
            try:
                heard[process] = self._hear(name, process, deadline - time.monotonic())
            except FileError as error:
                problems.append(str(error))
        if problems:
            raise FileError("; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if problems[8:] else ""))
        return heard

    def _key(self, name: str, process: int) -> str:
        return f"{self._prefix}/{name}/{process}"

    def _hear(self, name: str, process: int, wait: float) -> Any:
        began = time.monotonic()
        try:
            message = json.loads(
                self._client.blocking_key_value_get(self._key(name, process), max(1, int(1000 * wait)))
            )
        except RuntimeError as error:  # jax.errors.JaxRuntimeError: too late, or the service is gone
            waited = time.monotonic() - began
            raise FileError(
                f"{self._what}: process {process} said nothing for {waited:.0f} s: is it alive, and did every process"
                f" make this call? ({str(error).splitlines()[0][:200]})"
            ) from error
        if "error" in message:
            raise FileError(f"process {process}: {message['error']}")
        return message["value"]
