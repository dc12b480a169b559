"""One request while it runs: the pieces of its jobs, its client's leaving, and its stream of events."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from jaxadapt.server.engine import Engine, Job, Piece
from jaxadapt.server.protocol import LEFT, RequestError


class Session:
    """The jobs of one request: their pieces in the order of time, until all have ended or the client leaves."""

    def __init__(self, engine: Engine, http: HttpRequest) -> None:
        self._engine, self._loop = engine, asyncio.get_running_loop()
        self._pieces: asyncio.Queue[tuple[int, Piece] | None] = asyncio.Queue()
        self._watch = asyncio.ensure_future(self._wait_for_leaving(http))
        self._left = 0
        self.jobs: Sequence[Job] = ()

    def emit(self, index: int) -> Callable[[Piece], None]:
        """Return the function that the engine's thread calls with the pieces of one job."""

        def emit(piece: Piece) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the server has ended
                self._loop.call_soon_threadsafe(self._pieces.put_nowait, (index, piece))

        return emit

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue the jobs; raise `RequestError` if there is no room."""
        self.jobs, self._left = jobs, len(jobs)
        self._engine.submit(jobs)

    async def next(self) -> tuple[int, Piece]:
        """Return the next piece and its job's number; raise `RequestError` 499 if the client left."""
        found = await self._pieces.get()
        if found is None:
            raise RequestError(LEFT, "the client left")
        self._left -= found[1].final
        return found

    async def pieces(self, first: tuple[int, Piece]) -> AsyncGenerator[tuple[int, Piece]]:
        """Yield the first piece, which `next` returned, and all others until every job has ended."""
        yield first
        while self._left:
            yield await self.next()

    def close(self) -> None:
        """Cancel the jobs that have not ended."""
        self._watch.cancel()
        for job in self.jobs:
            self._engine.cancel(job)

    async def _wait_for_leaving(self, http: HttpRequest) -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass
        self._pieces.put_nowait(None)


class EventStream(Response):
    """Server-sent events; the session is closed when they end, for whatever reason."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[str], session: Session) -> None:
        super().__init__(headers={"cache-control": "no-store"})
        del self.headers["content-length"]
        self._events, self._session = events, session

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send the events."""
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async for event in self._events:
                await send({"type": "http.response.body", "body": event.encode(), "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        except (RequestError, OSError, asyncio.CancelledError):  # the client left, or did not read until the end
            return
        finally:
            self._session.close()
