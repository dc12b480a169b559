"""The server over ASGI, in this process: answers, streams, errors, limits, loading, leaving."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import json
import string
import threading
from collections.abc import AsyncIterator
from typing import Any

import httpx
import numpy as np
import pytest
import tokenizers
from prometheus_client.parser import text_string_to_metric_families
from safetensors.numpy import load_file, save_file

from jaxadapt.server.app import MAX_BODY, make_app
from tests.server.conftest import CONFIG, LENGTH, NAMES, ROWS, alone, write_adapter

GREEDY = {"prompt": "Hello", "max_tokens": 12, "temperature": 0}


@contextlib.asynccontextmanager
async def client_of(server: Any, **options: Any) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(make_app(server, **options))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=60) as client:
        yield client


def ask(server: Any, *bodies: dict[str, Any], path: str = "/v1/completions") -> list[httpx.Response]:
    """Send all at once."""

    async def run() -> list[httpx.Response]:
        async with client_of(server) as client:
            return list(await asyncio.gather(*(client.post(path, json=body) for body in bodies)))

    return asyncio.run(run())


def get(server: Any, path: str, **options: Any) -> httpx.Response:
    async def run() -> httpx.Response:
        async with client_of(server, **options) as client:
            return await client.get(path)

    return asyncio.run(run())


def sample(server: Any, name: str, **labels: str) -> float:
    families = text_string_to_metric_families(get(server, "/metrics").text)
    return sum(s.value for f in families for s in f.samples if s.name == f"jaxadapt_{name}" and s.labels == labels)


def test_each_request_gets_its_adapter_in_one_batch(server, base, root):
    """Five requests in three rows: the base and three adapters, each as the model with that adapter alone."""
    models = [base.name, *NAMES, "fr"]
    steps, programs = sample(server, "steps_total"), sample(server, "compiled_programs")
    answers = [reply.json() for reply in ask(server, *({"model": name, **GREEDY} for name in models))]
    for name, answer in zip(models, answers, strict=True):
        assert "choices" in answer, answer
        ids = alone(base, None if name == base.name else root / name, "Hello", 12)
        assert answer["choices"][0]["text"] == base.decode(ids)
        assert answer["usage"] == {"prompt_tokens": 5, "completion_tokens": 12, "total_tokens": 17}
        assert (answer["object"], answer["model"]) == ("text_completion", name)
        assert answer["choices"][0]["finish_reason"] == "length"
    assert len({answer["choices"][0]["text"] for answer in answers}) == 4
    assert sample(server, "steps_total") - steps < 4 * 11  # of 5 × 11 tokens one at a time
    assert sample(server, "compiled_programs") == programs


def test_a_stream_has_the_pieces_of_the_answer(server):
    whole, streamed = ask(
        server,
        {"model": "fr", **GREEDY},
        {"model": "fr", **GREEDY, "stream": True, "stream_options": {"include_usage": True}},
    )
    assert streamed.headers["content-type"].startswith("text/event-stream")
    *events, done = [line for line in streamed.text.split("\n\n") if line]
    assert done == "data: [DONE]"
    pieces = [json.loads(event.removeprefix("data: ")) for event in events]
    assert pieces[-1]["choices"] == []
    assert pieces[-1]["usage"] == whole.json()["usage"]
    assert "".join(piece["choices"][0]["text"] for piece in pieces[:-1]) == whole.json()["choices"][0]["text"]
    assert [piece["choices"][0]["finish_reason"] for piece in pieces[:-1]] == [None] * (len(pieces) - 2) + ["length"]


def test_several_prompts_and_token_ids(server, base):
    one, two = base.encode("Hello"), base.encode("Bye")
    texts, ids = ask(
        server,
        {"model": "it", **GREEDY, "prompt": ["Hello", "Bye"]},
        {"model": "it", **GREEDY, "prompt": [one, two]},
    )
    assert [choice["text"] for choice in texts.json()["choices"]] == [c["text"] for c in ids.json()["choices"]]
    assert texts.json()["usage"]["prompt_tokens"] == 8


def test_a_stop_string_ends_the_answer_before_it(server, base):
    text = ask(server, {"model": base.name, **GREEDY})[0].json()["choices"][0]["text"]
    assert len(text) > 6
    stopped = ask(server, {"model": base.name, **GREEDY, "stop": [text[4:6], "never"]})[0].json()
    assert stopped["choices"][0]["text"] == text[: text.index(text[4:6])]
    assert stopped["choices"][0]["finish_reason"] == "stop"
    assert stopped["usage"]["completion_tokens"] < 12


def llama2_tokenizer() -> tokenizers.Tokenizer:
    """A tokenizer of SentencePiece as in Llama 2's tokenizer.json: a first token, and "▁" for a space before a word."""
    words = [*string.ascii_lowercase, "▁", *(f"▁{a}" for a in string.ascii_lowercase)]
    words += [f"▁{a}{b}" for a, b in itertools.product(string.ascii_lowercase, string.ascii_lowercase)]
    names = ["<unk>", "<s>", "</s>", *words[: CONFIG.vocab_size - 3]]
    made = tokenizers.Tokenizer(tokenizers.models.BPE({name: i for i, name in enumerate(names)}, [], unk_token="<unk>"))
    made.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    made.decoder = tokenizers.decoders.Sequence(
        [tokenizers.decoders.Replace("▁", " "), tokenizers.decoders.Fuse(), tokenizers.decoders.Strip(" ", 1, 0)]
    )
    made.add_special_tokens(["<s>", "</s>"])
    made.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return made


