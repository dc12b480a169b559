"""Requests that the server cannot answer: its end, slow clients, errors; and what it does meanwhile."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from jaxadapt.server.app import make_app
from jaxadapt.server.engine import Engine
from tests.server.conftest import alone, write_adapter
from tests.server.test_app import GREEDY, ask, client_of, get


class Held:
    """A batch of one row, whose steps wait."""

    rows, usable = 1, True

    def __init__(self) -> None:
        self.begun, self.go = threading.Event(), threading.Event()

    def start(self, *_: Any) -> tuple[int, bool, None]:
        return 65, True, None

    def step(self) -> tuple[np.ndarray, np.ndarray, None]:
        self.begun.set()
        assert self.go.wait(60)
        return np.array([66]), np.array([True]), None

    def free(self, row: int) -> None: ...

    def compiled(self) -> int:
        return 0


def with_decoder(server: Any, decoder: Any) -> Any:
    engine = Engine(decoder, server.pool, stop=(), queue=4)
    return dataclasses.replace(server, engine=engine)


def test_the_end_of_the_server_ends_streams_and_refuses_those_that_wait(server):
    decoder = Held()
    ending = with_decoder(server, decoder)

    async def run() -> tuple[httpx.Response, ...]:
        async with client_of(ending) as client:

            def post(**fields: Any) -> asyncio.Future[httpx.Response]:
                body = {"model": "tiny", **GREEDY, **fields}
                return asyncio.ensure_future(client.post("/v1/completions", json=body))

            active = post(stream=True)
            await asyncio.to_thread(decoder.begun.wait, 60)
            waiting = [post(), post(stream=True)]
            while ending.engine.gauges()["queue_length"] < 2:
                await asyncio.sleep(0.01)
            ending.engine.drain(0)
            decoder.go.set()
            return tuple(await asyncio.gather(active, *waiting, post()))

    stream, *refused = asyncio.run(run())
    *_, error, done, rest = stream.text.split("\n\n")
    assert (stream.status_code, done, rest) == (200, "data: [DONE]", "")
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == "shutting_down"
    assert [reply.status_code for reply in refused] == [503] * 3
    assert all(reply.json()["error"]["code"] == "shutting_down" for reply in refused)
    assert get(ending, "/health").status_code == 503


def call(server: Any, messages: Sequence[dict[str, Any]], **headers: str) -> list[dict[str, Any]]:
    """Call the application with the messages that a server of ASGI would give it; return its answer's."""

    async def run() -> list[dict[str, Any]]:
        received, sent = list(messages), []

        async def receive() -> dict[str, Any]:
            if received:
                return received.pop(0)
            await asyncio.Event().wait()  # nothing more comes
            raise AssertionError

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        given = {"content-type": "application/json", "host": "localhost", **headers}
        scope = {
            "type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"", "http_version": "1.1",
            "headers": [(name.encode(), value.encode()) for name, value in given.items()],
            "scheme": "http", "server": ("localhost", 80), "client": ("localhost", 1),
        }  # fmt: skip
        await asyncio.wait_for(make_app(server)(scope, receive, send), 60)
        return sent

    return asyncio.run(run())


def test_a_client_that_does_not_read_its_stream_leaves_no_error_at_the_end(server, caplog):
    """Uvicorn cancels what has not ended in time, and would log a traceback."""

    async def run() -> None:
        messages = [{"type": "http.request", "body": json.dumps({"model": "fr", **GREEDY, "stream": True}).encode()}]
        waiting = asyncio.Event()

        async def receive() -> dict[str, Any]:
            if messages:
                return messages.pop()
            await asyncio.Event().wait()
            raise AssertionError

        async def send(_: Any) -> None:
            waiting.set()
            await asyncio.Event().wait()

        scope = {
            "type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"", "http_version": "1.1",
            "headers": [(b"content-type", b"application/json"), (b"host", b"localhost")],
        }  # fmt: skip
        task = asyncio.ensure_future(make_app(server)(scope, receive, send))
        await asyncio.wait_for(waiting.wait(), 60)
        task.cancel()
        await task

    asyncio.run(run())
    assert not caplog.text


