"""Saving and loading a large adapter beside raw IO of the same bytes, and beside what else there is.

    python -m benchmarks.io [--sizes 50 500] [--repeats 9] [--dir FOLDER] [--with-peft] [--with-fastsafetensors]
        [--with-orbax-harness] [--attached-only]

The adapter is LoRA on all seven projections of a Llama-2-7B (32 layers, 448 bfloat16 tensors), held as a
`jaxadapt.Adapter` in the model's layout. A last table is of an adapter attached to a model (`attached.py`). Each way
has a process of its own, which does nothing else; they take turns, and "x raw" is the median over rounds of the ratio
to the raw way of the same round. "The first" is what it took in a process that has JAX and Flax ready, as whoever has
a model, and that has saved or loaded nothing yet.
Exits with 1 if a target is missed.
"""

from __future__ import annotations

import argparse
import mmap
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors.flax
import safetensors.numpy
from flax import linen, nnx  # noqa: F401  (whoever has a model has them)

import jaxadapt
from benchmarks import attached, io_alone
from benchmarks.measure import Way, apart, environment, judge, parsed, peer, ratio, serve, table

LAYERS, HIDDEN, INNER = 32, 4096, 11008
PROJECTIONS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (HIDDEN, HIDDEN), "self_attn.v_proj": (HIDDEN, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.gate_proj": (HIDDEN, INNER), "mlp.up_proj": (HIDDEN, INNER),
    "mlp.down_proj": (INNER, HIDDEN),
}  # fmt: skip
SAVE, LOAD = 1.3, 1.3  # the targets, times raw
FILE = "adapter_model.safetensors"
OURS_SAVE, OURS_LOAD = "jaxadapt.save (durable, atomic)", "jaxadapt.load (model's layout)"


def base() -> dict[str, Any]:
    """The base's parameters as shapes, at Hugging Face's paths."""
    layers = {str(l): {} for l in range(LAYERS)}
    for tree in layers.values():
        for module, shape in PROJECTIONS.items():
            block, name = module.split(".")
            tree.setdefault(block, {})[name] = {"kernel": jax.ShapeDtypeStruct(shape, jnp.bfloat16)}
    return {"params": {"model": {"layers": layers}}}


def rank_for(megabytes: int) -> int:
    """The LoRA rank whose tensors are that large."""
    one = 2 * LAYERS * sum(sum(shape) for shape in PROJECTIONS.values())
    return max(1, round(megabytes * 1e6 / one))


def abstract(megabytes: int) -> jaxadapt.Adapter:
    """The adapter's shapes and dtypes."""
    config = jaxadapt.LoraConfig(
        r=rank_for(megabytes), lora_alpha=16, target_modules=[m.split(".")[1] for m in PROJECTIONS]
    )
    return jaxadapt.init(base()["params"], config, keymap="llama", dtype=jnp.bfloat16)


def make(megabytes: int) -> jaxadapt.Adapter:
    """The adapter on the default device, with random values."""
    adapter = abstract(megabytes)
    rng = np.random.default_rng(0)

    def value(spec: jax.ShapeDtypeStruct) -> jax.Array:
        # one at a time, and no float64: making them must not reach higher than saving them will
        bits = rng.integers(0x3C00, 0x3F80, spec.shape, np.uint16)
        return jax.block_until_ready(jnp.asarray(bits.view(ml_dtypes.bfloat16)))

    return jax.tree.map(value, adapter)


# ---------------------------------------------------------------- the ways


def raw_write(path: Path, data: bytes | memoryview) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    view, done = memoryview(data), 0
    while done < len(view):
        done += os.write(fd, view[done:])
    os.fsync(fd)
    os.close(fd)


def raw_read(path: Path) -> mmap.mmap:
    """Into new pages: what `malloc` gives is new, or was just given back by another way, as it happens."""
    fd = os.open(path, os.O_RDONLY)
    try:
        size = os.fstat(fd).st_size
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        done = 0
        while done < size:
            done += os.preadv(fd, [memoryview(memory)[done:]], done)
        return memory
    finally:
        os.close(fd)


def raw_read_again(path: Path, memory: bytearray) -> None:
    """Into pages that are in use already: a copy of what the system has, and nothing else."""
    with path.open("rb", buffering=0) as file:
        file.readinto(memory)


def raw_write_way(megabytes: int, folder: Path) -> Way:
    data = (folder / "ours" / FILE).read_bytes()
    return Way(lambda _: raw_write(folder / "raw.bin", data))


def save_way(megabytes: int, folder: Path) -> Way:
    adapter = make(megabytes)
    return Way(lambda _: jaxadapt.save(adapter, folder / "ours"))


