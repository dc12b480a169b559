"""OpenAI's requests and answers: JSON to values and back. Pure functions.

An answer has the text of its tokens, piece by piece, up to a stop string, and their log-probabilities in the two forms
of OpenAI's interface.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from jaxadapt.core.errors import AdapterError, ConfigError
from jaxadapt.serving.generation import TOP, Sampling, Scores

# ---------------------------------------------------------------- scores


Spell = Callable[[int], tuple[str, bool]]
"""Returns the text of one token, and False if its bytes are no whole text: the text is then the vocabulary's name."""

_LEAST = -9999.0  # JSON has no infinity; vLLM writes this number, too


@dataclasses.dataclass(frozen=True)
class TokenScore:
    """The log-probability of one token.

    Attributes:
        token: its id.
        offset: the place in the choice's text of the first character that it has a part of.
        logprob: its log-probability; None for the first token of a prompt, which follows nothing.
        top: (id, log-probability) of the most probable tokens at its place, in descending order.
    """

    token: int
    offset: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


def token_scores(tokens: Iterable[tuple[int, int]], scores: Scores, top: int, first: int = 0) -> Iterator[TokenScore]:
    """Yield the scores of (token, offset) that stand at the places from `first` on, each with `top` other tokens."""
    for place, (token, offset) in enumerate(tokens, first):
        others = zip(scores.ids[place, :top].tolist(), scores.top[place, :top].tolist(), strict=True)
        yield TokenScore(
            token, offset, max(float(scores.logprobs[place]), _LEAST), tuple((i, max(x, _LEAST)) for i, x in others)
        )


def completion_logprobs(scores: Sequence[TokenScore], spell: Spell, end: int) -> dict[str, Any]:
    """Return the field `logprobs` of a completion.

    Args:
        scores: of the choice's tokens, in order.
        spell: the text of a token.
        end: the length of the choice's text up to the last of these tokens; a stop string is not in it.
    """
    texts = [spell(score.token)[0] for score in scores]
    tops: list[dict[str, float] | None] = []
    for score, text in zip(scores, texts, strict=True):
        named = {} if score.logprob is None else {text: score.logprob}
        for token, logprob in score.top:  # two tokens may have one text; the more probable one is shown
            other = spell(token)[0]
            named[other] = max(logprob, named.get(other, logprob))
        tops.append(named or None)
    return {
        "tokens": texts, "token_logprobs": [score.logprob for score in scores], "top_logprobs": tops,
        "text_offset": [min(score.offset, end) for score in scores],
    }  # fmt: skip


def chat_logprobs(scores: Sequence[TokenScore], spell: Spell) -> dict[str, Any]:
    """Return the field `logprobs` of a chat."""

    def entry(token: int, logprob: float | None) -> dict[str, Any]:
        text, whole = spell(token)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode()) if whole else None}

    return {
        "content": [
            entry(score.token, score.logprob) | {"top_logprobs": [entry(*each) for each in score.top]}
            for score in scores
        ],
        "refusal": None,
    }


# ---------------------------------------------------------------- protocol


MAX_PROMPTS, MAX_STOPS, MAX_CHOICES = 64, 4, 128
LEFT = 499  # the status of a request whose client left


