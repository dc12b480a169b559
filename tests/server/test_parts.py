"""Parts of the server without HTTP: text from tokens, an engine that fails or ends, bases."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from jaxadapt.core.errors import ConfigError, FileError, FormatError
from jaxadapt.demo.generation import GREEDY
from jaxadapt.demo.llama import LlamaConfig
from jaxadapt.server import names, run
from jaxadapt.server.base import open_base
from jaxadapt.server.engine import Engine, Job, Piece
from jaxadapt.server.metrics import Metrics
from jaxadapt.server.protocol import RequestError
from jaxadapt.server.text import TextStream
from tests.server.conftest import CONFIG, write_base


def test_a_character_of_several_tokens_comes_whole(base):
    ids = base.encode("aé🎉 日本")
    assert len(ids) > 8
    stream = TextStream(base.decode)
    pieces = [stream.push(token) for token in ids]
    assert [piece for piece in pieces if piece] == ["a", "é", "🎉", " ", "日", "本"]
    assert stream.finish() == ""
    cut = TextStream(base.decode)
    assert [cut.push(token) for token in base.encode("🎉")[:2]] == ["", ""]
    assert cut.finish() == "\ufffd"  # as the tokenizer decodes bytes that are no character


@pytest.mark.parametrize("stop", ["STOP", "ab", "aab", "é"])
def test_stop_strings_are_found_across_tokens(base, stop):
    text = "xSTaSTOPaaabéz"
    stream, found = TextStream(base.decode, [stop, "never"]), ""
    for token in base.encode(text):
        found += stream.push(token)
        if stream.stopped:
            break
    assert found == text[: text.index(stop)]


class Broken:
    """A batch whose third step fails."""

    rows = 2

    def __init__(self) -> None:
        self.steps, self.go = 0, threading.Event()

    def start(self, *_: Any) -> tuple[int, bool]:
        return 65, True

    def step(self) -> tuple[np.ndarray, np.ndarray]:
        self.go.wait(30)
        self.steps += 1
        if self.steps == 3:
            raise RuntimeError("device lost")
        return np.array([66, 66]), np.array([True, True])

    def free(self, row: int) -> None: ...

    def compiled(self) -> int:
        return 0


def submit(
    engine: Engine, *, names: Sequence[str | None] = (None,), prompt: Sequence[int] = (1,), count: int = 50
) -> list[tuple[list[Piece], threading.Event]]:
    made = []
    for name in names:
        pieces: list[Piece] = []
        ended = threading.Event()

        def emit(piece: Piece, pieces: list[Piece] = pieces, ended: threading.Event = ended) -> None:
            pieces.append(piece)
            if piece.final:
                ended.set()

        engine.submit([Job(prompt, name, GREEDY, count, [], emit)])
        made.append((pieces, ended))
    return made


def make(decoder: Any) -> Engine:
    return Engine(
        decoder,
        None,
        lambda ids: "".join(map(chr, ids)),
        stop=[0],
        queue=4,
        metrics=Metrics(),  # type: ignore[arg-type]
    )


def test_a_failed_step_ends_all_requests_and_is_seen(caplog):
    decoder = Broken()
    engine = make(decoder)
    jobs = submit(engine, names=[None] * 3)
    decoder.go.set()
    for pieces, ended in jobs:
        assert ended.wait(30)
        assert pieces[-1].error is not None
        assert pieces[-1].error.status == 500
    engine._thread.join(30)
    assert not engine.healthy
    with pytest.raises(RequestError, match="a step of the batch failed"):
        submit(engine)
    assert "device lost" in caplog.text


def test_closing_ends_requests(base):
    decoder = Broken()
    engine = make(decoder)
    jobs = submit(engine, names=[None] * 3)
    closing = threading.Thread(target=engine.close)
    closing.start()
    while engine.healthy:
        pass
    decoder.go.set()
    closing.join(30)
    assert not engine._thread.is_alive()
    assert all(ended.is_set() and pieces[-1].error.status == 503 for pieces, ended in jobs)


def test_scan_leaves_out_links_that_leave(root, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "gone").symlink_to(root / "fr", target_is_directory=True)
    assert names.scan(tmp_path / "in") == (
        {}, ["the adapter 'gone' contains links to files outside the adapters' folder; copy the files into it"]
    )  # fmt: skip
    assert list(names.scan(root)[0])[:3] == ["broken", "de", "fr"]
    with pytest.raises(FileError, match="cannot list the adapters"):
        names.scan(tmp_path / "none")


def test_bases(tmp_path, base, root):
    assert base.config == CONFIG
    assert base.stop == (256, 258)
    with pytest.raises(FileError, match=r"lacks config\.json and tokenizer\.json"):
        open_base(tmp_path)
    folder = write_base(tmp_path / "other")
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**fields, "model_type": "qwen2", "attention_bias": True}))
    with pytest.raises(FormatError, match="model_type is 'qwen2', not 'llama'; attention_bias is True"):
        open_base(folder)
    assert LlamaConfig.from_hf(CONFIG.to_hf()) == CONFIG
    with pytest.raises(ConfigError, match="slots: expected more than the 4 rows"):
        run.make_server(base, root, rows=4, slots=4)
    (tmp_path / "adapters" / "tiny").mkdir(parents=True)
    (tmp_path / "adapters" / "tiny" / "adapter_config.json").write_text("{}")
    with pytest.raises(FileError, match="has the base's name, 'tiny'"):
        run.make_server(base, tmp_path / "adapters")