def save_alone_way(megabytes: int, folder: Path) -> Way:
    leaves = {str(i): x for i, x in enumerate(jax.tree.leaves(make(megabytes)))}
    return Way(lambda _: io_alone.write(folder / "alone.safetensors", leaves, b"{}"))


def save_numpy_way(megabytes: int, folder: Path) -> Way:
    host = dict(jaxadapt.read(folder / "ours").tensors)
    # its save_file puts arrays of its own into the dict it is given: hand it a copy
    return Way(lambda given: safetensors.numpy.save_file(given, folder / "np.safetensors"), lambda: dict(host))


def save_flax_way(megabytes: int, folder: Path) -> Way:
    device = jax.block_until_ready(jax.device_put(dict(jaxadapt.read(folder / "ours").tensors)))
    return Way(lambda given: safetensors.flax.save_file(given, folder / "flax.safetensors"), lambda: dict(device))


def save_orbax_way(megabytes: int, folder: Path) -> Way:
    adapter = make(megabytes)
    return Way(lambda _: orbax().save(folder / "orbax", adapter.params, overwrite=True))


def save_peft_way(megabytes: int, folder: Path) -> Way:
    model = peft_model(folder, torch_base())
    return Way(lambda _: model.save_pretrained(str(folder / "peft")))


def raw_read_again_way(megabytes: int, folder: Path) -> Way:
    used = bytearray((folder / "ours" / FILE).stat().st_size)
    return Way(lambda _: raw_read_again(folder / "ours" / FILE, used))


def device_put_way(megabytes: int, folder: Path) -> Way:
    host = list(jaxadapt.read(folder / "ours").tensors.values())
    return Way(lambda _: jax.block_until_ready(jax.device_put(host, may_alias=True)))


def load_way(megabytes: int, folder: Path) -> Way:
    target = base()
    return Way(lambda _: jax.block_until_ready(arrays(jaxadapt.load(folder / "ours", target, keymap="llama"))))


def load_alone_way(megabytes: int, folder: Path) -> Way:
    def load(_: Any) -> object:
        return jax.block_until_ready(jax.device_put(io_alone.read(folder / "ours" / FILE), may_alias=True))

    return Way(load)


def load_orbax_way(megabytes: int, folder: Path) -> Way:
    target = make(megabytes)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), target.params)
    del target
    return Way(lambda _: jax.block_until_ready(orbax().load(folder / "orbax", abstract)))


def fast_way(direct: bool) -> Callable[[int, Path], Way]:
    """Into tensors of torch, past the page cache as it does unless told otherwise, or by way of it as all others do."""

    def way(megabytes: int, folder: Path) -> Way:
        import fastsafetensors

        os.environ["FASTSAFETENSORS_ODIRECT"] = "1" if direct else "0"

        def load(_: Any) -> object:
            with fastsafetensors.fastsafe_open([str(folder / "ours" / FILE)], nogds=True, device="cpu") as file:
                return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118

        check_fast(load(None), folder)
        return Way(load)

    return way


def check_fast(loaded: Any, folder: Path) -> None:
    """That what is timed has the file's values."""
    import torch

    for key, value in jaxadapt.read(folder / "ours").tensors.items():
        if not np.array_equal(loaded[key].view(torch.uint16).numpy(), np.asarray(value).view(np.uint16)):
            raise SystemExit(f"fastsafetensors read other values of {key}")


def reading(read: Callable[[Path], object]) -> Callable[[int, Path], Way]:
    return lambda megabytes, folder: Way(lambda _: read(folder / "ours" / FILE))


SAVES: dict[str, Callable[[int, Path], Way]] = {
    "raw write+fsync": raw_write_way,
    OURS_SAVE: save_way,
    "NumPy alone: header, views, write, fsync": save_alone_way,
    "safetensors.numpy (no fsync)": save_numpy_way,
    "safetensors.flax (no fsync)": save_flax_way,
    "Orbax v1, blocking": save_orbax_way,
    "PEFT save_pretrained (no fsync)": save_peft_way,
}
LOADS: dict[str, Callable[[int, Path], Way]] = {
    "raw read": reading(raw_read),
    "raw read, into pages in use": raw_read_again_way,
    "JAX alone: device_put of what is in memory": device_put_way,
    OURS_LOAD: load_way,
    "JAX alone: read and device_put": load_alone_way,
    "jaxadapt.read (numpy, file's layout)": lambda _, folder: Way(lambda _: jaxadapt.read(folder / "ours")),
    "safetensors.numpy": reading(lambda file: safetensors.numpy.load_file(file)),
    "safetensors.flax": reading(lambda file: jax.block_until_ready(safetensors.flax.load_file(file))),
    "safetensors.flax + transpose": reading(lambda file: transposed(safetensors.flax.load_file(file))),
    "Orbax v1": load_orbax_way,
    "fastsafetensors into torch, page cache": fast_way(direct=False),
    "fastsafetensors into torch, O_DIRECT": fast_way(direct=True),
    "PEFT from_pretrained": lambda _, folder: Way(lambda given: peft_model(folder, given), torch_base),
}


