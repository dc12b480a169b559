"""The HTTP interface, and a server that runs it: OpenAI's completions, chats and models, vLLM's way to load adapters,
metrics and health.

The names and paths of adapters come from clients: each is a folder inside one root, and nothing else. A session is one
request while it runs: the pieces of its jobs, its client's leaving, and its stream of events.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import ipaddress
import json
import os
import socket
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import uvicorn
from starlette import requests
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from jaxadapt import serving
from jaxadapt.core.errors import LOGGER, AdapterError, ConfigError, FileError, warn
from jaxadapt.server.engine import END, START, Base, Engine, Job, make_room
from jaxadapt.server.protocol import (
    LEFT,
    Answer,
    Piece,
    Request,
    RequestError,
    TextStream,
    lora_error,
    parse_adapter,
    parse_request,
)
from jaxadapt.serving.pool import BASE, FILES, find_folders, is_adapter
from jaxadapt.storage import location

# ---------------------------------------------------------------- names


MAX_BYTES = 255


def find(root: Path, name: str, given: str | None = None) -> Path:
    """Return the adapter folder of a name, or the one at a path that a client gave.

    Args:
        root: the folder of the adapters.
        name: the name of the adapter.
        given: a path inside the root, absolute, or from the root or the working folder. None for the folder directly in
            the root that has the name.

    Raises:
        FileError: the name is no plain folder name, there is no adapter at the path, or the path, the folder or a file
            in it is a link that leaves the root.

    >>> find(Path("/adapters"), "../etc")
    Traceback (most recent call last):
        ...
    jaxadapt.core.errors.FileError: '../etc' is not the name of an adapter: expected a folder's name without separators,
    control characters or a dot at the start
    """
    if not is_plain(name):
        raise FileError(
            f"{name[:80]!r} is not the name of an adapter: expected a folder's name without separators, control"
            " characters or a dot at the start"
        )
    places = (root / name,) if given is None else (root / given, Path(given)) if given.isprintable() else ()
    inside = [path for path in places if given is None or _is_inside(root, path)]
    if (path := next(filter(is_adapter, inside), None)) is None:
        raise FileError(
            f"there is no adapter {(given or name)[:80]!r}: expected a folder in the adapters' folder, with"
            f" {location.CONFIG}"
        )
    if not all(_is_inside(root, each) for each in (path, *path.rglob("*"))):
        raise FileError(
            f"the adapter {name!r} contains links to files outside the adapters' folder; copy the files into it"
        )
    return path


def is_plain(name: str) -> bool:
    """Return True for a name that an adapter may have."""
    return (
        name not in ("", BASE)
        and name.isprintable()
        and not {"/", "\\", os.sep} & {*name}
        and not name.startswith(".")
        and len(os.fsencode(name)) <= MAX_BYTES
    )


def is_there(root: Path, path: Path) -> bool:
    """Return True if a folder that `find` returned is still there, and its adapter's files inside the root.

    It looks at these files only: it is called at each request.
    """
    return is_adapter(path) and all(_is_inside(root, path / name) for name in FILES)


def _is_inside(root: Path, path: Path) -> bool:
    return Path(os.path.realpath(root)) in Path(os.path.realpath(path)).parents


def scan(root: Path) -> dict[str, Path]:
    """Return `{name: folder}` of the adapters in a folder, sorted. Others are left out with a warning.

    Raises:
        FileError: the folder cannot be listed.
    """
    found: dict[str, Path] = {}
    for name in find_folders(root):
        try:
            found[name] = find(root, name)
        except FileError as error:
            warn(str(error))
    return found


# ---------------------------------------------------------------- session


class Session:
    """The jobs of one request: their pieces in the order of time, until all have ended or the client leaves."""

    def __init__(self, engine: Engine, http: requests.Request) -> None:
        self._engine, self._loop = engine, asyncio.get_running_loop()
        self._pieces: asyncio.Queue[tuple[int, Piece] | None] = asyncio.Queue()
        self._watch = asyncio.ensure_future(self._wait_for_leaving(http))
        self._left = 0
        self.jobs: Sequence[Job] = ()

    def emit(self, index: int, piece: Piece) -> None:
        """Take a piece of one job; the engine's thread calls this."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: the server has ended
            self._loop.call_soon_threadsafe(self._pieces.put_nowait, (index, piece))

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue the jobs; raise `RequestError` if there is no room."""
        self.jobs, self._left = jobs, len(jobs)
        self._engine.submit(jobs)

    async def next(self) -> tuple[int, Piece]:
        """Return the next piece and its job's number; raise `RequestError` 499 if the client left."""
        if (found := await self._pieces.get()) is None:
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

    async def _wait_for_leaving(self, http: requests.Request) -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass
        self._pieces.put_nowait(None)


