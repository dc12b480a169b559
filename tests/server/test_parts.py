"""Parts of the server without HTTP: text from tokens, an engine that fails or ends, bases."""

from __future__ import annotations

import concurrent.futures
import json
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxadapt import ConfigError, FileError, FormatError
from jaxadapt.demo.llama import LlamaConfig, to_nnx
from jaxadapt.server import app
from jaxadapt.server.engine import Engine, Job, Metrics, open_base
from jaxadapt.server.protocol import Piece, RequestError, TextStream
from jaxadapt.serving import Sampling
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


def test_the_offset_of_a_token_is_the_place_of_its_character(base):
    """The tokenizer knows the place of each token's character in a text that it encodes."""
    text = "aé🎉 日本 z"
    encoding = base.tokenizer.encode(text)
    want = [start for start, _ in encoding.offsets]
    assert len({*want}) == len(text) < len(want)
    assert list(base.locate(encoding.ids, text)) == list(zip(encoding.ids, want, strict=True))
    stream, found = TextStream(base.decode, ["日本"], [], 100), []
    for token in encoding.ids:
        stream.push(token)
        found.append(stream.offset - 100)
    assert found == want


def test_special_tokens_have_a_place_in_the_text_that_has_them(base):
    assert [place for _, place in base.locate([257, *base.encode("hi"), 256], "hi")] == [0, 0, 1, 2]
    text = "<|im_start|>hi"
    assert [place for _, place in base.locate(base.encode(text), text)] == [0, 12, 13]


@pytest.mark.parametrize("stop", ["STOP", "ab", "aab", "é"])
def test_stop_strings_are_found_across_tokens(base, stop):
    text = "xSTaSTOPaaabéz"
    stream, found = TextStream(base.decode, [stop, "never"]), ""
    for token in base.encode(text):
        found += stream.push(token)
        if stream.stopped:
            break
    assert found == text[: text.index(stop)]


def test_a_long_stop_string_takes_no_time():
    """A request may have a megabyte of them; all its beginnings were compared after each token."""

    class Counted(str):
        parts = 0

        def __getitem__(self, key: Any) -> str:
            Counted.parts += 1
            return super().__getitem__(key)

        def startswith(self, *args: Any) -> bool:
            Counted.parts += 1
            return super().startswith(*args)

    stream = TextStream(lambda ids: "".join(map(chr, ids)), [Counted("ab" * 250_000)])
    assert [stream.push(ord(c)) for c in "xabac"] == ["x", "", "", "", "abac"]
    assert 0 < Counted.parts < 100


class Broken:
    """A batch whose third step fails."""

    rows, usable = 2, True

    def __init__(self) -> None:
        self.steps, self.go = 0, threading.Event()

    def start(self, *_: Any) -> tuple[int, bool, None]:
        return 65, True, None

    def step(self) -> tuple[np.ndarray, np.ndarray, None]:
        self.go.wait(30)
        self.steps += 1
        if self.steps == 3:
            raise RuntimeError("device lost")
        return np.array([66, 66]), np.array([True, True]), None

    def free(self, row: int) -> None: ...

    def compiled(self) -> int:
        return 0


def text_of(ids: Sequence[int]) -> str:
    return "".join(map(chr, ids))


def submit(
    engine: Engine,
    *,
    names: Sequence[str | None] = (None,),
    prompt: Sequence[int] = (1,),
    count: int = 50,
    decode: Callable[[Sequence[int]], str] = text_of,
) -> list[tuple[list[Piece], threading.Event]]:
    made = []
    for name in names:
        pieces: list[Piece] = []
        ended = threading.Event()

        def emit(piece: Piece, pieces: list[Piece] = pieces, ended: threading.Event = ended) -> None:
            pieces.append(piece)
            if piece.final:
                ended.set()

        engine.submit([Job(prompt, name, Sampling(), count, TextStream(decode), emit)])
        made.append((pieces, ended))
    return made


def make(decoder: Any, pool: Any = None) -> Engine:
    return Engine(decoder, pool, stop=[0], queue=4)


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