class RequestError(AdapterError):
    """A request that is answered with an HTTP error.

    Attributes:
        status: the HTTP status.
        code: OpenAI's name of the error, or None; the status, as a number, in answers in vLLM's form.
        param: the field of the request at fault, or None.
        kind: the type of the error; None for OpenAI's type of the status.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | int | None = None,
        param: str | None = None,
        kind: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status: int = status
        self.code: str | int | None = code
        self.param: str | None = param
        usual = "invalid_request_error" if status < 500 else "server_error"
        self.kind: str = kind or ("rate_limit_error" if status == 429 else usual)


@dataclasses.dataclass(frozen=True)
class Request:
    """A completion or a chat.

    Attributes:
        model: the name of the base or of an adapter.
        prompts: texts or token ids; empty for a chat.
        messages: (role, text) of a chat.
        max_tokens: the most tokens of an answer; None for all that fit.
        sampling: how tokens are chosen, and whether their log-probabilities are returned.
        top: the number of most probable tokens to return beside each token.
        choices: the answers to each prompt.
        echo: True to put the prompt before its answer.
        stop: strings that end an answer.
        stream: True for server-sent events.
        usage: True if the stream ends with the numbers of tokens.
    """

    model: str
    prompts: tuple[str | list[int], ...]
    messages: tuple[tuple[str, str], ...]
    max_tokens: int | None
    sampling: Sampling
    top: int
    choices: int
    echo: bool
    stop: tuple[str, ...]
    stream: bool
    usage: bool


# The fields of a request, with their types and defaults; `object` is checked where the field is read. None is no value.
_FIELDS: Mapping[str, tuple[type, Any]] = {
    "model": (str, None), "temperature": (float, 1.0), "top_p": (float, 1.0), "top_k": (int, 0), "seed": (int, None),
    "n": (int, 1), "stop": (object, ()), "stream": (bool, False), "stream_options": (dict, {}),
}  # fmt: skip
_OF_CHATS: Mapping[str, tuple[type, Any]] = {
    "messages": (object, None), "max_tokens": (int, None), "max_completion_tokens": (int, None),
    "logprobs": (bool, False), "top_logprobs": (int, 0),
}  # fmt: skip
_OF_COMPLETIONS: Mapping[str, tuple[type, Any]] = {
    "prompt": (object, None), "max_tokens": (int, 16), "echo": (bool, False), "logprobs": (int, None),
}  # fmt: skip
# Fields that have no effect here, with the values at which they have none in OpenAI's interface either.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "best_of": (1,), "suffix": ("",),
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
    fields = _fields(body, chat)
    if fields["model"] is None:
        raise _wrong("model", "a string", None)
    newer, echo = fields.get("max_completion_tokens"), fields.get("echo", False)
    count = fields["max_tokens"] if newer is None else newer
    if count is not None and count < (0 if echo else 1):
        raise _wrong("max_tokens", "at least 1, or 0 with echo", count)
    if not 1 <= fields["n"] <= MAX_CHOICES:
        raise _wrong("n", f"1 to {MAX_CHOICES}", fields["n"])
    top, options = _top(fields, chat), fields["stream_options"]
    if options.keys() - {"include_usage", "include_obfuscation"} or not all(
        isinstance(x, bool) for x in options.values()
    ):
        raise _wrong("stream_options", "an object with include_usage, true or false", options)
    try:
        sampling = Sampling(
            temperature=fields["temperature"],
            top_k=max(0, fields["top_k"]),  # others write -1 for all tokens
            top_p=fields["top_p"],
            seed=(seed if fields["seed"] is None else fields["seed"]) % 2**32,
            scores=top is not None,
        )
    except ConfigError as error:
        raise RequestError(400, str(error)) from error
    return Request(
        model=fields["model"],
        prompts=() if chat else _prompts(fields["prompt"]),
        messages=_messages(fields["messages"]) if chat else (),
        max_tokens=count,
        sampling=sampling,
        top=top or 0,
        choices=fields["n"],
        echo=echo,
        stop=_stop(fields["stop"]),
        stream=fields["stream"],
        usage=bool(options.get("include_usage")),
    )


def _fields(body: Any, chat: bool) -> dict[str, Any]:
    """Return all fields of a request; raise `RequestError` for one that is unknown, not implemented or of a wrong type.

    A field that is null, or missing, has its default.
    """
    if not isinstance(body, dict):
        raise _wrong(None, "an object", body)
    given: dict[str, Any] = {name: value for name, value in body.items() if value is not None}
    table = {**_FIELDS, **(_OF_CHATS if chat else _OF_COMPLETIONS)}
    for name, value in given.items():
        if name not in table.keys() | _NEUTRAL.keys() | _IGNORED:
            raise RequestError(400, f"{name} is not a field that this server knows", param=name)
        if name in _NEUTRAL and value not in _NEUTRAL[name]:
            raise RequestError(400, f"{name}={value!r} is not implemented; leave it out", param=name)
    return {
        name: _read(name, kind, given[name]) if name in given else default for name, (kind, default) in table.items()
    }


_KINDS = {str: "a string", int: "an integer", float: "a number", bool: "true or false", dict: "an object"}


def _read(name: str, kind: type, value: Any) -> Any:
    """Return a field's value; raise `RequestError` if it has another type."""
    # A bool is an int in Python, but not in JSON.
    of_kind = isinstance(value, int | float if kind is float else kind)
    if not of_kind or (isinstance(value, bool) and kind not in (bool, object)):
        raise _wrong(name, _KINDS[kind], value)
    try:
        return float(value) if kind is float else value
    except OverflowError as error:
        raise _wrong(name, "a number", "an integer that is too large") from error


