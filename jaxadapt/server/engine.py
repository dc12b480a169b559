"""The base model of a server, room for its adapters, and the running batch.

The base is the demo's SmolLM2, or a folder with a Llama of Hugging Face. The server's bank has room for the
configurations that `make_room` finds in the folder of adapters. One thread owns the batch, which decodes continuously:
requests enter and leave it between two tokens. It counts requests and tokens, in Prometheus' text format.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import json
import os
import threading
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jaxadapt
from jaxadapt.adapters.sites import sites_of
from jaxadapt.configs.table import FACTS
from jaxadapt.core.errors import LOGGER, AdapterError, FileError, FormatError, warn
from jaxadapt.demo.llama import PROJECTIONS, LlamaConfig, to_nnx
from jaxadapt.demo.smollm2 import MODEL_NAME, SmolLM2, require
from jaxadapt.merging.factors import plain_config
from jaxadapt.methods.base import get_method
from jaxadapt.server.protocol import INCOMPLETE, Piece, RequestError, TextStream, TokenScore, token_scores
from jaxadapt.serving.generation import Decoder, Sampling, Scores
from jaxadapt.serving.layout import becomes_lora, compare_shared
from jaxadapt.serving.pool import AdapterPool
from jaxadapt.storage import hf_model

# ---------------------------------------------------------------- base


SMOLLM2 = "smollm2"
START, END = "<|im_start|>", "<|im_end|>"
SMOLLM2_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


@dataclasses.dataclass(frozen=True)
class Base:
    """A base model with its tokenizer.

    Attributes:
        name: the model's name for clients.
        config: its hyperparameters.
        weights: its checkpoint.
        tokenizer: a tokenizer of the package tokenizers.
        text_tokenizer: the same one, for which special tokens are text. It is an object of its own, because a setting
            that one thread changes would count for all.
        stop: tokens that end an answer.
        system: the system message of a chat that has none.
    """

    name: str
    config: LlamaConfig
    weights: Mapping[str, Any]
    tokenizer: Any
    text_tokenizer: Any
    stop: tuple[int, ...]
    system: str = ""

    def build(self) -> tuple[LlamaConfig, Any]:
        """Build the model in NNX; return its hyperparameters and the model."""
        # Stacked layers: a program compiles in a third of the time, and a step takes a fifth longer.
        config = dataclasses.replace(self.config, scan=True)
        return config, to_nnx(config, self.weights)

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, with the tokens that the tokenizer adds, such as Llama 2's first one."""
        return _encode(self.tokenizer, text, add=True)

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """Return the text of token ids, without special tokens, or with them."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=not special)

    def locate(self, ids: Sequence[int], text: str) -> Generator[tuple[int, int]]:
        """Yield the token ids of a text, each with the place of the first character that it has a part of."""
        # Special tokens are in the text if they were written there, and not if the tokenizer added them.
        special = self.decode(ids) != text
        stream = TextStream(lambda some: self.decode(some, special=special))
        for token in ids:
            stream.push(token)
            yield token, stream.offset

    def spell(self, token: int) -> tuple[str, bool]:
        """Return the text of one token, also of a special one, and True.

        A token whose bytes are no whole text has the name that the vocabulary gives it, and False.
        """
        alone, name = self.decode([token], special=True), self.tokenizer.id_to_token(token)
        # After another token: some decoders drop the space before the first one.
        text = self.decode([token, token], special=True)[len(alone) :]
        return (text, True) if name is None or INCOMPLETE not in alone else (name, False)

    @property
    def chats(self) -> bool:
        """True if the tokenizer has the two special tokens of ChatML. (Templates in files are never executed.)"""
        return all(self.tokenizer.token_to_id(token) is not None for token in (START, END))

    def encode_chat(self, messages: Sequence[tuple[str, str]]) -> list[int]:
        """Return the token ids of (role, text) messages in ChatML, up to the start of the answer.

        A message cannot contain the special tokens: in it they are text.
        """
        start, end = (self.tokenizer.token_to_id(token) for token in (START, END))
        if self.system and (not messages or messages[0][0] != "system"):
            messages = [("system", self.system), *messages]
        ids: list[int] = []
        for role, text in messages:
            ids += [start, *_encode(self.text_tokenizer, f"{role}\n{text}"), end]
            ids += _encode(self.text_tokenizer, "\n")
        return [*ids, start, *_encode(self.text_tokenizer, "assistant\n")]


def _encode(tokenizer: Any, text: str, *, add: bool = False) -> list[int]:
    # Other threads run meanwhile; while `encode` runs, they do not.
    return tokenizer.encode_batch([text], add_special_tokens=add)[0].ids


def open_base(base: str | os.PathLike[str]) -> Base:
    """Open a base model.

    Args:
        base: "smollm2", or a folder with config.json, model.safetensors (or its index and shards) and tokenizer.json.

    Raises:
        FileError: files or packages are missing.
        FormatError: a file does not hold a Llama.
    """
    if base == SMOLLM2:
        model = SmolLM2.open()
        tokenizer = model.tokenizer()
        stop = tuple(tokenizer.token_to_id(token) for token in (END, "<|endoftext|>"))
        return Base(MODEL_NAME, model.config, model.weights(), tokenizer, _as_text(tokenizer), stop, SMOLLM2_SYSTEM)
    folder = Path(base)
    if missing := [name for name in ("config.json", "tokenizer.json") if not (folder / name).is_file()]:
        raise FileError(
            f"{folder}: expected {SMOLLM2!r}, or a folder with a Llama; found no {' and no '.join(missing)} there"
        )
    path = folder / "config.json"
    try:
        fields = json.loads(path.read_bytes())
        config = LlamaConfig.from_hf(fields)
    except (ValueError, TypeError, KeyError, AttributeError, AdapterError) as error:
        raise FormatError(f"{path}: expected the configuration of a Llama; {type(error).__name__}: {error}") from error
    tokenizer = _read_tokenizer(folder / "tokenizer.json")
    stop = {*_end_tokens(path, fields.get("eos_token_id")), tokenizer.token_to_id(END)} - {None}
    with hf_model.open_model(folder) as tensors:
        hf_model.refuse_packed(tensors)
        codes = sorted({str(spec.dtype) for spec in tensors.specs.values() if spec.dtype.kind in "iub"})
        if codes or fields.get("quantization_config"):
            raise FormatError(
                f"{folder}: expected floating-point weights, found {', '.join(codes) or 'quantization_config'};"
                " dequantize the model first (transformers: model.dequantize(), save_pretrained)"
            )
        name, weights = folder.resolve().name, dict(tensors)
    return Base(name, config, weights, tokenizer, _as_text(tokenizer), tuple(sorted(stop)))


def _end_tokens(path: Path, ends: Any) -> list[int]:
    ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
    if not all(type(token) is int for token in ends):
        raise FormatError(f"{path}: eos_token_id: expected a token id or a list of them, found {ends}")
    return ends


def _read_tokenizer(path: Path) -> Any:
    tokenizers = require("tokenizers")
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises no class of its own
        raise FormatError(f"{path}: expected a tokenizer; {error}") from error
    tokenizer.no_truncation()  # files keep these settings of a training
    tokenizer.no_padding()
    return tokenizer


def _as_text(tokenizer: Any) -> Any:
    """Return a copy of a tokenizer, for which special tokens are text."""
    copy = type(tokenizer).from_str(tokenizer.to_str())
    copy.encode_special_tokens = True
    return copy


# ---------------------------------------------------------------- room


Room = jaxadapt.Config | jaxadapt.Adapter


def make_room(model: Any, folders: Iterable[Path], rank: int, targets: Sequence[str] = PROJECTIONS) -> list[Room]:
    """Return what to give `serving.create`: room for plain LoRAs, and for each other kind of adapter in the folders.

    Args:
        model: the base.
        folders: the adapters that are there at the start. One that cannot be read or served counts for nothing, with
            a warning.
        rank: the least rank to have room for.
        targets: the modules that adapters may change.
    """
    plain = jaxadapt.LoraConfig(r=rank, target_modules=list(targets))
    kinds: dict[tuple[str, bool, bool], list[Any]] = {("LORA", False, False): [plain]}
    for path in folders:
        try:
            found = _read_room(model, path, rank)
        except AdapterError as error:
            warn(f"requests for {path.name!r} will fail: {error}")
        else:
            config = found.config if isinstance(found, jaxadapt.Adapter) else found
            kind = (config.peft_type, bool(config.get("use_dora")), bool(config.get("lora_bias")))
            kinds.setdefault(kind, []).append(found)
    room: list[Room] = []
    for kind, members in kinds.items():
        whole = isinstance(members[0], jaxadapt.Adapter)
        for made in _different(members) if whole else [_cover(kind, members, plain)]:
            try:
                jaxadapt.serving.create(model, made, slots=2)
                room.append(made)
            except AdapterError as error:
                warn(f"requests for adapters of the kind {kind[0]} will fail: {error}")
    return room


def _read_room(model: Any, path: Path, rank: int) -> Any:
    """Return the configuration of an adapter's kind, or the adapter, if it has tensors of its own for all modules.

    Raises `AdapterError` if it cannot be read, or if no bank has room for it.
    """
    info = jaxadapt.inspect(path)
    config: Any = info.config
    largest = max((size for _, shape in info.tensors.values() for size in shape), default=0)
    # A number in a JSON file must not take all memory.
    if FACTS[config.peft_type].rows == "no" or max(_ranks(config), default=0) > largest:
        raise FormatError(f"no bank of adapters has room for this {config.peft_type}")
    if becomes_lora(config):
        config = plain_config(config, get_method(config).plain_rank(config) or rank)
    return jaxadapt.from_peft(jaxadapt.read(path), model) if get_method(config).has_shared else config


def _cover(kind: tuple[str, bool, bool], configs: Sequence[Any], plain: jaxadapt.LoraConfig) -> jaxadapt.Config:
    """Return a configuration with room for all adapters of one kind."""
    peft_type, dora, bias = kind
    ranks = [r for config in configs for r in _ranks(config)]
    if peft_type == "LORA":
        return plain.replace(r=max([plain.r, *ranks]), use_dora=dora, lora_bias=bias)
    if peft_type == "IA3":
        return jaxadapt.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])
    return configs[0].replace(target_modules=plain.target_modules, **({"r": max(ranks)} if ranks else {}))


def _ranks(config: jaxadapt.Config) -> list[int]:
    """Return the ranks that a configuration states, as far as it states them by `r` and `rank_pattern`."""
    return [r for r in (config.get("r"), *(config.get("rank_pattern") or {}).values()) if isinstance(r, int)]


def _different(adapters: Sequence[jaxadapt.Adapter]) -> list[jaxadapt.Adapter]:
    """Return one adapter for all those with the same shared tensors: the largest, with the targets of all."""
    groups: list[tuple[jaxadapt.Adapter, set[str]]] = []
    for adapter in sorted(adapters, key=lambda adapter: -sum(x.size for x in adapter.shared.values())):
        modules = {module for site in sites_of(adapter) for module in site.modules}
        known = next((own for first, own in groups if not compare_shared(first.shared, adapter.shared)), None)
        if known is None:
            groups.append((adapter, modules))
        else:
            known.update(modules)
    return [dataclasses.replace(first, config=first.config.with_targets(sorted(own))) for first, own in groups]


# ---------------------------------------------------------------- metrics


SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""The upper ends of the histograms' buckets."""