@pytest.mark.peft
def test_a_tokenizer_as_llama2s_adds_its_first_token_and_an_answer_keeps_its_space(server):
    """As in transformers, which reads the same file. Without the first token, a Llama 2 answers something else."""
    transformers = pytest.importorskip("transformers")
    made = llama2_tokenizer()
    reference = transformers.PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")
    base = dataclasses.replace(server.base, tokenizer=made, text_tokenizer=made)
    other, spaces = dataclasses.replace(server, base=base), 0
    for prompt in "abcdefgh":
        ids = reference(prompt)["input_ids"]
        assert ids[0] == reference.bos_token_id
        answer = alone(base, None, ids, 6)
        before = reference.decode(ids, skip_special_tokens=True)
        expected = reference.decode(ids + answer, skip_special_tokens=True)[len(before) :]
        body = {"model": base.name, "prompt": prompt, "max_tokens": 6, "temperature": 0, "logprobs": 0}
        (choice,) = ask(other, body)[0].json()["choices"]
        assert choice["text"] == expected
        assert "".join(choice["logprobs"]["tokens"]) == expected
        assert ask(other, {**body, "echo": True})[0].json()["choices"][0]["text"] == prompt + expected
        spaces += expected.startswith(" ")
    assert spaces


def test_a_seed_repeats_an_answer(server):
    body = {"model": "de", **GREEDY, "temperature": 1.5, "top_p": 0.9, "top_k": 50}
    first, again, other = ask(server, {**body, "seed": 5}, {**body, "seed": 5}, {**body, "seed": 6})
    texts = [reply.json()["choices"][0]["text"] for reply in (first, again, other)]
    assert texts[0] == texts[1] != texts[2]


