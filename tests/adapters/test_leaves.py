"""An adapter that a model or a file gives holds its arrays by path, and nests them when `params` is first read."""

from __future__ import annotations

import concurrent.futures
import copy
import dataclasses
import gc
import pickle
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxadapt
from jaxadapt.core import paths


class Net(nnx.Module):
    def __init__(self) -> None:
        self.q = nnx.Linear(4, 6, rngs=nnx.Rngs(0))


def adapted() -> Net:
    return jaxadapt.adapt(Net(), jaxadapt.LoraConfig(r=2, target_modules=["q"]), rngs=nnx.Rngs(1))


def extracted() -> jaxadapt.Adapter:
    return jaxadapt.extract(adapted())


def values(adapter: jaxadapt.Adapter) -> dict[str, np.ndarray]:
    return {path: np.asarray(x) for path, x in paths.flatten(adapter.params).items()}


def test_a_change_of_params_counts_from_then_on() -> None:
    adapter = extracted()
    held = adapter.flat()
    adapter.params["q"]["kernel"]["lora_B"] = jnp.ones((6, 2))
    assert adapter.flat()["q.kernel.lora_B"].sum() == 12
    assert held["q.kernel.lora_B"].sum() == 0
    model = jaxadapt.inject(adapted(), adapter)
    assert jaxadapt.extract(model).params["q"]["kernel"]["lora_B"].sum() == 12
    assert jaxadapt.to_peft(adapter).tensors["base_model.model.q.lora_B.weight"].sum() == 12


def test_an_array_that_is_replaced_in_params_does_not_stay_in_memory() -> None:
    adapter = extracted()
    old = weakref.ref(adapter.params["q"]["kernel"]["lora_B"])
    adapter.params["q"]["kernel"]["lora_B"] = jnp.ones((6, 2))
    gc.collect()
    assert old() is None


def test_threads_that_read_one_adapter_get_the_same_params() -> None:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            for _ in range(50):
                adapter = jaxadapt.Adapter.of_leaves(
                    jaxadapt.LoraConfig(),
                    {f"l.{i}.kernel.lora_A": np.zeros(1) for i in range(50)},
                    jaxadapt.KeyMap("k", ()),
                )
                barrier = threading.Barrier(8)

                def read(i: int, adapter: jaxadapt.Adapter = adapter, barrier: threading.Barrier = barrier) -> int:
                    barrier.wait()
                    return len(adapter.flat()) if i % 2 else id(adapter.params)

                found = list(pool.map(read, range(8)))
                assert set(found) == {50, id(adapter.params)}
    finally:
        sys.setswitchinterval(interval)


def test_a_changed_result_of_flat_changes_no_adapter() -> None:
    adapter = extracted()
    adapter.flat().clear()
    assert sorted(adapter.flat()) == ["q.kernel.lora_A", "q.kernel.lora_B"] == sorted(values(adapter))


@pytest.mark.parametrize("first", [lambda x: x, lambda x: x.params and x], ids=["by path", "nested"])
def test_copies_trees_and_files_are_those_of_nested_params(first: Callable[[Any], Any], tmp_path: Path) -> None:
    wanted = values(extracted())
    made = {
        "pickle": lambda x: pickle.loads(pickle.dumps(x)),
        "copy": copy.copy,
        "deepcopy": copy.deepcopy,
        "replace": lambda x: dataclasses.replace(x, config=x.config.replace(lora_alpha=3)),
        "map": lambda x: jax.tree.map(lambda leaf: leaf, x),
        "jit": jax.jit(lambda x: x),
        "grad": jax.grad(lambda x: sum(jnp.sum(leaf**2) / 2 for leaf in jax.tree.leaves(x))),
        "loaded": lambda x: (jaxadapt.save(x, tmp_path), jaxadapt.extract(jaxadapt.load(tmp_path, Net())))[1],
    }
    for name, make in made.items():
        found = make(first(extracted()))
        assert found.shapes == {"q.kernel": {"lora_A": (2, 4), "lora_B": (6, 2)}}, name
        jax.tree.map(np.testing.assert_array_equal, values(found), wanted)
        assert jax.tree.structure(found.params) == jax.tree.structure(extracted().params), name


def test_other_names_are_no_attributes() -> None:
    for adapter in (extracted(), jaxadapt.Adapter(extracted().config, {})):
        with pytest.raises(AttributeError, match="no attribute 'weights'"):
            _ = adapter.weights  # pyright: ignore[reportAttributeAccessIssue]