_HELP = {
    "requests_total": "Requests by HTTP status; 499 if the client left.",
    "prompt_tokens_total": "Tokens of prompts that were read.",
    "generated_tokens_total": "Tokens that were generated.",
    "steps_total": "Decoding steps of the batch.",
    "first_token_seconds": "Seconds from a request to its first token.",
    "request_seconds": "Seconds from a request to the end of its answer.",
    "rows": "Rows of the batch.",
    "rows_active": "Rows that hold a request.",
    "queue_length": "Requests that wait for a row.",
    "adapters": "Adapters that can be asked for.",
    "adapters_resident": "Adapters in slots of the bank.",
    "compiled_programs": "Compiled programs of the batch; it does not grow with requests.",
}


class Metrics:
    """Counters and histograms. All methods may be called from several threads.

    >>> metrics = Metrics()
    >>> metrics.count("steps_total", 2)
    >>> metrics.text({"rows": 8}).splitlines()[2]
    'jaxadapt_steps_total 2'
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # By metric, {the rest of a sample's name, with its labels: number}.
        self._samples = collections.defaultdict[str, dict[str, float]](lambda: collections.defaultdict(int))

    def count(self, name: str, amount: int = 1, labels: str = "") -> None:
        """Add to a counter; `labels` in Prometheus' form, 'status="200"'."""
        self._add(name, {f"{{{labels}}}" if labels else "": amount})

    def observe(self, name: str, seconds: float) -> None:
        """Add a time to a histogram."""
        buckets = {f'_bucket{{le="{end}"}}': int(seconds <= end) for end in SECONDS}
        self._add(name, {**buckets, '_bucket{le="+Inf"}': 1, "_sum": seconds, "_count": 1})

    def _add(self, name: str, numbers: Mapping[str, float]) -> None:
        with self._lock:
            for sample, number in numbers.items():
                self._samples[name][sample] += number

    def text(self, gauges: Mapping[str, int]) -> str:
        """Return all numbers, with gauges `{name: value}` of the present."""
        with self._lock:
            metrics = {name: dict(samples) for name, samples in sorted(self._samples.items())}
        lines: list[str] = []
        for name, samples in (metrics | {name: {"": value} for name, value in gauges.items()}).items():
            kind = "gauge" if name in gauges else "histogram" if "_sum" in samples else "counter"
            lines += [f"# HELP jaxadapt_{name} {_HELP[name]}", f"# TYPE jaxadapt_{name} {kind}"]
            lines += [f"jaxadapt_{name}{sample} {number}" for sample, number in samples.items()]
        return "\n".join([*lines, ""])


