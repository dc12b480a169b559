"""What the library makes is gone with its last reference: no cycle keeps arrays on a device until the gc comes."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import optax
import pytest
from flax import nnx

import jaxadapt
from tests import small

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
    with jaxadapt.rescale(variables, 0.5) as half:
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
