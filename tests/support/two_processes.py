"""One of several processes that share their arrays: `python -m tests.support.two_processes NUMBER PORT FOLDER WHAT
COUNT`.

WHAT is "train" (saves, loads on another topology, leaves without waiting), "die" (process 1 is killed in the middle
of a save), "resume" or "term" (a SIGTERM to process 1 makes both stop at one step).
"""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":  # pytest imports every file that may hold doctests
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={4 // int(sys.argv[5])}"

import signal
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import jaxadapt

CONFIG = jaxadapt.LoraConfig(r=4, target_modules=["q_proj"])
SHAPES = {"lora_A": (4, 64), "lora_B": (32, 4)}


def spread(mesh: Any, spec: dict[str, PartitionSpec], step: int) -> jaxadapt.Adapter:
    """An adapter whose values follow from the step, over all processes."""

    def leaf(name: str) -> jax.Array:
        whole = np.arange(np.prod(SHAPES[name]), dtype="f4").reshape(SHAPES[name]) + step
        return jax.make_array_from_callback(whole.shape, NamedSharding(mesh, spec[name]), lambda i: whole[i])

    return jaxadapt.Adapter(CONFIG, {"q_proj": {"kernel": {name: leaf(name) for name in SHAPES}}})


def check(found: jaxadapt.Adapter, like: jaxadapt.Adapter) -> None:
    for path, leaf in like.flat().items():
        got = found.flat()[path]
        assert got.sharding == leaf.sharding, path
        for mine, theirs in zip(got.addressable_shards, leaf.addressable_shards, strict=True):
            assert np.array_equal(np.asarray(mine.data), np.asarray(theirs.data)), path


def main() -> None:
    number, port, folder, what = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), sys.argv[4]
    count = int(sys.argv[5])
    # Only where a process dies do the others wait so long; elsewhere a busy machine must not look like a death.
    patience = 10 if what == "die" else 300
    jax.distributed.initialize(
        coordinator_address=f"127.0.0.1:{port}", num_processes=count, process_id=number,
        heartbeat_timeout_seconds=patience, shutdown_timeout_seconds=patience, initialization_timeout=300,
    )  # fmt: skip
    one, two = jax.make_mesh((4,), ("x",)), jax.make_mesh((2, 2), ("x", "y"))
    rows = {"lora_A": PartitionSpec(None, "x"), "lora_B": PartitionSpec("x")}
    other = {"lora_A": PartitionSpec("x", "y"), "lora_B": PartitionSpec()}
    told: list[tuple[str, int, int]] = []
    manager = jaxadapt.CheckpointManager(folder / "run", keep=2, progress=lambda *at: told.append(at))

    def save(step: int) -> None:
        adapter = spread(one, rows, step)
        moments = {"mu": spread(one, rows, -step).params, "count": np.int32(step)}
        manager.save(step, adapter, opt_state=moments, rng=jax.random.key(step), data={"position": step})

    def restore(step: int | None, expected: int) -> None:
        moments = {"mu": spread(two, other, 0).params, "count": np.int32(0)}
        back = manager.restore(spread(two, other, 0), step, opt_state=moments)
        assert (back.step, back.data) == (expected, {"position": expected})
        assert back.opt_state["count"] == expected
        check(back.model, spread(two, other, expected))
        check(jaxadapt.Adapter(CONFIG, back.opt_state["mu"]), spread(two, other, -expected))

    if what == "train":
        jaxadapt.save(spread(one, rows, 7), folder / "adapter", format="orbax")
        variables = {"params": {"q_proj": {"kernel": np.zeros((64, 32), "f4")}}, **spread(two, other, 0).collection}
        check(jaxadapt.extract(jaxadapt.load(folder / "adapter", variables)), spread(two, other, 7))
        for step in (1, 2, 3):
            save(step)
        assert (manager.steps, manager.latest) == ([2, 3], 3)  # in all processes, and at once
        restore(2, 2)
        restore(None, 3)
        last = [at for at in told if at[0] == "save"][-1]  # of step 3, which has landed
        assert last[1] == last[2]
        print(f"wrote {last[2]}")
        if number > 0:  # whose listing of the folder is an old one, as on a network's file system
            listed = Path.iterdir
            Path.iterdir = lambda here: iter(()) if here == folder / "run" else listed(here)
        assert manager.latest == 3
        restore(None, 3)
        manager.export(None, folder / "peft")
        manager.rollback(2)
        save(3)
        restore(3, 3)
        odd = jaxadapt.CheckpointManager(folder / "odd")
        for step, data, differs in ((1, {"position": number}, "values data/position"), (1 + number, {}, "step")):
            odd.save(step, spread(one, rows, 1), data=data)
            with pytest.raises(jaxadapt.AdapterError, match=rf"(?s)these differ between the processes.*\n *{differs}$"):
                odd.wait()
            assert not list((folder / "odd").glob("step-*"))  # besides what process 0 still clears away
        save(4)
        print("leaves", flush=True)  # without waiting
    elif what == "die":
        restore(None, 4)
        save(5)
        if number == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        manager.wait()
    elif what == "resume":
        restore(None, 4)
        manager.rollback(3)
        save(5)
        manager.wait()
        restore(None, 5)
    else:
        with manager, manager.preemption() as stop:
            for step in range(10, 10_000):
                time.sleep(0.02)
                if step == 20:
                    print("training", flush=True)
                if stop(step):
                    save(step)
                    print(f"stopped at {step}", flush=True)
                    break


if __name__ == "__main__":
    main()
