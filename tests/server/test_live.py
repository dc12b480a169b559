"""`jaxadapt serve` in a process of its own, and OpenAI's client."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from click.testing import CliRunner

from jaxadapt.cli import main
from tests.server.conftest import alone, write_base
from tests.support import compiling

pytestmark = pytest.mark.network


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process and its URL. At the end SIGTERM must end it in order, also among requests; see `end`."""
    folder = write_base(tmp_path_factory.mktemp("live") / "tiny")
    words = ["serve", "--base", folder, "--adapters", root, "--port", "0", "--rows", "2", "--length", "64", "--json"]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "XLA_FLAGS": "", **compiling.ENV}
    with (folder / "log").open("w+") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "jaxadapt", *map(str, words)], env=env, text=True, stdout=subprocess.PIPE, stderr=log
        )
        assert process.stdout is not None
        said = "".join(line for line in iter(process.stdout.readline, "}\n")) + "}"
        url = json.loads(said)["url"]
        yield process, url
        try:
            end(process, url)
        finally:
            process.kill()
        log.seek(0)
        assert "Traceback" not in log.read()


def end(process: subprocess.Popen[str], url: str) -> None:
    """Send SIGTERM while two requests have a row and others wait: the former end, the latter are refused."""
    port = int(url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port)) as upload:
        head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        upload.sendall(f"{head}content-length: 900\r\n\r\n{{".encode())  # and it leaves
    clients = [http.client.HTTPConnection("127.0.0.1", port, timeout=60) for _ in range(40)]
    for client in clients:
        client.request("GET", "/health")
        assert client.getresponse().read() == b'{"status":"ok"}'
    body = json.dumps({"model": "fr", "prompt": "x", "max_tokens": 60, "temperature": 0, "stream": True})
    for client in clients:
        client.request("POST", "/v1/completions", body, {"content-type": "application/json"})
    while b"jaxadapt_rows_active 2\n" not in urllib.request.urlopen(url + "/metrics").read():
        pass
    process.send_signal(signal.SIGTERM)
    replies = [(reply.status, reply.read().decode()) for reply in (client.getresponse() for client in clients)]
    ended, refused = ([text for code, text in replies if (code == 200) == right] for right in (True, False))
    assert ended
    assert refused
    assert all(text.endswith("data: [DONE]\n\n") for text in ended)
    assert {code for code, _ in replies} == {200, 503}
    assert all(json.loads(text)["error"]["code"] == "shutting_down" for text in refused)
    assert process.wait(60) == -signal.SIGTERM


def test_an_address_in_use_is_an_error_before_the_base_is_read(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        words = ["serve", "--base", tmp_path, "--adapters", tmp_path, "--port", taken.getsockname()[1]]
        result = CliRunner().invoke(main, list(map(str, words)))
    assert result.exit_code == 1
    assert "cannot listen on 127.0.0.1" in result.output


@pytest.fixture
def client(live: Any) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=live[1] + "/v1", api_key="-", max_retries=0) as made:
        yield made


def metric(live: Any, name: str) -> float:
    lines = urllib.request.urlopen(live[1] + "/metrics").read().decode().splitlines()
    return sum(float(line.split()[1]) for line in lines if line.split(" ")[0] == f"jaxadapt_{name}")


def test_the_client_of_openai(client, base, root):
    options: Any = {"prompt": "Hello", "max_tokens": 8, "temperature": 0}
    assert {model.id for model in client.models.list()} >= {"tiny", "fr", "de", "it"}
    for name in ("fr", "tiny"):
        answer = client.completions.create(model=name, **options)
        folder = None if name == "tiny" else root / name
        assert answer.choices[0].text == base.decode(alone(base, folder, "Hello", 8))
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 8
        stream = client.completions.create(model=name, stream=True, **options)
        assert "".join(piece.choices[0].text for piece in stream) == answer.choices[0].text
    several = client.completions.create(model="fr", n=2, logprobs=2, echo=True, **options)
    for choice in several.choices:
        assert choice.text == "Hello" + client.completions.create(model="fr", **options).choices[0].text
        assert choice.logprobs is not None
        assert choice.logprobs.token_logprobs is not None
        assert len(choice.logprobs.token_logprobs) == 13
    messages: Any = [{"role": "user", "content": "Hi"}]
    chat = client.chat.completions.create(model="it", messages=messages, max_completion_tokens=4, temperature=0)
    stream = client.chat.completions.create(
        model="it", messages=messages, max_completion_tokens=4, temperature=0, stream=True
    )
    assert "".join(piece.choices[0].delta.content or "" for piece in stream) == chat.choices[0].message.content
    with pytest.raises(openai.NotFoundError, match="similar names are 'fr'"):
        client.completions.create(model="frr", **options)
    with pytest.raises(openai.BadRequestError, match="exceed 64"):
        client.completions.create(model="fr", prompt="x" * 70)


def test_a_connection_that_ends_frees_its_row(client, live):
    stream = client.completions.create(model="fr", prompt="x", max_tokens=60, temperature=0, stream=True)
    next(iter(stream))
    stream.close()
    deadline = time.monotonic() + 60
    while metric(live, "rows_active"):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    client.completions.create(model="fr", prompt="x", max_tokens=1)