class EventStream(StreamingResponse):
    """Server-sent events; the session is closed when they end, for whatever reason."""

    def __init__(self, events: AsyncIterator[str], session: Session) -> None:
        super().__init__(events, headers={"cache-control": "no-store"}, media_type="text/event-stream")
        self._session = session

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send the events."""
        try:
            await self.stream_response(send)
        except (RequestError, OSError, asyncio.CancelledError):  # the client left, or did not read until the end
            return
        finally:
            self._session.close()


# ---------------------------------------------------------------- app


MAX_BODY = 1 << 20
CLOSE = {"connection": "close"}  # the rest of the body is not read


@dataclasses.dataclass(frozen=True)
class Server:
    """The objects that all routes use.

    Attributes:
        base: the base model.
        root: the folder of the adapters.
        pool: the adapters.
        engine: the running batch.
        length: the tokens of a prompt and its answer together.
        upload_seconds: the time in which a request's body must arrive.
    """

    base: Base
    root: Path
    pool: serving.AdapterPool
    engine: Engine
    length: int
    upload_seconds: float = 10.0
    begun: int = dataclasses.field(default_factory=lambda: int(time.time()))

    # ------------------------------------------------------------ requests

    async def complete(self, http: requests.Request, *, chat: bool) -> Response:
        """Answer a completion or a chat, whole or as a stream."""
        request = parse_request(await self.read_json(http), chat=chat, seed=int.from_bytes(os.urandom(4), "big"))
        adapter = self.adapter_of(request.model)
        session = Session(self.engine, http)
        with contextlib.ExitStack() as stack:
            stack.callback(session.close)
            # Tokenizing a long prompt takes seconds, in which the server must answer others.
            session.submit(await asyncio.to_thread(self._jobs, request, adapter, chat, session))
            first = await session.next()
            if first[1].error is not None:  # it then has an HTTP status, also in a stream
                raise first[1].error
            answer = Answer(
                f"{'chatcmpl' if chat else 'cmpl'}-{os.urandom(16).hex()}",
                chat,
                int(time.time()),
                request.model,
                f"{request.model}-{session.jobs[first[0]].version}",
                self.base.spell if request.sampling.scores else None,
            )
            if request.stream:
                stack.pop_all()  # the stream closes it
                return EventStream(self._events(session, first, answer, request), session)
            return JSONResponse(await self._whole(session, first, answer, request))

    def adapter_of(self, model: str) -> str | None:
        """Return the adapter of a model's name, None for the base; raise `RequestError` 404 if there is none.

        The name is that of the base or of an adapter, or "base:adapter", as in SGLang. An adapter may itself have such
        a name.
        """
        if model in {self.base.name, f"{self.base.name}:"} - {*self.pool.names()}:
            return None
        name = model if model in self.pool.names() else model.removeprefix(f"{self.base.name}:")
        try:
            if not is_plain(name):
                raise FileError("no adapter can have this name")
            if not is_there(self.root, self.pool.version(name).path):
                raise FileError("its files are gone, or are links to files outside the adapters' folder")
        except AdapterError as error:
            raise RequestError(
                404, f"no model {model[:80]!r}: {error}", code="model_not_found", param="model"
            ) from error
        return name

    def _jobs(self, request: Request, adapter: str | None, chat: bool, session: Session) -> list[Job]:
        """Return the jobs of a request, `request.choices` for each of its prompts."""
        jobs: list[Job] = []
        for text, ids in self._encode(request, chat):
            room = self.length - len(ids)
            wanted = room if request.max_tokens is None else request.max_tokens
            if room < 1 or wanted > room:
                raise RequestError(
                    400,
                    f"{len(ids)} tokens of the prompt and {max(wanted, 1)} of the answer exceed {self.length}",
                    code="context_length_exceeded",
                    param="prompt",
                )
            echo = [*self.base.locate(ids, text)] if request.echo and request.sampling.scores else []
            jobs += [
                Job(
                    prompt=ids,
                    adapter=adapter,
                    sampling=dataclasses.replace(request.sampling, seed=(request.sampling.seed + index) % 2**32),
                    max_tokens=wanted,
                    text=TextStream(self.base.decode, request.stop, ids[-5:], len(text)),  # as many as in vLLM
                    emit=functools.partial(session.emit, index),
                    top=request.top,
                    echo=echo,
                    unsent=text,
                )
                for index in range(len(jobs), len(jobs) + request.choices)
            ]
        return jobs

    def _encode(self, request: Request, chat: bool) -> list[tuple[str, list[int]]]:
        """Return the prompts: the text to put before the answer, and the token ids."""
        if chat and not self.base.chats:
            raise RequestError(400, f"{self.base.name} has no ChatML tokens ({START}, {END}); use /v1/completions")
        if chat:
            return [("", self.base.encode_chat(request.messages))]
        prompts = [(each, self.base.encode(each)) if isinstance(each, str) else ("", each) for each in request.prompts]
        size = self.base.config.vocab_size
        if any(not ids or not all(0 <= token < size for token in ids) for _, ids in prompts):
            raise RequestError(400, f"expected at least one token, and ids below {size}", param="prompt")
        return [((text or self.base.decode(ids, special=True)) if request.echo else "", ids) for text, ids in prompts]

    async def _whole(
        self, session: Session, first: tuple[int, Piece], answer: Answer, request: Request
    ) -> dict[str, Any]:
        found: list[list[Piece]] = [[] for _ in session.jobs]
        async for index, piece in session.pieces(first):
            if piece.error is not None:
                raise piece.error
            found[index].append(piece)
        made = [
            dataclasses.replace(
                pieces[-1],
                text="".join(piece.text for piece in pieces),
                scores=[score for piece in pieces for score in piece.scores],
            )
            for pieces in found
        ]
        return answer.whole(made, self._usage(session, request))

    async def _events(
        self, session: Session, first: tuple[int, Piece], answer: Answer, request: Request
    ) -> AsyncGenerator[str]:
        sent: dict[int, int] = {}
        async for index, piece in session.pieces(first):
            if piece.error is not None:
                yield f"data: {json.dumps(self.body_of(piece.error))}\n\n"
                break
            event = answer.piece(index, piece, first=index not in sent, offset=sent.get(index, 0))
            yield f"data: {json.dumps(event)}\n\n"
            sent[index] = sent.get(index, 0) + len(piece.text)
        else:
            if request.usage:
                yield f"data: {json.dumps(answer.last(self._usage(session, request)))}\n\n"
        yield "data: [DONE]\n\n"

    def _usage(self, session: Session, request: Request) -> dict[str, int]:
        """Return OpenAI's numbers of tokens of the jobs, which have ended."""
        prompts = sum(len(job.prompt) for job in session.jobs[:: request.choices])
        answers = sum(job.count for job in session.jobs)
        return {"prompt_tokens": prompts, "completion_tokens": answers, "total_tokens": prompts + answers}

    async def read_json(self, http: requests.Request) -> Any:
        """Return the JSON of a request; raise `RequestError` if it is none, too large, or does not arrive in time."""
        # A web page cannot send this type to another site without asking first.
        if http.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise RequestError(415, "expected the content type application/json")
        body = bytearray()
        try:
            async with asyncio.timeout(self.upload_seconds):
                async for chunk in http.stream():
                    body += chunk
                    if len(body) > MAX_BODY:
                        raise RequestError(413, f"expected at most {MAX_BODY} bytes")
        except TimeoutError as error:
            raise RequestError(408, f"expected the whole request within {self.upload_seconds:g} seconds") from error
        except requests.ClientDisconnect as error:
            raise RequestError(LEFT, "the client left before the end of its request") from error
        try:
            value = json.loads(body)
            # JSON can express half of a surrogate pair, which is no text.
            json.dumps(value, ensure_ascii=False).encode()
        except (ValueError, RecursionError) as error:
            raise RequestError(400, f"expected JSON: {error}") from error
        return value

    def body_of(self, error: RequestError) -> dict[str, Any]:
        """Return the JSON of an error, without the server's paths."""
        message = str(error).replace(f"{self.root}{os.sep}", "")
        return {"error": {"message": message, "type": error.kind, "param": error.param, "code": error.code}}

    # ------------------------------------------------------------ models

    def models(self) -> list[dict[str, Any]]:
        """Return the base and the adapters as OpenAI lists models; `parent` is vLLM's name for the base."""
        entry = {"object": "model", "created": self.begun, "owned_by": "jaxadapt"}
        adapters = [{"id": name, **entry, "parent": self.base.name} for name in sorted(self.pool.names())]
        return [{"id": self.base.name, **entry, "parent": None}, *adapters]

    async def load(self, http: requests.Request) -> Response:
        """Load an adapter inside the folder under a name, with vLLM's request and answers."""
        name, path, in_place = parse_adapter(await self.read_json(http))
        if name == self.base.name or not is_plain(name):
            raise lora_error(400, f"{name[:80]!r} is the base's name, or cannot be a folder's name")
        known = self.pool.version(name) if name in self.pool.names() else None
        if known is not None and not in_place:
            raise lora_error(
                400,
                f"The lora adapter '{name}' has already been loaded. If you want to load the adapter in place, set"
                " 'load_inplace' to True.",
            )
        try:
            folder = await asyncio.to_thread(find, self.root, name, path)
        except AdapterError as error:
            raise lora_error(
                404, f"Loading lora {name} failed: No adapter found for {(path or name)[:80]}: {error}"
            ) from error
        try:
            self.pool.add(name, folder)
            await asyncio.wrap_future(self.pool.prefetch([name])[name])
        except Exception as error:
            if known is None:
                self.pool.remove(name)
            else:
                self.pool.add(name, known.path)
            if not isinstance(error, AdapterError):
                raise
            raise lora_error(400, f"Loading lora {name} failed: {error}") from error
        return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")

    async def unload(self, http: requests.Request) -> Response:
        """Forget an adapter. Requests that have a row keep it; those that wait for one fail."""
        name, _, _ = parse_adapter(await self.read_json(http))
        try:
            self.pool.remove(name)
        except AdapterError as error:
            raise lora_error(404, f"The lora adapter '{name[:80]}' cannot be found.") from error
        return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")


