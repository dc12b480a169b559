"""Continuous batching: one thread owns the batch; requests enter and leave it between two tokens."""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from jaxadapt.core.errors import AdapterError
from jaxadapt.core.progress import LOGGER
from jaxadapt.server.metrics import Metrics
from jaxadapt.server.protocol import RequestError
from jaxadapt.server.text import TextStream
from jaxadapt.serving import AdapterPool, Decoder, Sampling


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of an answer.

    Attributes:
        text: the text that is new.
        tokens: the tokens so far.
        version: the id of the adapter's version; 0 for the base.
        reason: None while the answer goes on; "stop" or "length" at its end.
        error: why the request failed, at its end.
    """

    text: str = ""
    tokens: int = 0
    version: int = 0
    reason: str | None = None
    error: RequestError | None = None

    @property
    def final(self) -> bool:
        """True for the last piece."""
        return self.reason is not None or self.error is not None


@dataclasses.dataclass(eq=False)
class Job:
    """One prompt and what became of it.

    Attributes:
        prompt: token ids.
        adapter: the adapter's name, None for the base.
        sampling: how tokens are chosen.
        max_tokens: the most tokens.
        stop: strings that end the answer.
        emit: called in the engine's thread with each piece; it must not block or raise.
    """

    prompt: Sequence[int]
    adapter: str | None
    sampling: Sampling
    max_tokens: int
    stop: Sequence[str]
    emit: Callable[[Piece], None]
    begun: float = dataclasses.field(default_factory=time.monotonic)
    loaded: concurrent.futures.Future[Any] | None = None
    cancelled: bool = False
    count: int = 0
    version: int = 0
    text: TextStream | None = None
    held: contextlib.ExitStack = dataclasses.field(default_factory=contextlib.ExitStack)


class Engine:
    """The running batch. `submit` and `cancel` may be called from any thread.

    Args:
        decoder: the batch; it belongs to the engine's thread from now on.
        pool: the adapters, with at least one slot for each row.
        decode: returns the text of token ids.
        stop: tokens that end an answer.
        queue: the most requests that wait for a row.
        metrics: the counters.
    """

    def __init__(
        self,
        decoder: Decoder,
        pool: AdapterPool,
        decode: Callable[[Sequence[int]], str],
        *,
        stop: Sequence[int],
        queue: int,
        metrics: Metrics,
    ) -> None:
        self._decoder, self._pool, self._decode, self._stop = decoder, pool, decode, frozenset(stop)
        self._queue, self._metrics = queue, metrics
        self._changed = threading.Condition()
        self._waiting: collections.deque[Job] = collections.deque()
        self._active: dict[int, Job] = {}
        self._closed: RequestError | None = None
        self._thread = threading.Thread(target=self._run, name="jaxadapt-engine", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------ for all threads

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue the jobs of one request, all or none.

        Raises:
            RequestError: 429 if the queue is full, 400 for more jobs than fit in an empty one, 503 if the engine is
                closed or has failed.
        """
        most = self._queue + self._decoder.rows
        if len(jobs) > most:
            raise RequestError(400, f"prompt: expected at most {most} prompts, found {len(jobs)}", param="prompt")
        with self._changed:
            if self._closed is not None:
                raise self._closed
            # What enters a free row at once does not wait.
            free = self._decoder.rows - len(self._active)
            if len(self._waiting) + len(jobs) > self._queue + max(0, free):
                raise RequestError(
                    429, f"{len(self._waiting)} requests wait already; try again later", code="queue_full"
                )
            for job in jobs:
                if job.adapter is not None:  # read the files beside the computation
                    job.loaded = self._pool.prefetch([job.adapter])[job.adapter]
                    job.loaded.add_done_callback(self._wake)
            self._waiting.extend(jobs)
            self._changed.notify_all()

    def cancel(self, job: Job) -> None:
        """End a job whose client left; its row is free before the next token."""
        with self._changed:
            job.cancelled = True
            self._changed.notify_all()

    def gauges(self) -> dict[str, int]:
        """Return the numbers of rows, of requests that have one, of those that wait, and of compiled programs."""
        with self._changed:
            rows, active, waiting = self._decoder.rows, len(self._active), len(self._waiting)
        return {
            "rows": rows, "rows_active": active, "queue_length": waiting,
            "compiled_programs": self._decoder.compiled(),
        }  # fmt: skip

    @property
    def healthy(self) -> bool:
        """True while requests are taken."""
        with self._changed:
            return self._closed is None

    def close(self) -> None:
        """Take no more requests, fail those that are there, and end the thread."""
        self._shut(RequestError(503, "the server is shutting down", code="shutting_down"))
        self._thread.join()

    def _shut(self, error: RequestError) -> None:
        with self._changed:
            self._closed = self._closed or error
            self._changed.notify_all()

    def _wake(self, _: Any) -> None:
        with self._changed:
            self._changed.notify_all()

    # ------------------------------------------------------------ the engine's thread

    def _run(self) -> None:
        try:
            while self._closed is None:
                for row, job in self._admit():
                    self._start(row, job)
                if self._active:
                    self._advance()
        except Exception:
            LOGGER.exception("the engine stops: a step of the batch failed")
            self._shut(RequestError(500, "a step of the batch failed; the server's log says why", code="engine_failed"))
        closed = self._closed
        assert closed is not None
        with self._changed:
            waiting = list(self._waiting)
            self._waiting.clear()
        for job in waiting:
            self._end(job, Piece(error=closed))
        for row in list(self._active):
            self._leave(row, Piece(error=closed))

    def _admit(self) -> list[tuple[int, Job]]:
        """Wait until there is something to do; return the jobs whose turn it is, with free rows."""
        with self._changed:
            while True:
                for row in [row for row, job in self._active.items() if job.cancelled]:
                    self._leave(row, None)
                for job in [job for job in self._waiting if job.cancelled]:
                    self._waiting.remove(job)
                ready = [job for job in self._waiting if job.loaded is None or job.loaded.done()]
                rows = [row for row in range(self._decoder.rows) if row not in self._active]
                turn = list(zip(rows, ready, strict=False))
                if turn or self._active or self._closed is not None:
                    for row, job in turn:
                        self._waiting.remove(job)
                        self._active[row] = job
                    return turn
                self._changed.wait()

    def _start(self, row: int, job: Job) -> None:
        slot = 0
        try:
            if job.loaded is not None and job.adapter is not None:
                _result(job.loaded, job.adapter)
                lease = job.held.enter_context(self._pool.lease([job.adapter]))
                slot, job.version = lease.slots[0], lease.versions[0]
        except AdapterError as error:
            message = f"the adapter {job.adapter!r} cannot be loaded: {error}"
            self._leave(row, Piece(error=RequestError(400, message, code="adapter_error", param="model")))
            return
        job.text = TextStream(self._decode, job.stop)
        token, finite = self._decoder.start(row, job.prompt, job.sampling, slot)
        self._metrics.count("prompt_tokens_total", len(job.prompt))
        self._metrics.observe("first_token_seconds", time.monotonic() - job.begun)
        self._take(row, token, finite)

    def _advance(self) -> None:
        tokens, finite = self._decoder.step()
        self._metrics.count("steps_total")
        for row in list(self._active):
            self._take(row, int(tokens[row]), bool(finite[row]))

    def _take(self, row: int, token: int, finite: bool) -> None:
        job = self._active[row]
        assert job.text is not None
        if not finite:
            message = f"the logits of {job.adapter or 'the base'} are not finite; check the adapter's values"
            self._leave(row, Piece(error=RequestError(400, message, code="adapter_error", param="model")))
            return
        self._metrics.count("generated_tokens_total")
        job.count += 1
        ended = token in self._stop
        text = "" if ended else job.text.push(token)
        reason = "stop" if ended or job.text.stopped else "length" if job.count >= job.max_tokens else None
        if reason is not None and not job.text.stopped:
            text += job.text.finish()
            reason = "stop" if job.text.stopped else reason
        piece = Piece(text, job.count, job.version, reason)
        if reason is not None:
            self._leave(row, piece)
        elif text:
            job.emit(piece)

    def _leave(self, row: int, last: Piece | None) -> None:
        with self._changed:
            job = self._active.pop(row)
        self._decoder.free(row)
        self._end(job, last)

    def _end(self, job: Job, last: Piece | None) -> None:
        job.held.close()
        if last is not None:
            self._metrics.observe("request_seconds", time.monotonic() - job.begun)
            job.emit(last)


def _result(loaded: concurrent.futures.Future[Any], name: str) -> None:
    """Raise `AdapterError` for an adapter that was not loaded, whatever the reason: it ends its own requests only."""
    try:
        loaded.result()
    except AdapterError:
        raise
    except Exception as error:  # an error of any other class must not end the engine
        LOGGER.exception("the adapter %r cannot be loaded", name)
        raise AdapterError(repr(error)) from error
