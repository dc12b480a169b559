"""Object stores on this machine, for tests: fsspec's memory, and servers that speak S3's and Google's protocols."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import socketserver
import urllib.request
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

KINDS = ("memory", "s3", "gs")
NEEDS = {"memory": (), "s3": ("s3fs", "moto", "flask"), "gs": ("gcsfs", "gcp_storage_emulator")}
KEYS = {"AWS_ACCESS_KEY_ID": "somebody", "AWS_SECRET_ACCESS_KEY": "secret"}


@contextlib.contextmanager
def environment(**values: str | None) -> Generator[None]:
    """Environment variables for a while; None: unset."""
    before = {name: os.environ.get(name) for name in values}

    def put(values: dict[str, str | None]) -> None:
        for name, value in values.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})

    put(values)
    try:
        yield
    finally:
        put(before)


@contextlib.contextmanager
def s3() -> Generator[str]:
    """A server; yields its bucket's address. `localhost`: a name that has to be looked up, as in earnest."""
    from moto.moto_server.threaded_moto_server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="localhost", port=0, verbose=False)
    server.start()
    endpoint = "http://localhost:{1}".format(*server.get_host_and_port())
    settings = {"AWS_ENDPOINT_URL": endpoint, "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "1"}
    # What a server of this process held before is there again otherwise.
    urllib.request.urlopen(urllib.request.Request(f"{endpoint}/moto-api/reset", method="POST")).close()
    with environment(**KEYS, **settings):
        import s3fs

        s3fs.S3FileSystem.clear_instance_cache()
        s3fs.S3FileSystem(use_listings_cache=False).mkdir("bucket")
        try:
            yield "s3://bucket"
        finally:
            server.stop()
            s3fs.S3FileSystem.clear_instance_cache()


@contextlib.contextmanager
def gs() -> Generator[str]:
    from gcp_storage_emulator.server import create_server

    class Quiet(socketserver.TCPServer):
        def handle_error(self, request: Any, client_address: Any) -> None:
            pass  # a client that has read enough hangs up

    server = create_server("localhost", 0, in_memory=True, default_bucket="bucket")
    server.start()
    server._api._httpd.handle_error = Quiet.handle_error.__get__(server._api._httpd)
    endpoint = f"http://localhost:{server._api._httpd.server_port}"
    settings = {
        "STORAGE_EMULATOR_HOST": endpoint,
        "TENSORSTORE_GCS_HTTP_URL": endpoint,
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # it would ask Google what kind of bucket this is
    }
    with environment(**settings):
        import gcsfs

        gcsfs.GCSFileSystem.clear_instance_cache()
        try:
            yield "gs://bucket"
        finally:
            server.stop()
            gcsfs.GCSFileSystem.clear_instance_cache()


@contextlib.contextmanager
def memory() -> Generator[str]:
    yield "memory://bucket"


def start(kind: str) -> contextlib.AbstractContextManager[str]:
    """A bucket of a kind; skips where its packages are missing (they are in the extra `test`)."""
    if not all(importlib.util.find_spec(name) for name in NEEDS[kind]):
        pytest.skip(f"needs {', '.join(NEEDS[kind])} (extra `test`)")
    return {"memory": memory, "s3": s3, "gs": gs}[kind]()


def files(address: str) -> dict[str, bytes]:
    """Everything under an address, by relative path, as the store's own package sees it."""
    import fsspec

    fs, inner = fsspec.core.url_to_fs(address, use_listings_cache=False)
    inner = inner.strip("/")
    with contextlib.suppress(FileNotFoundError):
        return {str(Path(p.strip("/")).relative_to(inner)): fs.cat_file(p) for p in sorted(fs.find(inner))}
    return {}
