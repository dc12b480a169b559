"""Exporting and comparing adapters, beside reading and writing the same bytes.

    python -m benchmarks.export [--megabytes 500] [--rounds 5]

A LoRA of rank 16 in bfloat16 with rsLoRA, on seven projections in each layer. Targets: each way ≤ 1.3 × raw read and
write+fsync, and at most a few tensors of extra memory. "NumPy alone" is the least that the same arithmetic takes in one
thread, with no check and no names: the B multiplied in float32 (for mlx-lm also every matrix transposed), or the Gram
matrices of both files in float64.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

import jaxadapt
from benchmarks.measure import Way, environment, installed, interleave, judge, parsed, ratio, table
from jaxadapt.analysis import diff
from jaxadapt.export import export_adapter
from jaxadapt.persistence import folder as folders

RANK, WIDTH = 16, 4096
MODULES = {"self_attn.q_proj": (WIDTH, WIDTH), "self_attn.k_proj": (WIDTH, 1024), "self_attn.v_proj": (WIDTH, 1024),
           "self_attn.o_proj": (WIDTH, WIDTH), "mlp.gate_proj": (WIDTH, 14336), "mlp.up_proj": (WIDTH, 14336),
           "mlp.down_proj": (14336, WIDTH)}  # fmt: skip
RAW = "raw read, write, fsync"
SCALED, PRODUCTS = "NumPy alone: read, multiply, write, fsync", "NumPy alone: read two, multiply"
TURNED = "NumPy alone: read, multiply, transpose, write, fsync"
LARGEST = 14336 * RANK * 4  # bytes of the largest tensor in float32


def write_adapter(path: Path, megabytes: int, seed: int) -> None:
    """A random adapter of about this size, whose layers are as many as it takes."""
    layer = sum(RANK * (a + b) for a, b in MODULES.values()) * 2
    layers = max(1, megabytes * 1_000_000 // layer)
    config = jaxadapt.LoraConfig(r=RANK, lora_alpha=24, use_rslora=True, base_model_name_or_path="org/base",
                                 target_modules=[name.rpartition(".")[2] for name in MODULES])  # fmt: skip
    rng = np.random.default_rng(seed)
    values = {shape: rng.standard_normal(shape, "float32").astype(ml_dtypes.bfloat16)
              for a, b in MODULES.values() for shape in ((RANK, a), (b, RANK))}  # fmt: skip
    tensors = {}
    for i in range(layers):
        for module, (inputs, outputs) in MODULES.items():
            place = f"base_model.model.model.layers.{i}.{module}"
            tensors[f"{place}.lora_A.weight"] = values[RANK, inputs]
            tensors[f"{place}.lora_B.weight"] = values[outputs, RANK]
    jaxadapt.write(jaxadapt.PeftTensors(config, tensors), path)
    config_json = {"model_type": "llama", "num_hidden_layers": layers, "num_attention_heads": 32,
                   "num_key_value_heads": 8, "tie_word_embeddings": False}  # fmt: skip
    (path / "config.json").write_text(json.dumps(config_json))


def raw(source: Path, target: Path) -> None:
    """Read a file in pieces, write them to another, and flush it."""
    with source.open("rb", buffering=0) as reading, target.open("wb", buffering=0) as writing:
        while piece := reading.read(1 << 20):
            writing.write(piece)
        os.fsync(writing.fileno())


def layout(path: Path) -> tuple[int, list[tuple[str, dict[str, Any]]]]:
    """The start of the data and (key, entry) of each tensor in the file's order."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    header.pop("__metadata__")
    return 8 + size, sorted(header.items(), key=lambda item: item[1]["data_offsets"])


