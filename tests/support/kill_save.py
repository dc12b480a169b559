"""Kills a process that saves over and over, at random moments: `python -m tests.support.kill_save FOLDER KILLS`.

The saves alternate between two methods of writing trouble: another rank (the pair of files must agree) and
other values. A fresh process, so that fork() is safe and children start at once; numpy arrays only, so that no
JAX backend runs. Exits with 1 and a message if what a kill leaves is anything but one whole adapter.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import random
import signal
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import jaxadapt
from tests.support.small import CONFIG, WEIGHTS


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
        tensors = jaxadapt.read(path)
        again = jaxadapt.inspect(path)
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


def sweep(kills: int, child: Callable[[Callable[[], object]], None], inspect: Callable[[int], bool]) -> int:
    """How many of `kills` children were killed in the middle of something, as `inspect` says, told how many they began.

    A child saves for ever and tells when each save begins. It is killed in its first, second or third, at any moment
    of the time that such a save has just taken: however slow the machine is, some saves end and some are cut off.
    """
    rng, unfinished = random.Random(0), 0
    took = [0.0, 0.0]  # seconds, the first save of a child and the second
    for number in range(kills):
        sys.stdout.flush()
        seen, said = os.pipe()
        pid = os.fork()
        if pid == 0:
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # or it would go on for ever, if this process is killed itself
            child(functools.partial(os.write, said, b"."))
            os._exit(1)
        os.close(said)
        whole, began = rng.choice((0, 1, 2)) if number else 2, 0.0
        for ended in range(whole + 1):
            if not os.read(seen, 1):
                sys.exit("a writer failed")
            now = time.perf_counter()
            if ended:
                took[ended - 1] = now - began
            began = now
        time.sleep(rng.uniform(0, 1.2 * took[min(whole, 1)]))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        unfinished += inspect(whole + 1 + len(os.read(seen, 1000)))
        os.close(seen)
    return unfinished


class Apart:
    """Work done in a process of its own: what starts threads (a store's package, JAX) must not be in one that forks."""

    def __init__(self, work: Callable[[Any], Any]) -> None:
        ask, told = os.pipe(), os.pipe()
        if os.fork() == 0:
            os.close(ask[1])
            with os.fdopen(ask[0]) as asked:
                for line in asked:
                    os.write(told[1], json.dumps(work(json.loads(line))).encode() + b"\n")
            os._exit(0)
        os.close(told[1])
        self._ask, self._told = ask[1], os.fdopen(told[0])

    def __call__(self, what: Any) -> Any:
        os.write(self._ask, json.dumps(what).encode() + b"\n")
        line = self._told.readline()
        if not line:
            sys.exit(f"{what}: see above")
        return json.loads(line)


def main() -> None:
    path, kills = Path(sys.argv[1]), int(sys.argv[2])
    jaxadapt.save(make(0), path)
    seen = {"last": 0, "apart": 0}

    def child(begin: Callable[[], object]) -> None:
        version = seen["last"]
        while True:
            version += 1
            begin()
            jaxadapt.save(make(version), path)

    def inspect(_: int) -> bool:
        stale = [p.name for p in path.iterdir() if p.name.endswith(".tmp")]
        if len(stale) > 3:  # the next save of a file removes what a killed one of it left, and there are three files
            sys.exit(f"temporary files were left to pile up: {stale}")
        version, interrupted = check(path)
        if version < seen["last"]:
            sys.exit(f"went back from version {seen['last']} to {version}")
        seen.update(last=version, apart=seen["apart"] + interrupted)
        return bool(stale)

    unfinished, last = sweep(kills, child, inspect), seen["last"]
    jaxadapt.save(make(last + 1), path)
    left = sorted(p.name for p in path.iterdir())
    if left != sorted([CONFIG, WEIGHTS, "README.md"]):
        sys.exit(f"left behind: {left}")
    print(f"{unfinished} of {kills} were killed while writing, {seen['apart']} between two files; {last} versions")
    if not unfinished or last < 3:
        sys.exit("no process was killed while writing, or none ever finished: the test tests nothing")


if __name__ == "__main__":
    main()