# ---------------------------------------------------------------- engine


@dataclasses.dataclass(eq=False)
class Job:
    """One prompt and what became of it.

    Attributes:
        prompt: token ids.
        adapter: the adapter's name, None for the base.
        sampling: how tokens are chosen.
        max_tokens: the most tokens; 0 to read the prompt only.
        text: the text of the answer, up to a stop string.
        emit: called in the engine's thread with each piece; it must not block or raise.
        top: with `sampling.scores`, the number of most probable tokens beside each token.
        echo: the tokens of the prompt, each with its place in the text, to put their scores before the answer's.
        unsent: text to put before the answer, such as the prompt's.
    """

    prompt: Sequence[int]
    adapter: str | None
    sampling: Sampling
    max_tokens: int
    text: TextStream
    emit: Callable[[Piece], None]
    top: int = 0
    echo: Sequence[tuple[int, int]] = ()
    unsent: str = ""
    begun: float = dataclasses.field(default_factory=time.monotonic)
    loaded: concurrent.futures.Future[Any] | None = None
    cancelled: bool = False
    count: int = 0
    version: int = 0
    scores: list[TokenScore] = dataclasses.field(default_factory=list[TokenScore])
    held: contextlib.ExitStack = dataclasses.field(default_factory=contextlib.ExitStack)

    def piece(self, text: str, reason: str | None) -> Piece:
        """Return the next piece, with all text and scores that were not sent."""
        text, self.unsent = self.unsent + text, ""
        scores, self.scores = self.scores, []
        return Piece(text, reason, scores=scores)


