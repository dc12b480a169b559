"""Kills a process that saves over and over, at random moments: `python -m tests.kill_save FOLDER KILLS`.

The saves alternate between two methods of writing trouble: another rank (the pair of files must agree) and
other values. A fresh process, so that fork() is safe and children start at once; numpy arrays only, so that no
JAX backend runs. Exits with 1 and a message if what a kill leaves is anything but one whole adapter.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
import warnings
from pathlib import Path

import numpy as np

import jaxadapt
from jaxadapt import folder
from tests.small import CONFIG, WEIGHTS


def make(version: int) -> jaxadapt.Adapter:
    """The adapter of one save: rank, alpha and every value follow from the version."""
    r = 2 + version % 3
    sites = {
        f"l{i}": {"q_proj": {"kernel": {
            "lora_A": np.full((r, 200), version, "f4"), "lora_B": np.full((300, r), version, "f4"),
        }}}
        for i in range(40)
    }  # fmt: skip
    config = jaxadapt.LoraConfig(r=r, lora_alpha=1 + version % 7, target_modules=["q_proj"])
    return jaxadapt.Adapter(config, sites)


def check(path: Path) -> tuple[int, bool]:
    """The version that is there, and whether its two files were caught apart."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tensors = folder.read(path)
        again = folder.inspect(path)
    if any("interrupted" not in str(w.message) for w in caught):
        sys.exit(f"unexpected warnings: {[str(w.message) for w in caught]}")
    values = {float(v) for x in tensors.tensors.values() for v in (x.min(), x.max())}
    if len(values) != 1:
        sys.exit(f"the tensors are of several versions: {sorted(values)}")
    version = int(values.pop())
    shapes = {x.shape[0] for k, x in tensors.tensors.items() if ".lora_A." in k}
    expected = make(version).config
    if tensors.config != expected or again.config != expected or shapes != {expected.r}:
        sys.exit(f"version {version}: its configuration is {tensors.config}, its tensors have rank {shapes}")
    return version, bool(caught)


def main() -> None:
    path, kills = Path(sys.argv[1]), int(sys.argv[2])
    jaxadapt.save(make(0), path)
    start = time.perf_counter()
    jaxadapt.save(make(1), path)
    once = time.perf_counter() - start
    last, apart, unfinished, rng = 1, 0, 0, random.Random(0)
    for _ in range(kills):
        child = os.fork()
        if child == 0:
            version = last
            while True:
                version += 1
                jaxadapt.save(make(version), path)
        time.sleep(rng.uniform(0, 3 * once))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        stale = [p.name for p in path.iterdir() if p.name.endswith(".tmp")]
        unfinished += bool(stale)
        if len(stale) > 3:  # the next save of a file removes what a killed one of it left, and there are three files
            sys.exit(f"temporary files were left to pile up: {stale}")
        version, interrupted = check(path)
        apart += interrupted
        if version < last:
            sys.exit(f"went back from version {last} to {version}")
        last = version
    jaxadapt.save(make(last + 1), path)
    left = sorted(p.name for p in path.iterdir())
    if left != sorted([CONFIG, WEIGHTS, "README.md"]):
        sys.exit(f"left behind: {left}")
    print(
        f"{unfinished} of {kills} were killed while writing, {apart} between the two files; {last} versions"
    )
    if not unfinished or last < 3:
        sys.exit("no process was killed while writing, or none ever finished: the test tests nothing")


if __name__ == "__main__":
    main()
