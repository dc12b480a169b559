"""CheckpointManager: what comes back, what stays, and how a program may be left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import jaxadapt
from tests.support import leave, small, train_small
from tests.support.small import same

ROOT = Path(__file__).resolve().parents[2]


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


# ---------------------------------------------------------------- resuming


@pytest.mark.parametrize("api", ["nnx", "linen"])
def test_a_killed_training_resumes_bit_for_bit(api: str, tmp_path: Path):
    """8 steps in a process of their own, against 3 steps, SIGKILL, a new process, and 5 more."""
    env = {**os.environ, "JAX_DEFAULT_MATMUL_PRECISION": "highest"}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "tests.support.train_small", api, *arguments]
        return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=900, check=False)

    log = tmp_path / "losses"
    whole = run(str(tmp_path / "whole"), "8", str(log))
    assert whole.returncode == 0, whole.stderr
    expected = [float.fromhex(line.split()[1]) for line in log.read_text().splitlines()]
    killed = run(str(tmp_path / "run"), "3")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    resumed = train_small.APIS[api]()
    manager = jaxadapt.CheckpointManager(tmp_path / "run")
    assert manager.steps == [1, 2, 3]
    assert resumed.restore(manager) == 3
    assert [resumed.step() for _ in range(5)] == expected[3:]  # every bit of every loss
    again = train_small.APIS[api]()
    again.restore(manager, step=1)  # any kept step
    assert [again.step() for _ in range(3)] == expected[1:4]
    manager.rollback(2)
    assert again.restore(manager) == 2
    assert [again.step() for _ in range(2)] == expected[2:4]
    again.save(manager, 4)
    assert resumed.restore(manager) == 4
    assert resumed.step() == expected[4]


def test_a_tree_that_lost_its_configuration_is_saved_with_it(tmp_path: Path):
    held = small.variables()
    lost = {**held, "lora": {"default": {k: x for k, x in held["lora"]["default"].items() if k != "~config"}}}
    manager = jaxadapt.CheckpointManager(tmp_path)
    manager.save(1, jaxadapt.models.LoraTree(lost, config=small.LORA))
    manager.wait()
    restored = manager.restore(small.variables(seed=2)).model
    jax.tree.map(np.testing.assert_array_equal, restored, held)


@pytest.mark.parametrize("api", ["nnx", "linen"])
def test_a_save_under_way_is_not_touched_by_training(api: str, tmp_path: Path):
    """The next steps run, and donate the arrays, before the writer has begun to write."""
    go = threading.Event()

    def late(task: str, *_: int) -> None:
        assert task == "load" or go.wait(60)

    training, control = train_small.APIS[api](), train_small.APIS[api]()
    manager = jaxadapt.CheckpointManager(tmp_path, progress=late)
    for one in (training, control):
        for _ in range(2):
            one.step()
    training.save(manager, 2)
    for _ in range(3):
        training.step()
    go.set()
    manager.wait()
    back = train_small.APIS[api]()
    back.restore(manager)
    assert [back.step() for _ in range(2)] == [control.step() for _ in range(2)]


def test_the_optimizer_of_optax_with_all_its_nodes(tmp_path: Path):
    adapter = small.adapter()
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.masked(optax.adam(1e-3), {"q_proj": True, "up_proj": False}))
    state = tx.init(adapter.params)
    grads = jax.tree.map(jnp.ones_like, adapter.params)
    _, state = tx.update(grads, state, adapter.params)
    manager = jaxadapt.CheckpointManager(tmp_path)
    manager.save(1, adapter, opt_state=state)
    back = manager.restore(small.adapter(seed=9), opt_state=tx.init(adapter.params))
    assert same(back.opt_state, state)
    assert same(back.model.params, adapter.params)


VALUES: dict[str, Any] = {
    "bf16": jnp.arange(6, dtype=jnp.bfloat16).reshape(2, 3),
    "int4": jnp.arange(-3, 3, dtype=jnp.int4),
    "fp8": jnp.arange(4, dtype=jnp.float8_e4m3fn),
    "fp8 b11": np.arange(4).astype(ml_dtypes.float8_e4m3b11fnuz),
    "bool": jnp.array([True, False]),
    "empty": jnp.zeros((0, 3)),
    "scalar": jnp.float32(3.5),
    "nan": jnp.array([np.nan, -np.inf, -0.0]),
    "weak": jnp.asarray(2.0),
    "weak many": jnp.full((3,), 2),
    "host": np.arange(5)[::2],
    "host big endian": np.arange(3, dtype=">i4"),
    "generic": np.float32(1.25),
    "complex": np.array([1 + 2j]),
    "key": jax.random.key(1),
    "keys": jax.random.split(jax.random.key(1, impl="rbg"), 3),
    "old key": jax.random.PRNGKey(3),
    "int": 10**30,
    "float": 0.1,
    "inf": float("inf"),
    "complex number": 1 - 2j,
    "true": True,
    "text": "é\0 / .",
    "bytes": b"\0\xff",
    "none": None,
    "a.b": {"c": 1},
    "a": {"b.c": 2, "x/y": 4, "x%2Fy": 5},
    "numbered": {7: 3, 10: [1]},
    "nested": [(1, [jnp.ones(2)]), ()],
}


def equal(a: Any, b: Any) -> None:
    assert type(a) is type(b) or isinstance(a, jax.Array) or isinstance(b, np.ndarray)
    if isinstance(b, dict):
        assert a.keys() == b.keys()
        for key in b:
            equal(a[key], b[key])
    elif isinstance(b, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            equal(x, y)
    elif isinstance(b, jax.Array) and jnp.issubdtype(b.dtype, jax.dtypes.prng_key):
        assert jax.random.key_impl(a) == jax.random.key_impl(b)
        equal(jax.random.key_data(a), jax.random.key_data(b))
    elif isinstance(b, jax.Array | np.ndarray | np.generic):
        assert isinstance(a, jax.Array) == isinstance(b, jax.Array)
        assert (a.shape, a.dtype) == (b.shape, np.dtype(b.dtype).newbyteorder("="))
        assert np.asarray(a).tobytes() == np.asarray(b).astype(a.dtype).tobytes()  # NaN and -0.0 too
    else:
        assert (a, type(a)) == (b, type(b))


def test_every_kind_of_value_comes_back(tmp_path: Path):
    manager = jaxadapt.CheckpointManager(tmp_path)
    manager.save(1, small.adapter(), data=VALUES)
    found = manager.restore(small.adapter(seed=2)).data
    equal(found, {k: np.asarray(v) if isinstance(v, np.generic) else v for k, v in VALUES.items()})
    example = jax.tree.map(lambda x: x * 0 if isinstance(x, np.ndarray) else x, VALUES)
    filled = manager.restore(small.adapter(), data=example).data
    equal(filled, VALUES)
    weak = [filled[k].weak_type for k in ("weak", "weak many", "scalar")]
    assert weak == [VALUES[k].weak_type for k in ("weak", "weak many", "scalar")] == [True, True, False]
    assert not filled["bf16"].committed


def test_several_adapters_and_none_is_left_out(tmp_path: Path):
    def model() -> Any:
        net = small.trained(seed=3)
        return small.trained(small.IA3, seed=4, name="other", model=net)

    saved = model()
    manager = jaxadapt.CheckpointManager(tmp_path)
    manager.save(0, saved)
    target = model()
    for name in ("default", "other"):
        jaxadapt.inject(target, small.noisy(jaxadapt.extract(target, name=name), 8), name=name)
    manager.restore(target)
    for name in ("default", "other"):
        assert same(jaxadapt.extract(target, name=name).params, jaxadapt.extract(saved, name=name).params)
    manager.export(0, tmp_path / "peft")
    default, other = (jaxadapt.extract(saved, name=name) for name in ("default", "other"))  # a checkpoint has no base
    jaxadapt.save(default, tmp_path / "direct")
    jaxadapt.save(other, tmp_path / "direct", name="other")
    assert small.files(tmp_path / "peft") == small.files(tmp_path / "direct")  # byte for byte
    manager.export(0, tmp_path / "one", name="other")
    jaxadapt.save(other, tmp_path / "direct one", name="other")
    assert small.files(tmp_path / "one") == small.files(tmp_path / "direct one")
    with pytest.raises(jaxadapt.AttachError, match="there is no adapter 'third'; found"):
        manager.export(0, tmp_path / "one", name="third")
    with pytest.raises(jaxadapt.MismatchError, match="the adapter 'other' is saved"):
        manager.restore(small.trained())


@pytest.mark.parametrize("api", ["nnx", "linen"])
def test_an_adapter_that_the_step_lacks_is_named(api: str, tmp_path: Path):
    """It would keep the values it has, beside those of the step."""
    manager = jaxadapt.CheckpointManager(tmp_path)
    saved = small.trained(seed=3)
    manager.save(0, saved)
    if api == "nnx":
        target = small.trained(small.IA3, seed=4, name="other", model=small.trained(seed=5))
    else:
        target = {**small.variables(seed=5), **small.variables(small.IA3, seed=4, name="other")}
    before = {name: jaxadapt.extract(target, name=name).flat() for name in ("default", "other")}
    for options in ({}, {"model_only": True}):
        with pytest.raises(jaxadapt.MismatchError, match="target's adapter 'other' is not saved.*delete it first"):
            manager.restore(target, **options)
    for name, flat in before.items():
        for path, x in jaxadapt.extract(target, name=name).flat().items():
            np.testing.assert_array_equal(x, flat[path])
    back = manager.restore(jaxadapt.delete(target, name="other")).model
    assert same(jaxadapt.extract(back).params, jaxadapt.extract(saved).params)


def test_names_that_begin_alike(tmp_path: Path):
    saved = small.trained(seed=3, name="a")
    small.trained(seed=4, name="a/b", model=saved)
    with jaxadapt.CheckpointManager(tmp_path) as manager:
        manager.save(0, saved)
        target = small.trained(seed=5, name="a")
        manager.restore(small.trained(seed=6, name="a/b", model=target))
        for name in ("a", "a/b"):
            assert same(jaxadapt.extract(target, name=name).params, jaxadapt.extract(saved, name=name).params)
            assert same(manager.adapter(name=name).params, jaxadapt.extract(saved, name=name).params)


def test_what_else_changes_beside_another_library_s_lora(tmp_path: Path):
    q = {"kernel": jnp.ones((4, 6)), "kernel_lora_a": jnp.ones((4, 2)), "kernel_lora_b": jnp.ones((2, 6))}
    saved = {"params": {"q": q}, "batch_stats": {"bn": {"mean": jnp.arange(3.0)}}, "cache": {"k": jnp.ones(2)}}
    manager = jaxadapt.CheckpointManager(tmp_path)
    manager.save(0, saved)
    back = manager.restore(jax.tree.map(jnp.zeros_like, saved)).model
    np.testing.assert_array_equal(back["batch_stats"]["bn"]["mean"], [0, 1, 2])
    np.testing.assert_array_equal(back["params"]["q"]["kernel_lora_b"], np.ones((2, 6)))
    for left in (back["params"]["q"]["kernel"], back["cache"]["k"]):  # the base; what is of one call
        assert not left.any()


def test_linen_and_nnx_read_each_others_adapters(tmp_path: Path):
    manager = jaxadapt.CheckpointManager(tmp_path)
    manager.save(1, small.trained(seed=3))
    back = manager.restore(small.variables(seed=5))
    assert same(jaxadapt.extract(back.model).params, jaxadapt.extract(small.variables(seed=3)).params)
    assert same(manager.adapter(1).params, jax.tree.map(np.asarray, small.adapter(seed=3).params))
    state = nnx.state(small.trained(seed=6), jaxadapt.AdapterParam)
    assert manager.restore(state).model is state
    assert same(jaxadapt.extract(state).params, small.adapter(seed=3).params)


@pytest.mark.parametrize("abstract", [False, True])
def test_saved_on_one_mesh_restored_on_another(tmp_path: Path, abstract: bool):
    one, two = jax.make_mesh((8,), ("x",)), jax.make_mesh((4, 2), ("x", "y"))
    values = jnp.arange(64 * 16, dtype=jnp.float32).reshape(64, 16)
    state = {
        "rows": jax.device_put(values, NamedSharding(one, PartitionSpec("x"))),
        "columns": jax.device_put(values, NamedSharding(one, PartitionSpec(None, "x"))),
        "all": jax.device_put(values, NamedSharding(one, PartitionSpec())),
        "one": jax.device_put(values, jax.devices()[3]),
        "key": jax.device_put(jax.random.key(4), NamedSharding(one, PartitionSpec())),
    }
    manager = jaxadapt.CheckpointManager(tmp_path)
    manager.save(1, small.adapter(), opt_state=state)
    specs = {
        "rows": PartitionSpec("y", "x"), "columns": PartitionSpec("x"), "all": PartitionSpec(("x", "y")),
        "one": PartitionSpec(), "key": PartitionSpec(),
    }  # fmt: skip
    like: dict[str, Any] = {}
    for name, leaf in state.items():
        sharding = NamedSharding(two, specs[name])
        like[name] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        if not abstract:
            like[name] = jax.device_put(leaf, sharding)
    back = manager.restore(small.adapter(), opt_state=like).opt_state
    for name, leaf in state.items():
        assert back[name].sharding == like[name].sharding
        if name == "key":
            assert np.array_equal(*(np.asarray(jax.random.key_data(k)) for k in (back[name], leaf)))
        else:
            assert np.array_equal(np.asarray(back[name]), np.asarray(values))


def test_a_save_assembles_one_sharded_array_at_a_time(tmp_path: Path):
    """One for the writer and one for its CRC; the training loop waits for none, and none is kept."""
    sharding = NamedSharding(jax.make_mesh((8,), ("x",)), PartitionSpec("x"))
    state = {str(n): jax.device_put(jnp.full((512, 512), n, jnp.float32), sharding) for n in range(16)}
    manager = jaxadapt.CheckpointManager(tmp_path)
    manager.save(1, small.adapter(), opt_state={"0": state["0"]})
    manager.wait()
    tracemalloc.start()
    try:
        manager.save(2, small.adapter(), opt_state=state)
        manager.wait()
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept < state["0"].nbytes / 2
    assert peak < 4 * state["0"].nbytes


# ---------------------------------------------------------------- what does not fit


def test_everything_that_does_not_fit_is_named_and_nothing_changes(tmp_path: Path):
    manager = jaxadapt.CheckpointManager(tmp_path)
    manager.save(1, small.trained(), opt_state={"m": jnp.ones(3), "n": 1, "k": jax.random.key(0)}, rng=jnp.ones(2))
    model = small.trained(seed=9)
    before = jax.tree.map(np.asarray, jaxadapt.extract(model).params)
    like = {"m": jnp.ones(4), "n": jnp.ones(()), "k": jnp.ones(2), "extra": 1}
    with pytest.raises(jaxadapt.MismatchError) as caught:
        manager.restore(model, opt_state=like, rng=jnp.ones(2, jnp.bfloat16), data=3)
    for part in (
        "opt_state/m: expected float32 [4], found float32 [3]", "opt_state/n: expected ArrayImpl, found int",
        "opt_state/k: fry", "opt_state/extra: missing", "rng: expected bfloat16 [2], found float32 [2]",
        "data: none was saved", "step-000000001",
    ):  # fmt: skip
        assert part in str(caught.value) or part == "opt_state/k: fry", part
    assert "opt_state/k: expected an array, found threefry2x32" in str(caught.value)
    assert same(jaxadapt.extract(model).params, before)


def test_numbers_of_64_bits_are_not_cut_where_jax_has_32(tmp_path: Path):
    manager, adapter = jaxadapt.CheckpointManager(tmp_path), small.adapter()
    with jax.enable_x64(True):
        manager.save(1, adapter, data={"seen": jnp.asarray([2**40 + 3])})
        assert manager.restore(adapter).data["seen"].tolist() == [2**40 + 3]
    for example in (None, {"seen": jax.ShapeDtypeStruct((1,), np.dtype("int64"))}):
        with pytest.raises(jaxadapt.MismatchError, match="data/seen: int64 saved, .* jax_enable_x64"):
            manager.restore(adapter, data=example)


def test_what_cannot_be_filled_without_an_example_says_so(tmp_path: Path):
    manager = jaxadapt.CheckpointManager(tmp_path)
    adapter = small.adapter()
    manager.save(1, adapter, opt_state=optax.adam(1e-3).init(adapter.params))
    with pytest.raises(jaxadapt.MismatchError, match="give opt_state= an example"):
        manager.restore(adapter)
    other = jaxadapt.init(small.base()["params"], small.LORA.replace(lora_alpha=7), key=jax.random.key(0))
    with pytest.raises(jaxadapt.MismatchError, match="another configuration"):
        manager.restore(other, opt_state=optax.adam(1e-3).init(adapter.params))


RECORD = np.zeros(3, [("epoch", "i4"), ("seen", "f8")])


def test_what_cannot_be_saved_says_so_before_anything_is_written(tmp_path: Path):
    manager = jaxadapt.CheckpointManager(tmp_path / "run")
    gone = jnp.ones(3)
    gone.delete()
    with pytest.raises(jaxadapt.AttachError) as caught:
        manager.save(1, small.adapter(), data={"it": iter([]), "gone": gone, "o": np.array([object()]), "r": RECORD})
    for part in ("data/it: list_iterator", "data/gone: deleted", "data/o: ndarray", "data/r: ndarray"):
        assert part in str(caught.value)
    with pytest.raises(jaxadapt.AttachError, match="traced"):
        jax.jit(lambda x: manager.save(1, small.adapter(), data=x))(1.0)
    with pytest.raises(jaxadapt.ConfigError, match="metrics: loss"):
        manager.save(1, small.adapter(), metrics={"loss": "low"})
    with pytest.raises(jaxadapt.ConfigError, match="metrics: loss"):
        manager.save(1, small.adapter(), metrics={"loss": 10**400})
    for step in (-1, 1.5, "x"):
        with pytest.raises(jaxadapt.ConfigError, match="step"):
            manager.save(step, small.adapter())  # type: ignore[arg-type]
    with pytest.raises(jaxadapt.AttachError, match="cannot flatten this tree"):
        manager.save(1, small.adapter(), data={1: 2, "a": 3})
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------- which steps stay

LOSSES = [5.0, 1.0, 4.0, 0.5, 3.0, 0.5, 2.0, float("nan"), 6.0]


@pytest.mark.parametrize(
    ("policy", "kept"),
    [
        ({}, range(9)),
        ({"keep": 1}, [8]),
        ({"keep": 3}, [6, 7, 8]),
        ({"keep": 2, "keep_every": 3}, [0, 3, 6, 7, 8]),
        ({"keep": 1, "keep_best": 2, "minimize": "loss"}, [3, 5, 8]),
        ({"keep": 1, "keep_best": 3, "minimize": "loss"}, [1, 3, 5, 8]),
        # The best of those that are still there: when 8 came, 0 had been the best for long.
        ({"keep": 1, "keep_best": 1, "maximize": "loss"}, [8]),
        ({"keep": 1, "keep_best": 2, "maximize": "loss"}, [0, 8]),
        ({"keep": 2, "keep_best": 1, "keep_every": 4, "minimize": "loss"}, [0, 4, 5, 7, 8]),
        ({"keep": 1, "keep_best": 1, "minimize": "accuracy"}, [8]),
    ],
)
@pytest.mark.filterwarnings("ignore:metrics. step . has loss, and not accuracy")
def test_which_steps_stay(policy: dict[str, Any], kept: Any, tmp_path: Path):
    adapter = small.host_adapter()
    with jaxadapt.CheckpointManager(tmp_path, **policy) as manager:
        for step, loss in enumerate(LOSSES):
            manager.save(step, adapter, metrics={"loss": loss})
    assert manager.steps == list(kept)
    assert names(tmp_path) == [f"step-{s:09d}.safetensors" for s in kept]
    again = jaxadapt.CheckpointManager(tmp_path, minimize="loss")
    assert again.latest == 8
    assert again.best == min(kept, key=lambda s: (float("inf") if s == 7 else LOSSES[s], -s))
    assert again.metrics(8) == {"loss": 6.0}
    greatest = jaxadapt.CheckpointManager(tmp_path, maximize="loss").best
    assert greatest == max(kept, key=lambda s: (-1.0 if s == 7 else LOSSES[s], s))


def test_each_kept_step_is_a_peft_folder_in_one_call(tmp_path: Path):
    """Byte for byte what `save` would have written at that step, which PEFT reads (tests/reference)."""
    policy = {"keep": 1, "keep_best": 1, "keep_every": 2, "minimize": "loss"}
    with jaxadapt.CheckpointManager(tmp_path / "run", **policy) as manager:
        for step, loss in enumerate([3.0, 1.0, 4.0, 2.0]):
            manager.save(step, small.adapter(seed=step), opt_state={"mu": jnp.ones(3)}, metrics={"loss": loss})
    assert manager.steps == [0, 1, 2, 3]
    for step, name in [*((s, str(s)) for s in manager.steps), (manager.best, "best"), (None, "latest")]:
        manager.export(name if name in ("best", "latest") else step, tmp_path / name)
        jaxadapt.save(small.adapter(seed=3 if step is None else step), tmp_path / "direct")
        assert small.files(tmp_path / name) == small.files(tmp_path / "direct")


@pytest.mark.parametrize(
    "policy",
    [
        {"keep": 0}, {"keep": 1, "keep_best": 1}, {"keep_best": 1, "minimize": "x"}, {"keep_every": 3},
        {"minimize": "a", "maximize": "b"}, {"keep": 1, "keep_every": 0}, {"keep": 1, "keep_best": -1, "minimize": "x"},
        {"keep": 2.0}, {"keep": "2"}, {"keep": 1, "keep_every": 1.5},
    ],
)  # fmt: skip
def test_contradictory_policies_are_refused(policy: dict[str, Any], tmp_path: Path):
    with pytest.raises(jaxadapt.ConfigError):
        jaxadapt.CheckpointManager(tmp_path, **policy)


def test_going_back(tmp_path: Path):
    manager = jaxadapt.CheckpointManager(tmp_path, keep=5)
    for step in range(4):
        manager.save(step, small.host_adapter(fill=step))
    with pytest.raises(jaxadapt.FileError, match=r"contains later steps \(2, 3\); go back with rollback\(1\)"):
        manager.save(1, small.host_adapter())
    manager.rollback(1)
    assert manager.steps == [0, 1]
    manager.save(2, small.host_adapter(fill=20))
    assert manager.adapter().flat()["q_proj.kernel.lora_A"][0, 0] == 20
    manager.save(2, small.host_adapter(fill=21))  # the same step again: replaced
    assert manager.adapter(2).flat()["q_proj.kernel.lora_A"][0, 0] == 21
    for wrong in (lambda: manager.rollback(7), lambda: manager.restore(small.host_adapter(), 7)):
        with pytest.raises(jaxadapt.FileError, match=r"no step 7; found \[0, 1, 2\]"):
            wrong()
    with pytest.raises(jaxadapt.ConfigError, match="minimize"):
        _ = manager.best
    empty = jaxadapt.CheckpointManager(tmp_path / "nothing")
    assert (empty.steps, empty.latest) == ([], None)
    with pytest.raises(jaxadapt.FileError, match="no checkpoint"):
        empty.restore(small.host_adapter())


def test_best_and_latest_name_a_step(tmp_path: Path):
    with jaxadapt.CheckpointManager(tmp_path, minimize="loss") as manager:
        for step, loss in enumerate([3.0, 1.0, 4.0]):
            manager.save(step, small.host_adapter(fill=step), metrics={"loss": loss})
    like = small.host_adapter()
    assert [manager.restore(like, name).step for name in ("best", "latest", None, 0)] == [1, 2, 2, 0]
    assert [manager.adapter(name).flat()["q_proj.kernel.lora_A"][0, 0] for name in ("best", "latest")] == [1, 2]
    with pytest.raises(jaxadapt.FileError, match="cannot restore: no step has the metric 'error'"):
        jaxadapt.CheckpointManager(tmp_path, minimize="error").restore(like, "best")
    with pytest.raises(jaxadapt.ConfigError, match="'best' or 'latest' to restore: 'str' object"):
        manager.restore(like, "first")


def test_two_files_of_one_step_in_a_store_are_one_step():
    """As a copy under a name with more zeros; an address has no order."""
    files = pytest.importorskip("fsspec").filesystem("memory")
    for name in ("step-000000001", "step-0000000001"):
        files.pipe(f"/twice/{name}.safetensors", b"")
    assert jaxadapt.CheckpointManager("memory://twice").steps == [1]


def test_other_files_in_the_folder_are_left_alone(tmp_path: Path):
    for name in ("notes.txt", "step-1.safetensors", "step-000000001.bin"):
        (tmp_path / name).write_text("mine")
    with jaxadapt.CheckpointManager(tmp_path, keep=1) as manager:
        for step in range(3):
            manager.save(step, small.host_adapter())
    assert manager.steps == [2]
    assert len(names(tmp_path)) == 4


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "at least 8 bytes"),
        (b"\xff" * 100, "not a valid safetensors file"),
        (b"\x02\0\0\0\0\0\0\0{}", "not a training checkpoint"),
    ],
)
def test_damaged_steps_name_the_file(content: bytes, message: str, tmp_path: Path):
    (tmp_path / "step-000000004.safetensors").write_bytes(content)
    with pytest.raises(jaxadapt.FormatError, match=message) as caught:
        jaxadapt.CheckpointManager(tmp_path).restore(small.adapter())
    assert "step-000000004" in str(caught.value)


def test_a_damaged_structure_changes_nothing(tmp_path: Path):
    manager = jaxadapt.CheckpointManager(tmp_path)
    manager.save(4, small.trained(seed=3), data={"seen": np.arange(3)})
    manager.wait()
    (file,) = tmp_path.iterdir()
    with safe_open(file, "numpy") as held:
        metadata = held.metadata()
    text = metadata[small.STEP]
    metadata[small.STEP] = text.replace('["seen", ["leaf"]]', '["seen"]')
    assert metadata[small.STEP] != text
    del metadata[small.CRC]
    metadata[small.STEP] = metadata[small.STEP].replace('"step": 4, ', "")  # as an older version wrote it
    save_file(load_file(file), file, metadata)
    model = small.trained(seed=5)
    with pytest.raises(jaxadapt.FormatError, match="data: its stored structure is damaged"):
        manager.restore(model)
    assert same(jaxadapt.extract(model).params, small.adapter(seed=5).params)


# ---------------------------------------------------------------- errors in the background


def on_full_disk(folder: Path, **options: Any) -> jaxadapt.CheckpointManager:
    """A manager that cannot write: the error comes out of `progress=`, where the writing begins."""

    def fail(*_: Any) -> None:
        raise jaxadapt.FileError("the disk is full")

    return jaxadapt.CheckpointManager(folder, progress=fail, **options)


@pytest.mark.parametrize("call", ["save", "wait", "close", "restore", "export", "rollback", "adapter"])
def test_an_error_in_the_background_is_raised_at_the_next_call(call: str, tmp_path: Path):
    manager = on_full_disk(tmp_path)
    manager.save(1, small.host_adapter())
    arguments = {"save": (2, small.host_adapter()), "restore": (small.host_adapter(),), "rollback": (1,)}
    arguments |= {"export": (1, tmp_path / "out"), "adapter": (1,)}
    with pytest.raises(jaxadapt.FileError, match="the disk is full"):
        getattr(manager, call)(*arguments.get(call, ()))
    manager.wait()  # once


def test_an_error_in_the_background_is_raised_at_the_end_of_the_block(tmp_path: Path):
    with pytest.raises(jaxadapt.FileError, match="full"), on_full_disk(tmp_path) as manager:
        manager.save(1, small.host_adapter())
    with pytest.raises(RuntimeError, match="mine") as caught, on_full_disk(tmp_path) as manager:  # noqa: PT012
        manager.save(1, small.host_adapter())
        raise RuntimeError("mine")
    assert "the last checkpoint was not saved: the disk is full" in str(caught.value.__notes__)
    with pytest.raises(jaxadapt.FileError, match="full"), on_full_disk(tmp_path) as manager:  # noqa: PT012
        manager.save(1, small.host_adapter())
        sys.exit(0)  # must not read as success
    with pytest.raises(jaxadapt.FileError, match="full"):
        on_full_disk(tmp_path, asynchronous=False).save(1, small.host_adapter())


def test_places_that_cannot_be(tmp_path: Path):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(jaxadapt.FileError, match="file"):
            jaxadapt.CheckpointManager(place).save(1, small.host_adapter())
    (tmp_path / "run" / "step-000000001.safetensors").mkdir(parents=True)
    manager = jaxadapt.CheckpointManager(tmp_path / "run")
    manager.save(1, small.host_adapter())
    with pytest.raises(jaxadapt.FileError, match="step-000000001"):
        manager.wait()


def test_a_step_that_is_no_number_is_named(tmp_path: Path):
    manager, adapter = jaxadapt.CheckpointManager(tmp_path), small.host_adapter()
    manager.save(1, adapter)
    swapped: list[Callable[[], Any]] = [
        lambda: manager.save(adapter, 1),
        lambda: manager.restore(1, adapter),
        lambda: manager.adapter("1"),
        lambda: manager.export(1.0, tmp_path / "out"),
        lambda: manager.rollback(adapter),
        lambda: manager.metrics("1"),
        lambda: manager.metrics(None),  # type: ignore[arg-type]
    ]
    for call in swapped:
        with pytest.raises(jaxadapt.ConfigError, match=r"an integer, .*: .* cannot .*; call save\(step, model\)"):
            call()
    assert manager.steps == [1]
    manager.save(2, adapter, metrics={"loss": 0.5})
    manager.wait()
    assert [manager.metrics(step) for step in (2, np.int64(2), np.uint8(2), jnp.asarray(2))] == [{"loss": 0.5}] * 4


# ---------------------------------------------------------------- leaving


def left(how: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.support.leave", how, str(folder)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)


@pytest.mark.parametrize(("how", "status"), [("end", 0), ("exception", 1), ("sys.exit", 3), ("thread", 0)])
def test_leaving_without_waiting_lands_the_checkpoint(how: str, status: int, tmp_path: Path):
    run = left(how, tmp_path)
    assert run.returncode == status, run.stderr
    assert "unfinished" in run.stdout, "the save was over before the program was left: the test tests nothing"
    assert ("on purpose" in run.stderr) == (how == "exception")
    manager = jaxadapt.CheckpointManager(tmp_path)
    assert names(tmp_path) == ["step-000000007.safetensors"]
    back = manager.restore(leave.adapter(0))
    assert same(back.model.params, leave.adapter().params)
    assert back.data == {"position": 3}


def test_a_save_that_fails_as_the_program_ends_is_no_success(tmp_path: Path):
    run = left("no space", tmp_path)
    assert run.returncode == 1
    assert "a checkpoint was not saved" in run.stderr
    assert "step-000000007.safetensors: cannot write: File too large" in run.stderr
    assert names(tmp_path) == []


def test_no_permission():
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)  # whoever runs this, the folder can be looked into and not written to
        run = left("no permission", Path(folder))
        assert names(Path(folder)) == []
    assert run.returncode == 1
    assert "a checkpoint was not saved" in run.stderr
    assert "step-000000007.safetensors: cannot write: Permission denied" in run.stderr


def test_only_sigkill_loses_it_and_the_next_save_sweeps(tmp_path: Path):
    run = left("kill", tmp_path)
    assert run.returncode == -signal.SIGKILL
    assert jaxadapt.CheckpointManager(tmp_path).steps == []
    assert len(names(tmp_path)) == 1  # what it had written so far
    with jaxadapt.CheckpointManager(tmp_path) as manager:
        manager.save(1, small.host_adapter())  # another step: its temporary file has another name
    assert names(tmp_path) == ["step-000000001.safetensors"]


@pytest.mark.parametrize(
    ("how", "status", "said"),
    [
        ("sigterm", 143, "training\n"),
        ("sigterm in with", 143, "training\n"),
        ("sigterm with a handler", 0, "training\nthe handler before\nwent on\n"),
    ],
)
def test_sigterm_saves_and_leaves(how: str, status: int, said: str, tmp_path: Path):
    command = [sys.executable, "-m", "tests.support.leave", how, str(tmp_path)]
    child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout is not None
    first = child.stdout.readline()
    child.send_signal(signal.SIGTERM)
    rest, errors = child.communicate(timeout=900)
    assert (child.returncode, first + rest) == (status, said), errors
    manager = jaxadapt.CheckpointManager(tmp_path)
    back = manager.restore(leave.adapter(0))
    assert back.step == back.data + 10
    assert same(back.model.params, leave.adapter().params)


def test_the_signal_handler_is_undone(tmp_path: Path):
    manager = jaxadapt.CheckpointManager(tmp_path)
    before = signal.getsignal(signal.SIGTERM)
    with manager.preemption() as stop:
        assert not stop(1)
    with pytest.raises(RuntimeError, match="mine"), manager.preemption():
        raise RuntimeError("mine")
    with pytest.raises(SystemExit) as caught, manager.preemption() as stop:  # noqa: PT012
        signal.raise_signal(signal.SIGTERM)
        assert stop(1)
    assert caught.value.code == 143
    assert signal.getsignal(signal.SIGTERM) == before
    problems: list[BaseException] = []

    def elsewhere() -> None:
        try:
            with manager.preemption():
                pass
        except jaxadapt.ConfigError as error:
            problems.append(error)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert "main thread" in str(problems[0])


def test_two_writers_of_one_step_one_wins_whole(tmp_path: Path):
    managers = [jaxadapt.CheckpointManager(tmp_path) for _ in range(2)]
    for _ in range(10):
        for fill, manager in enumerate(managers):
            manager.save(3, leave.adapter(fill, width=2000))
        for manager in managers:
            manager.wait()
        values = {float(v) for x in managers[0].adapter(3).flat().values() for v in (x.min(), x.max())}
        assert len(values) == 1
    assert names(tmp_path) == ["step-000000003.safetensors"]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "count"), [("manager", 15), ("orbax", 4), ("race", 3), ("pair", 4)])
def test_killed_writers_and_two_at_once(kind: str, count: int, tmp_path: Path):
    """19 kills here, 300 in tests/full: nothing lost, nothing piled up, and of two writers one wins whole."""
    command = [sys.executable, "-m", "tests.support.kill_checkpoints", kind, str(tmp_path / "out"), str(count)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=2400, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
