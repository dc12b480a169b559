"""Kills a process that saves to an object store over and over: `python -m tests.support.kill_store KIND ADDRESS KILLS`.

KIND is "folder" (an adapter for PEFT) or "manager" (a run of which the last two steps are kept). Exits with 1 and a
message if what a kill leaves is anything but the old files or the new, in the store or on this machine.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import jaxadapt
from jaxadapt.core import paths
from tests.support.kill_save import Apart, check, make, sweep


def save(kind: str, address: str) -> Callable[[int], None]:
    """What saves a version."""
    if kind == "folder":
        return lambda version: jaxadapt.save(make(version), address)
    manager = jaxadapt.CheckpointManager(address, keep=2)

    def step(version: int) -> None:
        adapter = make(version)
        manager.save(version, adapter, opt_state={"mu": adapter.params}, data={"version": version})
        manager.wait()

    return step


def there(kind: str, address: str) -> int:
    """The version that is there, whole; everything else that is there is whole as well."""
    from tests.support import stores

    names = sorted(stores.files(address))
    if kind == "folder":
        if names != ["README.md", "adapter_config.json", "adapter_model.safetensors"]:
            sys.exit(f"there are {names}")
        return check(address)[0]
    manager = jaxadapt.CheckpointManager(address)
    steps = manager.steps
    # Two, and one more of each kill in a row that came between a step and the deletion of another.
    if names != [f"step-{step:09d}.safetensors" for step in steps] or not 2 <= len(steps) <= 6:
        sys.exit(f"there are {names}")
    for step in steps:
        like = make(step)
        back = manager.restore(like, step, opt_state={"mu": like.params})
        held = [*back.model.flat().values(), *paths.flatten(back.opt_state).values()]
        values = {float(v) for x in held for v in (x.min(), x.max())}
        if back.data != {"version": step} or values != {float(step)}:
            sys.exit(f"step {step}: {back.data}, {values}")
    return steps[-1]


def main() -> None:
    kind, address, kills = sys.argv[1], sys.argv[2], int(sys.argv[3])
    for name in ("s3fs", "gcsfs")[address.startswith("gs") :][:1]:
        importlib.import_module(name)  # once for all children
    tempfile.tempdir = tempfile.mkdtemp()
    first = Apart(lambda version: save(kind, address)(version))
    for version in (1, 2):
        first(version)
    found = Apart(lambda _: there(kind, address))
    seen = {"last": found(None)}

    def child(begin: Callable[[], object]) -> None:
        do, version = save(kind, address), seen["last"]
        while True:
            version += 1
            begin()
            do(version)

    def inspect(begun: int) -> bool:
        before, seen["last"] = seen["last"], found(None)
        if not begun - 1 <= seen["last"] - before <= begun:
            sys.exit(f"version {seen['last']}, where {before} was and {begun} saves were begun")
        return seen["last"] - before < begun

    unfinished = sweep(kills, child, inspect)
    if left := list(Path(tempfile.tempdir).iterdir()):
        sys.exit(f"left on this machine: {left}")
    Path(tempfile.tempdir).rmdir()
    print(f"{unfinished} of {kills} were killed while writing; {seen['last']} versions")
    if not unfinished or seen["last"] < 5:
        sys.exit("no process was killed while writing, or none ever finished: the test tests nothing")


if __name__ == "__main__":
    main()
