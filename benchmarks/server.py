"""A load test of `jaxadapt serve`: tokens a second, and the latency of requests, with up to 200 adapters.

    python -m benchmarks.server [--layers 6] [--adapters 200] [--plot server.png]

The base is the demo's Llama with the widths of SmolLM2-135M and random weights, and the adapters are LoRAs of rank 8 on
all seven projections. As many clients as `--clients` send one request after another, each for an adapter of its own,
and read the answers as streams. The server is a process of its own with `--rows` rows, and twice as many slots for
adapters: most requests for one of 200 adapters bring it in.

Three ratios follow, with `--known` adapters in the server's folder: the tokens a second for four times as many adapters
as slots beside those for as many as slots (no cliff: at least 0.5), those for even traffic over all known adapters
beside Zipf's (at least 0.7), and the 95th percentile of even traffic's answers beside the median (at most 2). Each is
the median over rounds, in which the loads take turns; with `--busy` the first two are of the processor's seconds.
At the end `/health` is asked for while a prompt of 1 MB is tokenized: the longest answer takes at most a tenth of that
time.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import jax
import numpy as np
import tokenizers
from safetensors.numpy import save_file

import jaxadapt
from benchmarks.measure import environment, judge, parsed, ratio, table
from benchmarks.serving import RANK, lora, sizes
from jaxadapt.demo import llama
from jaxadapt.demo.llama import LlamaConfig, to_nnx


@dataclass
class Answered:
    """Seconds from a request to its first piece of text and to its end, and its tokens."""

    first: float
    whole: float
    tokens: int


def write_base(folder: Path, config: LlamaConfig) -> dict[str, np.ndarray]:
    """A folder as Hugging Face's, with a tokenizer of bytes."""
    rng = np.random.default_rng(0)
    weights = {
        name: np.ones(shape, "f4") if len(shape) == 1 else rng.standard_normal(shape, "f4") * shape[-1] ** -0.5
        for name, shape in llama.hf_shapes(config).items()
    }
    folder.mkdir()
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config.to_hf()))
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    words = [*alphabet, *(f"{a}{b}" for a in alphabet[:64] for b in alphabet[:64])][: config.vocab_size]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({word: i for i, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    return weights


def write_adapters(root: Path, config: LlamaConfig, weights: Any, count: int) -> None:
    one = jaxadapt.init(to_nnx(config, weights), lora(), key=jax.random.key(0))
    for number in range(count):
        jaxadapt.save(jax.tree.map(lambda x, n=number: np.asarray(x) * (1 + n / 1000), one), root / f"t{number}")


async def load(
    url: str, models: Sequence[str], given: argparse.Namespace, seed: int = 1
) -> tuple[list[Answered], float]:
    """Send all requests, and return what they took, and the seconds of all together."""
    rng = np.random.default_rng(seed)
    waiting = [
        (models[int(rng.integers(len(models)))], rng.integers(0, 64, given.prompt)) for _ in range(given.requests)
    ]
    done: list[Answered] = []

    async def ask(client: httpx.AsyncClient, model: str, prompt: Any) -> Answered:
        body = {"model": model, "prompt": prompt.tolist(), "max_tokens": given.tokens, "temperature": 0, "stream": True}
        body["stream_options"] = {"include_usage": True}
        begun, first, tokens = time.perf_counter(), 0.0, 0
        async with client.stream("POST", f"{url}/v1/completions", json=body) as reply:
            reply.raise_for_status()
            async for line in reply.aiter_lines():
                if line.startswith("data: {"):
                    first = first or time.perf_counter() - begun
                    tokens = json.loads(line[6:]).get("usage", {}).get("completion_tokens", tokens)
        return Answered(first, time.perf_counter() - begun, tokens)

    async def work(client: httpx.AsyncClient) -> None:
        while waiting:
            done.append(await ask(client, *waiting.pop()))

    async with httpx.AsyncClient(timeout=None) as client:
        begun = time.perf_counter()
        await asyncio.gather(*(work(client) for _ in range(given.clients)))
        return done, time.perf_counter() - begun


def link_adapters(root: Path, given: argparse.Namespace) -> None:
    """Fill the folder up to the known adapters, with links to the files that are there."""
    for number in range(given.adapters, given.known):
        folder = root / f"t{number}"
        folder.mkdir()
        for file in (root / f"t{number % given.adapters}").iterdir():
            (folder / file.name).hardlink_to(file)


def traffic(given: argparse.Namespace) -> dict[str, list[str]]:
    """The names among which each load's requests choose, each with the same chance."""
    names, slots = [f"t{i}" for i in range(given.known)], 2 * given.rows
    shares = 1 / np.arange(1, given.known + 1)
    zipf = np.random.default_rng(0).choice(names, 1 << 16, p=shares / shares.sum())
    return {
        f"{slots} adapters, as slots": names[:slots],
        f"{4 * slots} adapters": names[: 4 * slots],
        f"{given.known} adapters, even": names,
        f"{given.known} adapters, Zipf": zipf.tolist(),
    }


def judge_traffic(url: str, pid: int, given: argparse.Namespace) -> list[str]:
    """Send each load in each round, print the medians and the three ratios, and return the missed targets."""
    loads = traffic(given)
    rounds: dict[str, list[tuple[float, ...]]] = {name: [] for name in loads}
    for number in range(given.rounds + 1):  # the first one warms up
        for name in list(loads)[:: 1 if number % 2 else -1]:
            began = processor_seconds(pid)
            found, seconds = asyncio.run(load(url, loads[name], given, seed=2 + number))
            busy, tokens = processor_seconds(pid) - began, sum(each.tokens for each in found)
            of = np.percentile([1e3 * each.whole for each in found], (50, 95, 99))
            if number:
                rounds[name].append((tokens / seconds, 1e3 * busy / tokens, *of))
    head = ["requests for", "tokens/s", "CPU ms a token", "answer, median ms", "p95 ms", "p99 ms"]
    medians = {name: np.median(each, axis=0) for name, each in rounds.items()}
    rows = [[name, f"{of[0]:.0f}", f"{of[1]:.1f}", *(f"{x:.0f}" for x in of[2:])] for name, of in medians.items()]
    print(table("### working sets", head, rows))
    clock, processor, median, late = ({name: [x[i] for x in of] for name, of in rounds.items()} for i in range(4))
    fits, large, even, zipf = loads
    targets: list[tuple[str, float, float]] = []
    for name, one, other, least in (
        ("four times as many adapters as slots ÷ as many as slots", large, fits, 0.5),
        ("even ÷ Zipf traffic", even, zipf, 0.7),
    ):
        found = {"tokens/s": ratio(clock[one], clock[other]), "processor": ratio(processor[other], processor[one])}
        print(f"\n- {name}: " + ", ".join(f"{x:.2f} ({of})" for of, x in found.items()), end="")
        targets.append((name, found["processor" if given.busy else "tokens/s"], least))
    targets.append(("the median ÷ p95 of the answers to even traffic", ratio(median[even], late[even]), 0.5))
    print(f"\n- {targets[-1][0]}: {targets[-1][1]:.2f}")
    return [f"{name}: at least {least}, found {found:.2f}" for name, found, least in targets if found < least]


async def judge_health(url: str) -> list[str]:
    """Ask for /health while a prompt of 1 MB is tokenized; print the longest answer, and return the missed target."""
    body = {"model": "base", "prompt": "!" * 1_000_000, "max_tokens": 1}
    async with httpx.AsyncClient(timeout=None) as client:
        begun = time.perf_counter()
        long = asyncio.ensure_future(client.post(f"{url}/v1/completions", json=body))
        times: list[float] = []
        while not long.done():
            asked = time.perf_counter()
            (await client.get(f"{url}/health")).raise_for_status()
            times.append(time.perf_counter() - asked)
        whole = time.perf_counter() - begun
    assert "exceed" in long.result().json()["error"]["message"]  # it was tokenized, and has too many tokens
    print(f"- /health beside a prompt of 1 MB: at most {max(times):.3f} s in {whole:.1f} s")
    found = max(times) / whole
    return [] if found <= 0.1 else [f"/health beside a prompt of 1 MB: at most a tenth of its time, found {found:.2f}"]


def processor_seconds(pid: int) -> float:
    """The processor time of a process so far, which other work on the machine changes little (Linux; else NaN)."""
    stat = Path(f"/proc/{pid}/stat")
    if not stat.exists():
        return float("nan")
    user, system = stat.read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def draw(results: dict[str, tuple[list[Answered], float]], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for name, (answers, _) in results.items():
        seconds = np.sort([a.whole for a in answers])
        left.plot(seconds, np.arange(1, len(seconds) + 1) / len(seconds), label=name)
    left.set(xlabel="seconds from a request to the end of its answer", ylabel="share of the requests", ylim=(0, 1))
    left.set_xlim(left=0)
    left.legend()
    rates = [sum(a.tokens for a in answers) / seconds for answers, seconds in results.values()]
    right.barh(list(results), rates)
    right.invert_yaxis()
    right.set_xlabel("tokens a second")
    figure.savefig(path, dpi=120)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--layers", type=int, default=6)
    options.add_argument("--adapters", type=int, default=200)
    options.add_argument("--rows", type=int, default=8)
    options.add_argument("--clients", type=int, default=16)
    options.add_argument("--requests", type=int, default=200, help="in each of the three loads")
    options.add_argument("--prompt", type=int, default=32, help="tokens of a prompt")
    options.add_argument("--tokens", type=int, default=24, help="tokens of an answer")
    options.add_argument("--known", type=int, default=1024, help="adapters in the folder")
    options.add_argument("--rounds", type=int, default=3, help="of the loads for the ratios")
    options.add_argument("--busy", action="store_true", help="judge the processor's seconds, not the clock's")
    options.add_argument("--plot", type=Path, help="where to write the plot")
    given = parsed(options, layers=1, adapters=3, rows=2, clients=3, requests=6, tokens=3, known=16, rounds=1)
    widths = sizes(given)
    config = LlamaConfig(num_layers=given.layers, head_dim=widths["hidden_size"] // widths["num_heads"], **widths)
    print(environment("jax", "flax", "starlette", "uvicorn"))
    print(
        f"{given.clients} clients, {given.requests} requests a load of {given.prompt} + {given.tokens} tokens,"
        f" {given.rows} rows, {given.layers} layers, rank {RANK} on {len(llama.PROJECTIONS)} projections"
    )
    results: dict[str, tuple[list[Answered], float]] = {}
    busy: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="jaxadapt-load-") as made:
        base, root = Path(made, "base"), Path(made, "adapters")
        write_adapters(root, config, write_base(base, config), given.adapters)
        link_adapters(root, given)
        words = f"serve --base {base} --adapters {root} --port 0 --rows {given.rows} --length 64 --json".split()
        server = subprocess.Popen([sys.executable, "-m", "jaxadapt", *words], stdout=subprocess.PIPE, text=True)
        try:
            assert server.stdout is not None
            url = json.loads("".join(iter(server.stdout.readline, "}\n")) + "}")["url"]
            names = [f"t{i}" for i in range(given.adapters)]
            for title, models in {
                "the base": ["base"], "1 adapter": names[:1], f"{given.adapters} adapters": names,
            }.items():  # fmt: skip
                asyncio.run(load(url, models, argparse.Namespace(**{**vars(given), "requests": 2 * given.rows})))
                began = processor_seconds(server.pid)
                results[title] = asyncio.run(load(url, models, given))
                busy[title] = processor_seconds(server.pid) - began
            missed = judge_traffic(url, server.pid, given) + asyncio.run(judge_health(url))
            lines = httpx.get(f"{url}/metrics").text.splitlines()
        finally:
            server.terminate()
            server.wait()
    rows = [
        [
            title, f"{sum(a.tokens for a in answers) / seconds:.0f}",
            f"{1e3 * busy[title] / sum(a.tokens for a in answers):.1f}",
            *(f"{1e3 * np.percentile([a.first for a in answers], p):.0f}" for p in (50, 99)),
            *(f"{1e3 * np.percentile([a.whole for a in answers], p):.0f}" for p in (50, 99)),
        ]
        for title, (answers, seconds) in results.items()
    ]  # fmt: skip
    head = [
        "requests for",
        "tokens/s",
        "CPU ms a token",
        "first token, median ms",
        "p99 ms",
        "answer, median ms",
        "p99 ms",
    ]
    print(table("### load", head, rows))
    print(next(line for line in lines if line.startswith("jaxadapt_compiled_programs")))
    if given.plot:
        draw(results, given.plot)
    judge(missed, given)


if __name__ == "__main__":
    main()
