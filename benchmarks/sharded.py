"""Saving and loading an adapter that is spread over a mesh, in one process of 8 devices and in 2 of 4.

    python -m benchmarks.sharded [--sizes 50 500] [--repeats 9] [--dir FOLDER] [--with-dcp]

The adapter is that of `benchmarks.io` (448 bfloat16 tensors on a Llama-2-7B), its base cut over a mesh of 4 (FSDP) by
2 (tensor parallel). Beside: one process that writes (reads) the same bytes in one piece, Orbax v1 and v0, and every
tensor gathered by `process_allgather` for `safetensors` to write; with `--with-dcp` also PyTorch's DCP over two
processes (`dcp.py`). All ways are interleaved, those that load in processes of their own, which do nothing else; a
round counts what the slowest process took; "x raw" is the median over rounds of the ratio to the raw way of the same
round.
Exits with 1 if a target is missed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import Way, apart, environment, interleave, judge, parsed, peer, ratio, serve, table

SAVE, MEMORY, LOAD, STALL, STATE = 1.2, 1.1, 1.2, 0.1, 2.0  # the targets
SHAPES = {"8 devices": (1, 8), "2 processes of 4 devices": (2, 4)}
RAW_SAVE, RAW_LOAD, RAW_STATE = "raw write+fsync, one process", "raw read, one process", "raw write+fsync"
SAVED, LOADED, MANAGER = "jaxadapt.save", "jaxadapt.load", "CheckpointManager"
FLOOR_LOAD, FLOOR_STALL = "JAX alone: make_array_from_callback of memory", "JAX alone: np.asarray of each part"
GATHERED = "process_allgather + safetensors (no fsync)"
LOADS = (RAW_LOAD, LOADED, FLOOR_LOAD, "Orbax v1", "Orbax v0")
TORCH = {"PyTorch DCP": False, "PyTorch DCP, one safetensors file": True}
TWO = "2 processes of 4 devices"
MEASURED = (SAVED, MANAGER, GATHERED, "Orbax v1")


# ---------------------------------------------------------------- one of the processes


def shapes(megabytes: int) -> tuple[Any, Any]:
    """The adapter over all devices, and variables to load it into, of both only shapes and shardings."""
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    import jaxadapt
    from benchmarks import io

    mesh = jax.make_mesh((4, 2), ("fsdp", "tp"))

    def spread(path: Any, spec: Any) -> Any:
        turned = path[-2].key in ("o_proj", "down_proj")
        place = NamedSharding(mesh, PartitionSpec(*(("tp", "fsdp") if turned else ("fsdp", "tp"))))
        return jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=place)

    base = jax.tree_util.tree_map_with_path(spread, io.base())
    modules = [m.split(".")[1] for m in io.PROJECTIONS]
    config = jaxadapt.LoraConfig(r=io.rank_for(megabytes), lora_alpha=16, target_modules=modules)
    return jaxadapt.init(base["params"], config, keymap="llama", dtype="bfloat16"), base


def make(megabytes: int) -> Any:
    """The adapter, with random values."""
    import jax
    import ml_dtypes
    import numpy as np

    rng = np.random.default_rng(0)

    def value(spec: Any) -> Any:
        bits = rng.integers(0x3C00, 0x3F80, spec.shape, np.uint16).view(ml_dtypes.bfloat16)
        return jax.make_array_from_callback(spec.shape, spec.sharding, bits.__getitem__)

    return jax.block_until_ready(jax.tree.map(value, shapes(megabytes)[0]))


def moments(adapter: Any) -> Any:
    """Adam's state, laid out as the adapter is."""
    import jax
    import numpy as np
    import optax

    state = optax.adam(1e-3).init(adapter.params)
    return jax.tree.map(lambda x: x if x.ndim else np.asarray(x), state)


def barrier(_: Any = None) -> None:
    from jax.experimental import multihost_utils

    multihost_utils.sync_global_devices("benchmark")