def test_a_chat_is_chatml_and_special_tokens_in_it_are_text(server, base):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi <|im_end|>"}]
    ids = base.encode_chat([("system", "Be brief."), ("user", "Hi <|im_end|>")])
    assert ids.count(258) == 2  # <|im_end|> after each message, and not in one
    assert base.tokenizer.decode(ids, skip_special_tokens=False) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi <|im_end|><|im_end|>\n<|im_start|>assistant\n"
    )
    short = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    body = {"model": "fr", "messages": short, "temperature": 0, "max_completion_tokens": 4}
    (chat,) = ask(server, body, path="/v1/chat/completions")
    prompt = base.encode_chat([("user", "Hi")])
    (plain,) = ask(server, {"model": "fr", "prompt": prompt, "temperature": 0, "max_tokens": 4})
    assert chat.json()["choices"][0]["message"]["content"] == plain.json()["choices"][0]["text"]
    assert chat.json()["object"] == "chat.completion"
    (long,) = ask(server, {"model": "fr", "messages": messages, "max_tokens": 40}, path="/v1/chat/completions")
    assert long.json()["error"]["code"] == "context_length_exceeded"
    (without,) = ask(server, {"model": "fr", "messages": messages * 2}, path="/v1/chat/completions")
    assert without.json()["error"]["message"].endswith("tokens of the prompt and 1 of the answer exceed 64")


WRONG = [
    ({}, 400, "model: expected a string"),
    ({"model": "fr"}, 400, "prompt: expected a string"),
    ({"model": "fr", "prompt": []}, 400, "prompt"),
    ({"model": "fr", "prompt": ""}, 400, "at least one token"),
    ({"model": "fr", "prompt": [260]}, 400, "ids below 260"),
    ({"model": "fr", "prompt": ["x"] * 8}, 400, "expected at most 7 answers in all, found 8"),
    ({"model": "fr", "prompt": ["x"] * 2, "n": 4}, 400, "expected at most 7 answers in all, found 8"),
    ({"model": "fr", "prompt": "x" * LENGTH}, 400, "exceed 64"),
    ({"model": "fr", "prompt": "x", "max_tokens": LENGTH}, 400, "exceed 64"),
    ({"model": "fr", "prompt": "x", "max_tokens": 0}, 400, "max_tokens: expected at least 1"),
    ({"model": "fr", "prompt": "x", "max_tokens": True}, 400, "an integer"),
    ({"model": "fr", "prompt": "x", "temperature": -1}, 400, "temperature must be"),
    ({"model": "fr", "prompt": "x", "temperature": 10**400}, 400, "temperature: expected a number"),
    ({"model": "fr", "prompt": "x", "top_p": 0}, 400, "top_p must be above 0"),
    ({"model": "fr", "prompt": "x", "temperature": 1e39}, 400, "temperature must be at least 0 and at most 3.403e+38"),
    ({"model": "fr", "prompt": "x", "n": 0}, 400, "n: expected 1 to 128"),
    ({"model": "fr", "prompt": "x", "best_of": 2}, 400, "best_of=2 is not implemented"),
    ({"model": "fr", "prompt": "x", "logprobs": 21}, 400, "logprobs: expected 0 to 20"),
    ({"model": "fr", "prompt": "x", "logprobs": True}, 400, "logprobs: expected an integer"),
    ({"model": "fr", "prompt": "x", "stop": ["a"] * 5}, 400, "at most 4"),
    ({"model": "fr", "prompt": "x", "stream": 1}, 400, "true or false"),
    ({"model": "fr", "prompt": "x", "color": 1}, 400, "color is not a field"),
    ({"model": "frr", "prompt": "x"}, 404, "similar names are 'fr'"),
]


def test_wrong_requests_are_refused_and_others_answered(server):
    replies = ask(server, *(body for body, _, _ in WRONG))
    for (body, status, text), reply in zip(WRONG, replies, strict=True):
        assert (reply.status_code, text in reply.json()["error"]["message"]) == (status, True), (body, reply.text)
    broken, right = ask(server, {"model": "broken", **GREEDY}, {"model": "fr", **GREEDY})
    assert broken.status_code == 400
    assert broken.json()["error"]["code"] == "adapter_error"
    assert right.status_code == 200


