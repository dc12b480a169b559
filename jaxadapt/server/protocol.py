"""OpenAI's requests and answers: JSON to values and back. Pure functions."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from jaxadapt.core.errors import AdapterError, ConfigError
from jaxadapt.serving import Sampling

MAX_PROMPTS, MAX_STOPS = 64, 4


class RequestError(AdapterError):
    """A request that is answered with an HTTP error.

    Attributes:
        status: the HTTP status.
        code: OpenAI's name of the error, or None.
        param: the field of the request at fault, or None.
    """

    def __init__(self, status: int, message: str, *, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param

    def body(self) -> dict[str, Any]:
        """Return the JSON of the answer."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        kind = "rate_limit_error" if self.status == 429 else kind
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


@dataclasses.dataclass(frozen=True)
class Request:
    """A completion or a chat.

    Attributes:
        model: the name of the base or of an adapter.
        prompts: texts or token ids; empty for a chat.
        messages: (role, text) of a chat.
        max_tokens: the most tokens of an answer; None for all that fit.
        sampling: how tokens are chosen; None as the seed means one of the server's choice.
        stop: strings that end an answer.
        stream: True for server-sent events.
        usage: True if the stream ends with the numbers of tokens.
    """

    model: str
    prompts: tuple[str | list[int], ...]
    messages: tuple[tuple[str, str], ...]
    max_tokens: int | None
    sampling: Sampling
    stop: tuple[str, ...]
    stream: bool
    usage: bool


# Fields that have no effect here, with the values at which they have none in OpenAI's interface either.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "n": (1,), "best_of": (1,), "echo": (False,), "suffix": ("",), "logprobs": (False,), "top_logprobs": (),
    "presence_penalty": (0,), "frequency_penalty": (0,), "logit_bias": ({},), "store": (False,),
    "response_format": ({"type": "text"},), "tools": ([],), "tool_choice": ("none",),
}  # fmt: skip
_IGNORED = {"user", "metadata", "safety_identifier"}  # about the client, not the answer


def parse_request(body: Any, *, chat: bool, seed: int) -> Request:
    """Check the JSON of a request.

    Args:
        body: the decoded JSON.
        chat: True for a chat.
        seed: for a request without one.

    Raises:
        RequestError: a field is missing, unknown, of the wrong type, or has a value that is not implemented.

    >>> parse_request({"model": "fr", "prompt": "Bonjour", "temperature": 0}, chat=False, seed=1).max_tokens
    16
    """
    if not isinstance(body, dict):
        raise _wrong(None, "an object", body)
    fields: dict[str, Any] = {name: value for name, value in body.items() if value is not None}
    texts = "messages" if chat else "prompt"
    known = {"model", texts, "max_tokens", "temperature", "top_p", "top_k", "seed", "stop", "stream", "stream_options"}
    known |= {"max_completion_tokens"} if chat else set()
    for name, value in fields.items():
        if name not in known | _NEUTRAL.keys() | _IGNORED:
            raise RequestError(400, f"{name} is not a field that this server knows", param=name)
        if name in _NEUTRAL and value not in _NEUTRAL[name]:
            raise RequestError(400, f"{name}={value!r} is not implemented; leave it out", param=name)
    model = _take(fields, "model", str, None)
    count = _take(fields, "max_tokens", int, None if chat else 16, required=False)
    count = _take(fields, "max_completion_tokens", int, count, required=False)
    if count is not None and count < 1:
        raise _wrong("max_tokens", "at least 1", count)
    try:
        sampling = Sampling(
            temperature=_number(fields, "temperature", 1.0),
            top_k=max(0, _take(fields, "top_k", int, 0)),  # others write -1 for all tokens
            top_p=_number(fields, "top_p", 1.0),
            seed=_take(fields, "seed", int, seed) % 2**32,
        )
    except ConfigError as error:
        raise RequestError(400, str(error)) from error
    stop = fields.get("stop", [])
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or len(stop) > MAX_STOPS or not all(isinstance(s, str) and s for s in stop):
        raise _wrong("stop", f"a string, or a list of at most {MAX_STOPS}, none of them empty", stop)
    stream = _take(fields, "stream", bool, False)
    options = _take(fields, "stream_options", dict, {})
    if options.keys() - {"include_usage", "include_obfuscation"} or not all(
        isinstance(x, bool) for x in options.values()
    ):
        raise _wrong("stream_options", "an object with include_usage, true or false", options)
    messages = _messages(fields.get(texts)) if chat else ()
    prompts = () if chat else _prompts(fields.get(texts))
    usage = bool(options.get("include_usage"))
    return Request(model, prompts, messages, count, sampling, tuple(stop), stream, usage)


