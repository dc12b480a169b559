"""Kills a process that saves over and over, at random moments: `python kill_writer.py FILE KILLS`.

A fresh process, so that fork() is safe and its children start at once. Exits with 1 and a message if what is
left is anything but one whole version of the file.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import numpy as np

from jaxadapt.storage import safetensors

SPECS = {f"t{i:02}": ("U16", (256, 500)) for i in range(12)}  # 3 MB


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def save(path: Path, version: int) -> None:
    # every second tensor needs a copy, all of them hold the version
    array = np.full((500, 256), version % 65536, np.uint16)
    safetensors.write(
        path,
        SPECS,
        lambda key: array.T if key.endswith(("1", "3")) else np.ascontiguousarray(array.T),
        {"version": str(version)},
    )


def check(path: Path) -> int:
    with safetensors.TensorFile(path) as file:
        version = int(file.header.metadata["version"])
        for key in file:
            if not (file[key] == version % 65536).all():
                sys.exit(f"version {version}: {key} holds {np.unique(file[key])}")
        return version


def main() -> None:
    path, kills = Path(sys.argv[1]), int(sys.argv[2])
    save(path, 0)
    last, interrupted, rng = 0, 0, random.Random(0)
    for _ in range(kills):
        child = os.fork()
        if child == 0:
            version = last
            while True:
                version += 1
                save(path, version)
        time.sleep(rng.uniform(0, 0.05))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        stale = [name for name in names(path.parent) if name != path.name]
        interrupted += bool(stale)
        if len({name.rpartition(".")[0] for name in stale}) > 1:  # of one save the new file, and a link to the old one
            sys.exit(f"temporary files were left to pile up: {stale}")
        version = check(path)
        if version < last:
            sys.exit(f"went back from version {last} to {version}")
        last = version
    save(path, last + 1)
    if names(path.parent) != [path.name]:
        sys.exit(f"left behind: {names(path.parent)}")
    print(f"{interrupted} of {kills} were killed while writing, {last} versions")
    if not interrupted or not last:
        sys.exit("no process was killed while writing, or none ever finished: the test tests nothing")


if __name__ == "__main__":
    main()