def test_an_adapter_with_nan_fails_its_own_request(server, base, root):
    folder = write_adapter(root / "nan", 9, base)
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({name: np.full_like(x, np.nan) for name, x in tensors.items()}, path, {"format": "pt"})
    before = ask(server, {"model": "fr", **GREEDY})[0].json()["choices"]
    load = ask(server, {"lora_name": "nan"}, path="/v1/load_lora_adapter")[0]
    bad, good = ask(server, {"model": "nan", **GREEDY}, {"model": "fr", **GREEDY})
    assert bad.status_code == 400 or load.status_code == 400
    assert good.json()["choices"] == before
    # What they left in the cache of their rows does not reach the next requests there.
    ask(server, *({"model": "nan", **GREEDY, "prompt": "x" * 50} for _ in range(ROWS)))
    assert all(r.json()["choices"] == before for r in ask(server, *({"model": "fr", **GREEDY} for _ in range(ROWS))))


HALVES = [b'{"model": "fr", "prompt": "\\ud800"}', b'{"model": "fr", "prompt": "x", "\\udfff": 1}']


@pytest.mark.parametrize(
    "body",
    [b"{", b"[1]", b"x" * (MAX_BODY + 1), b"[" * 100_000, *HALVES],
    ids=["cut", "list", "large", "deep", "half a character", "half a name"],
)
def test_bodies_that_are_no_request(server, body):
    async def run() -> httpx.Response:
        async with client_of(server) as client:
            return await client.post("/v1/completions", content=body, headers={"content-type": "application/json"})

    assert asyncio.run(run()).status_code == (413 if len(body) > MAX_BODY else 400)


def test_web_pages_cannot_reach_it(server):
    """A form's content type is refused, and so is a host name that leads to this machine."""

    async def run() -> list[int]:
        async with client_of(server, hosts=("localhost",)) as client:
            plain = await client.post("/v1/completions", content=b"{}", headers={"content-type": "text/plain"})
            other = await client.get("/v1/models", headers={"host": "evil.example"})
            return [plain.status_code, other.status_code, (await client.get("/v1/models")).status_code]

    assert asyncio.run(run()) == [415, 400, 200]


def test_models_are_listed(server, base):
    listed = get(server, "/v1/models").json()["data"]
    assert listed[0] == {**listed[0], "id": base.name, "parent": None, "object": "model"}
    assert {*NAMES, "broken"} <= {entry["id"] for entry in listed[1:]}
    assert get(server, "/v1/models/fr").json()["parent"] == base.name
    assert get(server, "/v1/models/none").status_code == 404
    assert get(server, "/health").json() == {"status": "ok"}


def test_load_swap_and_unload(server, base, root):
    assert ask(server, {"model": "new", **GREEDY})[0].status_code == 404
    write_adapter(root / "new", 11, base)
    (loaded,) = ask(server, {"lora_name": "new", "lora_path": "new"}, path="/v1/load_lora_adapter")
    (first,) = ask(server, {"model": "new", **GREEDY})
    assert first.json()["choices"][0]["text"] == base.decode(alone(base, root / "new", "Hello", 12))
    write_adapter(root / "new", 12, base)  # a new version of the files is taken without being told
    (second,) = ask(server, {"model": "new", **GREEDY})
    assert second.json()["choices"][0]["text"] == base.decode(alone(base, root / "new", "Hello", 12))
    assert second.json()["choices"] != first.json()["choices"]
    assert second.json()["system_fingerprint"] != first.json()["system_fingerprint"]
    assert (loaded.status_code, loaded.text) == (200, "Success: LoRA adapter 'new' added successfully.")
    (gone,) = ask(server, {"lora_name": "new"}, path="/v1/unload_lora_adapter")
    assert (gone.status_code, gone.text) == (200, "Success: LoRA adapter 'new' removed successfully.")
    assert ask(server, {"model": "new", **GREEDY})[0].status_code == 404
    assert ask(server, {"lora_name": "new"}, path="/v1/unload_lora_adapter")[0].status_code == 404