class Engine:
    """The running batch. `submit` and `cancel` may be called from any thread.

    Args:
        decoder: the batch; it belongs to the engine's thread from now on.
        pool: the adapters, with at least one slot for each row.
        stop: tokens that end an answer.
        queue: the most requests that wait for a row.

    Attributes:
        metrics: the counters.
    """

    def __init__(
        self,
        decoder: Decoder,
        pool: AdapterPool,
        *,
        stop: Sequence[int],
        queue: int,
    ) -> None:
        self._decoder, self._pool, self._stop, self._queue = decoder, pool, frozenset(stop), queue
        self.metrics: Metrics = Metrics()
        self._changed = threading.Condition()
        self._waiting: collections.deque[Job] = collections.deque()
        self._active: dict[int, Job] = {}
        self._closed: RequestError | None = None
        self._deadline = float("inf")
        self._thread = threading.Thread(target=self._run, name="jaxadapt-engine", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------ for all threads

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue the jobs of one request, all or none.

        Raises:
            RequestError: 429 if the queue is full, 400 for more jobs than fit in an empty one, 503 if the engine is
                closed or has failed.
        """
        most = self._queue + self._decoder.rows
        if len(jobs) > most:
            raise RequestError(
                400, f"prompt and n: expected at most {most} answers in all, found {len(jobs)}", param="prompt"
            )
        with self._changed:
            if self._closed is not None:
                raise self._closed
            # What enters a free row at once does not wait.
            if len(self._waiting) + len(jobs) > self._queue + max(0, self._decoder.rows - len(self._active)):
                raise RequestError(
                    429, f"{len(self._waiting)} requests wait already; try again later", code="queue_full"
                )
            for job in jobs:
                if job.adapter is not None:  # read the files beside the computation
                    job.loaded = self._pool.prefetch([job.adapter])[job.adapter]
                    job.loaded.add_done_callback(self._wake)
            self._waiting.extend(jobs)
            self._changed.notify_all()

    def cancel(self, job: Job) -> None:
        """End a job whose client left; its row is free before the next token."""
        job.cancelled = True
        self._wake()

    def gauges(self) -> dict[str, int]:
        """Return the numbers of rows, of requests that have one, of those that wait, and of compiled programs."""
        with self._changed:
            return {
                "rows": self._decoder.rows,
                "rows_active": len(self._active),
                "queue_length": len(self._waiting),
                "compiled_programs": self._decoder.compiled(),
            }

    @property
    def healthy(self) -> bool:
        """True while requests are taken."""
        return self._closed is None

    def drain(self, seconds: float) -> None:
        """Take no more requests, fail those that wait, and after some seconds also those that have a row."""
        self._shut(RequestError(503, "the server is shutting down", code="shutting_down"), seconds)

    def close(self) -> None:
        """Take no more requests, fail those that are there, and end the thread."""
        self.drain(0)
        self._thread.join()

    def _shut(self, error: RequestError, seconds: float) -> None:
        with self._changed:
            self._closed = self._closed or error
            self._deadline = min(self._deadline, time.monotonic() + seconds)
            self._changed.notify_all()

    def _wake(self, _: Any = None) -> None:
        with self._changed:
            self._changed.notify_all()

    # ------------------------------------------------------------ the engine's thread

    def _run(self) -> None:
        try:
            while self._closed is None or (self._active and time.monotonic() < self._deadline):
                for row, job in self._admit():
                    with self._alone(row):
                        self._start(row, job)
                if self._active:
                    self._advance()
        except Exception:
            LOGGER.exception("the engine stops: a step of the batch failed")
            self._shut(
                RequestError(500, "a step of the batch failed; the server's log says why", code="engine_failed"), 0
            )
        self._admit()
        for row in list(self._active):
            self._leave(row, Piece(error=self._closed))

    @contextlib.contextmanager
    def _alone(self, row: int) -> Generator[None]:
        """Let an error of any class end the request in a row, and no other, unless the whole batch is lost."""
        try:
            yield
        except AdapterError as error:
            name = self._active[row].adapter
            what = "the request failed" if name is None else f"the adapter {name!r} cannot be loaded"
            self._leave(row, Piece(error=RequestError(400, f"{what}: {error}", code="adapter_error", param="model")))
        except Exception:
            if not self._decoder.usable:
                raise
            LOGGER.exception("a request for %s failed", self._active[row].adapter or "the base")
            failed = RequestError(500, "the request failed; the server's log says why", code="internal_error")
            self._leave(row, Piece(error=failed))

    def _admit(self) -> list[tuple[int, Job]]:
        """Wait until there is something to do; return the jobs whose turn it is, with free rows."""
        with self._changed:
            while True:
                for row in [row for row, job in self._active.items() if job.cancelled]:
                    self._leave(row, None)
                for job in [job for job in self._waiting if job.cancelled or self._closed is not None]:
                    self._waiting.remove(job)
                    self._end(job, None if job.cancelled else Piece(error=self._closed))
                ready = [job for job in self._waiting if job.loaded is None or job.loaded.done()]
                rows = [row for row in range(self._decoder.rows) if row not in self._active]
                turn = list(zip(rows, ready, strict=False))
                if turn or self._active or self._closed is not None:
                    for row, job in turn:
                        self._waiting.remove(job)
                        self._active[row] = job
                    return turn
                self._changed.wait()

    def _start(self, row: int, job: Job) -> None:
        slot = 0
        if job.loaded is not None and job.adapter is not None:
            job.loaded.result()
            lease = job.held.enter_context(self._pool.lease([job.adapter]))
            slot, job.version = lease.slots[0], lease.versions[0]
        token, finite, scores = self._decoder.start(row, job.prompt, job.sampling, slot)
        self.metrics.count("prompt_tokens_total", len(job.prompt))
        self.metrics.observe("first_token_seconds", time.monotonic() - job.begun)
        if job.echo and scores is not None:
            job.scores += [TokenScore(*job.echo[0]), *token_scores(job.echo[1:], scores, job.top)]
        self._take(row, token, finite, scores, len(job.prompt) - 1)

    def _advance(self) -> None:
        tokens, finite, scores = self._decoder.step()
        self.metrics.count("steps_total")
        for row in list(self._active):
            with self._alone(row):
                self._take(row, int(tokens[row]), bool(finite[row]), scores, row)

    def _take(self, row: int, token: int, finite: bool, scores: Scores | None, place: int) -> None:
        """Add a token to the answer in a row; its scores are at `place`."""
        job = self._active[row]
        if not finite:
            message = f"the logits of {job.adapter or 'the base'} are not finite; check the adapter's values"
            self._leave(row, Piece(error=RequestError(400, message, code="adapter_error", param="model")))
            return
        if not job.max_tokens:
            self._leave(row, job.piece("", "length"))
            return
        self.metrics.count("generated_tokens_total")
        job.count += 1
        ended = token in self._stop
        text = job.text.finish() if ended else job.text.push(token)
        if scores is not None and job.sampling.scores:
            job.scores += token_scores([(token, job.text.offset)], scores, job.top, place)
        reason = "stop" if ended or job.text.stopped else "length" if job.count >= job.max_tokens else None
        if reason == "length":
            text += job.text.finish()
            reason = "stop" if job.text.stopped else reason
        if reason is not None:
            self._leave(row, job.piece(text, reason))
        elif text:
            job.emit(job.piece(text, None))

    def _leave(self, row: int, last: Piece | None) -> None:
        with self._changed:
            job = self._active.pop(row)
        self._decoder.free(row)
        self._end(job, last)

    def _end(self, job: Job, last: Piece | None) -> None:
        job.held.close()
        if last is not None:
            self.metrics.observe("request_seconds", time.monotonic() - job.begun)
            job.emit(last)
