"""`jaxadapt serve` in a process of its own, and OpenAI's client."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.server.conftest import alone, write_base

pytestmark = pytest.mark.network


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process and its URL; at the end Ctrl-C must end it in order."""
    folder = write_base(tmp_path_factory.mktemp("live") / "tiny")
    words = ["serve", "--base", folder, "--adapters", root, "--port", "0", "--rows", "2", "--length", "64", "--json"]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "XLA_FLAGS": ""}
    process = subprocess.Popen(
        [sys.executable, "-m", "jaxadapt", *map(str, words)], env=env, text=True, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    said = "".join(line for line in iter(process.stdout.readline, "}\n")) + "}"
    yield process, json.loads(said)["url"]
    process.send_signal(signal.SIGINT)
    assert process.wait(60) in (0, 130)


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
