"""Leaves a program in one way or another while a checkpoint is being written: `python -m tests.support.leave HOW
FOLDER`.

numpy arrays only, so that no JAX backend starts. Prints "unfinished" if the save was still under way.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
from typing import Any

import numpy as np

import jaxadapt


def adapter(fill: float = 1.0, width: int = 400_000, r: int = 8) -> jaxadapt.Adapter:
    """About 50 MB: long enough to be caught."""
    sites = {
        name: {"kernel": {"lora_A": np.full((r, width), fill, "f4"), "lora_B": np.full((width, r), fill, "f4")}}
        for name in ("q_proj", "up_proj")
    }
    return jaxadapt.Adapter(jaxadapt.LoraConfig(r=r, target_modules=["q_proj", "up_proj"]), sites)


def train(manager: jaxadapt.CheckpointManager, steps: int = 100_000) -> None:
    """Asks at each step whether it has to leave, and is told so by SIGTERM."""
    with manager.preemption() as stop:
        print("training", flush=True)
        for step in range(steps):
            time.sleep(0.01)
            if stop(step):
                manager.save(step + 10, adapter(), data=step)
                break


def main() -> None:
    how, folder = sys.argv[1], sys.argv[2]
    manager: Any = jaxadapt.CheckpointManager(folder)
    if how == "sigterm":
        train(manager)
        print("not reached")
    if how in ("sigterm with a handler", "sigterm in with"):
        if how == "sigterm in with":
            with manager:
                train(manager)
        signal.signal(signal.SIGTERM, lambda *_: print("the handler before", flush=True))
        train(manager)
        print("went on")
        return
    if how == "no space":
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    if how == "no permission":
        os.chmod(folder, 0o555)  # noqa: PTH101
        if os.geteuid() == 0:
            os.setuid(65534)  # root may write everywhere
    manager.save(7, adapter(), opt_state={"mu": adapter(0.5).params}, data={"position": 3})
    print("unfinished" if manager._saving.running else "finished", flush=True)
    if how == "exception":
        raise RuntimeError("on purpose")
    if how == "sys.exit":
        sys.exit(3)
    if how == "thread":  # left in the middle of another thread's work, which is no daemon either
        import threading

        threading.Thread(target=time.sleep, args=(0.2,)).start()
    if how == "kill":
        while not any(name.endswith(".tmp") for name in os.listdir(folder)):  # noqa: PTH208
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