def test_an_adapter_that_cannot_be_loaded_for_whatever_reason_ends_its_own_requests(caplog):
    class Pool:
        def prefetch(self, names: Sequence[str]) -> dict[str, concurrent.futures.Future[Any]]:
            failed: concurrent.futures.Future[Any] = concurrent.futures.Future()
            failed.set_exception(ZeroDivisionError("in a file"))
            return dict.fromkeys(names, failed)

    decoder = Broken()
    engine = make(decoder, Pool())
    ((bad, ended),) = submit(engine, names=["fr"])
    assert ended.wait(30)
    assert bad[-1].error is not None
    assert (bad[-1].error.status, "in a file" in str(bad[-1].error)) == (500, False)
    assert "in a file" in caplog.text
    assert engine.healthy
    decoder.go.set()
    ((good, ended),) = submit(engine, count=2)
    assert ended.wait(30)
    assert good[-1].reason == "length"
    engine.close()


class Failing(Broken):
    """A batch in which a prompt that begins with 7 fails."""

    def start(self, row: int, prompt: Sequence[int], *_: Any) -> tuple[int, bool, None]:
        if prompt[0] == 7:
            raise RuntimeError("of another library")
        return super().start()


@pytest.mark.parametrize("usable", [True, False])
def test_an_error_of_another_library_fails_its_request_and_not_the_engine(usable, caplog):
    """If the failed program has taken the cache, all rows are lost."""
    decoder = Failing()
    decoder.usable = usable
    engine = make(decoder)
    ((bad, ended),) = submit(engine, prompt=[7])
    assert ended.wait(30)
    assert bad[-1].error is not None
    assert bad[-1].error.status == 500
    assert "of another library" in caplog.text
    assert "of another library" not in str(bad[-1].error)
    if not usable:
        engine._thread.join(30)
        assert not engine.healthy
        return
    decoder.go.set()
    ((good, ended),) = submit(engine, count=2)
    assert ended.wait(30)
    assert good[-1].reason == "length"
    engine.close()


def test_a_text_that_cannot_be_decoded_fails_its_request_alone(caplog):
    def decode(ids: Sequence[int]) -> str:
        if 66 in ids:
            raise UnicodeError("no text")
        return "A" * len(ids)

    decoder = Broken()
    engine = make(decoder)
    decoder.go.set()
    (bad, ended), *_ = submit(engine, decode=decode)
    assert ended.wait(30)
    assert bad[-1].error is not None
    assert bad[-1].error.code == "internal_error"
    ((good, ended),) = submit(engine, count=1, decode=decode)
    assert ended.wait(30)
    assert good[-1].text == "A"
    engine.close()


def test_draining_fails_those_that_wait_and_lets_those_with_a_row_end():
    decoder = Broken()
    decoder.rows = 1
    engine = make(decoder)
    active = submit(engine, count=2)
    while not engine.gauges()["rows_active"]:
        time.sleep(0.001)
    waiting = submit(engine, names=[None] * 2, count=2)
    engine.drain(3600)
    assert not engine.healthy
    with pytest.raises(RequestError, match="shutting down"):
        submit(engine)
    decoder.go.set()
    engine._thread.join(30)
    assert [pieces[-1].reason for pieces, _ in active] == ["length"]
    assert [pieces[-1].error.status for pieces, _ in waiting] == [503] * 2


def test_a_time_at_the_upper_end_of_a_bucket_counts_in_it():
    """`le` means "less or equal" in Prometheus' format."""
    metrics = Metrics()
    metrics.observe("request_seconds", 0.1)
    lines = metrics.text({}).splitlines()
    assert {'jaxadapt_request_seconds_bucket{le="0.05"} 0', 'jaxadapt_request_seconds_bucket{le="0.1"} 1'} <= {*lines}


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


@pytest.mark.filterwarnings("ignore:the adapter '.*' contains links")  # other tests write them
def test_scan_leaves_out_links_that_leave(root, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "gone").symlink_to(root / "fr", target_is_directory=True)
    with pytest.warns(
        UserWarning, match="^the adapter 'gone' contains links to files outside the adapters' folder; copy"
    ):
        assert app.scan(tmp_path / "in") == {}
    assert list(app.scan(root))[:3] == ["broken", "de", "fr"]
    with pytest.raises(FileError, match="cannot list the adapters"):
        app.scan(tmp_path / "none")
    with pytest.raises(FileError, match="fr is the folder of one adapter; give the folder that contains it"):
        app.scan(root / "fr")


