"""The HTTP interface: OpenAI's completions, chats and models, vLLM's way to load adapters, metrics and health."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from jaxadapt.core.errors import AdapterError, FileError
from jaxadapt.server import names, protocol
from jaxadapt.server.base import END, START, Base
from jaxadapt.server.engine import Engine, Job, Piece
from jaxadapt.server.metrics import Metrics
from jaxadapt.server.protocol import Answer, Request, RequestError
from jaxadapt.serving import AdapterPool

MAX_BODY = 1 << 20
LEFT = 499  # the status of a request whose client left


@dataclasses.dataclass(frozen=True)
class Server:
    """The objects that all routes use.

    Attributes:
        base: the base model.
        root: the folder of the adapters.
        pool: the adapters.
        engine: the running batch.
        length: the tokens of a prompt and its answer together.
        metrics: the counters.
    """

    base: Base
    root: Path
    pool: AdapterPool
    engine: Engine
    length: int
    metrics: Metrics
    begun: int = dataclasses.field(default_factory=lambda: int(time.time()))

    # ------------------------------------------------------------ requests

    async def complete(self, http: HttpRequest, *, chat: bool) -> Response:
        """Answer a completion or a chat, whole or as a stream."""
        body = await read_json(http)
        request = protocol.parse_request(body, chat=chat, seed=int.from_bytes(os.urandom(4), "big"))
        adapter = self.adapter_of(request.model)
        session = Session(self.engine, http)
        jobs = [
            Job(prompt, adapter, self._own(request, i), self._room(request, prompt), request.stop, session.emit(i))
            for i, prompt in enumerate(self._encode(request, chat))
        ]
        kind = "chatcmpl" if chat else "cmpl"
        answer = Answer(f"{kind}-{uuid.uuid4().hex}", chat, int(time.time()), request.model, "")
        session.submit(jobs)
        try:
            first = await session.next()  # an error before the first token has an HTTP status, also in a stream
            named = dataclasses.replace(answer, fingerprint=f"{request.model}-{first[1].version}")
            if request.stream:
                return EventStream(self._events(session, first, named, request.usage), session)
            whole = await self._whole(session, first, named)
        except BaseException:
            session.close()
            raise
        session.close()
        return JSONResponse(whole)

    def adapter_of(self, model: str) -> str | None:
        """Return the adapter of a model's name, None for the base; raise `RequestError` 404 if there is none."""
        if model == self.base.name:
            return None
        try:
            self.pool.version(model)
            names.find(self.root, model)
        except AdapterError as error:
            raise RequestError(
                404, f"no model {model[:80]!r}: {error}", code="model_not_found", param="model"
            ) from error
        return model

    def _own(self, request: Request, index: int) -> Any:
        return dataclasses.replace(request.sampling, seed=(request.sampling.seed + index) % 2**32)

    def _encode(self, request: Request, chat: bool) -> list[list[int]]:
        if chat and not self.base.chats:
            raise RequestError(400, f"{self.base.name} has no ChatML tokens ({START}, {END}); use /v1/completions")
        if chat:
            return [self.base.encode_chat(request.messages)]
        return [self.base.encode(prompt) if isinstance(prompt, str) else prompt for prompt in request.prompts]

    def _room(self, request: Request, prompt: Sequence[int]) -> int:
        """Return the most tokens of an answer."""
        room = self.length - len(prompt)
        wanted = room if request.max_tokens is None else request.max_tokens
        if not prompt or any(not 0 <= token < self.base.config.vocab_size for token in prompt):
            message = f"expected at least one token, and ids below {self.base.config.vocab_size}"
            raise RequestError(400, message, param="prompt")
        if room < 1 or wanted > room:
            message = f"{len(prompt)} tokens of the prompt and {wanted} of the answer exceed {self.length}"
            raise RequestError(400, message, code="context_length_exceeded", param="prompt")
        return wanted

    async def _whole(self, session: Session, first: tuple[int, Piece], answer: Answer) -> dict[str, Any]:
        texts, reasons, counts = [""] * len(session.jobs), [""] * len(session.jobs), [0] * len(session.jobs)
        async for index, piece in session.pieces(first):
            if piece.error is not None:
                raise piece.error
            texts[index] += piece.text
            reasons[index], counts[index] = piece.reason or "", piece.tokens
        usage = protocol.usage_of(sum(len(job.prompt) for job in session.jobs), sum(counts))
        return answer.whole(list(zip(texts, reasons, strict=True)), usage)

    async def _events(
        self, session: Session, first: tuple[int, Piece], answer: Answer, usage: bool
    ) -> AsyncGenerator[str]:
        counts = [0] * len(session.jobs)
        seen: set[int] = set()
        async for index, piece in session.pieces(first):
            if piece.error is not None:
                yield f"data: {json.dumps(piece.error.body())}\n\n"
                return
            counts[index] = piece.tokens
            yield f"data: {json.dumps(answer.piece(index, piece.text, piece.reason, first=index not in seen))}\n\n"
            seen.add(index)
        if usage:
            of = protocol.usage_of(sum(len(job.prompt) for job in session.jobs), sum(counts))
            yield f"data: {json.dumps(answer.last(of))}\n\n"
        yield "data: [DONE]\n\n"

    # ------------------------------------------------------------ models

    def models(self) -> list[dict[str, Any]]:
        """Return the base and the adapters as OpenAI lists models; `parent` is vLLM's name for the base."""
        entry = {"object": "model", "created": self.begun, "owned_by": "jaxadapt"}
        adapters = [{"id": name, **entry, "parent": self.base.name} for name in sorted(self.pool.names())]
        return [{"id": self.base.name, **entry, "parent": None}, *adapters]

    async def load(self, http: HttpRequest) -> Response:
        """Load an adapter of the folder: a new one, or a new version of one whose files changed."""
        name = adapter_name(await read_json(http), path=True)
        try:
            if name == self.base.name:
                raise FileError(f"{name!r} is the base's name; rename the adapter's folder")
            known = name in self.pool.names()
            self.pool.add(name, names.find(self.root, name))
            try:
                version = await asyncio.wrap_future(self.pool.prefetch([name])[name])
            except AdapterError:
                if not known:
                    self.pool.remove(name)
                raise
        except AdapterError as error:
            raise RequestError(400, f"cannot load {name[:80]!r}: {error}", code="adapter_error") from error
        return JSONResponse({"id": name, "object": "model", "version": version.id})

    async def unload(self, http: HttpRequest) -> Response:
        """Forget an adapter. Requests that have a row keep it; those that wait for one fail."""
        name = adapter_name(await read_json(http), path=False)
        try:
            self.pool.remove(name)
        except AdapterError as error:
            raise RequestError(404, str(error), code="model_not_found") from error
        return JSONResponse({"id": name, "object": "model", "deleted": True})

    def text(self) -> str:
        """Return the metrics."""
        known = {"adapters": len(self.pool.names()), "adapters_resident": len(self.pool.resident())}
        return self.metrics.text(self.engine.gauges() | known)


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
        try:
            self._engine.submit(jobs)
        except RequestError:
            self.close()
            raise

    async def next(self) -> tuple[int, Piece]:
        """Return the next piece and its job's number; raise the error of a job, or 499 if the client left."""
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
        except (RequestError, OSError):  # the client left
            return
        finally:
            self._session.close()


