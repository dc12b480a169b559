"""A training step of every registered method beside LoRA's, and beside PEFT's own step in torch.

    python -m benchmarks.methods [--layers 2] [--rounds 5] [--results FILE] [--losses FILE] [--only oft] [--plot FILE]

SmolLM2-135M's shape with fewer layers, run by a scan, and random float32 weights, 4 × 64 tokens, each method with the
demo's configuration. FLOPs are those of the dot_general equations of the step's jaxpr, times the length of the scans
around them; "own" are those beyond the base's, which `formulas.py` compares with the arithmetic. Steps of all methods
are interleaved, and the least processor time of all rounds counts, because it hardly depends on what else the machine
does; so it is for PEFT, one method after the other. "memory" is what the compiled step holds beside the base.

`--results FILE` keeps the measurements in a file: a run measures only the methods that the file lacks, beside LoRA.
`--losses FILE` trains SmolLM2 itself with each method that the file lacks, `--steps` steps of 2 × 64 tokens, and adds
the loss on held-out text to the file; `--plot` draws the losses over the sizes. Exits with 1 if a target is missed.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import math
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr

import jaxadapt
from benchmarks import formulas
from benchmarks.measure import Way, environment, installed, interleave, judge, parsed, table
from benchmarks.train import BATCH, LENGTH, random_weights, smollm2
from jaxadapt.core.errors import AdapterError
from jaxadapt.demo import finetune, llama
from jaxadapt.demo.llama import LlamaConfig
from jaxadapt.demo.smollm2 import SmolLM2, batches
from jaxadapt.models.summary_table import count_trained

COMPARED = "lora"
# Offsets of a label from its point, in points, and its horizontal alignment: the nearest free one is taken.
PLACES: Any = [
    (x, y, "left" if x > 0 else "right" if x < 0 else "center")
    for far in (7, 14, 22, 32, 44)
    for x, y in (
        (far, -3),
        (-far, -3),
        (0, far),
        (0, -far - 6),
        (far, far),
        (-far, far),
        (far, -far - 6),
        (-far, -far - 6),
    )
]
TOP = 3.8  # of the plot; the losses above it are written beside their points
NOISE = 1.15  # processor times of the same step differ by as much on a busy machine


@dataclass
class Measured:
    """What is known of one method: FLOPs of a step, bytes beside the base, times beside LoRA's in the same run."""

    trained: int
    flops: float
    formula: float | None
    memory: int
    seconds: float = math.nan
    ratio: float = math.nan
    theirs: float = math.nan  # PEFT's seconds divided by those of its LoRA


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


# ---------------------------------------------------------------- jaxadapt's steps


def measured(
    method: str, config: LlamaConfig, weights: Any, base: Any, tokens: np.ndarray
) -> tuple[Measured, Callable[[], None], Any]:
    """Trace and compile a method's step; return what is known, the step, and the base.

    `base` is the base of the trainer before, which is used again.
    """
    trainer: Any = finetune.make_trainer("linen", config, weights, method, 1000)
    base, fixed = trainer.rest if base is None else (base, trainer.rest[1])
    trainer.rest = (base, fixed)
    rest = (trainer.rest, jnp.asarray(tokens))
    traced = trainer.compute_step.trace(trainer.adapter, trainer.state, *rest)
    compiled: Any = traced.lower().compile()
    memory = compiled.memory_analysis()
    held = sum(x.nbytes for x in jax.tree.leaves((trainer.adapter, trainer.state, fixed)))
    flops = dot_flops(traced.jaxpr) - formulas.base_flops(config)
    adapter = finetune.adapter_config(method)

    def step() -> None:
        trainer.adapter, trainer.state, loss = compiled(trainer.adapter, trainer.state, *rest)
        loss.block_until_ready()

    formula = formulas.adapter_flops(method, config, adapter)
    found = Measured(trainer.adapter_size(), flops, formula, held + memory.temp_size_in_bytes)
    return found, step, base


# ---------------------------------------------------------------- PEFT's