def make_app(server: Server, *, hosts: Sequence[str] = ("*",), started: Callable[[], None] = lambda: None) -> Starlette:
    """Build the ASGI application.

    Args:
        server: what it serves.
        hosts: the host names that requests may be for. On loopback, only loopback's: else a web page could reach the
            server under a name of its own.
        started: called once, when the application has started.
    """

    def counted(
        run: Callable[[requests.Request], Awaitable[Response]],
    ) -> Callable[[requests.Request], Awaitable[Response]]:
        async def answer(http: requests.Request) -> Response:
            try:
                response = await run(http)
            except RequestError as error:
                headers = {429: {"retry-after": "1"}, 408: CLOSE, 413: CLOSE, 415: CLOSE}.get(error.status)
                response = JSONResponse(server.body_of(error), error.status, headers)
            except Exception:
                LOGGER.exception("a request failed")
                failed = RequestError(500, "the request failed; the server's log says why", code="internal_error")
                response = JSONResponse(server.body_of(failed), failed.status)
            server.engine.metrics.count("requests_total", labels=f'status="{response.status_code}"')
            return response

        return answer

    async def models(_: requests.Request) -> Response:
        return JSONResponse({"object": "list", "data": server.models()})

    async def model(http: requests.Request) -> Response:
        name = server.adapter_of(http.path_params["name"]) or server.base.name
        return JSONResponse(next(entry for entry in server.models() if entry["id"] == name))

    async def metrics(_: requests.Request) -> Response:
        return PlainTextResponse(
            server.engine.metrics.text(
                {
                    **server.engine.gauges(),
                    "adapters": len(server.pool.names()),
                    "adapters_resident": len(server.pool.resident()),
                }
            ),
            media_type="text/plain; version=0.0.4",
        )

    async def health(_: requests.Request) -> Response:
        healthy = server.engine.healthy
        return JSONResponse({"status": "ok" if healthy else "failed"}, 200 if healthy else 503)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncGenerator[None]:
        started()
        yield
        await asyncio.to_thread(server.engine.close)
        server.pool.close()

    return Starlette(
        routes=[
            Route("/v1/completions", counted(lambda http: server.complete(http, chat=False)), methods=["POST"]),
            Route("/v1/chat/completions", counted(lambda http: server.complete(http, chat=True)), methods=["POST"]),
            Route("/v1/load_lora_adapter", counted(server.load), methods=["POST"]),
            Route("/v1/unload_lora_adapter", counted(server.unload), methods=["POST"]),
            Route("/v1/models", counted(models)),
            Route("/v1/models/{name:path}", counted(model)),
            Route("/metrics", metrics),
            Route("/health", health),
        ],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))],
        lifespan=lifespan,
    )