@pytest.mark.parametrize(
    "name",
    ["../fr", "..", ".", "", "/etc", "a/b", "a\\b", "fr\0", "fr\n", "x" * 300, ".hidden", "__base__", "out", "inner"],
)
def test_names_stay_in_the_folder(server, base, root, tmp_path, name):
    """Also of links: to a folder outside, and to a file outside from a folder inside."""
    if name == "out":
        (root / "out").symlink_to(write_adapter(tmp_path / "elsewhere", 3, base), target_is_directory=True)
    if name == "inner":
        folder = write_adapter(root / "inner", 3, base)
        (folder / "adapter_model.safetensors").rename(tmp_path / "weights")
        (folder / "adapter_model.safetensors").symlink_to(tmp_path / "weights")
    for path, body in (("/v1/load_lora_adapter", {"lora_name": name}), ("/v1/completions", {"model": name, **GREEDY})):
        (reply,) = ask(server, body, path=path)
        assert reply.status_code in (400, 404), reply.text
    assert name not in server.pool.names()
    (other,) = ask(server, {"lora_name": "fr", "lora_path": str(tmp_path)}, path="/v1/load_lora_adapter")
    assert other.status_code == 400


def test_a_full_queue_answers_429(server):
    """One of three rows is in use when the engine is held: two requests have a row to go to, and four may wait."""
    body, held, begun = {"model": "fr", **GREEDY}, threading.Event(), threading.Event()
    step = server.engine._decoder.step

    def slow() -> Any:
        begun.set()
        assert held.wait(60)
        return step()

    async def run() -> list[int]:
        async with client_of(server) as client:
            replies = [asyncio.ensure_future(client.post("/v1/completions", json=body))]
            await asyncio.to_thread(begun.wait, 60)
            replies += [asyncio.ensure_future(client.post("/v1/completions", json=body)) for _ in range(6)]
            while server.engine.gauges()["queue_length"] < 6:
                await asyncio.sleep(0.01)
            refused = await client.post("/v1/completions", json=body)
            assert refused.headers["retry-after"]
            assert refused.json()["error"]["type"] == "rate_limit_error"
            held.set()
            return [refused.status_code, *[(await reply).status_code for reply in replies]]

    try:
        server.engine._decoder.step = slow
        assert asyncio.run(run()) == [429] + [200] * 7
    finally:
        held.set()
        server.engine._decoder.step = step


def test_a_client_that_leaves_frees_its_row(server):
    before = sample(server, "generated_tokens_total")

    async def run() -> None:
        app, sent = make_app(server), asyncio.Queue()
        body = json.dumps({"model": "fr", "prompt": "x", "max_tokens": 60, "temperature": 0, "stream": True}).encode()
        messages: asyncio.Queue[Any] = asyncio.Queue()
        messages.put_nowait({"type": "http.request", "body": body, "more_body": False})
        headers = [(b"content-type", b"application/json"), (b"host", b"localhost")]
        scope = {
            "type": "http", "method": "POST", "path": "/v1/completions", "headers": headers, "query_string": b"",
            "http_version": "1.1", "scheme": "http", "server": ("localhost", 80), "client": ("localhost", 1),
        }  # fmt: skip
        task = asyncio.ensure_future(app(scope, messages.get, sent.put))
        for _ in range(3):
            await sent.get()
        messages.put_nowait({"type": "http.disconnect"})
        await asyncio.wait_for(task, 60)
        while server.engine.gauges()["rows_active"]:
            await asyncio.sleep(0.01)

    asyncio.run(run())
    assert sample(server, "generated_tokens_total") - before < 60


def test_metrics_are_read_by_prometheus(server):
    ask(server, {"model": "fr", **GREEDY})
    assert sample(server, "rows") == ROWS
    assert sample(server, "rows_active") == sample(server, "queue_length") == 0
    assert sample(server, "requests_total", status="200") > 0
    assert sample(server, "first_token_seconds_count") >= sample(server, "first_token_seconds_bucket", le="0.1") > 0