def default_of(field: Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def torch_seconds(method: str, config: LlamaConfig, tokens: np.ndarray, rounds: int) -> float:
    """The least processor time of a step of PEFT on transformers' Llama, eager; NaN if PEFT refuses the fields."""
    import torch
    import transformers
    from peft import get_peft_model
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    ours = finetune.adapter_config(method)
    kind: Any = PEFT_TYPE_TO_CONFIG_MAPPING.get(method.upper())
    if kind is None:
        return math.nan
    known = kind.__dataclass_fields__
    given = {f.name: v for f in fields(ours) if f.name in known and (v := ours.get(f.name)) != default_of(f)}
    given = {name: list(v) if isinstance(v, tuple) else v for name, v in given.items() if name != "peft_type"}
    hf = {k: v for k, v in config.to_hf().items() if k != "architectures"}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**hf))
    try:
        adapted = get_peft_model(model, kind(**given))
    except (KeyError, TypeError, ValueError) as error:
        print(f"PEFT, {method}: {error}")
        return math.nan
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-4)
    batch = torch.from_numpy(tokens).long()
    more = {name: torch.from_numpy(np.array(x)).long() for name, x in finetune.task_data(ours, len(tokens)).items()}
    seconds: list[float] = []
    for _ in range(rounds + 1):
        start = time.process_time()
        adapted(input_ids=batch, labels=batch, **more).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.process_time() - start)
    return min(seconds[1:])


# ---------------------------------------------------------------- held-out losses


def losses_of(method: str, steps: int, batch: int = 2) -> tuple[float, float]:
    """The losses of SmolLM2 on held-out text before and after `steps` steps of a method on `batch` chunks of text.

    A scan runs the layers, which compiles faster than the unrolled layers of the demo.
    """
    model = SmolLM2.open()
    training, held_out = finetune.texts(model.tokenizer())
    tuner = finetune.make_trainer("linen", replace(model.config, scan=True), model.weights(), method, steps)
    before = finetune.mean_loss(tuner, held_out)
    source = batches(training, batch, seed=0)
    for _ in range(steps):
        tuner.step(next(source))
    return before, finetune.mean_loss(tuner, held_out)


def held_out_losses(file: Path, methods: Sequence[str], steps: int) -> dict[str, tuple[float, float]]:
    """The losses of SmolLM2 on held-out text before and after `steps` steps; the file gets those that it lacks."""
    for method in methods:
        found = read(file)
        if method in found:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found[method] = losses_of(method, steps)
        file.write_text(json.dumps(found, indent=1))
        jax.clear_caches()
        gc.collect()
    return {method: (before, after) for method, (before, after) in sorted(read(file).items())}


def read(file: Path | None) -> dict[str, Any]:
    return json.loads(file.read_text()) if file is not None and file.exists() else {}


@functools.cache
def adapter_shapes(method: str) -> Any:
    """The variables of SmolLM2 with the demo's adapter, as shapes."""
    config = replace(smollm2(30, 49152), scan=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of block sizes that do not divide
        module: Any = jaxadapt.adapt(llama.LinenLlama(config), finetune.adapter_config(method))
        return jax.eval_shape(module.init, jax.random.key(0), finetune.TOKENS)


def trained_size(method: str) -> int:
    """The number of trained parameters of the demo's adapter on SmolLM2."""
    return count_trained(jaxadapt.extract(adapter_shapes(method)))


def file_size(method: str) -> int:
    """The bytes of the tensors in the file of the demo's adapter on SmolLM2, in float32."""
    tensors = jax.eval_shape(lambda variables: dict(jaxadapt.to_peft(variables).tensors), adapter_shapes(method))
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in tensors.values())