# ---------------------------------------------------------------- run


GRACE_SECONDS = 10


def make_server(
    base: Base,
    root: str | os.PathLike[str],
    *,
    rows: int = 8,
    slots: int | None = None,
    length: int = 512,
    rank: int = 16,
    queue: int = 64,
) -> Server:
    """Build a server: the model with a bank, the pool of adapters, the running batch. It is compiled here.

    Args:
        base: the base model.
        root: the folder of the adapter folders.
        rows: the requests that are computed at once.
        slots: the adapters on the device, with the base; None for twice the rows, and one.
        length: the tokens of a prompt and its answer together.
        rank: the least rank to have room for; a larger one in the folder makes room for itself.
        queue: the requests that may wait.

    Raises:
        ConfigError: a number is out of its range.
        FileError: the folder cannot be listed, or an adapter has the base's name.
    """
    slots = 2 * rows + 1 if slots is None else slots
    if slots <= rows or queue < 0:
        raise ConfigError(
            f"slots: expected more than the {rows} rows, since each may have an adapter of its own and slot 0 is the"
            f" base; found {slots}. queue: expected at least 0, found {queue}"
        )
    root = Path(os.path.realpath(root))
    folders = scan(root)
    if base.name in folders:
        raise FileError(f"{folders[base.name]} has the base's name, {base.name!r}; rename it")
    config, model = base.build()
    bank = serving.create(model, make_room(model, folders.values(), rank), slots=slots)
    pool = serving.AdapterPool(bank, model, folders)
    serving.attach(model, bank)
    decoder = serving.Decoder(config, *serving.nnx_forward(model), rows=rows, length=length, select=pool.select)
    for size in decoder.buckets:
        decoder.start(0, [0] * min(size, length - 1))
    decoder.step()
    return Server(base, root, pool, Engine(decoder, pool, stop=base.stop, queue=queue), length)


