"""Durable save and load of adapter-like tensors, against raw writes and reads of the same bytes.

    python -m benchmarks.codec [MB ...]

450 bfloat16 tensors; every second one is a transposed view, as a Flax kernel is in PyTorch's layout. All ways
are interleaved and medians are printed, with the ratio to the raw way: (x).
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import safetensors.flax

from benchmarks.measure import parsed
from jaxadapt.storage import safetensors as codec

COUNT = 450


def tensors(megabytes: int) -> dict[str, np.ndarray]:
    rank = 16
    width = megabytes * 1_000_000 // (COUNT * 2 * rank)
    values = np.random.default_rng(0).standard_normal((rank, width)).astype(ml_dtypes.bfloat16)
    made: dict[str, np.ndarray] = {}
    for i in range(COUNT):
        if i % 2:
            made[f"layers.{i // 2}.lora_B.weight"] = np.array(values).T
        else:
            made[f"layers.{i // 2}.lora_A.weight"] = np.array(values.T).T.copy() if i % 4 else np.array(values)
    return made


def raw_write(path: Path, data: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    view = memoryview(data)
    done = 0
    while done < len(view):
        done += os.write(fd, view[done:])
    os.fsync(fd)
    os.close(fd)


def raw_replace(path: Path, data: bytes) -> None:
    temporary = path.with_suffix(".tmp")
    raw_write(temporary, data)
    temporary.replace(path)


def raw_read(path: Path) -> bytes:
    fd = os.open(path, os.O_RDONLY)
    try:
        return os.read(fd, os.fstat(fd).st_size)
    finally:
        os.close(fd)


def to_jax(loaded: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    return jax.block_until_ready(jax.device_put(loaded, may_alias=True))


def run(megabytes: int, rounds: int, folder: Path) -> None:
    source = tensors(megabytes)
    specs = {key: (value.dtype, value.shape) for key, value in source.items()}
    ours, raw = folder / "ours.safetensors", folder / "raw.bin"
    codec.write(ours, specs, source.__getitem__, {"format": "pt"})
    data = ours.read_bytes()
    contiguous = {key: np.ascontiguousarray(value) for key, value in source.items()}

    writes: dict[str, Callable[[], object]] = {
        "raw write+fsync": lambda: raw_write(raw, data),
        "raw write+fsync+rename": lambda: raw_replace(raw, data),
        "ours": lambda: codec.write(ours, specs, source.__getitem__, {"format": "pt"}),
        "ours, contiguous": lambda: codec.write(ours, specs, contiguous.__getitem__, {"format": "pt"}),
    }
    reads: dict[str, Callable[[], object]] = {
        "raw read": lambda: raw_read(ours),
        "ours, numpy": lambda: codec.read(ours),
        "ours, jax": lambda: to_jax(codec.read(ours)),
        "safetensors.flax": lambda: jax.block_until_ready(safetensors.flax.load_file(ours)),
    }
    for title, ways in (("save", writes), ("load", reads)):
        times: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(rounds + 1):
            for name in (list(ways), list(ways)[::-1])[number % 2]:
                start = time.perf_counter()
                result = ways[name]()
                elapsed = time.perf_counter() - start
                del result
                if number:  # the first round warms up
                    times[name].append(elapsed)
        base = statistics.median(next(iter(times.values())))
        print(f"{title} {megabytes} MB, {COUNT} tensors, median of {rounds}")
        for name, values in times.items():
            middle = statistics.median(values)
            print(f"  {name:26} {middle * 1e3:8.1f} ms  x{middle / base:.2f}   best {min(values) * 1e3:.1f}")


def main() -> None:
    options = argparse.ArgumentParser(description="the safetensors codec beside raw IO")
    options.add_argument("sizes", type=int, nargs="*", default=[50, 500], help="megabytes")
    given = parsed(options, sizes=[1])
    with tempfile.TemporaryDirectory(dir=os.environ.get("JAXADAPT_BENCH_DIR")) as folder:
        for megabytes in given.sizes:
            run(megabytes, 15 if megabytes <= 100 else 7, Path(folder))


if __name__ == "__main__":
    main()