def arrays(variables: Any) -> list[jax.Array]:
    return [x for x in jax.tree.leaves(variables) if isinstance(x, jax.Array)]


def transposed(loaded: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """What a user of safetensors.flax has still to do before the tensors fit a Flax model."""
    return jax.block_until_ready({key: value.T for key, value in loaded.items()})


def orbax() -> Any:
    from orbax.checkpoint import v1

    return v1


# ---------------------------------------------------------------- PEFT


def torch_base() -> Any:
    """A torch module with the projections' shapes, whose base weights share one element each."""
    import torch

    def linear(shape: tuple[int, int]) -> Any:
        module = torch.nn.Linear(*shape, bias=False, device="meta", dtype=torch.bfloat16)
        weight = torch.zeros((), dtype=torch.bfloat16).expand(shape[::-1])
        module.weight = torch.nn.Parameter(weight, requires_grad=False)
        return module

    def layer() -> Any:
        parts: dict[str, Any] = {}
        for module, shape in PROJECTIONS.items():
            block, name = module.split(".")
            parts.setdefault(block, torch.nn.ModuleDict())[name] = linear(shape)
        return torch.nn.ModuleDict(parts)

    model = torch.nn.Module()
    model.model = torch.nn.Module()
    model.model.layers = torch.nn.ModuleList([layer() for _ in range(LAYERS)])
    return model


def peft_model(folder: Path, given: Any) -> Any:
    import peft

    return peft.PeftModel.from_pretrained(given, str(folder / "ours"), autocast_adapter_dtype=False)


# ---------------------------------------------------------------- memory


def status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"/proc/self/status has no {field}")


def memory(way: str, megabytes: int, folder: Path) -> None:
    """In a process of its own: print by how many bytes a save or a load raises the peak of resident memory."""
    adapter = make(megabytes)
    warm = make(1)  # what is imported or set up on first use is no memory of the data
    kinds: dict[str, Callable[[jaxadapt.Adapter, Path], Any]] = {
        "jaxadapt.save": jaxadapt.save,
        "safetensors.flax": lambda a, to: safetensors.flax.save_file(
            {k: jnp.asarray(v) for k, v in jaxadapt.to_peft(a).tensors.items()}, to / "flax.safetensors"
        ),
        "Orbax v1": lambda a, to: orbax().save(to / "orbax", a.params, overwrite=True),
        "jaxadapt.load": lambda a, to: jax.block_until_ready(
            arrays(jaxadapt.load(folder / "ours", base(), keymap="llama"))
        ),
    }
    if way == "jaxadapt.load":
        jaxadapt.save(warm, folder / "ours")
    kinds[way](warm, folder)
    if way == "jaxadapt.load":
        jaxadapt.save(adapter, folder / "ours")
        del adapter
        adapter = warm
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = status("VmRSS")
    kept = kinds[way](adapter, folder)
    print(status("VmHWM") - before)
    del kept