class Fresh:
    """Folders that are there once, for all processes: Orbax does not replace."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.number = 0

    def __call__(self) -> Path:
        import jax

        if jax.process_index() == 0:
            self.folder.mkdir(exist_ok=True)
            for old in self.folder.glob("*"):
                shutil.rmtree(old)
        self.number += 1
        barrier()
        return self.folder / str(self.number)


def alone(work: Callable[[], object]) -> Way:
    """What only process 0 does."""
    import jax

    return Way(lambda _: work() if jax.process_index() == 0 else None, barrier)


def gathered(adapter: Any, path: Path) -> None:
    """Every tensor to every process, and from one of them to a file: what one would write by hand."""
    import jax
    import numpy as np
    import safetensors.numpy
    from jax.experimental import multihost_utils

    whole = jax.tree.map(lambda x: np.asarray(multihost_utils.process_allgather(x, tiled=True)), adapter)
    if jax.process_index() == 0:
        import jaxadapt

        tensors = {k: np.ascontiguousarray(v) for k, v in jaxadapt.to_peft(whole).tensors.items()}
        safetensors.numpy.save_file(tensors, path)
    barrier()


def ways(adapter: Any, folder: Path) -> tuple[dict[str, dict[str, Way]], Callable[[], None]]:
    """All ways by table, and what to call at the end."""
    import jax
    import numpy as np
    import orbax.checkpoint as v0
    from orbax.checkpoint import v1

    import jaxadapt
    from benchmarks import io

    tree = {"adapter": adapter.params, "opt_state": moments(adapter)}
    sizes = [sum(x.nbytes for x in jax.tree.leaves(one)) for one in (adapter.params, tree)]
    both = np.random.default_rng(0).bytes(max(sizes)) if jax.process_index() == 0 else b""
    data = [memoryview(both)[:size] for size in sizes]
    manager = jaxadapt.CheckpointManager(folder / "run", keep=1)
    # Donated, as in earnest: eight devices hold what they share eight times, and one of those is enough. (The adapter
    # too: it is saved and loaded before the first step.)
    bump = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1 if x.ndim else x, tree), donate_argnums=0)
    steps = iter(range(10**9))
    old, old_async = v0.Checkpointer(v0.StandardCheckpointHandler()), v0.StandardCheckpointer()
    under_way: list[Any] = []
    names = ("v1", "v0", "state-v1", "state-v0", "async-v1", "async-v0")
    fresh = {name: Fresh(folder / name) for name in names}
    jaxadapt.save(adapter, folder / "ours")
    v1.save(folder / "there-v1", adapter.params)
    old.save(folder / "there-v0", args=v0.args.StandardSave(adapter.params))
    barrier()

    def step() -> None:
        """What a checkpoint saves has just been computed: nothing is known of it on the host yet."""
        with jax.set_mesh(jax.tree.leaves(adapter.params)[0].sharding.mesh):
            tree.update(jax.block_until_ready(bump(tree)))

    def begin() -> None:
        manager.save(next(steps), dataclasses.replace(adapter, params=tree["adapter"]), opt_state=tree["opt_state"])

    def whole(_: Any) -> None:
        begin()
        manager.wait()

    def settle() -> None:
        """What is under way is over before the next begins, and is not timed."""
        manager.wait()
        while under_way:
            under_way.pop().result()
        old_async.wait_until_finished()
        step()
        barrier()

    def settled(name: str) -> Callable[[], Path]:
        def before() -> Path:
            settle()
            return fresh[name]()

        return before

    def looked_at(_: Any) -> Any:
        """What no save can do without: a view of each part that this process has to write."""
        arrays = [x for x in jax.tree.leaves(tree) if isinstance(x, jax.Array)]
        return [np.asarray(shard.data) for x in arrays for shard in x.addressable_shards if shard.replica_id == 0]

    def finish() -> None:
        settle()
        manager.close()
        old_async.close()

    return {
        "save": {
            RAW_SAVE: alone(lambda: io.raw_write(folder / "raw.bin", data[0])),
            SAVED: Way(lambda _: jaxadapt.save(adapter, folder / "ours"), barrier),
            GATHERED: Way(lambda _: gathered(adapter, folder / "gathered"), barrier),
            "Orbax v1": Way(lambda path: v1.save(path, adapter.params), fresh["v1"]),
            "Orbax v0": Way(lambda path: old.save(path, args=v0.args.StandardSave(adapter.params)), fresh["v0"]),
        },
        "state": {
            RAW_STATE: alone(lambda: io.raw_write(folder / "raw.bin", data[1])),
            MANAGER: Way(whole, settle),
            "Orbax v1": Way(lambda path: v1.save(path, tree), settled("state-v1")),
            "Orbax v0": Way(lambda path: old.save(path, args=v0.args.StandardSave(tree)), settled("state-v0")),
        },
        "stall": {
            MANAGER: Way(lambda _: begin(), settle),
            FLOOR_STALL: Way(looked_at, settle),
            "Orbax v1": Way(lambda path: under_way.append(v1.save_async(path, tree)), settled("async-v1")),
            "Orbax v0": Way(lambda path: old_async.save(path, tree), settled("async-v0")),
        },
    }, finish


def save_way(name: str, megabytes: int, folder: Path) -> Way:
    """The raw write or jaxadapt's save alone, as DCP's save has processes that do nothing else."""
    import jax
    import numpy as np

    import jaxadapt
    from benchmarks import io

    adapter = make(megabytes)
    if name == SAVED:
        return Way(lambda _: jaxadapt.save(adapter, folder / "ours"), barrier)
    data = np.random.default_rng(0).bytes(sum(x.nbytes for x in jax.tree.leaves(adapter)))
    return alone(lambda: io.raw_write(folder / "raw.bin", data))


def load_way(name: str, megabytes: int, folder: Path) -> Way:
    """What loads the files that `ways` has left in the folder."""
    import jax
    import numpy as np
    import orbax.checkpoint as v0
    from orbax.checkpoint import v1

    import jaxadapt
    from benchmarks import io

    adapter, base = shapes(megabytes)
    like = adapter.params
    if name == RAW_LOAD:
        return alone(lambda: io.raw_read(folder / "ours" / io.FILE))
    if name == LOADED:
        return Way(
            lambda _: jax.block_until_ready(io.arrays(jaxadapt.load(folder / "ours", base, keymap="llama"))), barrier
        )
    if name == "Orbax v1":
        return Way(lambda _: jax.block_until_ready(v1.load(folder / "there-v1", like)), barrier)
    if name == "Orbax v0":
        old = v0.Checkpointer(v0.StandardCheckpointHandler())
        return Way(
            lambda _: jax.block_until_ready(old.restore(folder / "there-v0", args=v0.args.StandardRestore(like))),
            barrier,
        )
    memory = [np.zeros(x.shape, x.dtype) for x in jax.tree.leaves(like)]

    def made(_: Any) -> Any:
        """What no load can do without: arrays of memory that is there already."""
        both = zip(jax.tree.leaves(like), memory, strict=True)
        return jax.block_until_ready(
            [jax.make_array_from_callback(x.shape, x.sharding, whole.__getitem__) for x, whole in both]
        )

    return Way(made, barrier)


def timed(megabytes: int, rounds: int, folder: Path) -> dict[str, Any]:
    """Seconds of each round by table and way: those of the slowest process."""
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    adapter = make(megabytes)
    tables, finish = ways(adapter, folder)
    out: dict[str, Any] = {"megabytes": sum(x.nbytes for x in jax.tree.leaves(adapter)) / 1e6}
    for name, some in tables.items():
        times = interleave(some, rounds)
        found = np.array([t.clock for t in times.values()])
        slowest = np.asarray(multihost_utils.process_allgather(found)).reshape(-1, *found.shape).max(0)
        out[name] = dict(zip(some, slowest.tolist(), strict=True))
    finish()
    return out


def resident(way: str, megabytes: int, folder: Path) -> dict[str, Any]:
    """By how many bytes a save raises the peak of resident memory, as a part of what this process' devices hold."""
    import jax
    import numpy as np
    from jax.experimental import multihost_utils
    from orbax.checkpoint import v1

    import jaxadapt
    from benchmarks.io import status

    def save(adapter: Any, state: Any, to: Path) -> None:
        if way == SAVED:
            jaxadapt.save(adapter, to)
        elif way == MANAGER:
            with jaxadapt.CheckpointManager(to) as manager:
                manager.save(0, adapter, opt_state=state)
        elif way == "Orbax v1":
            v1.save(to, adapter.params)
        else:
            gathered(adapter, to)

    # What is imported or set up on first use is no memory of the data.
    for size, to in ((1, folder / "warm"), (megabytes, folder / "cold")):
        adapter = make(size)
        state = moments(adapter) if way == MANAGER else None
        held = [x for x in jax.tree.leaves((adapter.params, state)) if isinstance(x, jax.Array)]
        jax.block_until_ready(held)
        local = sum(s.data.nbytes for x in held for s in x.addressable_shards if s.replica_id == 0)
        barrier()
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
        before = status("VmRSS")
        save(adapter, state, to)
        extra = status("VmHWM") - before
    found = np.asarray(multihost_utils.process_allgather(np.array([extra, extra / local]))).reshape(-1, 2).max(0)
    return {"extra": float(found[0]) / 1e6, "local": float(found[1])}


