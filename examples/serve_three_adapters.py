"""Serve three adapters on one base: requests enter and leave one running batch, each row with its own adapter.

    python examples/serve_three_adapters.py      # 10 seconds; writes the adapters to out/serve_three_adapters

`jaxadapt serve` does the same behind OpenAI's HTTP interface. It prints each answer when its last token is there:

    a     [3, 1, 4] -> [36, 53, 10, 22, 29, 5]
    ...
    the files of "a" change; a new request gets the new version
    10 answers, each the one of its adapter alone; 2 programs compiled
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import sys
from pathlib import Path

import jax
import numpy as np
from flax import nnx

import jaxadapt
from jaxadapt import serving
from jaxadapt.demo.llama import Llama, LlamaConfig

SIZE = LlamaConfig(64, 32, 48, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=8)
ROOM = jaxadapt.LoraConfig(r=8, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"])  # the largest adapter
TOKENS = 6  # of each answer


@dataclasses.dataclass
class Request:
    """One prompt for one adapter; `lease` keeps the adapter in its slot until the answer ends."""

    name: str | None
    prompt: list[int]
    answer: list[int] = dataclasses.field(default_factory=list)
    lease: contextlib.ExitStack = dataclasses.field(default_factory=contextlib.ExitStack)


def base() -> Llama:
    return Llama(SIZE, rngs=nnx.Rngs(0))  # a real program fills it with jaxadapt.export.import_base


def write_adapter(folder: Path, config: jaxadapt.LoraConfig, seed: int) -> None:  # in place of a training
    model = jaxadapt.adapt(base(), config.replace(lora_alpha=64, init_lora_weights=False), rngs=nnx.Rngs(seed))
    jaxadapt.save(model, folder)


def serve(decoder: serving.Decoder, pool: serving.AdapterPool, waiting: collections.deque[Request]) -> None:
    """Answer requests until none waits. A row that ends takes the next request before the following token."""
    running: dict[int, Request] = {}

    def take(row: int, token: int) -> None:
        request = running[row]
        request.answer.append(token)
        if len(request.answer) == TOKENS:
            print(f"{request.name or 'base':5} {request.prompt} -> {request.answer}")
            decoder.free(row)
            running.pop(row).lease.close()  # another adapter may have the slot now

    while waiting or running:
        for row in range(decoder.rows):
            if row not in running and waiting:
                running[row] = request = waiting.popleft()
                ids = request.lease.enter_context(pool.lease([request.name]))  # reads the folder if its files are new
                take(row, decoder.start(row, request.prompt, slot=ids[0])[0])
        if running:
            tokens, _, _ = decoder.step()  # one token in every row
            for row in list(running):
                take(row, int(tokens[row]))


@nnx.jit
def next_token(model: Llama, tokens: jax.Array, count: jax.Array) -> jax.Array:
    return model(tokens)[0, count - 1].argmax()


def alone(folder: Path, request: Request) -> list[int]:
    """Return the same answer from a model with this adapter only, without a cache."""
    model = base() if request.name is None else jaxadapt.load(folder / request.name, base())
    tokens, count = np.zeros((1, 16), np.int32), len(request.prompt)
    tokens[0, :count] = request.prompt
    for place in range(count, count + TOKENS):
        tokens[0, place] = next_token(model, tokens, place)
    return tokens[0, count : count + TOKENS].tolist()


def main(folder: Path) -> None:
    """Serve two batches of requests; the adapter "a" changes between them."""
    write_adapter(folder / "a", ROOM, 1)
    write_adapter(folder / "b", ROOM.replace(r=4, target_modules=["q_proj", "v_proj"]), 2)  # smaller ones fit too
    write_adapter(folder / "c", ROOM.replace(r=2, use_rslora=True), 3)

    model = base()
    bank = serving.create(model, ROOM, slots=3)  # the base and two adapters: the third one evicts an idle one
    serving.attach(model, bank)
    pool = serving.AdapterPool(bank, model, folder)
    decoder = serving.Decoder(SIZE, *serving.nnx_forward(model), rows=2, length=32, select=pool.select)

    prompts = {"a": [3, 1, 4], "b": [1, 5, 9], "c": [2, 6], None: [1, 5]}
    first = [Request(name, prompt) for name in ("a", None, "b", "c", "a", "b", None) for prompt in [prompts[name]]]
    serve(decoder, pool, collections.deque(first))
    answers = {request.name: alone(folder, request) for request in first[:4]}
    assert all(request.answer == answers[request.name] for request in first)

    print('the files of "a" change; a new request gets the new version')
    write_adapter(folder / "a", ROOM.replace(r=4), 4)
    second = [Request(name, prompts[name]) for name in ("a", "b", "c")]
    serve(decoder, pool, collections.deque(second))
    assert all(request.answer == alone(folder, request) for request in second)
    assert second[0].answer != first[0].answer
    print(f"{len(first + second)} answers, each the one of its adapter alone; {decoder.compiled()} programs compiled")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "out/serve_three_adapters"))
