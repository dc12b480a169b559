"""Kills a process that saves checkpoints over and over: `python -m tests.support.kill_checkpoints KIND FOLDER KILLS`.

KIND is "manager" (steps in one folder, the last three and the best kept) or "orbax" (`save(…, format="orbax")` to one
new path after another). Or "race" and "pair": two processes save to the same paths at once, Orbax checkpoints and
folders that PEFT reads, and one of them must win whole.

A fresh process, so that fork() is safe and children start at once. Exits with 1 and a message if what a kill
leaves is anything but whole checkpoints, and none that had been there is gone.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np

import jaxadapt
from jaxadapt.storage import orbax
from tests.support.kill_save import Apart, sweep


def make(version: int) -> jaxadapt.Adapter:
    """The adapter of one save: rank, alpha and every value follow from the version."""
    r = 2 + version % 3
    sites = {
        f"l{i}": {"q_proj": {"kernel": {
            "lora_A": np.full((r, 200), version, "f4"), "lora_B": np.full((300, r), version, "f4"),
        }}}
        for i in range(10)
    }  # fmt: skip
    return jaxadapt.Adapter(jaxadapt.LoraConfig(r=r, lora_alpha=1 + version % 7, target_modules=["q_proj"]), sites)


def check(version: int, found: jaxadapt.Adapter | jaxadapt.PeftTensors) -> None:
    """All of one checkpoint is of the version it was saved as."""
    flat = found.flat() if isinstance(found, jaxadapt.Adapter) else found.tensors
    values = {float(v) for x in flat.values() for v in (x.min(), x.max())}
    if values != {float(version)}:
        sys.exit(f"version {version} holds values of {sorted(values)}")
    expected = make(version).config
    if (found.config.r, found.config.lora_alpha) != (expected.r, expected.lora_alpha):
        sys.exit(f"version {version}: its configuration is {found.config}")


def quiet() -> None:
    """A child that is killed has nothing to say; one that fails has."""
    import absl.logging

    absl.logging.set_verbosity(absl.logging.ERROR)


def manager(folder: Path, kills: int) -> None:
    def new() -> jaxadapt.CheckpointManager:
        return jaxadapt.CheckpointManager(folder, keep=3, keep_best=1, minimize="loss")

    def save(one: jaxadapt.CheckpointManager, step: int) -> None:
        moments = {"mu": make(step).params, "count": step}
        one.save(step, make(step), opt_state=moments, data={"step": step}, metrics={"loss": 1.0 + (step % 5 > 0)})

    with new() as first:
        for step in range(4):
            save(first, step)
    seen = {"last": 3}

    def child(begin: Callable[[], object]) -> None:
        one, step = new(), seen["last"]
        while True:
            step += 1
            begin()
            save(one, step)

    def inspect(_: int) -> bool:
        one = new()
        steps = one.steps
        # Three and the best, and one more of each kill in a row that came between a step and its pruning.
        if not 3 <= len(steps) <= 8 or steps[-1] < seen["last"]:
            sys.exit(f"steps {steps} after {seen['last']}")
        for step in steps:
            back = one.restore(make(step), step)
            check(step, back.model)
            if (back.data, back.opt_state["count"]) != ({"step": step}, step):
                sys.exit(f"step {step}: {back.data}, {back.opt_state['count']}")
        seen["last"] = steps[-1]
        litter = [p.name for p in folder.iterdir() if p.name.endswith(".tmp")]
        if len(litter) > 1:
            sys.exit(f"temporary files were left to pile up: {litter}")
        return bool(litter)

    unfinished = sweep(kills, child, inspect)
    with new() as last:
        save(last, seen["last"] + 1)
    left = sorted(p.name for p in folder.iterdir())
    if left != [f"step-{s:09d}.safetensors" for s in last.steps] or not 3 <= len(left) <= 4:
        sys.exit(f"left behind: {left}")
    close(unfinished, kills, seen["last"])


def several(folder: Path, kills: int) -> None:
    """Orbax: each save has a path of its own, and the last two are kept, as a loop by hand would do it."""
    seen = {"last": 0}
    folder.mkdir()
    from orbax.checkpoint import v1  # noqa: F401 (once for all children)

    # A save, or a reading, starts threads and a JAX backend: never in this process, which forks.
    def read(version: int) -> None:
        quiet()
        check(version, jaxadapt.read(folder / str(version)))

    whole = Apart(read)

    def child(begin: Callable[[], object]) -> None:
        quiet()
        version = seen["last"]
        while True:
            version += 1
            begin()
            jaxadapt.save(make(version), folder / str(version), format="orbax")

    def inspect(_: int) -> bool:
        there = sorted(int(p.name) for p in folder.iterdir() if not p.name.startswith("."))
        if there and there != list(range(there[0], there[-1] + 1)):
            sys.exit(f"checkpoints are missing: {there}")
        if there and there[-1] < seen["last"]:
            sys.exit(f"went back from {seen['last']} to {there}")
        for version in [v for v in there if v > seen["last"]]:
            whole(version)
        seen["last"] = max([seen["last"], *there])
        litter = [p.name for p in folder.iterdir() if p.name.endswith(".tmp")]
        if len(litter) > 1:
            sys.exit(f"temporary folders were left to pile up: {litter}")
        return bool(litter)

    unfinished = sweep(kills, child, inspect)
    close(unfinished, kills, seen["last"])


def race(folder: Path, rounds: int) -> None:
    folder.mkdir()
    go = time.time() + 2.0
    pids: list[int] = []
    for me in range(2):
        pid = os.fork()
        if pid == 0:
            quiet()
            won = 0
            orbax.save(folder.parent / f"warm{me}", {"t": {"x": np.ones(1)}}, {}, single_process=True)
            for number in range(rounds):
                time.sleep(max(0.0, go + 0.2 * number - time.time()))  # both at once
                try:
                    jaxadapt.save(make(1000 * me + number), folder / str(number), format="orbax")
                    won += 1
                    (folder.parent / f"won{number}").write_text(str(me))
                except jaxadapt.FileError:
                    pass
            print(f"{me} won {won}", flush=True)
            os._exit(0)
        pids.append(pid)
    for pid in pids:
        if os.waitpid(pid, 0)[1]:
            sys.exit("a writer failed")
    for number in range(rounds):
        me = int((folder.parent / f"won{number}").read_text())
        check(1000 * me + number, jaxadapt.read(folder / str(number)))
    left = sorted(p.name for p in folder.iterdir())
    if left != sorted(map(str, range(rounds))):
        sys.exit(f"left behind: {left}")


def pair(folder: Path, rounds: int) -> None:
    """Two processes save to one folder at once, adapters that differ in alpha and in every value but not in shape.

    A third reads what is there all the while.
    """

    def save(version: int) -> None:
        config = jaxadapt.LoraConfig(r=2, lora_alpha=1 + version, target_modules=["q_proj"])
        jaxadapt.save(dataclasses.replace(make(3 * version), config=config), folder)

    save(0)
    reads = 0
    for number in range(rounds):
        pids = [0, 0]
        for me in range(2):
            pids[me] = os.fork()
            if pids[me] == 0:
                for again in range(4):
                    save(8 * number + 4 * me + again)
                os._exit(0)
        while pids:
            reads += 1
            with warnings.catch_warnings():  # of a save that is between its two files, and of nothing else
                warnings.simplefilter("error")
                warnings.filterwarnings("ignore", message=".*a save was interrupted after the weights")
                found = jaxadapt.read(folder)
            values = {float(v) / 3 + 1 for x in found.tensors.values() for v in (x.min(), x.max())}
            if values != {found.config.lora_alpha}:
                sys.exit(f"alpha {found.config.lora_alpha} with the values of {values}")
            for pid in list(pids):
                done, status = os.waitpid(pid, os.WNOHANG)
                if status:
                    sys.exit("a writer failed")
                if done:
                    pids.remove(pid)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            jaxadapt.read(folder)
    print(f"read {reads} times")
    if len(list(folder.iterdir())) != 3:
        sys.exit(f"left behind: {sorted(p.name for p in folder.iterdir())}")


def close(unfinished: int, kills: int, versions: int) -> None:
    print(f"{unfinished} of {kills} were killed while writing; {versions} versions")
    if not unfinished or versions < 3:
        sys.exit("no process was killed while writing, or none ever finished: the test tests nothing")


def main() -> None:
    kind, folder, count = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    {"manager": manager, "orbax": several, "race": race, "pair": pair}[kind](folder, count)


if __name__ == "__main__":
    main()
