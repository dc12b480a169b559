"""One of several processes is killed in the middle of a save: what is there then, how the others end, the next run.

`killed` and `resumed` are what each process does (see processes.py); `kill` and `resume` start them and look.
"""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

import jaxadapt
from jaxadapt.storage import orbax
from jaxadapt.storage.sharded_write import Group
from tests.persistence.test_sharded_files import numbers, original
from tests.support import meshes, processes

TIMEOUT = 8  # seconds for one answer of another process, where one is killed


class Case(NamedTuple):
    """Of a save of version 1 where version 0 is: who dies (-1: the last), when, and which version may be there then."""

    kind: str
    victim: int
    moment: str
    left: tuple[int, ...] = (0,)

    def __str__(self) -> str:
        return f"{self.kind}-{self.victim}-{self.moment}"


# What is said in a save of one file (together.py, codecs/parallel.py), and what is done between that.
_FILE = [
    (-1, "begin", (0,)), (-1, "sees", (0,)), (-1, "write", (0,)), (-1, "written", (0,)),
    (0, "begin", (0,)), (0, "plan", (0,)), (0, "mode", (0,)), (0, "write", (0,)), (0, "commit", (0,)),
    (0, "result", (1,)),
]  # fmt: skip
_ORBAX = [
    (-1, "begin", (0,)), (-1, "arrays", (0,)), (-1, "arrays done", (0,)),
    (0, "folder", (0,)), (0, "arrays", (0,)), (0, "arrays done", (0,)), (0, "merged", (0, 1)), (0, "renamed", (1,)),
]  # fmt: skip
CASES = [
    *(Case("adapter", *case) for case in _FILE),
    Case("gathered", -1, "gather"),
    Case("gathered", 0, "gather"),
    *(Case("manager", *case) for case in _FILE),
    Case("manager", 0, "prune", (1,)),
    *(Case("orbax", *case) for case in _ORBAX),
]

# What is seen of an Orbax save while it goes on, of process {i}.
_ON_DISK = {
    "folder": "1.orbax-checkpoint-tmp",
    "arrays": "1.orbax-checkpoint-tmp/adapter/ocdbt.process_{i}/d/*",
    "arrays done": "1.orbax-checkpoint-tmp/adapter/ocdbt.process_{i}/manifest.ocdbt",
    "merged": "1.orbax-checkpoint-tmp/adapter/manifest.ocdbt",
    "renamed": "1/_CHECKPOINT_METADATA",
}


# ---------------------------------------------------------------- any kind of save


def save(kind: str, folder: Path, adapter: jaxadapt.Adapter, version: int, timeout: float = 300) -> None:
    match kind:
        case "manager":
            with jaxadapt.CheckpointManager(folder, keep=1, timeout=timeout) as manager:
                manager.save(version, adapter, opt_state={"mu": adapter.params}, data={"version": version})
        case "orbax":
            jaxadapt.save(adapter, folder / str(version), format="orbax")
        case _:
            jaxadapt.save(
                adapter, jaxadapt.MultihostFolder(folder, shared=False if kind == "gathered" else None, timeout=timeout)
            )


def latest(kind: str, folder: Path) -> int:
    """Which version is there, whole; fails if what is there is not."""
    match kind:
        case "manager":
            manager = jaxadapt.CheckpointManager(folder)
            version = manager.latest
            assert version is not None
            found = manager.adapter()
        case "orbax":
            steps = [p for p in folder.iterdir() if p.name.isdigit()]
            version = max(int(p.name) for p in steps if orbax.is_checkpoint(p, {each.name for each in p.iterdir()}))
            found = _read(folder / str(version))
        case _:
            found = _read(folder)
            version = next(v for v in range(9) if _same(found, v))
    assert _same(found, version)
    return version


def _read(path: Path) -> jaxadapt.Adapter:
    return jaxadapt.from_peft(jaxadapt.read(path), meshes.base(False), keymap=meshes.TABLE)


def _same(found: jaxadapt.Adapter, version: int) -> bool:
    want, flat = numbers(False, version), found.flat()
    return flat.keys() == want.keys() and all(np.array_equal(np.asarray(flat[path]), want[path]) for path in want)


# ---------------------------------------------------------------- outside