def _wrong(name: str | None, expected: str, found: Any) -> RequestError:
    return RequestError(400, f"{name or 'the request'}: expected {expected}, found {str(found)[:80]!r}", param=name)


def _take(fields: Mapping[str, Any], name: str, kind: type, default: Any, *, required: bool = True) -> Any:
    value = fields.get(name, default)
    if value is None and not required:
        return None
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise _wrong(name, {str: "a string", int: "an integer", bool: "true or false"}.get(kind, "an object"), value)
    return value


def _number(fields: Mapping[str, Any], name: str, default: float) -> float:
    value = fields.get(name, default)
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise _wrong(name, "a number", value)
    try:
        return float(value)
    except OverflowError as error:
        raise _wrong(name, "a number", "an integer that is too large") from error


def _prompts(prompt: Any) -> tuple[str | list[int], ...]:
    def is_ids(value: Any) -> bool:
        return isinstance(value, list) and bool(value) and all(type(x) is int for x in value)

    prompts = [prompt] if isinstance(prompt, str) or is_ids(prompt) else prompt
    right = isinstance(prompts, list) and all(isinstance(p, str) or is_ids(p) for p in prompts)
    if not right or not 0 < len(prompts) <= MAX_PROMPTS:
        raise _wrong("prompt", f"a string, a list of token ids, or a list of at most {MAX_PROMPTS} of them", prompt)
    return tuple(prompts)


def _messages(messages: Any) -> tuple[tuple[str, str], ...]:
    expected = "a list of objects with role (system, user or assistant) and content, a string or a list of text parts"
    if not isinstance(messages, list) or not messages:
        raise _wrong("messages", expected, messages)
    found: list[tuple[str, str]] = []
    for message in messages:
        role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
        if isinstance(content, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
            content = "".join(part["text"] for part in content)
        role = "system" if role == "developer" else role
        if role not in ("system", "user", "assistant") or not isinstance(content, str):
            raise _wrong("messages", expected, message)
        found.append((role, content))
    return tuple(found)


@dataclasses.dataclass(frozen=True)
class Answer:
    """The fields common to all parts of one answer: id, kind, time, model and version of the adapter."""

    id: str
    chat: bool
    created: int
    model: str
    fingerprint: str

    def whole(self, choices: Sequence[tuple[str, str]], usage: Mapping[str, int]) -> dict[str, Any]:
        """Return the JSON of (text, reason of the end) of each prompt."""
        made = [
            {"index": i, "finish_reason": reason, "logprobs": None}
            | ({"message": {"role": "assistant", "content": text}} if self.chat else {"text": text})
            for i, (text, reason) in enumerate(choices)
        ]
        return self._frame("chat.completion" if self.chat else "text_completion", made) | {"usage": dict(usage)}

    def piece(self, index: int, text: str, reason: str | None, *, first: bool) -> dict[str, Any]:
        """Return the JSON of a piece of a stream."""
        choice: dict[str, Any] = {"index": index, "finish_reason": reason, "logprobs": None}
        role = {"role": "assistant"} if first else {}
        choice |= {"delta": role | ({"content": text} if text or first else {})} if self.chat else {"text": text}
        return self._frame("chat.completion.chunk" if self.chat else "text_completion", [choice])

    def last(self, usage: Mapping[str, int]) -> dict[str, Any]:
        """Return the JSON of the last piece of a stream, which has the numbers of tokens."""
        return self._frame("chat.completion.chunk" if self.chat else "text_completion", []) | {"usage": dict(usage)}

    def _frame(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices,
            "system_fingerprint": self.fingerprint,
        }  # fmt: skip


def usage_of(prompt: int, completion: int) -> dict[str, int]:
    """Return OpenAI's numbers of tokens."""
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
