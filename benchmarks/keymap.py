"""What a table of names costs: planning a 70B-shaped model, moving tensors through it, exporting a whole model.

    python -m benchmarks.keymap [--repeats 9] [--layers 4]

Planning: Llama-3-70B's shapes (80 layers, all seven projections, r = 64, nothing allocated): recognizing the family,
what `target_modules` means, and the plan of the file. Encode and decode: the same adapter in bfloat16, fewer layers,
beside copying the same bytes once into new memory. Memory: a model of float32 weights, the largest 128 MB, in a process
of its own. Exits with 1 if a target is missed.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import ml_dtypes
import numpy as np

import jaxadapt
from benchmarks.io import status
from benchmarks.measure import Way, environment, interleave, judge, parsed, ratio, table
from jaxadapt.adapters.adapter import make_file_plan
from jaxadapt.core import paths
from jaxadapt.keymaps import families
from jaxadapt.models import planning
from jaxadapt.models.carriers import base_params

LAYERS, HIDDEN, INNER, HEADS, KV, HEAD, VOCAB, RANK = 80, 8192, 28672, 64, 8, 128, 128256, 64
PLAN, SPEED, EXTRA = 0.3, 0.5, 1.5  # seconds; parts of memcpy; times the largest tensor
CONFIG = jaxadapt.LoraConfig(
    r=RANK,
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
)
FAMILIES = ("llama", "tunix:llama3", "maxtext:llama3.1", "maxtext:llama3.1/scan1")


def shapes(name: str, layers: int = LAYERS, vocab: int = VOCAB) -> dict[str, tuple[int, ...]]:
    """The leaves of a Llama-3-70B in this family's layout."""
    size = {
        "q_proj": (HIDDEN, HEADS * HEAD),
        "k_proj": (HIDDEN, KV * HEAD),
        "v_proj": (HIDDEN, KV * HEAD),
        "o_proj": (HEADS * HEAD, HIDDEN),
        "gate_proj": (HIDDEN, INNER),
        "up_proj": (HIDDEN, INNER),
        "down_proj": (INNER, HIDDEN),
        "embed_tokens": (vocab, HIDDEN),
        "lm_head": (HIDDEN, vocab),
    }
    out: dict[str, tuple[int, ...]] = {}
    for line in families.get_family(name).weights:
        module = line.key.removesuffix(".weight").rpartition(".")[2]
        if line.key.endswith("bias") or module in ("q_norm", "k_norm"):
            continue
        known = {"{l}": layers}
        inputs, out_ = size.get(module, (HIDDEN, HIDDEN))
        heads = {"q_proj": HEADS, "o_proj": HEADS}.get(module, KV)
        for role, total in (("in", inputs), ("out", out_)):
            axes = line.roles[role]
            if len(axes) == 2:
                known |= {axes[0]: heads, axes[1]: HEAD}
            elif axes:
                known[axes[0]] = total if line.kind == "linear" else HIDDEN
        if line.kind == "embedding":
            known = {line.left[0]: vocab, line.left[1]: HIDDEN}
        shape = tuple(known.get(axis, HIDDEN) for axis in line.left)
        for l in range(layers) if "{l}" in line.leaf else (0,):
            out[line.leaf.replace("{l}", str(l))] = shape
    return out


def tree(name: str, layers: int = LAYERS, vocab: int = VOCAB) -> Any:
    leaves = {path: jax.ShapeDtypeStruct(shape, "bfloat16") for path, shape in shapes(name, layers, vocab).items()}
    return paths.unflatten(leaves)


def planned(rounds: int) -> tuple[list[list[object]], list[str]]:
    ways: dict[str, Way] = {}
    counts: dict[str, tuple[int, int]] = {}
    vocabularies = itertools.count(VOCAB)  # of each model another: plans and recognized families are kept
    for name in FAMILIES:
        keymap = name if name.startswith("maxtext") else None  # a Llama of MaxText is not known by its names

        def new(name: str = name) -> Any:
            return tree(name, vocab=next(vocabularies))

        def plan(model: Any, keymap: str | None = keymap) -> Any:
            _, bounds = planning.plan_adapter(base_params(model), CONFIG, keymap)
            return make_file_plan(bounds).shapes

        ways[name] = Way(plan, new)
        counts[name] = (len(shapes(name)), len(plan(new())))
    times = interleave(ways, rounds)
    rows = [
        [name, *counts[name], f"{statistics.median(t.clock):.3f}", f"{min(t.clock):.3f}"] for name, t in times.items()
    ]
    slow = [f"planning {name}: {statistics.median(t.clock):.2f} s" for name, t in times.items()]
    return rows, [text for text, t in zip(slow, times.values(), strict=True) if statistics.median(t.clock) > PLAN]