def draw(path: Path, points: Mapping[str, tuple[int, float]]) -> None:
    """The held-out losses over the numbers of trained parameters."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.text import Text
    from matplotlib.transforms import Bbox

    figure = Figure(figsize=(9, 6), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axis = figure.add_subplot()
    axis.set(xscale="log", xlabel="trained parameters of SmolLM2's adapter", ylabel="held-out loss")
    axis.spines[["top", "right"]].set_visible(False)
    shown = {method: (size, min(loss, TOP)) for method, (size, loss) in points.items()}
    for method, point in shown.items():
        mark = "^" if points[method][1] > TOP else "o"
        axis.plot(*point, mark, markersize=5, color="#c1440e" if method == COMPARED else "#1f5fa8")
    canvas.draw()  # the limits of the axes are known from here on
    taken = [Bbox.from_bounds(x - 4, y - 4, 8, 8) for x, y in axis.transData.transform(list(shown.values()))]
    for method, point in shown.items():
        text = method if points[method][1] <= TOP else f"{method} {points[method][1]:.2f}"
        for x, y, side in PLACES:
            line = {"arrowstyle": "-", "linewidth": 0.5, "color": "#999999"} if max(abs(x), abs(y)) > 20 else None
            label = axis.annotate(text, point, (x, y), textcoords="offset points", ha=side, fontsize=8, arrowprops=line)
            label.update_positions(canvas.get_renderer())
            box = Text.get_window_extent(label, canvas.get_renderer())
            if not any(box.overlaps(other) for other in taken):
                break
            label.remove()
        else:
            raise ValueError(f"no place for the label {method}; add one to the offsets")
        taken.append(box)
    figure.savefig(path, dpi=120)


# ---------------------------------------------------------------- the run


def missed_targets(found: Mapping[str, Measured]) -> list[str]:
    missed: list[str] = []
    for name, one in found.items():
        if one.formula is not None and abs(one.flops - one.formula) > 0.1 * max(one.formula, 1e6):
            missed.append(f"{name}: {one.flops / 1e9:.3f} GFLOP of its own, by the formula {one.formula / 1e9:.3f}")
        if one.ratio > one.theirs * NOISE:  # false where PEFT has no figure
            missed.append(f"{name}: a step takes {one.ratio:.2f} x LoRA's, PEFT's {one.theirs:.2f} x its LoRA's")
    return missed


def rows(found: Mapping[str, Measured]) -> list[list[str]]:
    def number(value: float | None, digits: int) -> str:
        return "" if value is None or math.isnan(value) else f"{value:.{digits}f}"

    return [
        [
            name,
            f"{one.trained:,}",
            number(one.flops / 1e9, 3),
            number(None if one.formula is None else one.formula / 1e9, 3),
            number(one.memory / 1e6, 1),
            number(one.seconds * 1e3, 0),
            number(one.ratio, 2),
            number(one.theirs, 2),
        ]
        for name, one in found.items()
    ]


def measure(names: Sequence[str], config: LlamaConfig, given: argparse.Namespace) -> dict[str, Measured]:
    """Measure these methods, of which LoRA is one, in interleaved rounds."""
    weights, base = random_weights(config), None
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, (BATCH, LENGTH))
    found, ways = dict[str, Measured](), dict[str, Way]()
    for name in names:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of block sizes that do not divide
                found[name], step, base = measured(name, config, weights, base, tokens)
        except AdapterError as error:
            print(f"{name}: {str(error).partition(chr(10))[0]}")
            continue
        ways[name] = Way(lambda _, step=step: step())
        print(f"{name}: compiled", file=sys.stderr, flush=True)
    for name, times in interleave(ways, given.rounds).items():
        found[name].seconds = min(times.processor)
    for one in found.values():
        one.ratio = one.seconds / found[COMPARED].seconds
    if given.with_torch:
        theirs = {name: torch_seconds(name, config, tokens, given.rounds) for name in found}
        for name, one in found.items():
            one.theirs = theirs[name] / theirs[COMPARED]
    return found


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--layers", type=int, default=2)
    options.add_argument("--vocab", type=int, default=8192)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--steps", type=int, default=20, help="of training SmolLM2, for the held-out loss")
    options.add_argument("--results", type=Path, help="a file of measurements, to read and to complete")
    options.add_argument("--losses", type=Path, help="a file of held-out losses, to read and to complete")
    options.add_argument("--only", nargs="*", help="these methods and LoRA; by default all")
    options.add_argument("--plot", type=Path)
    options.add_argument("--with-torch", action="store_true")
    small = {"layers": 1, "vocab": 64, "rounds": 1, "results": None, "losses": None, "plot": None}
    given = parsed(options, **small, with_torch=installed("peft"), only=["ia3"])
    config = replace(smollm2(given.layers, given.vocab), scan=True)
    chosen = [n for n in finetune.method_names() if given.only is None or n in given.only or n == COMPARED]
    print(environment("jax", "flax", "optax", "peft", "torch"))
    found = {name: Measured(**values) for name, values in read(given.results).items()}
    missing = [name for name in chosen if name not in found]
    if missing:
        new = measure([COMPARED, *(name for name in missing if name != COMPARED)], config, given)
        found = {**new, **{name: Measured(**values) for name, values in read(given.results).items()}}
        if given.results is not None:
            given.results.write_text(json.dumps({name: asdict(one) for name, one in found.items()}, indent=1))
    found = {name: found[name] for name in sorted(found)}
    head = ["method", "trained", "own GFLOP", "formula", "memory MB", "step ms", "x LoRA's", "PEFT's x its LoRA's"]
    print(table(f"**One step, {given.layers} layers, {BATCH} × {LENGTH} tokens**", head, rows(found)))
    if given.losses is not None:
        losses = held_out_losses(given.losses, chosen, given.steps)
        sizes = {method: trained_size(method) for method in losses}
        lines = [[m, f"{sizes[m]:,}", f"{before:.3f}", f"{after:.3f}"] for m, (before, after) in losses.items()]
        title = f"**SmolLM2 after {given.steps} steps of 2 × 64 tokens**"
        print(table(title, ["method", "trained", "held-out loss before", "after"], lines))
        if given.plot is not None:
            draw(given.plot, {method: (sizes[method], after) for method, (_, after) in losses.items()})
    judge(missed_targets(found), given)


if __name__ == "__main__":
    main()
