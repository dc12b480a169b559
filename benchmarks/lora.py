"""What DoRA and rsLoRA cost a training step, and what a merge costs, beside PEFT in torch and beside memory.

    python -m benchmarks.lora [--layers 3] [--steps 15] [--merge-layers 16] [--dtype bfloat16] [--r 8] [--rounds 7]

Steps: SmolLM2-135M's shape with `--layers` layers, 4 × 64 tokens, r=8 on all seven projections, AdamW, float32; each
beside plain LoRA in the same library. Merging: the seven projections of a Llama 3.2 1B (973 million weights with 16
layers), in place, in and out again; beside PEFT's `merge_and_unload` and beside one pass over as much memory. The pass
is the bandwidth limit: each weight is read once and written once in place, the bits inverted by numpy, which is the
fastest such pass found (a copy, whose target has to be fetched too, and JAX's own `x + 1` and `-x` take 1 to 3 times as
long). It is made by one core and by all of them: a merge uses them all, and the target is of the latter. Processor time
beside one core's pass compares the work itself, and on a busy machine it is the steadier. All interleaved. Exits with 1
if a target is missed. All of the 1B takes 4 GB in bfloat16, 8 in float32: the model, and as much that is passed over;
PEFT's turn is over before ours.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jaxadapt
from benchmarks.measure import Times, Way, environment, interleave, judge, parsed, ratio, table
from benchmarks.train import ALPHA, BATCH, LENGTH, R, analyse, measure_steps, nnx_way, random_weights, smollm2
from jaxadapt.demo import llama
from jaxadapt.demo.llama import PROJECTIONS, LlamaConfig

VARIANTS: Mapping[str, Mapping[str, Any]] = {"LoRA": {}, "rsLoRA": {"use_rslora": True}, "DoRA": {"use_dora": True}}
TARGET, EXTRA = 1.2, 1.0  # merging: times one pass of all cores over the memory; weights held besides the model
ONE, ALL = "one pass, one core", "one pass, all cores"
OURS = "jaxadapt, donate=True"
Beside = tuple[str, Times, Mapping[str, Times]]  # a way, its times, and those it was measured beside
_PAGE = 4096

# ---------------------------------------------------------------- steps


def our_steps(config: LlamaConfig, ids: np.ndarray, rounds: int) -> dict[str, Any]:
    tokens, weights = jnp.asarray(ids), random_weights(config)

    def way(fields: Mapping[str, Any]) -> Any:
        made = jaxadapt.LoraConfig(r=R, lora_alpha=ALPHA, target_modules=list(PROJECTIONS), **fields)
        return nnx_way(
            lambda: llama.to_nnx(config, weights),
            lambda m: jaxadapt.adapt(m, made, rngs=nnx.Rngs(0)),
            jaxadapt.AdapterParam,
            tokens,
        )

    found = {name: way(fields) for name, fields in VARIANTS.items()}
    for one in found.values():
        one.analysis = analyse(one.jit().lower(*one.arguments()).compile())
    measure_steps(found, rounds)
    return found


def peft_steps(config: LlamaConfig, ids: np.ndarray, rounds: int) -> dict[str, list[float]]:
    """Seconds of each step of PEFT on transformers' Llama, one variant after another in every round."""
    import peft
    import torch
    import transformers

    hf = {k: v for k, v in config.to_hf().items() if k != "architectures"}
    batch = torch.from_numpy(ids).long()

    def stepper(fields: Mapping[str, Any]) -> Callable[[], None]:
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**hf))
        made = peft.LoraConfig(r=R, lora_alpha=ALPHA, target_modules=list(PROJECTIONS), task_type="CAUSAL_LM", **fields)
        adapted = peft.get_peft_model(model, made)
        optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-4)

        def step() -> None:
            adapted(input_ids=batch, labels=batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    found = {name: stepper(fields) for name, fields in VARIANTS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in found}
    for number in range(rounds + 1):
        for name, step in list(found.items())[:: 1 if number % 2 else -1]:
            start = time.perf_counter()
            step()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


# ---------------------------------------------------------------- merging


def shapes(layers: int) -> dict[str, tuple[int, int]]:
    """(out, in) of the projections of a Llama 3.2 1B."""
    of = {"q_proj": (2048, 2048), "k_proj": (512, 2048), "v_proj": (512, 2048), "o_proj": (2048, 2048)}
    of |= {"gate_proj": (8192, 2048), "up_proj": (8192, 2048), "down_proj": (2048, 8192)}
    return {f"{layer}.{name}": shape for layer in range(layers) for name, shape in of.items()}


class OnJax:
    """A tree of the weights, and an adapter on it."""

    def __init__(self, layers: int, dtype: str, r: int) -> None:
        self.tree: Any = {name: {"kernel": jnp.full(shape[::-1], 0.5, dtype)} for name, shape in shapes(layers).items()}
        config = jaxadapt.LoraConfig(r=r, lora_alpha=r, target_modules=list(PROJECTIONS), init_lora_weights=False)
        self.adapter = jaxadapt.init(self.tree, config, key=jax.random.key(0))
        jax.block_until_ready((self.tree, self.adapter))
        self.inside = False

    def __call__(self, _: Any) -> None:
        """Into the weights, or out of them again."""
        change = jaxadapt.unmerge if self.inside else jaxadapt.merge
        self.tree = jax.block_until_ready(change(self.tree, self.adapter, donate=True))
        self.inside = not self.inside


class OnTorch:
    """The same as torch modules, wrapped anew for each merge: unloading leaves the base."""

    def __init__(self, layers: int, dtype: str, r: int) -> None:
        import peft
        import torch

        class Layers(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                for name, (out, inputs) in shapes(layers).items():
                    layer, _, kind = name.partition(".")
                    if not hasattr(self, layer):
                        self.add_module(layer, torch.nn.Module())
                    linear = torch.nn.Linear(inputs, out, bias=False, device="meta", dtype=getattr(torch, dtype))
                    weight = torch.full((out, inputs), 0.5, dtype=getattr(torch, dtype))
                    linear.weight = torch.nn.Parameter(weight, requires_grad=False)
                    self.get_submodule(layer).add_module(kind, linear)

        self.base: Any = Layers()
        self.config = peft.LoraConfig(r=r, lora_alpha=r, target_modules=list(PROJECTIONS), init_lora_weights=False)
        self.wrap: Any = peft.get_peft_model

    def before(self) -> Any:
        return self.wrap(self.base, self.config)

    def __call__(self, model: Any) -> None:
        self.base = model.merge_and_unload()


def passes(layers: int, dtype: str) -> dict[str, Way]:
    """One pass over as much memory as the weights take, by one core and by all of them."""
    memory = [np.zeros(shape, f"u{jnp.dtype(dtype).itemsize}") for shape in shapes(layers).values()]

    def way(cores: int) -> Way:
        pieces = [piece for weight in memory for piece in np.array_split(weight, cores)]
        pool = ThreadPoolExecutor(cores)
        return Way(lambda _: list(pool.map(lambda piece: np.invert(piece, out=piece).size, pieces)))

    return {ONE: way(1), ALL: way(os.cpu_count() or 1)}


def peak(run: Callable[[], object]) -> int:
    """How many bytes more the process held at its most, while `run` ran."""
    statm, most, done = Path("/proc/self/statm"), [0], threading.Event()

    def now() -> int:
        return int(statm.read_text().split()[1]) * _PAGE

    def watch() -> None:
        while not done.is_set():
            most[0] = max(most[0], now())
            time.sleep(0.0005)

    gc.collect()
    before = now()
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        run()
    finally:
        done.set()
        watcher.join()
    return max(most[0] - before, 0)


def peft_merges(layers: int, dtype: str, r: int, rounds: int) -> tuple[dict[str, Times], int]:
    torch = OnTorch(layers, dtype, r)
    times = interleave({**passes(layers, dtype), "PEFT": Way(torch, torch.before)}, rounds)
    model = torch.before()
    return times, peak(lambda: torch(model))


def merges(layers: int, dtype: str, r: int, rounds: int) -> tuple[list[Beside], dict[str, float], float]:
    """Each way beside its passes, how many of the largest weights each held besides the model, and the first merge's
    seconds.

    PEFT's turn is over before ours begins: both models would not fit where one does.
    """
    largest = max(out * inputs for out, inputs in shapes(layers).values()) * jnp.dtype(dtype).itemsize
    theirs, held = peft_merges(layers, dtype, r, rounds)
    extra = {"PEFT, merge_and_unload": held / largest}
    gc.collect()
    ours = OnJax(layers, dtype, r)
    start = time.perf_counter()
    ours(None)
    first = time.perf_counter() - start
    ours(None)
    extra[OURS] = peak(lambda: ours(None)) / largest
    times = interleave({**passes(layers, dtype), OURS: Way(ours)}, rounds)
    found = [(name, times[name], times) for name in (ONE, ALL, OURS)]
    found.append(("PEFT, merge_and_unload", theirs["PEFT"], theirs))
    return found, extra, first


# ---------------------------------------------------------------- the run


def report_steps(found: Mapping[str, Any], theirs: Mapping[str, list[float]]) -> None:
    plain = found["LoRA"]
    head = ["", "GFLOP", "x LoRA", "GB accessed", "x LoRA", "step ms", "x LoRA", "PEFT ms", "x LoRA in PEFT"]
    rows = [
        [
            name,
            f"{way.analysis['flops'] / 1e9:.2f}",
            f"{way.analysis['flops'] / plain.analysis['flops']:.3f}",
            f"{way.analysis['bytes'] / 1e9:.3f}",
            f"{way.analysis['bytes'] / plain.analysis['bytes']:.3f}",
            f"{statistics.median(way.steps) * 1e3:.0f}",
            f"{ratio(way.steps, plain.steps):.2f}",
            f"{statistics.median(theirs[name]) * 1e3:.0f}",
            f"{ratio(theirs[name], theirs['LoRA']):.2f}",
        ]
        for name, way in found.items()
    ]
    print(table("**a training step**", head, rows))


def report_merges(
    found: list[Beside], extra: Mapping[str, float], first: float, layers: int, dtype: str, r: int
) -> list[str]:
    total = sum(out * inputs for out, inputs in shapes(layers).values())
    size = 2 * total * jnp.dtype(dtype).itemsize
    rows = [
        [
            name,
            f"{statistics.median(times.clock) * 1e3:.0f}",
            f"{min(times.clock) * 1e3:.0f}",
            f"{size / min(times.clock) / 1e9:.1f}",
            f"{ratio(times.clock, beside[ONE].clock):.2f}",
            f"{ratio(times.clock, beside[ALL].clock):.2f}",
            f"{min(times.processor) / total * 1e9:.3f}",
            f"{min(times.processor) / min(beside[ONE].processor):.2f}",
            f"{extra[name]:.2f}" if name in extra else "",
        ]
        for name, times, beside in found
    ]
    head = ["", "median ms", "best ms", "GB/s at best", "x one core's pass", "x all cores' pass"]
    head += ["processor ns a weight, best", "x one core's pass", "extra memory, largest weights"]
    print(table(f"**merging {total / 1e6:.0f} million weights in {dtype}, r={r}**", head, rows))
    print(f"\nThe first merge, with its four shapes to compile: {first:.2f} s.")
    _, times, beside = next(one for one in found if one[0] == OURS)
    missed = []
    if (slower := ratio(times.clock, beside[ALL].clock)) > TARGET:
        missed.append(f"merge {slower:.2f} x one pass of all cores over the memory, target {TARGET}")
    if extra[OURS] > EXTRA:
        missed.append(f"merge holds {extra[OURS]:.2f} weights more, target {EXTRA}")
    return missed


def main() -> None:
    options = argparse.ArgumentParser(description="variants of LoRA beside plain LoRA, and merging beside memory")
    options.add_argument("--layers", type=int, default=3, help="of the model that takes steps")
    options.add_argument("--vocab", type=int, default=49152, help="of the same model")
    options.add_argument("--steps", type=int, default=15)
    options.add_argument("--merge-layers", type=int, default=16, help="of the model that is merged into")
    options.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    options.add_argument("--r", type=int, default=8, help="of the adapter that is merged")
    options.add_argument("--rounds", type=int, default=7)
    given = parsed(options, layers=1, vocab=64, steps=1, merge_layers=1, rounds=1)
    warnings.simplefilter("ignore")
    print(environment("jax", "jaxlib", "flax", "peft", "torch"))
    if given.layers:
        config = smollm2(given.layers, given.vocab)
        ids = np.random.default_rng(1).integers(0, config.vocab_size, (BATCH, LENGTH)).astype(np.int32)
        found = our_steps(config, ids, given.steps)
        report_steps(found, peft_steps(config, ids, given.steps))
        del found
        gc.collect()
    measured = merges(given.merge_layers, given.dtype, given.r, given.rounds)
    missed = report_merges(*measured, given.merge_layers, given.dtype, given.r)
    judge(missed, given)


if __name__ == "__main__":
    main()