def is_loopback(host: str) -> bool:
    """Return True for an address of this machine only.

    >>> is_loopback("127.0.0.1"), is_loopback("0.0.0.0")
    (True, False)
    """
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def allowed_hosts(host: str) -> tuple[str, ...]:
    """Return the host names that requests to a server at this address may be for.

    >>> allowed_hosts("127.0.0.2"), allowed_hosts("0.0.0.0")
    (('localhost', '127.0.0.1', '[::1]', '127.0.0.2'), ('*',))
    """
    return ("localhost", "127.0.0.1", "[::1]", _in_url(host)) if is_loopback(host) else ("*",)


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def run(server: Server, *, host: str = "127.0.0.1", port: int = 8000, started: Callable[[str], None]) -> None:
    """Answer requests until SIGINT or SIGTERM.

    Requests that wait then fail with the status 503. Answers that have begun get ten seconds to end; a stream that is
    not at its end then gets an event with the error, and "[DONE]".

    Args:
        server: the result of `make_server`.
        host: the address to listen on.
        port: the port; 0 for a free one.
        started: called with the server's URL when it answers.

    Raises:
        FileError: the address cannot be used.
    """
    listener = listen(host, port)
    url = f"http://{_in_url(host)}:{listener.getsockname()[1]}"
    app = make_app(server, hosts=allowed_hosts(host), started=lambda: started(url))

    class Ending(uvicorn.Server):
        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            server.engine.drain(GRACE_SECONDS)
            await super().shutdown(sockets)

    # Twice the time, for a last step, and for a request that is still arriving.
    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=2 * GRACE_SECONDS)
    with listener:
        Ending(config).run(sockets=[listener])


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens at an address; raise `FileError` if the address cannot be used."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(
            address,
            family=family,
            backlog=128,
            dualstack_ipv6=family == socket.AF_INET6 and socket.has_dualstack_ipv6(),  # IPv4 too on "::", as on Linux
        )
    except OSError as error:
        raise FileError(
            f"cannot listen on {host}, port {port}: {error}. Choose another address with --host and --port"
        ) from error