def _stop(stop: Any) -> tuple[str, ...]:
    """Return the texts that end an answer."""
    stops = [stop] if isinstance(stop, str) else stop
    if (
        not isinstance(stops, list | tuple)
        or len(stops) > MAX_STOPS
        or not all(isinstance(s, str) and s for s in stops)
    ):
        raise _wrong("stop", f"a string, or a list of at most {MAX_STOPS}, none of them empty", stop)
    return tuple(stops)


def _top(fields: Mapping[str, Any], chat: bool) -> int | None:
    """Return the number of most probable tokens to return beside each token; None for no log-probabilities.

    A completion states the number as `logprobs`, a chat as `top_logprobs`, beside `logprobs`, which is true.
    """
    name = "top_logprobs" if chat else "logprobs"
    wanted = fields["logprobs"] if chat else fields["logprobs"] is not None
    top = fields[name] or 0
    if not 0 <= top <= TOP or (top and not wanted):
        raise _wrong(name, f"0 to {TOP}" + (", and logprobs true" if chat else ""), top)
    return top if wanted else None


def parse_adapter(body: Any) -> tuple[str, str | None, bool]:
    """Return lora_name, lora_path and load_inplace of a request in vLLM's form; without lora_path, None.

    Raises:
        RequestError: a field has the wrong type, or a name or path is empty.

    >>> parse_adapter({"lora_name": "fr", "lora_path": "/adapters/fr"})
    ('fr', '/adapters/fr', False)
    """
    fields: dict[str, Any] = body if isinstance(body, dict) else {}
    name, path, in_place = fields.get("lora_name"), fields.get("lora_path"), fields.get("load_inplace", False)
    if not isinstance(name, str) or not isinstance(path, str | None) or not isinstance(in_place, bool):
        raise lora_error(400, "expected lora_name and lora_path, strings, and load_inplace, true or false")
    if not name or path == "":
        raise lora_error(400, "Both 'lora_name' and 'lora_path' must be provided.")
    return name, path, in_place


def lora_error(status: int, message: str) -> RequestError:
    """Return an error in vLLM's form, for the requests that load and unload adapters."""
    return RequestError(status, message, code=status, kind="NotFoundError" if status == 404 else "InvalidUserInput")


def _wrong(name: str | None, expected: str, found: Any) -> RequestError:
    return RequestError(400, f"{name or 'the request'}: expected {expected}, found {str(found)[:80]!r}", param=name)


def _prompts(prompt: Any) -> tuple[str | list[int], ...]:
    def is_ids(value: Any) -> bool:
        return isinstance(value, list) and bool(value) and all(type(x) is int for x in value)

    prompts = [prompt] if isinstance(prompt, str) or is_ids(prompt) else prompt
    if (
        not isinstance(prompts, list)
        or not 0 < len(prompts) <= MAX_PROMPTS
        or not all(isinstance(p, str) or is_ids(p) for p in prompts)
    ):
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
class Piece:
    """A part of an answer.

    Attributes:
        text: the text that is new.
        reason: None while the answer goes on; "stop" or "length" at its end.
        error: why the request failed, at its end.
        scores: of the tokens that are new, and of the prompt's if the job asks for them.
    """

    text: str = ""
    reason: str | None = None
    error: RequestError | None = None
    scores: Sequence[TokenScore] = ()

    @property
    def final(self) -> bool:
        """True for the last piece."""
        return self.reason is not None or self.error is not None


