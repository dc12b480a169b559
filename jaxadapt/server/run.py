"""Building a server from a base and a folder of adapters, and running it."""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Callable
from pathlib import Path

import uvicorn

from jaxadapt import serving
from jaxadapt.core.errors import ConfigError, FileError, warn
from jaxadapt.server.app import Server, make_app
from jaxadapt.server.base import Base, make_room, scan
from jaxadapt.server.engine import Engine, Metrics

GRACE_SECONDS = 10
LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "[::1]")


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
    folders, problems = scan(root)
    if base.name in folders:
        raise FileError(f"{folders[base.name]} has the base's name, {base.name!r}; rename it")
    for problem in problems:
        warn(problem)
    config, model = base.build()
    bank = serving.create(model, make_room(model, folders.values(), rank, base.targets), slots=slots)
    pool = serving.AdapterPool(bank, model, folders)
    serving.attach(model, bank)
    decoder = serving.Decoder(config, *serving.nnx_forward(model), rows=rows, length=length, select=pool.select)
    for size in decoder.buckets:
        decoder.start(0, [0] * min(size, length - 1))
    decoder.step()
    metrics = Metrics()
    engine = Engine(decoder, pool, base.decode, stop=base.stop, queue=queue, metrics=metrics)
    return Server(base, root, pool, engine, length, metrics)


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
    return (*LOOPBACK_HOSTS, _in_url(host)) if is_loopback(host) else ("*",)


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
    listener = _listen(host, port)
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


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(128)
    except OSError as error:
        raise FileError(f"cannot listen on {host}, port {port}: {error}. Choose another one with --port") from error
    return listener
