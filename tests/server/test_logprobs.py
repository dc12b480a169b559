"""Log-probabilities, echoed prompts and several choices, in OpenAI's forms; compared with PEFT on transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxadapt.analysis import compare_logprobs
from jaxadapt.server.protocol import RequestError, parse_request
from tests.server.conftest import CONFIG, NAMES, make_weights
from tests.server.test_app import GREEDY, ask


def peft_logprobs(folder: Path | None, ids: list[int]) -> np.ndarray:
    """The log-probabilities (T, V) of the tokens after each of these, by PEFT."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG.to_hf())).eval()
    model.load_state_dict({name: torch.from_numpy(w) for name, w in make_weights().items()}, strict=False)
    model = model if folder is None else peft.PeftModel.from_pretrained(model, folder)
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].log_softmax(-1).numpy()


@pytest.mark.peft
def test_an_evaluation_program_gets_the_likelihoods_that_peft_computes(server, base, root):
    """The request and the sums are those of lm-evaluation-harness (its class LocalCompletionsAPI)."""
    contexts, continuations = ["Hello", "One two"], [" you", " three"]
    prompts = [base.encode(a + b) for a, b in zip(contexts, continuations, strict=True)]
    lengths = [len(base.encode(context)) for context in contexts]
    body = {"prompt": prompts, "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}
    for name, folder in (("tiny", None), ("fr", root / "fr")):
        (reply,) = ask(server, {"model": name, **body})
        for choice, prompt, length in zip(reply.json()["choices"], prompts, lengths, strict=True):
            found = choice["logprobs"]
            want = peft_logprobs(folder, prompt)
            each = want[np.arange(len(prompt) - 1), prompt[1:]]
            assert found["token_logprobs"][0] is found["top_logprobs"][0] is None
            np.testing.assert_allclose(found["token_logprobs"][1:-1], each, atol=1e-4, rtol=0)  # float32
            np.testing.assert_allclose(sum(found["token_logprobs"][length:-1]), each[length - 1 :].sum(), atol=1e-3)
            pairs = zip(found["top_logprobs"][1:], found["token_logprobs"][1:], strict=True)
            greedy = [max(top.values()) == own for top, own in pairs]
            assert greedy[:-1] == (want[:-1].argmax(-1) == prompt[1:]).tolist()
            assert greedy[-1]
            text = base.decode(prompt)
            assert choice["text"].startswith(text)
            assert found["tokens"][: len(prompt)] == list(text)
            assert found["text_offset"][: len(prompt) + 1] == list(range(len(prompt) + 1))


@pytest.mark.peft
def test_each_new_token_has_its_logprob_and_those_of_the_most_probable_ones(server, base, root):
    (reply,) = ask(server, {"model": "de", **GREEDY, "temperature": 1.5, "seed": 3, "logprobs": 2})
    found = reply.json()["choices"][0]["logprobs"]
    ids = base.encode("Hello")
    for place, (token, logprob, top) in enumerate(
        zip(found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=True)
    ):
        want = peft_logprobs(root / "de", ids)[-1]  # temperature does not change them
        new = next(i for i in range(CONFIG.vocab_size) if base.spell(i)[0] == token)
        assert abs(logprob - want[new]) < 1e-4, place
        best = np.argsort(-want)[:2]
        assert top.keys() == {token, *(base.spell(int(i))[0] for i in best)}
        np.testing.assert_allclose([top[base.spell(int(i))[0]] for i in best], want[best], atol=1e-4, rtol=0)
        ids.append(new)
    assert len(found["tokens"]) == 12


@pytest.mark.peft
def test_compare_logprobs_tells_that_the_server_applies_each_adapter(server, base, root):
    """The request is that of docs/checking.md; its first token has a null."""
    folders = {"base": None, **{name: root / name for name in NAMES}}
    texts = ["Hello you", "One two three"]
    body = {"prompt": texts, "max_tokens": 0, "echo": True, "logprobs": 0}
    served: dict[str, Any] = {}
    for name in folders:
        (reply,) = ask(server, {"model": "tiny" if name == "base" else name, **body})
        served[name] = [choice["logprobs"]["token_logprobs"] for choice in reply.json()["choices"]]
    expected: dict[str, Any] = {}
    for name, folder in folders.items():
        ids = [base.encode(text) for text in texts]
        expected[name] = [peft_logprobs(folder, each)[np.arange(len(each) - 1), each[1:]] for each in ids]
    found = compare_logprobs(served, expected)
    assert [each.verdict for each in found] == ["applied"] * len(NAMES), list(map(str, found))
    mixed = compare_logprobs(served | {"de": served["fr"], "it": served["base"]}, expected)
    assert [each.verdict for each in mixed] == ["another adapter", "applied", "not applied"]


def events(text: str) -> list[Any]:
    return [json.loads(line.removeprefix("data: ")) for line in text.split("\n\n") if line.startswith("data: {")]


def test_a_stream_has_the_logprobs_of_the_whole_answer(server):
    body = {"model": "it", **GREEDY, "logprobs": 1, "echo": True}
    whole, streamed = ask(server, body, {**body, "stream": True})
    (choice,) = whole.json()["choices"]
    pieces = [piece["choices"][0] for piece in events(streamed.text)]
    assert "".join(piece["text"] for piece in pieces) == choice["text"]
    for name in ("tokens", "token_logprobs", "top_logprobs"):
        assert [x for piece in pieces for x in piece["logprobs"][name]] == choice["logprobs"][name]
    begun = 0
    for piece in pieces:
        assert piece["logprobs"]["text_offset"][0] == begun
        begun += len(piece["text"])


def test_the_offsets_of_tokens_are_places_in_the_text(server, base):
    """Also of tokens that are a part of a character, and of those behind a stop string."""
    prompt = "é🎉日 z"
    body = {"model": "it", **GREEDY, "prompt": prompt, "logprobs": 0, "echo": True}
    whole, streamed = ask(server, body, {**body, "stream": True})
    (choice,) = whole.json()["choices"]
    found, encoding = choice["logprobs"]["text_offset"], base.tokenizer.encode(prompt)
    assert found[: len(encoding)] == [start for start, _ in encoding.offsets]
    assert found[len(encoding)] == len(prompt)
    answer = choice["text"][len(prompt) :]
    for place, token in zip(found, choice["logprobs"]["tokens"], strict=True):
        if len(base.tokenizer.encode(token)) == 1:
            assert choice["text"][place:].startswith(token)
    pieces = [piece["choices"][0]["logprobs"]["text_offset"] for piece in events(streamed.text)]
    assert [place for piece in pieces for place in piece] == found
    stop = next(character for character in answer if character != "\ufffd")
    (reply,) = ask(server, {**body, "stop": stop})
    (cut,) = reply.json()["choices"]
    assert max(cut["logprobs"]["text_offset"]) <= len(cut["text"]) == choice["text"].index(stop, len(prompt))


def test_a_chat_has_logprobs_in_its_own_form(server):
    body = {
        "model": "it", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4, "temperature": 0,
        "logprobs": True, "top_logprobs": 2,
    }  # fmt: skip
    whole, streamed = ask(server, body, {**body, "stream": True}, path="/v1/chat/completions")
    content = whole.json()["choices"][0]["logprobs"]["content"]
    assert [x for piece in events(streamed.text) for x in piece["choices"][0]["logprobs"]["content"]] == content
    assert len(content) == 4
    for entry in content:
        first, second = entry["top_logprobs"]
        assert (first["token"], first["logprob"]) == (entry["token"], entry["logprob"])
        assert first["logprob"] >= second["logprob"]
        assert entry["bytes"] is None or bytes(entry["bytes"]).decode() == entry["token"]


def test_a_prompt_has_n_answers(server):
    """The answer i of a request is that of a request with the seed + i; a prompt's tokens count once."""
    body = {"model": "fr", **GREEDY, "temperature": 1.5, "max_tokens": 4}
    both = {**body, "prompt": ["Hello", "Bye"], "n": 2, "seed": 5}
    ((several,), (streamed,)) = ask(server, both), ask(server, {**both, "stream": True})
    prompts = enumerate(["Hello", "Hello", "Bye", "Bye"], 5)
    alone = ask(server, *({**body, "prompt": prompt, "seed": seed} for seed, prompt in prompts))
    want = [reply.json()["choices"][0]["text"] for reply in alone]
    choices = several.json()["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
    assert [choice["text"] for choice in choices] == want
    assert want[0] != want[1]
    assert several.json()["usage"] == {"prompt_tokens": 8, "completion_tokens": 16, "total_tokens": 24}
    pieces = [event["choices"][0] for event in events(streamed.text)]
    assert ["".join(p["text"] for p in pieces if p["index"] == i) for i in range(4)] == want


def test_a_prompt_alone_is_scored_with_no_new_token(server):
    (reply,) = ask(server, {"model": "fr", **GREEDY, "max_tokens": 0, "echo": True, "logprobs": 0})
    (choice,) = reply.json()["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("Hello", "length")
    assert choice["logprobs"]["tokens"] == list("Hello")
    assert [top and list(top) for top in choice["logprobs"]["top_logprobs"]] == [None, *([c] for c in "ello")]
    assert reply.json()["usage"]["completion_tokens"] == 0


def test_tokens_whose_bytes_are_no_text_have_different_names(base):
    parts = base.encode("🎉")
    assert len({base.spell(token) for token in parts}) == len(parts)
    assert base.spell(258) == ("<|im_end|>", True)
    assert all("\ufffd" not in base.spell(token)[0] for token in parts)


@pytest.mark.parametrize(
    "fields", [{"top_logprobs": 2}, {"logprobs": True, "top_logprobs": 21}, {"logprobs": 2}, {"echo": True}]
)
def test_fields_of_a_chat_that_are_wrong(fields):
    with pytest.raises(RequestError):
        parse_request({"model": "fr", "messages": [{"role": "user", "content": "x"}], **fields}, chat=True, seed=0)