def worker(given: Sequence[str]) -> None:
    index, count, port, megabytes, rounds, where, what, name = given
    import jax
    from flax import linen, nnx  # noqa: F401  (whoever has a model has them)

    if int(count) > 1:
        jax.distributed.initialize(f"127.0.0.1:{port}", int(count), int(index))
    folder, size = Path(where), int(megabytes)
    if what in ("load", "save"):
        barrier()
        return serve({"load": load_way, "save": save_way}[what](name, size, folder))
    found = resident(name, size, folder) if what == "memory" else timed(size, int(rounds), folder)
    if index == "0":
        print("\n" + json.dumps(found), flush=True)
    return None


# ---------------------------------------------------------------- outside


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def commands(shape: str, megabytes: int, rounds: int, folder: str, what: str, name: str = "") -> list[list[str]]:
    """One for each process of a group."""
    count, _ = SHAPES[shape]
    port = free_port()
    words = [sys.executable, "-m", "benchmarks.sharded", "--worker"]
    rest = [str(count), str(port), str(megabytes), str(rounds), folder, what, name]
    return [[*words, str(index), *rest] for index in range(count)]


def environ(shape: str) -> dict[str, str]:
    flags = f"--xla_force_host_platform_device_count={SHAPES[shape][1]}"
    return {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}