def moving(rounds: int, layers: int) -> tuple[list[list[object]], list[str], str]:
    rows: list[list[object]] = []
    missed: list[str] = []
    title = ""
    for name in FAMILIES:
        model = tree(name, layers)
        keymap = name if name.startswith("maxtext") else None
        recipe, bounds = planning.plan_adapter(base_params(model), CONFIG, keymap)
        rng = np.random.default_rng(0)
        leaves = {
            e.path: rng.standard_normal(e.shape, "float32").astype(ml_dtypes.bfloat16)
            for e in make_file_plan(bounds).entries
        }
        adapter = jaxadapt.Adapter(recipe.config, paths.unflatten(leaves), recipe.keymap)
        nbytes = sum(x.nbytes for x in leaves.values())
        title = f"{nbytes / 1e6:.0f} MB of bfloat16 in {layers} layers"
        tensors = {k: np.ascontiguousarray(x) for k, x in jaxadapt.to_peft(adapter).tensors.items()}
        held = jaxadapt.PeftTensors(recipe.config, tensors)
        ways = {
            "memcpy": Way(lambda _, leaves=leaves: memcpy(leaves.values())),
            "encode": Way(lambda _, a=adapter: [packed(x) for x in jaxadapt.to_peft(a).tensors.values()]),
            "decode": Way(
                lambda _, held=held, model=model, keymap=keymap: jax.block_until_ready(
                    jaxadapt.from_peft(held, model, keymap=keymap).params
                )
            ),
        }
        times = interleave(ways, rounds)
        speed = {way: 1 / ratio(t.clock, times["memcpy"].clock) for way, t in times.items()}
        both = 2 / sum(1 / speed[way] for way in ("encode", "decode"))
        rate = nbytes / statistics.median(times["memcpy"].clock) / 1e9
        speeds = [f"{100 * x:.0f} %" for x in (speed["encode"], speed["decode"], both)]
        rows.append([name, f"{rate:.1f}", *speeds])
        if both < SPEED:
            missed.append(f"encode and decode of {name}: {100 * both:.0f} % of memcpy")
    return rows, missed, title


def memcpy(arrays: Iterable[np.ndarray]) -> np.ndarray:
    """All bytes once, into memory as new as what decoding makes: its pages are the kernel's to give, as there."""
    arrays = list(arrays)
    out, at = np.empty(sum(x.nbytes for x in arrays), "u1"), 0
    for x in arrays:
        out[at : at + x.nbytes] = x.reshape(-1).view("u1")
        at += x.nbytes
    return out


def packed(x: np.ndarray) -> np.ndarray:
    """The tensor's bytes in PyTorch's order; as integers, since numpy moves bfloat16 one number at a time."""
    return np.ascontiguousarray(x.view(f"u{x.itemsize}")).view(x.dtype)


def weights(scan: bool, width: int) -> tuple[str, Mapping[str, Any]]:
    """A float32 model whose largest tensors have 32 · width² bytes, as numpy arrays that are really there."""
    d, f = width, 8 * width
    layer = {"self_attn.q_proj": (d, d), "mlp.up_proj": (d, f), "mlp.down_proj": (f, d)}
    out: dict[str, np.ndarray] = {}
    for l in range(2):
        for module, shape in layer.items():
            out[f"model.layers.{l}.{module}.kernel"] = np.full(shape, l + 1, "float32")
    if not scan:
        return "llama", paths.unflatten(out)
    stacked = {
        f"model.layers.{m}.kernel": np.stack([out[f"model.layers.{l}.{m}.kernel"] for l in range(2)]) for m in layer
    }
    return "llama/scan0", paths.unflatten(stacked)


def exporting(kind: str, merged: bool, width: int) -> None:
    """In a process of its own: print by how many bytes an export raises the peak of resident memory."""
    keymap, model = weights(kind == "stacked", width)
    config = jaxadapt.LoraConfig(r=8, target_modules=["q_proj", "up_proj", "down_proj"])
    adapter = jaxadapt.init(model, config, key=jax.random.key(0), keymap=keymap) if merged else None
    with tempfile.TemporaryDirectory() as folder:
        # What is imported and compiled on first use is no memory of the data; what it leaves free goes back.
        jaxadapt.export.export_base(model, folder, adapter, keymap=keymap)
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = status("VmRSS")
        jaxadapt.export.export_base(model, folder, adapter, keymap=keymap)
        print(status("VmHWM") - before)


def memory(width: int) -> tuple[list[list[object]], list[str]]:
    rows: list[list[object]] = []
    missed: list[str] = []
    largest = 4 * width * 8 * width
    for kind in ("unrolled", "stacked"):
        for merged in (False, True):
            command = [sys.executable, "-m", "benchmarks.keymap", "--memory", kind, str(int(merged)), str(width)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
            extra = int(done.stdout.split()[-1])
            what = f"{kind} layers" + (", adapter merged on the way" if merged else "")
            rows.append([what, f"{extra / 1e6:.1f}", f"{extra / largest:.2f}"])
            if extra > EXTRA * largest:
                missed.append(f"export_base, {what}: {extra / largest:.2f} x the largest tensor")
    return rows, missed


def main() -> None:
    options = argparse.ArgumentParser(description="what tables cost")
    options.add_argument("--repeats", type=int, default=9)
    options.add_argument("--layers", type=int, default=4)
    options.add_argument("--width", type=int, default=2048, help="of the model that is exported")
    options.add_argument("--memory", nargs=3, help=argparse.SUPPRESS)
    given = parsed(options, repeats=1, layers=1, width=64)
    warnings.simplefilter("ignore")
    if given.memory:
        kind, merged, width = given.memory
        return exporting(kind, merged == "1", int(width))
    print(environment("jax", "flax", "numpy"))
    rows, missed = planned(given.repeats)
    head = ["family", "leaves", "tensors", "median s", "best s"]
    title = f"**planning a Llama-3-70B, r = {RANK}, median of {given.repeats} interleaved rounds**"
    print(table(title, head, rows), flush=True)
    rows, more, title = moving(given.repeats, given.layers)
    head = ["family", "memcpy GB/s", "encode", "decode", "both"]
    print(table(f"**speed beside memcpy of the same bytes, {title}**", head, rows), flush=True)
    missed += more
    rows, more = memory(given.width)
    head = ["model", "extra MB", "x its largest tensor"]
    print(table("**export_base: peak memory above what was resident before**", head, rows))
    missed += more
    return judge(missed, given)


if __name__ == "__main__":
    main()