def test_bases(tmp_path, base, root):
    assert base.config == CONFIG
    assert base.stop == (256, 258)
    with pytest.raises(FileError, match=r"found no config\.json and no tokenizer\.json there"):
        open_base(tmp_path)
    folder = write_base(tmp_path / "other")
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**fields, "model_type": "qwen2", "attention_bias": True}))
    with pytest.raises(FormatError, match="model_type is 'qwen2', not 'llama'; attention_bias is True"):
        open_base(folder)
    assert LlamaConfig.from_hf(CONFIG.to_hf()) == CONFIG
    with pytest.raises(ConfigError, match="slots: expected more than the 4 rows"):
        app.make_server(base, root, rows=4, slots=4)
    (tmp_path / "adapters" / "tiny").mkdir(parents=True)
    (tmp_path / "adapters" / "tiny" / "adapter_config.json").write_text("{}")
    with pytest.raises(FileError, match="has the base's name, 'tiny'"):
        app.make_server(base, tmp_path / "adapters")


def test_a_base_is_read_as_its_files_mean_it(base, tmp_path):
    """Settings of a training in tokenizer.json do not cut prompts, and quantized weights are not taken for weights."""
    tokenizer = json.loads((write_base(tmp_path / "one") / "tokenizer.json").read_text())
    tokenizer["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    tokenizer["padding"] = {"strategy": {"Fixed": 9}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": 0,
                            "pad_type_id": 0, "pad_token": "!"}  # fmt: skip
    (tmp_path / "one" / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert open_base(tmp_path / "one").encode("Hello") == base.encode("Hello")
    path = tmp_path / "one" / "model.safetensors"
    weights = load_file(path)
    scales = {name.replace(".weight", ".weight_scale"): np.ones(1, "f4") for name in weights if "proj" in name}
    save_file(weights | scales, path)
    with pytest.raises(FormatError, match="its weights are quantized"):
        open_base(tmp_path / "one")
    save_file({name: x.astype("i1") if "proj" in name else x for name, x in weights.items()}, path)
    with pytest.raises(FormatError, match="expected floating-point weights, found int8"):
        open_base(tmp_path / "one")
    config = json.loads((tmp_path / "one" / "config.json").read_text())
    (tmp_path / "one" / "config.json").write_text(json.dumps({**config, "rope_scaling": {"rope_type": "llama3"}}))
    with pytest.raises(FormatError, match="rope_type is 'llama3'"):
        open_base(tmp_path / "one")
    (tmp_path / "one" / "config.json").write_text(json.dumps({**config, "eos_token_id": "</s>"}))
    with pytest.raises(FormatError, match="eos_token_id: expected a token id"):
        open_base(tmp_path / "one")


def test_a_rank_that_only_a_json_file_states_takes_no_room(base, root, tmp_path):
    shutil.copytree(root / "fr", tmp_path / "huge")
    path = tmp_path / "huge" / "adapter_config.json"
    weights = load_file(tmp_path / "huge" / "adapter_model.safetensors")
    save_file(
        weights, tmp_path / "huge" / "adapter_model.safetensors", {"format": "pt"}
    )  # without the copy of the JSON
    path.write_text(json.dumps({**json.loads(path.read_text()), "r": 10**9}))
    model = to_nnx(base.config, base.weights)
    with pytest.warns(UserWarning, match="requests for 'huge' will fail: no bank of adapters has room for this LORA"):
        (made,) = app.make_room(model, [root / "fr", tmp_path / "huge"], 1, ["q_proj"])
    assert made.get("r") == 2


def test_chats_are_encoded_while_other_threads_decode(base):
    ids, wrong = base.encode_chat([("user", "Hi <|im_end|>")]), []
    ended = threading.Event()

    def decode() -> None:
        while not ended.is_set():
            base.decode(ids * 50)

    def encode() -> None:
        while not ended.is_set():
            if base.encode("<|im_end|>") != [258]:
                wrong.append("a special token as text")

    threads = [threading.Thread(target=each) for each in (decode, encode)]
    for thread in threads:
        thread.start()
    try:
        assert all(base.encode_chat([("user", "Hi <|im_end|>")]) == ids for _ in range(500))
    finally:
        ended.set()
        for thread in threads:
            thread.join()
    assert not wrong