def told(shape: str, words: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Runs the processes, and gives what the first of them found."""
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(list(each), **pipes, env=environ(shape)) for each in words]
    said = [process.communicate() for process in processes]
    failed = [text[1] for process, text in zip(processes, said, strict=True) if process.returncode]
    if failed:
        raise SystemExit(f"a process failed:\n{failed[0][-3000:]}")
    return json.loads(said[0][0].strip().splitlines()[-1])


def measured(name: str, megabytes: int, rounds: int, place: str | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Seconds by table and way, and the growth of memory by way."""
    with tempfile.TemporaryDirectory(dir=place) as folder:
        found = told(name, commands(name, megabytes, rounds, folder, "tables"))
        loads = {way: commands(name, megabytes, rounds, folder, "load", way) for way in LOADS}
        found["load"] = {way: times.clock for way, times in apart(loads, rounds, environ(name)).items()}
    memory: dict[str, Any] = {}
    for way in MEASURED:
        with tempfile.TemporaryDirectory(dir=place) as folder:
            memory[way] = told(name, commands(name, megabytes, rounds, folder, "memory", way))
    return found, memory


def rows(times: Mapping[str, Sequence[float]]) -> list[list[object]]:
    raw = next(iter(times.values()))
    return [
        [name, f"{1e3 * statistics.median(t):.0f}", f"{1e3 * min(t):.0f}", f"{ratio(t, raw):.2f}"]
        for name, t in times.items()
    ]


def run(name: str, megabytes: int, rounds: int, place: str | None) -> list[str]:
    """Prints the tables of one size in one shape; the targets missed."""
    found, memory = measured(name, megabytes, rounds, place)
    what = f"{found['megabytes']:.0f} MB, {name}, median of {rounds} interleaved rounds"
    with_moments = f"{found['megabytes']:.0f} MB and Adam's moments, {name}"
    for kind, title in (("save", f"save, {what}"), ("load", f"load onto the mesh, {what}"),
                        ("state", f"save and wait, {with_moments}")):  # fmt: skip
        print(table(f"**{title}**", [kind, "median ms", "best ms", "x raw"], rows(found[kind])), flush=True)
    state, stall = found["state"], found["stall"]
    part = {way: ratio(t, state[MANAGER if way == FLOOR_STALL else way]) for way, t in stall.items()}
    lines = [[way, f"{1e3 * statistics.median(t):.1f}", f"{1e3 * min(t):.1f}", f"{part[way]:.3f}",
              f"{ratio(t, state[MANAGER]):.3f}"] for way, t in stall.items()]  # fmt: skip
    head = ["asynchronous save", "median ms", "best ms", "of its own blocking time", f"of {MANAGER}'s"]
    print(table(f"**the stall of the loop, {with_moments}**", head, lines), flush=True)
    lines = [[way, f"{m['extra']:.1f}", f"{m['local']:.2f}"] for way, m in memory.items()]
    print(table(f"**growth of memory while saving, {what.split(', median')[0]}, the worst process**",
                ["way", "MB", "x the bytes it holds"], lines), flush=True)  # fmt: skip
    held = [
        ("save {:.2f} x raw", ratio(found["save"][SAVED], found["save"][RAW_SAVE]), SAVE),
        ("load {:.2f} x raw", ratio(found["load"][LOADED], found["load"][RAW_LOAD]), LOAD),
        ("manager {:.2f} x raw", ratio(state[MANAGER], state[RAW_STATE]), STATE),
        ("stall {:.3f} of the blocking time", part[MANAGER], STALL),
        ("save's memory {:.2f} x local bytes", memory[SAVED]["local"], MEMORY),
        ("the manager's memory {:.2f} x local bytes", memory[MANAGER]["local"], MEMORY),
    ]
    print("\n" + "; ".join(f"{text.format(value)} (target {limit})" for text, value, limit in held), flush=True)
    return [f"{megabytes} MB, {name}: {text.format(v)}, target {limit}" for text, v, limit in held if v > limit]


def torch_commands(kind: str, name: str, megabytes: int, folder: str) -> list[list[str]]:
    """The same for PyTorch's DCP."""
    from benchmarks import io

    modules = {
        f"model.layers.{i}.{module}": shape for i in range(io.LAYERS) for module, shape in io.PROJECTIONS.items()
    }
    what = {"kind": kind, "one_file": TORCH[name], "modules": modules, "rank": io.rank_for(megabytes)}
    both = {"count": 2, "port": free_port(), "folder": folder, **what}
    return [[sys.executable, "-m", "benchmarks.dcp", json.dumps({"index": index, **both})] for index in range(2)]


def beside_dcp(megabytes: int, rounds: int, place: str | None) -> None:
    """Prints the tables beside PyTorch's DCP, each way in two processes of its own."""
    with tempfile.TemporaryDirectory(dir=place) as folder:
        for kind, ours in (("save", (RAW_SAVE, SAVED)), ("load", (RAW_LOAD, LOADED))):
            ways = {name: commands(TWO, megabytes, rounds, folder, kind, name) for name in ours}
            ways |= {name: torch_commands(kind, name, megabytes, folder) for name in TORCH}
            times = apart(ways, rounds, environ(TWO))
            title = f"**{kind} beside PyTorch's DCP, {megabytes} MB, 2 processes, median of {rounds} rounds**"
            clocks = {name: t.clock for name, t in times.items()}
            print(table(title, [kind, "median ms", "best ms", "x raw"], rows(clocks)), flush=True)


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--sizes", type=int, nargs="+", default=[50, 500], help="of the adapter, in MB")
    options.add_argument("--repeats", type=int, default=9)
    options.add_argument("--shapes", nargs="*", choices=list(SHAPES), default=list(SHAPES))
    options.add_argument("--dir", help="where to write; a temporary folder by default")
    options.add_argument("--with-dcp", action="store_true", help="also PyTorch's DCP, over two processes of gloo")
    options.add_argument("--worker", nargs=8, help=argparse.SUPPRESS)
    given = parsed(options, sizes=[1], repeats=1, shapes=["8 devices"], with_dcp=True)
    if given.worker:
        return worker(given.worker)
    print(environment("jax", "flax", "optax", "orbax-checkpoint", "safetensors", "torch", "numpy"))
    with_dcp = peer("PyTorch's DCP", given.with_dcp, "torch")
    missed = [m for size in given.sizes for name in given.shapes for m in run(name, size, given.repeats, given.dir)]
    for size in given.sizes if with_dcp else ():
        beside_dcp(size, given.repeats, given.dir)
    return judge(missed, given)


if __name__ == "__main__":
    main()