def tensors_of(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Each tensor of a file of bfloat16, in memory that the next one overwrites."""
    start, entries = layout(path)
    memory = np.empty(LARGEST, "uint8")
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        for key, entry in entries:
            begin, end = entry["data_offsets"]
            file.readinto(memory[: end - begin].data)
            yield key, memory[: end - begin].view(ml_dtypes.bfloat16).reshape(entry["shape"])


def numpy_scaled(source: Path, target: Path, transpose: bool = False) -> None:
    """Read, multiply the B, transpose on request, write, flush."""
    block = np.empty(1 << 15, "float32")
    with target.open("wb", buffering=0) as writing:
        for key, x in tensors_of(source):
            flat = x.reshape(-1)
            for start in range(0, flat.size if "lora_B" in key else 0, block.size):
                part = block[: flat.size - start]
                part[...] = flat[start : start + block.size]
                part *= 1.5
                flat[start : start + block.size] = part
            turned = np.ascontiguousarray(x.view("uint16").T) if transpose else flat
            writing.write(turned.reshape(-1).view("uint8").data)
        os.fsync(writing.fileno())


def numpy_products(one: Path, other: Path) -> float:
    """Read both files and multiply the factors with themselves and each other, as a comparison without ΔW must."""
    total = 0.0
    for (_, x), (_, y) in zip(tensors_of(one), tensors_of(other), strict=True):
        both = np.concatenate([x, y], 0 if x.shape[0] == RANK else 1, dtype="float64", casting="unsafe")
        gram = both @ both.T if x.shape[0] == RANK else both.T @ both
        total += float(gram[0, 0])
    return total


def raw_read(*sources: Path) -> None:
    memory = bytearray(1 << 20)
    for source in sources:
        with source.open("rb", buffering=0) as reading:
            while reading.readinto(memory):
                pass


def difference(one: Path, other: Path) -> None:
    with folders.open_adapter(one) as a, folders.open_adapter(other) as b:
        diff(a, b)


def ways(work: Path) -> dict[str, Callable[[], object]]:
    one, other = work / "one", work / "other"
    weights = "adapter_model.safetensors"
    found: dict[str, Callable[[], object]] = {
        RAW: lambda: raw(one / weights, work / "raw"),
        SCALED: lambda: numpy_scaled(one / weights, work / "numpy"),
        TURNED: lambda: numpy_scaled(one / weights, work / "numpy", transpose=True),
        "export --for plain, bfloat16": lambda: export_adapter(one, work / "plain", "plain", dtype="bfloat16"),
        "export --for mlx, bfloat16": lambda: export_adapter(one, work / "mlx", "mlx", dtype="bfloat16"),
    }
    if installed("gguf"):
        found["export --for gguf, bfloat16"] = lambda: export_adapter(
            one, work / "a.gguf", "gguf", base=one / "config.json", dtype="bfloat16"
        )
    found["raw read of two"] = lambda: raw_read(one / weights, other / weights)
    found[PRODUCTS] = lambda: numpy_products(one / weights, other / weights)
    found["diff of two"] = lambda: difference(one, other)
    return found


def memory(work: Path, name: str) -> float:
    """The growth of the peak memory, in bytes, of one way in a process of its own after it did the same on 1 MB."""
    command = [sys.executable, "-m", "benchmarks.export", "--child", str(work), name]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


def child(work: Path, name: str) -> None:
    with tempfile.TemporaryDirectory(dir=work) as small:
        for number, each in enumerate(("one", "other")):
            write_adapter(Path(small) / each, 1, number)
        ways(Path(small))[name]()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ways(work)[name]()
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)


def main() -> None:
    options = argparse.ArgumentParser(description="exporting and comparing adapters beside raw reading and writing")
    options.add_argument("--megabytes", type=int, default=500)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    given = parsed(options, megabytes=4, rounds=1)
    if given.child:
        child(Path(given.child[0]), given.child[1])
        return
    missed: list[str] = []
    rows: list[tuple[object, ...]] = []
    with tempfile.TemporaryDirectory(dir=os.environ.get("JAXADAPT_BENCH_DIR")) as folder:
        work = Path(folder)
        for number, name in enumerate(("one", "other")):
            write_adapter(work / name, given.megabytes, number)
        size = (work / "one/adapter_model.safetensors").stat().st_size
        todo = ways(work)
        times = interleave({name: Way(lambda _, run=run: run()) for name, run in todo.items()}, given.rounds)
        for name, found in times.items():
            is_ours = name.startswith(("export", "diff"))
            beside = ratio(found.clock, times[RAW].clock)
            alone = PRODUCTS if name.startswith("diff") else TURNED if "mlx" in name else SCALED
            least = ratio(found.clock, times[alone].clock)
            grown = memory(work, name)
            rows.append((name, f"{sorted(found.clock)[len(found.clock) // 2]:.3f}", f"{min(found.processor):.3f}",
                         f"{beside:.2f} x", f"{least:.2f} x" if is_ours else "", f"{grown / 1e6:.1f}"))  # fmt: skip
            if is_ours and beside > 1.3:
                missed.append(f"{name}: {beside:.2f} x raw read and write, target 1.3")
            if is_ours and grown > 8 * LARGEST:
                missed.append(f"{name}: {grown / 1e6:.0f} MB of extra memory")
    print(environment("jax", "numpy", "gguf"))
    head = ("way", "median s", "min processor s", "beside raw", "beside NumPy alone", "growth of peak memory, MB")
    print(table(f"{size / 1e6:.0f} MB, {given.rounds} interleaved rounds", head, rows))
    # The fingerprint of a base has its row here.
    judge(missed, given)


if __name__ == "__main__":
    main()
