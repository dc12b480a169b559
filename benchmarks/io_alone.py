"""The least that saving and loading safetensors takes with NumPy: no plan, no checks, no names but the header's."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np


def read(path: Path, shapes: Sequence[tuple[int, ...]] | None = None) -> list[np.ndarray]:
    """Return the tensors of a file in its order, in memory that JAX uses without a copy; `shapes` replace theirs."""
    fd = os.open(path, os.O_RDONLY)
    try:
        size = int.from_bytes(os.pread(fd, 8, 0), "little")
        header = json.loads(os.pread(fd, size, 8))
        header.pop("__metadata__", None)
        out: list[np.ndarray] = []
        for number, info in enumerate(header.values()):
            start, stop = info["data_offsets"]
            memory = np.empty(stop - start + 63, np.uint8)
            skip = -memory.__array_interface__["data"][0] % 64
            memory = memory[skip : skip + stop - start]
            os.preadv(fd, [memory.data], 8 + size + start)
            dtype = np.float32 if info["dtype"] == "F32" else np.uint16
            out.append(memory.view(dtype).reshape(info["shape"] if shapes is None else shapes[number]))
        return out
    finally:
        os.close(fd)


def write(path: Path, tensors: Mapping[str, Any], small: bytes) -> None:
    """Write arrays of JAX under their names, and a small file beside them, and wait until both are on the disk."""
    header, position = {}, 0
    for key, x in tensors.items():
        header[key] = {"dtype": "BF16", "shape": list(x.shape), "data_offsets": [position, position + x.nbytes]}
        position += x.nbytes
    text = json.dumps(header).encode()
    fd = os.open(path.with_suffix(".new"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    os.write(fd, len(text).to_bytes(8, "little") + text)
    for x in tensors.values():
        os.write(fd, np.asarray(x).view(np.uint16).data)
    os.fsync(fd)
    os.close(fd)
    path.with_suffix(".json").write_bytes(small)
    path.with_suffix(".new").rename(path)
    directory = os.open(path.parent, os.O_RDONLY)
    os.fsync(directory)
    os.close(directory)
