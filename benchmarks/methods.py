"""A training step of every registered method beside LoRA's, and beside PEFT's own step in torch.

    python -m benchmarks.methods [--layers 4] [--rounds 5] [--steps 0] [--only vera oft] [--plot methods.png]

SmolLM2-135M's shape with fewer layers and random float32 weights, 4 × 64 tokens, each method with the demo's
configuration. FLOPs are those of the dot_general equations of the step's jaxpr, times the length of the scans around
them. Steps of all methods are interleaved. With `--steps` each method trains SmolLM2 itself for as many steps, and the
loss on held-out text follows; `--plot` draws it over the size. It knows no method by name, except LoRA to compare with.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr

from benchmarks.measure import Way, environment, installed, interleave, parsed, ratio, table
from benchmarks.train import BATCH, LENGTH, random_weights, smollm2
from jaxadapt.core.errors import AdapterError
from jaxadapt.demo import training
from jaxadapt.demo.llama import PROJECTIONS, LlamaConfig

COMPARED = "lora"


def dot_flops(jaxpr: Any) -> float:
    """FLOPs of the matrix products of a jaxpr, with those of inner jaxprs; a scan counts as often as it runs."""
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(shape[i] for i in contracted)
        times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        total += times * sum(dot_flops(inner) for inner in inner_jaxprs(equation.params.values()))
    return total


def inner_jaxprs(values: Any) -> list[Any]:
    """The jaxprs among the parameters of an equation."""
    found: list[Any] = []
    for value in values:
        if isinstance(value, ClosedJaxpr):
            found.append(value.jaxpr)
        elif isinstance(value, Jaxpr):
            found.append(value)
        elif isinstance(value, tuple | list):
            found += inner_jaxprs(value)
    return found


def torch_seconds(method: str, config: LlamaConfig, tokens: np.ndarray, rounds: int) -> list[float]:
    """Seconds of each step of PEFT on transformers' Llama, eager; empty if PEFT refuses the configuration."""
    import torch
    import transformers
    from peft import get_peft_model
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    fields = {"target_modules": list(PROJECTIONS), **copy.deepcopy(dict(training.adapter_config(method).facts.demo))}
    fields = {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}
    hf = {k: v for k, v in config.to_hf().items() if k != "architectures"}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**hf))
    try:
        kind = PEFT_TYPE_TO_CONFIG_MAPPING[method.upper()]
        known = {name: value for name, value in fields.items() if name in kind.__dataclass_fields__}
        adapted = get_peft_model(model, kind(task_type="CAUSAL_LM", **known))
    except (KeyError, TypeError, ValueError):
        return []
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-4)
    batch = torch.from_numpy(tokens).long()
    seconds: list[float] = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        adapted(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


def measured_step(trainer: training.LinenTrainer, tokens: np.ndarray) -> tuple[float, Callable[[], None]]:
    """The FLOPs of a trainer's step, and a function that takes one."""
    arguments = (trainer.adapter, trainer.state, trainer.base, jnp.asarray(tokens))
    flops = dot_flops(jax.make_jaxpr(trainer.compute_step)(*arguments).jaxpr)
    return flops, lambda: float(trainer.step(tokens)) and None


def held_out_losses(methods: Sequence[str], steps: int) -> dict[str, float]:
    """The loss of SmolLM2 on held-out text after `steps` steps of each method."""
    from jaxadapt.demo import finetune

    return {method: finetune.held_out_losses(method, steps)[1] for method in methods}


def draw(path: Path, sizes: dict[str, int], losses: dict[str, float]) -> None:
    """Held-out loss over the number of trained parameters."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.add_subplot()
    axis.set(xscale="log", xlabel="trained parameters", ylabel="held-out loss")
    for method, loss in losses.items():
        axis.plot(sizes[method], loss, "o", color="#1f5fa8")
        axis.annotate(method, (sizes[method], loss), xytext=(4, 4), textcoords="offset points", fontsize=8)
    figure.savefig(path)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--layers", type=int, default=4)
    options.add_argument("--vocab", type=int, default=8192)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--steps", type=int, default=0, help="train SmolLM2 for as many steps, for the held-out loss")
    options.add_argument("--only", nargs="*", help="these methods and LoRA; by default all")
    options.add_argument("--plot", type=Path)
    options.add_argument("--with-torch", action="store_true")
    small = {"layers": 1, "vocab": 64, "rounds": 1, "steps": 0, "plot": None, "with_torch": installed("peft")}
    given = parsed(options, **small, only=["ia3"])
    config = smollm2(given.layers, given.vocab)
    weights = random_weights(config)
    tokens = np.random.default_rng(1).integers(0, given.vocab, (BATCH, LENGTH))
    names = [n for n in training.method_names() if n == COMPARED or given.only is None or n in given.only]
    print(environment("jax", "flax", "optax", "peft", "torch"))
    sizes, flops, ways, refused = dict[str, int](), dict[str, float](), dict[str, Way](), dict[str, str]()
    for name in names:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of block sizes that do not divide
                trainer: Any = training.make_trainer("linen", config, weights, name, 1000)
                flops[name], step = measured_step(trainer, tokens)
        except AdapterError as error:
            refused[name] = str(error).partition("\n")[0]
            continue
        sizes[name], ways[name] = trainer.adapter_size(), Way(lambda _, step=step: step())
    times = {name: found.clock for name, found in interleave(ways, given.rounds).items()}
    theirs = {n: torch_seconds(n, config, tokens, given.rounds) for n in ways} if given.with_torch else {}
    losses = held_out_losses(list(ways), given.steps) if given.steps else {}
    rows = [
        [
            name,
            f"{sizes[name]:,}",
            f"{flops[name] / 1e9:.3f}",
            f"{flops[name] / flops[COMPARED]:.3f}",
            f"{statistics.median(times[name]):.3f}",
            f"{ratio(times[name], times[COMPARED]):.2f}",
            f"{statistics.median(theirs[name]) / statistics.median(theirs[COMPARED]):.2f}" if theirs.get(name) else "",
            f"{losses[name]:.3f}" if name in losses else "",
        ]
        for name in ways
    ]
    head = ["method", "trained", "GFLOP", "x LoRA's", "median s", "x LoRA's", "PEFT's x its LoRA's", "held-out loss"]
    print(table(f"**One step, {given.layers} layers, {BATCH} × {LENGTH} tokens**", head, rows))
    for name, reason in refused.items():
        print(f"{name}: {reason}")
    if given.plot is not None and losses:
        draw(given.plot, sizes, losses)


if __name__ == "__main__":
    main()
