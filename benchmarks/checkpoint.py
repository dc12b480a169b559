"""Checkpoints of an adapter and its Adam state: how long a save takes, and for how long it stops the loop.

    python -m benchmarks.checkpoint [--sizes 50 500] [--repeats 9] [--dir FOLDER]

The adapter is that of `benchmarks.io` (448 bfloat16 tensors on a Llama-2-7B), with `optax.adam`'s two moments:
three times as many bytes, 1,345 arrays. All ways are interleaved; "x raw" is the median over rounds of the ratio to
writing the same bytes in one piece and flushing them. Exits with 1 if a target is missed.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import orbax.checkpoint as v0
from orbax.checkpoint import v1

import jaxadapt
from benchmarks.io import make, raw_write
from benchmarks.measure import Way, environment, interleave, judge, parsed, ratio, table

SAVE, STALL = 2.0, 0.1  # the targets: times raw, and the part of the blocking time
RAW, OURS = "raw write+fsync", "CheckpointManager"
FLOOR = "JAX alone: np.asarray of each"  # a view of each array: no save can do without


class Fresh:
    """Folders that are there once: Orbax does not replace (or deletes the old one first)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.number = 0

    def __call__(self) -> Path:
        for old in self.folder.glob("*"):
            shutil.rmtree(old)
        self.number += 1
        return self.folder / str(self.number)


def ways(adapter: jaxadapt.Adapter, folder: Path) -> tuple[dict[str, Way], dict[str, Way], Callable[[], None]]:
    """Those that block, those that return early, and what to call at the end."""
    state = optax.adam(1e-3).init(adapter.params)
    tree = {"adapter": adapter.params, "opt_state": state}
    bump = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree))
    data = np.random.default_rng(0).bytes(sum(x.nbytes for x in jax.tree.leaves(tree)))
    manager = jaxadapt.CheckpointManager(folder / "ours", keep=1)
    steps = iter(range(10**9))
    fresh, fresh_async, fresh_v0, fresh_v0_async = (Fresh(folder / f"orbax{i}") for i in range(4))
    for one in (fresh, fresh_async, fresh_v0, fresh_v0_async):
        one.folder.mkdir()
    old_async, old_blocking = v0.StandardCheckpointer(), v0.Checkpointer(v0.StandardCheckpointHandler())
    under_way: list[Any] = []

    def step() -> None:
        """What a checkpoint saves has just been computed: nothing is known of it on the host yet."""
        tree.update(jax.block_until_ready(bump(tree)))

    def save() -> None:
        manager.save(next(steps), dataclasses.replace(adapter, params=tree["adapter"]), opt_state=tree["opt_state"])

    def idle() -> None:
        manager.wait()
        step()

    def save_and_wait(_: Any) -> None:
        save()
        manager.wait()

    def settled(path: Callable[[], Path]) -> Callable[[], Path]:
        """What is under way is over before the next begins, and is not timed."""

        def before() -> Path:
            while under_way:
                under_way.pop().result()
            old_async.wait_until_finished()
            step()
            return path()

        return before

    blocking = {
        RAW: Way(lambda _: raw_write(folder / "raw.bin", data), manager.wait),
        OURS: Way(save_and_wait, idle),
        "Orbax v1": Way(lambda path: v1.save(path, tree), settled(fresh)),
        "Orbax v0": Way(lambda path: old_blocking.save(path, args=v0.args.StandardSave(tree)), settled(fresh_v0)),
    }
    stalls = {
        OURS: Way(lambda _: save(), idle),
        FLOOR: Way(lambda _: [np.asarray(x) for x in jax.tree.leaves(tree)], idle),
        "Orbax v1": Way(lambda path: under_way.append(v1.save_async(path, tree)), settled(fresh_async)),
        "Orbax v0": Way(lambda path: old_async.save(path, tree), settled(fresh_v0_async)),
    }

    def finish() -> None:
        settled(lambda: folder)()
        manager.close()
        old_async.close()

    return blocking, stalls, finish


def measure(megabytes: int, repeats: int, folder: Path) -> list[str]:
    """Prints the tables of one size; the targets missed."""
    adapter = make(megabytes)
    blocking, stalls, finish = ways(adapter, folder)
    whole = interleave(blocking, repeats)
    early = interleave(stalls, repeats)
    finish()

    def median(values: list[float]) -> float:
        return 1000 * statistics.median(values)

    rows = [
        [name, f"{median(t.clock):.0f}", f"{1000 * min(t.clock):.0f}", f"{median(t.processor):.0f}",
         f"{ratio(t.clock, whole[RAW].clock):.2f}"]
        for name, t in whole.items()
    ]  # fmt: skip
    what = f"{megabytes} MB and Adam's moments"
    print(table(f"**save and wait, {what}, median of {repeats} interleaved rounds**",
                ["save", "median ms", "best ms", "CPU ms", "x raw"], rows))  # fmt: skip
    blocked = {name: median(t.clock) for name, t in whole.items()}
    blocked[FLOOR] = blocked[OURS]
    rows = [
        [name, f"{median(t.clock):.1f}", f"{1000 * min(t.clock):.1f}", f"{median(t.clock) / blocked[name]:.3f}",
         f"{median(t.clock) / blocked[OURS]:.3f}"]
        for name, t in early.items()
    ]  # fmt: skip
    head = ["asynchronous save", "median ms", "best ms", "of its own blocking time", f"of {OURS}'s"]
    print(table(f"**the stall of the loop, {what}**", head, rows))
    save, stall = ratio(whole[OURS].clock, whole[RAW].clock), median(early[OURS].clock) / median(whole[OURS].clock)
    print(f"\nsave {save:.2f} x raw, target {SAVE}; stall {stall:.3f} of the blocking time, target {STALL}")
    found = (("save {:.2f} x raw", save, SAVE), ("stall {:.3f} of the blocking time", stall, STALL))
    return [f"{megabytes} MB: {text.format(v)}, target {limit}" for text, v, limit in found if v > limit]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[50, 500], help="of the adapter, in MB")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--dir", type=Path, help="where to write; a temporary folder by default")
    arguments = parsed(parser, sizes=[1], repeats=1)
    print(environment("jax", "flax", "optax", "orbax-checkpoint", "numpy"))
    missed: list[str] = []
    for size in arguments.sizes:
        with tempfile.TemporaryDirectory(dir=arguments.dir) as folder:
            missed += measure(size, arguments.repeats, Path(folder))
    judge(missed, arguments)


if __name__ == "__main__":
    main()