def kill(case: Case, folder: Path, count: int = 2) -> int:
    """Kills one of `count` processes that save version 1 where 0 is; the version that is there then."""
    kind, victim, moment, left = case
    victim %= count
    argument = f"{kind}:{victim}:{moment}"
    env = {processes.HEARTBEAT: "20"}  # which dozens of processes on two cores must not miss
    started = processes.Processes("killed", folder, count, 8 // count, argument, env)
    try:
        started.all[victim].wait(600)  # a busy machine takes long to come so far
    finally:
        done = started.wait(120)  # or the survivors hang
    assert done[victim][0] == -signal.SIGKILL, done[victim]
    version = latest(kind, folder)
    assert version in left, (case, version)
    for index, (code, out, err) in enumerate(done):
        if index != victim:
            # our own error, which names the one that is gone, or JAX's, which ends a process that misses another
            named = {"orbax": "", "gathered": "process"}.get(kind, f"process {victim}")
            ours = code == 3 and named in out
            late = code == 0 and version == 1
            assert ours or late or code == -signal.SIGABRT, (case, index, code, out, err[-3000:])
    return version


def resume(kind: str, folder: Path, version: int, count: int = 1) -> None:
    """The next run, of one process or several, finds nothing in its way, and what was left behind goes."""
    if count == 1:
        save(kind, folder, original(False, version + 1), version + 1)
    else:
        processes.run("resumed", folder, count=count, devices=8 // count, argument=f"{kind}:{version}")
    assert latest(kind, folder) == version + 1
    left = sorted(p.name for p in folder.iterdir())
    match kind:
        case "manager":
            assert left == [f"step-{version + 1:09d}.safetensors"]
        case "orbax":
            assert left == [str(v) for v in range(version + 2)]
            assert all(_same(_read(folder / v), int(v)) for v in left)
        case _:
            assert left == ["README.md", "adapter_config.json", "adapter_model.safetensors"]


def all_of(cases: list[Case], folder: Path, count: int, at_once: int, next_run: int) -> None:
    """`kill` and `resume` of several cases, some at once: they mostly wait, for each other and for JAX to notice."""

    for case in cases:  # one after the other: Orbax numbers its saves by the process
        (folder / str(case)).mkdir()
        save(case.kind, folder / str(case), original(False), 0)

    def one(case: Case) -> int:
        return kill(case, folder / str(case), count)

    with ThreadPoolExecutor(at_once) as pool:
        versions = list(pool.map(one, cases))
    with ThreadPoolExecutor(at_once if next_run > 1 else 1) as pool:
        list(pool.map(lambda case, version: resume(case.kind, folder / str(case), version, next_run), cases, versions))


# ---------------------------------------------------------------- inside


def killed(folder: Path, argument: str) -> None:
    """A process is killed as it says or does something; the others must end by themselves."""
    kind, victim, moment = argument.split(":")
    mine = processes.adapter(("4x2", "fsdp"), False, 1)
    start = time.monotonic()
    try:
        _all_here()  # so that none has long to wait for another but the dead
        start = time.monotonic()
        if jax.process_index() == int(victim):
            _die_at(moment, folder)
        save(kind, folder, mine, 1, TIMEOUT)
    except jaxadapt.FileError as error:
        print(f"{time.monotonic() - start:.1f} s: {error}", flush=True)
        os._exit(3)  # JAX's own end would wait for the dead
    print("saved", flush=True)
    os._exit(0)


def _all_here() -> None:
    here = Group("begin", 300, ("go",))
    if here.index == 0:
        here.receive_all("ready")
        here.send("go")
    else:
        here.send("ready")
        here.receive("go")


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _die_at(moment: str, folder: Path) -> None:
    from jaxadapt.storage import atomic, sharded_write

    if moment == "begin":
        _die()
    if moment in _ON_DISK:
        pattern = _ON_DISK[moment].format(i=jax.process_index())

        def watch() -> None:
            while not any(folder.glob(pattern)):
                time.sleep(0.0002)  # there are other processes
            _die()

        threading.Thread(target=watch, daemon=True).start()
        return
    say, write, manager = sharded_write.Group._publish, atomic.write_at, jaxadapt.CheckpointManager
    gather = multihost_utils.process_allgather

    def dying_say(self: Any, name: str, message: Any) -> None:
        if name == moment:
            _die()
        say(self, name, message)

    sharded_write.Group._publish = dying_say
    if moment == "write":
        writes = itertools.count()

        def dying_write(fd: int, data: memoryview, offset: int, path: str) -> None:
            if next(writes) == 5:
                write(fd, data[: len(data) // 2], offset, path)
                _die()
            write(fd, data, offset, path)

        atomic.write_at = dying_write
    elif moment == "gather":
        gathered = itertools.count()

        def dying_gather(*args: Any, **more: Any) -> Any:
            if next(gathered) == 5:
                _die()
            return gather(*args, **more)

        multihost_utils.process_allgather = dying_gather
    elif moment == "commit":
        Path.replace = lambda *_: _die()
    elif moment == "prune":
        manager._prune = lambda _: _die()


def resumed(folder: Path, argument: str) -> None:
    """What is there loads on another topology than it was saved on, and the save that was cut off is made again."""
    kind, found = argument.split(":")
    version = int(found)
    _load(kind, folder, version, ("2x2x2", "both"))
    save(kind, folder, processes.adapter(("8", "fsdp"), False, version + 1), version + 1)
    _load(kind, folder, version + 1, ("4x2", "tp"))


def _load(kind: str, folder: Path, version: int, layout: tuple[str, str]) -> None:
    if kind == "manager":
        like = processes.adapter(layout, False, 99)
        manager = jaxadapt.CheckpointManager(folder)
        back = manager.restore(like, opt_state={"mu": like.params})
        assert (back.step, back.data) == (version, {"version": version})
        processes.check(back.model, False, version)
        processes.check(jaxadapt.Adapter(meshes.CONFIG, back.opt_state["mu"]), False, version)
    else:
        path = folder / str(version) if kind == "orbax" else folder
        loaded = jaxadapt.load(path, {"params": processes.base(layout, False)}, keymap=meshes.TABLE)
        processes.check(jaxadapt.extract(loaded), False, version)


SCENARIOS: dict[str, Callable[[Path, str], None]] = {"killed": killed, "resumed": resumed}