def memory_rows(megabytes: int, folder: Path, nbytes: int, largest: int) -> list[list[object]]:
    rows: list[list[object]] = []
    for way in ("jaxadapt.save", "safetensors.flax", "Orbax v1", "jaxadapt.load"):
        scratch = folder / "memory"
        scratch.mkdir()
        command = [sys.executable, "-m", "benchmarks.io", "--memory", way, str(megabytes), str(scratch)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        shutil.rmtree(scratch)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
        extra = int(done.stdout.split()[-1])
        rows.append([way, f"{extra / 1e6:.1f}", f"{extra / nbytes:.2f}", f"{extra / largest:.1f}"])
    return rows


# ---------------------------------------------------------------- the run


def run(megabytes: int, rounds: int, folder: Path, left_out: tuple[str, ...]) -> list[str]:
    """Print the tables of one size, without the peers left out; return the targets missed."""
    adapter = make(megabytes)
    leaves = jax.tree.leaves(adapter)
    nbytes, largest, count = sum(x.nbytes for x in leaves), max(x.nbytes for x in leaves), len(leaves)
    jaxadapt.save(adapter, folder / "ours")
    del adapter, leaves
    title = f"{nbytes / 1e6:.0f} MB, {count} tensors, each way in a process of its own, median of {rounds} rounds"
    results: dict[str, dict[str, float]] = {}
    flax = 0.0
    for kind, ways in (("save", SAVES), ("load", LOADS)):
        words = [sys.executable, "-m", "benchmarks.io", "--way"]
        names = [name for name in ways if not name.startswith(left_out)]
        times = apart({name: [[*words, kind, name, str(megabytes), str(folder)]] for name in names}, rounds, os.environ)
        raw = next(iter(times.values()))
        results[kind] = {name: ratio(t.clock, raw.clock) for name, t in times.items()}
        rows = [
            [name]
            + [f"{x * 1e3:.0f}" for x in (statistics.median(t.clock), min(t.clock), statistics.median(t.processor))]
            + [f"{results[kind][name]:.2f}", f"{t.first * 1e3:.0f}"]
            for name, t in times.items()
        ]
        head = [kind, "median ms", "best ms", "CPU ms", "x raw", "the first ms"]
        print(table(f"**{kind}, {title}**", head, rows), flush=True)
        if kind == "load":
            flax = ratio(times[OURS_LOAD].clock, times["safetensors.flax"].clock)
    extra = memory_rows(megabytes, folder, nbytes, largest)
    head = ["way", "extra MB", "x the adapter", "x its largest tensor"]
    print(table(f"**peak memory above what was resident before, {nbytes / 1e6:.0f} MB**", head, extra))
    found = [
        ("save {:.2f} x raw", SAVE, results["save"][OURS_SAVE]),
        ("load {:.2f} x raw", LOAD, results["load"][OURS_LOAD]),
        ("load {:.2f} x safetensors.flax", 1.0, flax),
    ]
    return [f"{megabytes} MB: {what.format(value)}, target {limit}" for what, limit, value in found if value > limit]


def in_harness(megabytes: int, rounds: int, folder: Path) -> None:
    from benchmarks import orbax_harness

    head = ["in Orbax's harness", "save, median ms", "best", "first", "load, median ms", "best", "first"]
    print(table(f"**{megabytes} MB in Orbax's own benchmark harness, {rounds} rounds, one row after the other**",
                head, orbax_harness.rows(megabytes, rounds, folder)), flush=True)  # fmt: skip


def main() -> None:
    options = argparse.ArgumentParser(description="save and load beside raw IO")
    options.add_argument("--sizes", type=int, nargs="+", default=[50, 500], help="megabytes")
    options.add_argument("--repeats", type=int, default=9)
    options.add_argument("--dir", default=None, help="where to write; the system's temporary folder by default")
    options.add_argument("--with-peft", action="store_true")
    options.add_argument("--with-fastsafetensors", action="store_true")
    options.add_argument("--with-orbax-harness", action="store_true", help="also by Orbax's own benchmark harness")
    options.add_argument("--attached-only", action="store_true", help="only the table of an attached adapter")
    options.add_argument("--memory", nargs=3, help=argparse.SUPPRESS)
    options.add_argument("--way", nargs=4, help=argparse.SUPPRESS)
    given = parsed(options, sizes=[1], repeats=1, with_peft=True, with_fastsafetensors=True, with_orbax_harness=True)
    warnings.simplefilter("ignore")
    if given.memory:
        way, megabytes, where = given.memory
        return memory(way, int(megabytes), Path(where))
    if given.way:
        kind, name, megabytes, where = given.way
        jax.block_until_ready(jnp.zeros(()))
        return serve({"save": SAVES, "load": LOADS}[kind][name](int(megabytes), Path(where)))
    print(environment("jax", "flax", "safetensors", "orbax-checkpoint", "peft", "fastsafetensors", "torch", "numpy"))
    with_peft = peer("PEFT", given.with_peft, "peft")
    with_fast = peer("fastsafetensors", given.with_fastsafetensors, "fastsafetensors", "torch")
    left_out = tuple(name for name, there in (("PEFT", with_peft), ("fastsafetensors", with_fast)) if not there)
    harness = peer("Orbax's harness", given.with_orbax_harness, "clu", "psutil", "tensorflow", "tensorboard")
    missed: list[str] = []
    for megabytes in () if given.attached_only else given.sizes:
        with tempfile.TemporaryDirectory(dir=given.dir) as folder:
            missed += run(megabytes, given.repeats, Path(folder), left_out)
            if harness:
                in_harness(megabytes, given.repeats, Path(folder))
    with tempfile.TemporaryDirectory(dir=given.dir) as folder:
        missed += attached.run(given.repeats, Path(folder), with_peft)
    return judge(missed, given)


if __name__ == "__main__":
    main()
