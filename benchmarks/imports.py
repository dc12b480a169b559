"""What a command costs before it works: whole processes, interleaved, medians.

    python -m benchmarks.imports [--runs 15] [--busy]

Rows: a bare interpreter, `import jaxadapt`, `import jax`, `import peft` (where installed), and the commands that need
no JAX, on an adapter of 448 tensors, the shapes of a model of 225 weights, a run of 20 checkpoints; push and pull
without a network, as far as they come. Prints the table that benchmarks/README.md holds, and exits with 1 if a target
is missed: by the clock's seconds, or with `--busy` by the processor's.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.measure import judge, parsed, ratio

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = {
    "--help": 0, "inspect out": 0, "inspect out --norms": 0, "families": 0, "methods": 0, "completion zsh": 0,
    "check-keymap auto --model shapes.json": 0, "checkpoints run --minimize loss": 0,
    "pull org/name": 1, "push out org/name --no-picture": 1,
}  # fmt: skip
"""With their exit statuses: nobody answers the last two."""
TARGETS = {"import jaxadapt": 0.1, **{f"jaxadapt {words}": 0.3 for words in COMMANDS}}  # seconds, the whole process
LAYERS, WIDTH, RANK = 32, 64, 8
MODULES = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
MODULES += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]


def adapter(folder: Path) -> Path:
    """A PEFT adapter of 2 x 7 x 32 tensors, written without jaxadapt."""
    import numpy as np
    from safetensors.numpy import save_file

    tensors = {}
    for layer in range(LAYERS):
        for module in MODULES:
            stem = f"base_model.model.model.layers.{layer}.{module}"
            tensors[f"{stem}.lora_A.weight"] = np.zeros((RANK, WIDTH), np.float32)
            tensors[f"{stem}.lora_B.weight"] = np.zeros((WIDTH, RANK), np.float32)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 16}
    config["target_modules"] = [module.split(".")[-1] for module in MODULES]
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True))
    return folder


def shapes(path: Path) -> None:
    """Those of a Llama as `check-keymap` reads them."""
    kernels = {f"model.layers.{i}.{module}.kernel": [WIDTH, WIDTH] for i in range(LAYERS) for module in MODULES}
    path.write_text(json.dumps({**kernels, "model.embed_tokens.embedding": [100, WIDTH]}))


def run(folder: Path) -> None:
    """Twenty checkpoints of a training run, each with a metric; the only thing here that jaxadapt writes."""
    script = (
        "import sys, jax, jaxadapt\n"
        "base = {'q': {'kernel': jax.ShapeDtypeStruct((8, 8), 'float32')}}\n"
        "adapter = jaxadapt.init(base, jaxadapt.LoraConfig(r=2, target_modules=['q']), key=jax.random.key(0))\n"
        "with jaxadapt.CheckpointManager(sys.argv[1]) as manager:\n"
        "    for step in range(20): manager.save(step, adapter, metrics={'loss': 1 / (1 + step)})\n"
    )
    once([sys.executable, "-c", script, str(folder)], folder.parent, 0)


def once(command: list[str], cwd: Path, status: int) -> tuple[float, float]:
    """Seconds of the clock and of the processor."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, cwd=cwd, env=env, text=True, capture_output=True)
    taken, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode != status:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return taken, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def versions(*names: str) -> str:
    found = [f"{n} {importlib.metadata.version(n)}" for n in names if importlib.util.find_spec(n)]
    return ", ".join([f"Python {platform.python_version()}", *found, f"{os.cpu_count()} cores"])


def main() -> None:
    options = argparse.ArgumentParser(description="whole-process timings of imports and of inspect")
    options.add_argument("--runs", type=int, default=15)
    options.add_argument("--busy", action="store_true", help="judge the processor's seconds, not the clock's")
    given = parsed(options, runs=1)
    runs = given.runs
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "out").mkdir()
        adapter(folder / "out")
        shapes(folder / "shapes.json")
        run(folder / "run")
        python = [sys.executable]
        rows = {"python -c pass": [*python, "-c", "pass"]}
        rows |= {f"import {m}": [*python, "-c", f"import {m}"] for m in ("jaxadapt", "jax", "peft")}
        rows |= {f"jaxadapt {words}": [*python, "-m", "jaxadapt", *words.split()] for words in COMMANDS}
        if importlib.util.find_spec("peft") is None:
            del rows["import peft"]
        status = {row: COMMANDS.get(row.removeprefix("jaxadapt "), 0) for row in rows}
        for row, command in rows.items() if not given.smoke else ():
            once(command, folder, status[row])  # compiled files and the page cache
        times: dict[str, list[tuple[float, float]]] = {row: [] for row in rows}
        for _ in range(runs):
            for row, command in rows.items():
                times[row].append(once(command, folder, status[row]))
    clock, processor = ({row: [one[i] for one in values] for row, values in times.items()} for i in range(2))
    print(f"{versions('jax', 'flax', 'peft', 'torch')}; {runs} interleaved runs\n")
    print("| process | median s | min s | CPU s | beside `import jax` | target s |")
    print("|---|---|---|---|---|---|")
    for row, values in clock.items():
        target, beside = f"{TARGETS[row]:.1f}" if row in TARGETS else "", ratio(values, clock["import jax"])
        seconds = (statistics.median(values), min(values), statistics.median(processor[row]))
        print(f"| `{row}` | {' | '.join(f'{x:.3f}' for x in seconds)} | {beside:.2f} x | {target} |")
    judged = processor if given.busy else clock
    judge([row for row, target in TARGETS.items() if statistics.median(judged[row]) > target], given)


if __name__ == "__main__":
    main()