PART = {"type": "http.request", "body": b'{"model": "fr", ', "more_body": True}


def test_a_client_that_leaves_during_its_upload_is_no_error(server, caplog):
    start, *_ = call(server, [PART, {"type": "http.disconnect"}])
    assert start["status"] == 499
    assert not caplog.text


def test_a_body_that_does_not_arrive_in_time_is_refused(server):
    start, body = call(dataclasses.replace(server, upload_seconds=0.05), [PART])
    assert start["status"] == 408
    assert (b"connection", b"close") in start["headers"]
    assert "within 0.05 seconds" in json.loads(body["body"])["error"]["message"]


def test_others_are_answered_while_a_prompt_is_tokenized(server):
    """The tokenizer's `encode` would hold the interpreter's lock, so that no thread runs beside it."""
    answered = threading.Event()

    class Slow:
        def encode_batch(self, texts: list[str], **options: Any) -> Any:
            assert answered.wait(60)
            return server.base.tokenizer.encode_batch(texts, **options)

    slow = dataclasses.replace(server, base=dataclasses.replace(server.base, tokenizer=Slow()))

    async def run() -> httpx.Response:
        async with client_of(slow) as client:
            long = asyncio.ensure_future(client.post("/v1/completions", json={"model": "fr", "prompt": "x" * 900_000}))
            await asyncio.sleep(0)
            for path in ("/health", "/metrics", "/v1/models"):
                assert (await client.get(path)).status_code == 200
            answered.set()
            return await long

    assert "900000 tokens" in asyncio.run(run()).json()["error"]["message"]


def test_an_unexpected_error_has_the_form_of_the_others_and_says_nothing_of_the_server(server, caplog):
    class Wrong:
        def encode_batch(self, texts: list[str], **options: Any) -> Any:
            raise ZeroDivisionError("in /home/someone")

    wrong = dataclasses.replace(server, base=dataclasses.replace(server.base, tokenizer=Wrong()))
    (reply,) = ask(wrong, {"model": "fr", **GREEDY})
    assert (reply.status_code, reply.json()["error"]["code"]) == (500, "internal_error")
    assert "someone" not in reply.text
    assert "someone" in caplog.text


def test_answers_do_not_contain_the_servers_paths(server, base, root):
    folder = write_adapter(root / "partial", 3, base)
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    loads = {"lora_name": "partial"}, {"lora_name": "other", "lora_path": str(folder)}
    replies = ask(server, *loads, path="/v1/load_lora_adapter")
    for reply in replies + ask(server, {"model": "broken", **GREEDY}, {"model": "broken", **GREEDY, "stream": True}):
        assert reply.status_code == 400, reply.text
        assert str(root) not in reply.text
    assert "partial/adapter_model.safetensors" in replies[0].json()["error"]["message"]
    assert str(root) not in get(server, "/v1/models").text


def test_a_request_does_not_walk_through_the_adapters_folder(server, monkeypatch):
    def fail(*_: Any) -> Any:
        raise AssertionError("a request lists all files of a folder")

    monkeypatch.setattr(Path, "rglob", fail)
    assert ask(server, {"model": "fr", **GREEDY})[0].status_code == 200


def test_a_link_that_replaces_a_file_later_is_refused(server, base, root, tmp_path):
    folder = write_adapter(root / "later", 3, base)
    assert ask(server, {"lora_name": "later"}, path="/v1/load_lora_adapter")[0].status_code == 200
    (folder / "adapter_model.safetensors").rename(tmp_path / "weights")
    (folder / "adapter_model.safetensors").symlink_to(tmp_path / "weights")
    (reply,) = ask(server, {"model": "later", **GREEDY})
    assert (reply.status_code, "outside the adapters' folder" in reply.text) == (404, True)


