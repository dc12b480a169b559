"""What the library makes is gone with its last reference: no cycle keeps arrays on a device until the gc comes."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import jaxadapt
from tests.support import small

Work = Callable[[Path], Any]


def load_linen(folder: Path) -> Any:
    return jaxadapt.load(folder / "a", small.base())


def load_nnx(folder: Path) -> Any:
    return jaxadapt.load(folder / "a", small.net())


def adapted(folder: Path) -> Any:
    model = jaxadapt.adapt(small.net(), small.LORA, rngs=nnx.Rngs(0))
    model(small.X)
    return jaxadapt.detach(model)


def by_memory(folder: Path) -> Any:
    return jaxadapt.to_peft(jaxadapt.from_peft(jaxadapt.read(folder / "a"), small.base())).tensors


def saved(folder: Path) -> Any:
    jaxadapt.save(load_linen(folder), folder / "again")


def merged(folder: Path) -> Any:
    base = small.base()["params"]
    adapter = jaxadapt.from_peft(jaxadapt.read(folder / "a"), base)
    return jaxadapt.unmerge(jaxadapt.merge(base, adapter), adapter)


def scaled(folder: Path) -> Any:
    variables = load_linen(folder)
    with jaxadapt.models.rescale(variables, 0.5) as half:
        return half


def run(folder: Path) -> Any:
    adapter = jaxadapt.from_peft(jaxadapt.read(folder / "a"), small.base())
    state = optax.adam(1e-3).init(adapter)
    with jaxadapt.CheckpointManager(folder / "run") as manager:
        manager.save(1, adapter, opt_state=state)
        manager.wait()
        back = manager.restore(adapter, opt_state=state)
        manager.rollback(1)
    return back


WORK: list[Work] = [load_linen, load_nnx, adapted, by_memory, saved, merged, scaled, run]


@pytest.mark.parametrize("work", WORK, ids=lambda w: w.__name__)
def test_nothing_outlives_its_last_reference(work: Work, tmp_path: Path) -> None:
    jaxadapt.save(small.trained(small.LORA), tmp_path / "a")
    work(tmp_path)  # what is made once for all: constants of compiled programs, caches
    gc.collect()
    gc.disable()
    try:
        before = {id(x) for x in jax.live_arrays()}
        work(tmp_path)
        left = [x.aval for x in jax.live_arrays() if id(x) not in before]
    finally:
        gc.enable()
    assert left == []


SWAPS = """
import sys, jax, jax.numpy as jnp, jaxadapt

folder, way = sys.argv[1:]
base = {f"q{i}": {"kernel": jax.ShapeDtypeStruct((4096, 4096), "float32")} for i in range(80)}
config = jaxadapt.LoraConfig(r=32, target_modules=list(base))
if way == "save":
    jaxadapt.save(jaxadapt.init(base, config, key=jax.random.key(0)), folder)
    sys.exit()
jax.block_until_ready(jnp.zeros(()) + 1)  # what compiles has as many threads as malloc has arenas
resident = []
for _ in range(8):
    {"load": lambda: jaxadapt.load(folder, {"params": base}), "read": lambda: jaxadapt.read(folder)}[way]()
    line = next(line for line in open("/proc/self/status") if line.startswith("VmRSS"))
    resident.append(int(line.split()[1]) >> 10)
print(max(resident) - resident[0])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/status")
@pytest.mark.parametrize("way", ["load", "read"])
def test_adapters_that_come_and_go_leave_no_pages_behind(way: str, tmp_path: Path) -> None:
    """84 MB: each of malloc's arenas kept a share, and a process grew with every load until it had 5 times as much."""

    def run(way: str) -> str:
        command = [sys.executable, "-c", SWAPS, str(tmp_path / "a"), way]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=900).stdout

    run("save")
    assert int(run(way)) < 150


def test_what_a_forward_holds_is_not_kept() -> None:
    held = jnp.full(3, 2.0)
    gone = weakref.ref(held)
    config = small.LORA.replace(init_lora_weights="corda")
    inputs = jaxadapt.initializers.Batches([small.X], lambda model, x, held=held: model(x) * held[0])
    jaxadapt.initializers.start(small.net(), config, inputs)
    del inputs
    del held
    gc.collect()
    assert gone() is None