@dataclasses.dataclass(frozen=True)
class Answer:
    """What all parts of one answer have in common: id, kind, time, model and version of the adapter.

    Attributes:
        spell: the text of a token if the request asks for log-probabilities, else None.
    """

    id: str
    chat: bool
    created: int
    model: str
    fingerprint: str
    spell: Spell | None = None

    def whole(self, choices: Sequence[Piece], usage: Mapping[str, int]) -> dict[str, Any]:
        """Return the JSON of all choices."""
        made = [
            self._choice(index, choice, {"message": {"role": "assistant", "content": choice.text}})
            for index, choice in enumerate(choices)
        ]
        return self._frame("chat.completion", made) | {"usage": dict(usage)}

    def piece(self, index: int, piece: Piece, *, first: bool, offset: int) -> dict[str, Any]:
        """Return the JSON of a piece of a stream, whose text begins at `offset` in the choice's text."""
        delta = ({"role": "assistant"} if first else {}) | ({"content": piece.text} if piece.text or first else {})
        return self._frame("chat.completion.chunk", [self._choice(index, piece, {"delta": delta}, offset)])

    def last(self, usage: Mapping[str, int]) -> dict[str, Any]:
        """Return the JSON of the last piece of a stream, which has the numbers of tokens."""
        return self._frame("chat.completion.chunk", []) | {"usage": dict(usage)}

    def _choice(self, index: int, piece: Piece, chat: Mapping[str, Any], offset: int = 0) -> dict[str, Any]:
        """Return the JSON of a choice or of a part of it; `chat` is its text in the form of a chat."""
        scores, spell = piece.scores, self.spell
        logprobs = None if spell is None else (
            chat_logprobs(scores, spell) if self.chat else completion_logprobs(scores, spell, offset + len(piece.text))
        )  # fmt: skip
        text = chat if self.chat else {"text": piece.text}
        return {"index": index, "finish_reason": piece.reason, "logprobs": logprobs, **text}

    def _frame(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the JSON of an answer or of a part of it; `kind` is its name for a chat."""
        return {
            "id": self.id, "object": kind if self.chat else "text_completion", "created": self.created,
            "model": self.model, "choices": choices, "system_fingerprint": self.fingerprint,
        }  # fmt: skip


# ---------------------------------------------------------------- text


INCOMPLETE = "\ufffd"  # what a decoder writes for a character whose bytes are not all there


class TextStream:
    """The text of growing tokens. A piece is returned when later tokens cannot change or end it.

    Args:
        decode: returns the text of token ids.
        stop: strings that end the text, which does not contain them.
        context: token ids before the text. A decoder may drop the space before its first token.
        offset: the number of characters before the text.

    Attributes:
        offset: the place of the first character that the last token has a part of; at the end, that of the end.
        stopped: True after a stop string.

    >>> stream = TextStream(lambda ids: "".join(map(chr, ids)), ["END"])
    >>> [stream.push(ord(c)) for c in "a EaEND"], stream.stopped
    (['a', ' ', '', 'Ea', '', '', ''], True)
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        stop: Sequence[str] = (),
        context: Sequence[int] = (),
        offset: int = 0,
    ) -> None:
        self._decode, self._stop = decode, [text for text in stop if text]
        self._ids: list[int] = [*context]
        self._begin = 0  # ids before it are decoded for good; those from it on give the next characters their context
        self._read = len(context)  # ids before it are in the text, or before it
        self._whole = offset  # the place of the text of the ids from `_read` on
        self._held = ""
        self.offset: int = offset
        self.stopped: bool = False

    def push(self, token: int) -> str:
        """Add a token; return the text that is certain now."""
        earlier = self._decode(self._ids[self._begin :])
        self._ids.append(token)
        before = self._decode(self._ids[self._begin : self._read])
        now = self._decode(self._ids[self._begin :])
        kept = earlier if now.startswith(earlier) else earlier.rstrip(INCOMPLETE)
        self.offset = self._whole + min(len(kept), len(now.rstrip(INCOMPLETE))) - len(before)
        if now.endswith(INCOMPLETE) or len(now) <= len(before):
            return ""
        self._begin, self._read = self._read, len(self._ids)
        self._whole += len(now) - len(before)
        return self._release(now[len(before) :], final=False)

    def finish(self) -> str:
        """Return the rest of the text; no token follows."""
        before = self._decode(self._ids[self._begin : self._read])
        rest = self._decode(self._ids[self._begin :])[len(before) :]
        self.offset = self._whole + len(rest)
        return self._release(rest, final=True)

    def _release(self, text: str, *, final: bool) -> str:
        held = self._held + text
        ends = [place for place in (held.find(stop) for stop in self._stop) if place >= 0]
        if ends:
            self.stopped, self._held = True, ""
            return held[: min(ends)]
        kept = 0 if final else max((_overlap(held, stop) for stop in self._stop), default=0)
        self._held = held[len(held) - kept :]
        return held[: len(held) - kept]


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest beginning of a stop string, but not all of it, that a text ends in.

    >>> _overlap("the EN", "END"), _overlap("the", "END")
    (2, 0)
    """
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