@pytest.mark.parametrize("name", ["tiny:fr", "tiny:", "tiny:none", "other:fr", "fr:", "tiny:tiny"])
def test_names_as_sglangs(server, name):
    """ "base:adapter" is the adapter, and "base:" the base."""
    (reply,) = ask(server, {"model": name, **GREEDY})
    if name not in ("tiny:fr", "tiny:"):
        assert reply.status_code == 404
        return
    (plain,) = ask(server, {"model": {"tiny:fr": "fr", "tiny:": "tiny"}[name], **GREEDY})
    assert reply.json()["choices"] == plain.json()["choices"]
    assert reply.json()["model"] == name
    assert get(server, f"/v1/models/{name}").json()["id"] == plain.json()["model"]


@pytest.mark.parametrize("name", ["tiny:new", "tiny:"])
def test_an_adapter_with_a_name_as_sglangs_answers(server, base, root, name):
    """/v1/models lists it, so a request for it gets it."""
    write_adapter(root / name, 17, base)
    assert ask(server, {"lora_name": name}, path="/v1/load_lora_adapter")[0].status_code == 200
    (reply,) = ask(server, {"model": name, **GREEDY})
    assert reply.json()["choices"][0]["text"] == base.decode(alone(base, root / name, "Hello", 12))
    assert get(server, f"/v1/models/{name}").json()["id"] == name
    assert name in {model["id"] for model in get(server, "/v1/models").json()["data"]}
    assert ask(server, {"lora_name": name}, path="/v1/unload_lora_adapter")[0].status_code == 200


def test_adapters_are_loaded_and_unloaded_with_vllms_requests_and_answers(server, base, root, tmp_path):
    """The statuses, types and texts are those of vLLM's `OpenAIServingModels`, and its own tests' cases."""
    folder = write_adapter(root / "team" / "checkpoint-1", 8, base)
    outside = write_adapter(tmp_path / "outside", 8, base)

    def send(action: str, **body: Any) -> tuple[int, str]:
        (reply,) = ask(server, body, path=f"/v1/{action}_lora_adapter")
        if reply.status_code == 200:
            return 200, reply.text
        error = reply.json()["error"]
        assert (error["code"], error["param"]) == (reply.status_code, None)
        return reply.status_code, f"{error['type']}: {error['message']}"

    added, removed = (
        "Success: LoRA adapter 'mine' added successfully.",
        "Success: LoRA adapter 'mine' removed successfully.",
    )
    loaded = (
        "InvalidUserInput: The lora adapter 'mine' has already been loaded. If you want to load the adapter in place,"
        " set 'load_inplace' to True."
    )
    assert send("load", lora_name="mine", lora_path=str(folder)) == (200, added)
    (found,) = ask(server, {"model": "mine", **GREEDY})
    assert send("load", lora_name="mine", lora_path="team/checkpoint-1") == (400, loaded)
    assert send("load", lora_name="mine", lora_path=str(root / "broken"), load_inplace=True)[0] == 400
    assert ask(server, {"model": "mine", **GREEDY})[0].json()["choices"] == found.json()["choices"]
    assert send("load", lora_name="mine", lora_path=str(root / "fr"), load_inplace=True) == (200, added)
    (fr, now) = ask(server, {"model": "fr", **GREEDY}, {"model": "mine", **GREEDY})
    assert fr.json()["choices"] == now.json()["choices"] != found.json()["choices"]
    assert send("unload", lora_name="mine", lora_int_id=3) == (200, removed)
    assert send("unload", lora_name="mine") == (404, "NotFoundError: The lora adapter 'mine' cannot be found.")
    assert send("load", lora_name="mine", lora_path="")[1] == (
        "InvalidUserInput: Both 'lora_name' and 'lora_path' must be provided."
    )
    for path in (str(outside), "../outside", "/not/an/adapter", str(root), str(root / "team"), "a\0b"):
        status, text = send("load", lora_name="mine", lora_path=path)
        assert (status, text.startswith("NotFoundError: Loading lora mine failed: No adapter found for")) == (404, True)
    assert send("load", lora_name="invalid", lora_path=str(root / "broken"))[0] == 400
    assert {"mine", "invalid"}.isdisjoint(server.pool.names())
