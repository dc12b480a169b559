"""The fingerprint of a base of 7B parameters: in memory, and in the files of its Hugging Face folder.

    python -m benchmarks.fingerprint

The weights are zeros that take no memory and no disk (a sparse file), because a few values are read of any base.
Target: at most 0.2 s, the first time in a process included.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import struct
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

import jaxadapt
from benchmarks.measure import judge, parsed
from jaxadapt.adapters import sites
from jaxadapt.core import paths
from jaxadapt.persistence import fingerprint, verify_folder

TARGET = 0.2
SIZES = {"q": (1, 1), "k": (1, 1), "v": (1, 1), "o": (1, 1), "gate": (1, 0), "up": (1, 0), "down": (0, 1)}
MODULE = {name: f"self_attn.{name}_proj" if name in "qkvo" else f"mlp.{name}_proj" for name in SIZES}


def leaf_shapes(layers: int, width: int, inner: int) -> dict[str, tuple[int, int]]:
    """Return `{path: (in, out)}` of Llama 2's weights."""
    size = {1: width, 0: inner}
    return {
        f"model.layers.{layer}.{MODULE[name]}.kernel": (size[i], size[o])
        for layer in range(layers)
        for name, (i, o) in SIZES.items()
    }


def sparse_file(shapes: dict[str, tuple[int, int]], path: Path) -> None:
    """Write a safetensors file of zeros that takes no disk."""
    header, offset = dict[str, Any](), 0
    for leaf, (rows, columns) in shapes.items():
        size = 2 * rows * columns
        key = leaf.replace(".kernel", ".weight")
        header[key] = {"dtype": "BF16", "shape": [columns, rows], "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + offset)


def timed(title: str, call: Callable[[], object], rounds: int = 10) -> float:
    """Print and return the first time, and print the median of the others."""
    times: list[float] = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    print(f"{title:36} first {times[0] * 1e3:7.1f} ms   then, median {statistics.median(times[1:]) * 1e3:6.2f} ms")
    return times[0]


def main() -> None:
    given = parsed(argparse.ArgumentParser(description="the fingerprint of a base"))
    small = given.smoke
    shapes = leaf_shapes(2, 64, 96) if small else leaf_shapes(32, 4096, 11008)
    base = {path: np.zeros(shape, ml_dtypes.bfloat16) for path, shape in shapes.items()}
    specs = paths.unflatten({path: jax.ShapeDtypeStruct(shape, "bfloat16") for path, shape in shapes.items()})
    config = jaxadapt.LoraConfig(r=8, target_modules=[module.rpartition(".")[2] for module in MODULE.values()])
    adapter = jaxadapt.init(specs, config, keymap="llama")
    adapted = sites.sites_of(adapter)
    count = sum(int(np.prod(shape)) for shape in shapes.values())
    print(f"{len(shapes)} adapted weights, {count / 1e9:.2f}B parameters")
    first = timed("in memory", lambda: fingerprint.of_base(lambda _: base, adapter.keymap, adapted))
    stored = fingerprint.of_base(lambda _: base, adapter.keymap, adapted)
    assert stored is not None
    torch = {leaf.replace(".kernel", ".weight"): shape[::-1] for leaf, shape in shapes.items()}
    with tempfile.TemporaryDirectory(dir=os.environ.get("JAXADAPT_BENCH_DIR")) as folder:
        sparse_file(shapes, Path(folder) / "model.safetensors")
        (note,) = verify_folder.check_identity(stored, torch, folder)
        assert note.code == "base", note
        files = timed("in its files, compared", lambda: list(verify_folder.check_identity(stored, torch, folder)))
    worst = max(first, files)
    judge([] if worst <= TARGET else [f"the fingerprint takes {worst:.3f} s, and may take {TARGET} s"], given)


if __name__ == "__main__":
    main()
