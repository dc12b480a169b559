"""Several real JAX processes on this machine, over loopback: `run` starts them, `main` is what each of them does.

python -m tests.support.processes SCENARIO INDEX COUNT PORT DEVICES FOLDER [ARGUMENT]
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 300.0  # seconds for one answer of another process
HEARTBEAT = "JAXADAPT_TEST_HEARTBEAT"  # seconds until JAX ends the processes that outlive another


# ---------------------------------------------------------------- outside


class Processes:
    """Started processes; whatever happens, none outlives the block."""

    def __init__(
        self, scenario: str, folder: Path, count: int = 2, devices: int = 4, argument: str = "", env: Any = None
    ) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        common = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            "OMP_NUM_THREADS": "1",
            **(env or {}),
        }
        words = [sys.executable, "-m", "tests.support.processes", scenario]
        self.all = [
            subprocess.Popen(
                [*words, str(index), str(count), str(port), str(devices), str(folder), argument],
                cwd=ROOT, env=common, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
            for index in range(count)
        ]  # fmt: skip

    def wait(self, timeout: float) -> list[tuple[int, str, str]]:
        """(exit code, stdout, stderr) of each; a process that is not done in time is killed, and the test fails."""
        end = time.monotonic() + timeout
        try:
            texts = [p.communicate(timeout=max(1.0, end - time.monotonic())) for p in self.all]
            return [(p.returncode, *text) for p, text in zip(self.all, texts, strict=True)]
        finally:
            self.kill()

    def kill(self) -> None:
        for process in self.all:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGKILL)  # a process stuck in a collective ignores SIGTERM
            process.wait()


def run(scenario: str, folder: Path, timeout: float = 600, **options: Any) -> list[str]:
    """What each process printed; all must succeed."""
    done = Processes(scenario, folder, **options).wait(timeout)
    for index, (code, out, err) in enumerate(done):
        assert code == 0, f"process {index} of {scenario} ended with {code}:\n{out}\n{err[-4000:]}"
    return [out for _, out, _ in done]


# ---------------------------------------------------------------- inside


def start(index: int, count: int, port: int) -> None:
    import jax

    patience = int(os.environ.get(HEARTBEAT, "300"))  # where none is killed, a busy machine must not look like it
    jax.distributed.initialize(
        f"127.0.0.1:{port}", count, index, heartbeat_timeout_seconds=patience, shutdown_timeout_seconds=2 * patience
    )


def adapter(layout: tuple[str, str], scanned: bool, version: int = 0) -> Any:
    """The adapter of one version, laid over the devices of all processes."""
    import jax

    from tests.persistence.test_sharded_files import numbers
    from tests.support import meshes

    mesh = meshes.mesh_of(layout[0])
    flat = numbers(scanned, version)
    like = meshes.like(mesh, layout, scanned)

    def make(path: str) -> Any:
        return jax.make_array_from_callback(flat[path].shape, like[path], lambda index: flat[path][index])

    return meshes.adapter({path: make(path) for path in flat}, scanned)


def check(found: Any, scanned: bool, version: int = 0) -> None:
    """Every shard of this process holds what it should, bit for bit."""
    import numpy as np

    from tests.persistence.test_sharded_files import numbers

    want = numbers(scanned, version)
    assert found.flat().keys() == want.keys()
    for path, x in found.flat().items():
        assert x.dtype == want[path].dtype
        for shard in x.addressable_shards:
            np.testing.assert_array_equal(np.asarray(shard.data).view("u2"), want[path][shard.index].view("u2"))


def base(layout: tuple[str, str], scanned: bool) -> Any:
    """Specs of the base over the devices of all processes."""
    import jax
    from jax.sharding import NamedSharding

    from jaxadapt.core import paths
    from tests.support import meshes

    mesh = meshes.mesh_of(layout[0])
    flat = paths.flatten(meshes.base(scanned))
    where = {p: NamedSharding(mesh, meshes.spec(p, *layout, x.ndim)) for p, x in flat.items()}
    return paths.unflatten({p: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where[p]) for p, x in flat.items()})


def watching(stem: Path) -> Any:
    """What keeps the last that this process was told, in a file of its own."""
    import jax

    def told(what: str, done: int, total: int) -> None:
        stem.with_suffix(f".{jax.process_index()}").write_text(f"{what} {done} {total}")

    return told


def save_and_load(folder: Path, argument: str) -> None:
    """Saved on each layout, by all and through process 0, loaded on another."""
    from jax.experimental import multihost_utils

    import jaxadapt
    from tests.support import meshes

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("gathered, where every process could write")

    for number, layout in enumerate(meshes.LAYOUTS):
        scanned = bool(number % 2)
        mine = adapter(layout, scanned)
        with mock.patch.object(multihost_utils, "process_allgather", never):
            jaxadapt.save(
                mine,
                jaxadapt.MultihostFolder(folder / f"{number}-all", timeout=PATIENCE),
                progress=watching(folder / f"{number}-all-told"),
            )
        if number % 3 == 0:
            told = watching(folder / f"{number}-one-told")
            jaxadapt.save(
                mine, jaxadapt.MultihostFolder(folder / f"{number}-one", shared=False, timeout=PATIENCE), progress=told
            )
        other = meshes.LAYOUTS[(number + 3) % len(meshes.LAYOUTS)]
        target = {"params": base(other, not scanned)}
        found = jaxadapt.load(folder / f"{number}-all", target, keymap=meshes.table(not scanned))
        check(jaxadapt.extract(found), not scanned)
        assert all(not x.is_fully_addressable for x in jaxadapt.extract(found).flat().values())
    import jax

    model = meshes.model(base(("4x2", "both"), False), False)
    check(jaxadapt.extract(jaxadapt.load(folder / "0-all", model, keymap=meshes.TABLE)), False)
    jaxadapt.save(model, jaxadapt.MultihostFolder(folder / "nnx-all", timeout=PATIENCE))
    fresh = jaxadapt.init(base(("8", "fsdp"), False), meshes.CONFIG, key=jax.random.key(3), keymap=meshes.TABLE)
    jaxadapt.save(fresh, jaxadapt.MultihostFolder(folder / "fresh", timeout=PATIENCE))
    here = jax.process_index()
    with pytest.raises(jaxadapt.AttachError, match="other processes"):
        jaxadapt.to_peft(fresh)
    # no file system in common: found out
    jaxadapt.save(
        adapter(("2x2x2", "both"), False), jaxadapt.MultihostFolder(folder / f"apart{here}", timeout=PATIENCE)
    )
    # to the Hub that the environment names: one commit, of which all hear; and what it refuses, all hear too
    mine = adapter(("4x2", "both"), False)
    for source in (mine, model):
        print(jaxadapt.push(source, "org/spread", token="hf_writes", card=jaxadapt.Card(picture=False)).address)
    with pytest.raises(jaxadapt.FileError, match=r"401|token"):
        jaxadapt.push(mine, "org/other", token="hf_wrong", card=jaxadapt.Card(picture=False))


def on_bases(folder: Path, argument: str) -> None:
    """A fingerprint of a base that is spread over the processes; another base is seen by all of them."""
    import jax
    import numpy as np

    import jaxadapt
    from tests.support import meshes

    def spread(layout: tuple[str, str], scanned: bool, change: Any = None) -> dict[str, Any]:
        def leaf(spec: Any, x: np.ndarray) -> Any:
            values = x if change is None else change(x)
            return jax.make_array_from_callback(x.shape, spec.sharding, lambda index: values[index])

        return {"params": jax.tree.map(leaf, base(layout, scanned), meshes.base(scanned))}

    def second_half(x: np.ndarray) -> np.ndarray:
        """Change the part of `up` that process 1 alone holds in the layout ("8", "fsdp")."""
        is_up = x.shape == (meshes.D, meshes.F)
        return np.concatenate([x[: meshes.D // 2], x[meshes.D // 2 :] + 1]) if is_up else x

    for number, layout in enumerate(meshes.LAYOUTS[1::3]):
        scanned = bool(number % 2)
        jaxadapt.save(
            spread(layout, scanned) | adapter(layout, scanned).collection,
            jaxadapt.MultihostFolder(folder / f"{number}", timeout=PATIENCE),
        )
    layout = ("8", "fsdp")
    found = jaxadapt.load(folder / "0", spread(layout, False), keymap=meshes.TABLE, strict="base")
    check(jaxadapt.extract(found), False)
    other = spread(layout, False, second_half)
    with pytest.raises(jaxadapt.MismatchError, match="was trained on another base"):
        jaxadapt.load(folder / "0", other, keymap=meshes.TABLE, strict="base")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        jaxadapt.load(folder / "0", other, keymap=meshes.TABLE)
    print(*[str(each.message) for each in caught if "another base" in str(each.message)] or ["no warning"])


def faults(folder: Path, argument: str) -> None:
    """What fails in one process fails in all, soon, with its reason; the old adapter stays."""
    import resource

    import jax

    import jaxadapt
    from jaxadapt.persistence import save_adapter
    from tests.support import meshes

    here = jax.process_index()
    new, layout = folder / "new", ("4x2", "both")
    for version in (0, 1):
        mine = adapter(layout, False, version)
        if version == 0:
            jaxadapt.save(mine, jaxadapt.MultihostFolder(new, timeout=PATIENCE))

    def refused(path: Path, *words: str, tree: Any = mine, shared: bool | None = None) -> None:
        with pytest.raises(jaxadapt.AdapterError) as caught:
            jaxadapt.save(tree, jaxadapt.MultihostFolder(path, shared=shared, timeout=PATIENCE))
        missing = [word for word in words if word not in str(caught.value)]
        assert not missing, f"process {here}: {missing} not in: {caught.value}"  # the reason, not a time limit

    # the disk of process 1 is full, so to say
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if here == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    refused(new, "cannot write: File too large", *["process 1"] * (here == 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    # of process 0
    if here == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    refused(new, "cannot write: File too large", *["process 0"] * (here == 1))
    refused(new, "cannot write: File too large", *["process 0"] * (here == 1), shared=False)
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    # a file where a folder should be
    if here == 0:
        (folder / "file").write_text("")
    refused(folder / "file", "file")
    # no file system in common, and one demanded
    refused(folder / f"none{here}", "do not see the file", shared=True)
    # another adapter in each process: shapes of its own
    config = meshes.CONFIG.replace(r=3 + here)
    other = jaxadapt.init(base(layout, False), config, key=jax.random.key(0), keymap=meshes.TABLE)
    refused(folder / "odd", "differ from those of process 0", tree=other)
    # only the configuration differs
    other = dataclasses.replace(mine, config=meshes.CONFIG.replace(lora_alpha=6 + here))
    refused(folder / "odd", "the configuration", tree=other)
    # process 0 begins once all have called
    arrived = folder / "arrived"
    if here == 1:
        time.sleep(0.5)
        arrived.touch()
    assert save_adapter.run_on_leader("look", lambda: arrived.exists() and not arrived.unlink(), PATIENCE) is True
    jaxadapt.save(mine, jaxadapt.MultihostFolder(folder / "after", timeout=PATIENCE))


def in_a_store(folder: Path, argument: str) -> None:
    """An adapter and a run under an address, where no process can write a part of a file."""
    import jax
    import numpy as np

    import jaxadapt
    from tests.support import meshes

    layout, other = ("4x2", "both"), ("2x2x2", "both")
    mine, target = adapter(layout, False), {"params": base(other, True)}
    jaxadapt.save(mine, jaxadapt.MultihostFolder(f"{argument}/adapter", timeout=PATIENCE))
    check(jaxadapt.extract(jaxadapt.load(f"{argument}/adapter", target, keymap=meshes.table(True))), True)
    if not argument.startswith("gs"):
        with pytest.raises(jaxadapt.FileError, match="Orbax cannot use s3://"):
            jaxadapt.save(mine, f"{argument}/orbax", format="orbax")
    with jaxadapt.CheckpointManager(f"{argument}/run", keep=2, timeout=PATIENCE) as manager:
        for step in range(3):
            moments = {"mu": adapter(layout, False, step).params, "count": np.int32(step)}
            manager.save(step, adapter(layout, False, step), opt_state=moments, data={"seen": step})
        like = adapter(other, False, 7)
        back = manager.restore(like, 1, opt_state={"mu": like.params, "count": np.int32(0)})
        assert (manager.steps, back.data, back.opt_state["count"]) == ([1, 2], {"seen": 1}, 1)
        check(back.model, False, 1)
        check(jaxadapt.Adapter(meshes.CONFIG, back.opt_state["mu"]), False, 1)
        manager.rollback(1)
        manager.export(None, f"{argument}/exported")
    manager.save(3, mine, data={"seen": jax.process_index()})
    with pytest.raises(jaxadapt.AdapterError, match="(?s)differ.*values data/seen"):
        manager.wait()
    assert manager.steps == [1]


SCENARIOS: dict[str, Callable[[Path, str], None]] = {
    f.__name__: f for f in (save_and_load, on_bases, faults, in_a_store)
}


def main(arguments: Sequence[str]) -> None:
    scenario, index, count, port, _, folder, argument = arguments
    start(int(index), int(count), int(port))
    if scenario not in SCENARIOS:
        from tests.support import killed

        SCENARIOS.update(killed.SCENARIOS)
    SCENARIOS[scenario](Path(folder), argument)


if __name__ == "__main__":
    main(sys.argv[1:])