async def read_json(http: HttpRequest) -> Any:
    """Return the JSON of a request; raise `RequestError` if it is none, or too large."""
    # A web page cannot send this type to another site without asking first.
    if http.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise RequestError(415, "expected the content type application/json")
    body = b""
    async for chunk in http.stream():
        body += chunk
        if len(body) > MAX_BODY:
            raise RequestError(413, f"expected at most {MAX_BODY} bytes")
    try:
        value = json.loads(body)
        json.dumps(value, ensure_ascii=False).encode()  # JSON can express half of a surrogate pair, which is no text
    except (ValueError, RecursionError) as error:
        raise RequestError(400, f"expected JSON: {error}") from error
    return value


def adapter_name(body: Any, *, path: bool) -> str:
    """Return lora_name of a request in vLLM's form. lora_path, if given, must be the same name."""
    fields: dict[str, Any] = body if isinstance(body, dict) else {}
    name = fields.get("lora_name")
    if not isinstance(name, str):
        raise RequestError(400, "expected an object with lora_name, a string", param="lora_name")
    if path and fields.get("lora_path", name) != name:
        raise RequestError(400, "lora_path must be the name of the folder, as lora_name", param="lora_path")
    return name


def make_app(server: Server, *, hosts: Sequence[str] = ("*",), started: Callable[[], None] = lambda: None) -> Starlette:
    """Build the ASGI application.

    Args:
        server: what it serves.
        hosts: the host names that requests may be for. On loopback, only loopback's: else a web page could reach the
            server under a name of its own.
        started: called once, when the application has started.
    """

    def counted(run: Callable[[HttpRequest], Awaitable[Response]]) -> Callable[[HttpRequest], Awaitable[Response]]:
        async def answer(http: HttpRequest) -> Response:
            try:
                response = await run(http)
            except RequestError as error:
                headers = {"retry-after": "1"} if error.status == 429 else None
                response = JSONResponse(error.body(), error.status, headers)
            server.metrics.count("requests_total", labels=f'status="{response.status_code}"')
            return response

        return answer

    async def completions(http: HttpRequest) -> Response:
        return await server.complete(http, chat=False)

    async def chats(http: HttpRequest) -> Response:
        return await server.complete(http, chat=True)

    async def models(_: HttpRequest) -> Response:
        return JSONResponse({"object": "list", "data": server.models()})

    async def model(http: HttpRequest) -> Response:
        name = http.path_params["name"]
        server.adapter_of(name)
        return JSONResponse(next(entry for entry in server.models() if entry["id"] == name))

    async def metrics(_: HttpRequest) -> Response:
        return PlainTextResponse(server.text(), media_type="text/plain; version=0.0.4")

    async def health(_: HttpRequest) -> Response:
        healthy = server.engine.healthy
        return JSONResponse({"status": "ok" if healthy else "failed"}, 200 if healthy else 503)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncGenerator[None]:
        started()
        yield
        await asyncio.to_thread(server.engine.close)
        server.pool.close()

    routes = [
        Route("/v1/completions", counted(completions), methods=["POST"]),
        Route("/v1/chat/completions", counted(chats), methods=["POST"]),
        Route("/v1/load_lora_adapter", counted(server.load), methods=["POST"]),
        Route("/v1/unload_lora_adapter", counted(server.unload), methods=["POST"]),
        Route("/v1/models", counted(models)),
        Route("/v1/models/{name:path}", counted(model)),
        Route("/metrics", metrics),
        Route("/health", health),
    ]
    middleware = [Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))]
    return Starlette(routes=routes, middleware=middleware, lifespan=lifespan)
