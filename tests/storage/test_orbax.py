"""Adapters as Orbax checkpoints: which trees go in and come out, and what Orbax itself makes of them."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as v0
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from orbax.checkpoint import v1

import jaxadapt
from jaxadapt.core import paths
from jaxadapt.demo import llama
from jaxadapt.storage import orbax
from tests.support import small
from tests.support.small import same


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


# ---------------------------------------------------------------- what comes back

SOURCES = {
    "nnx": lambda config: small.trained(config, seed=3),
    "nnx state": lambda config: nnx.state(small.trained(config, seed=3), jaxadapt.AdapterParam),
    "linen": lambda config: small.variables(config, seed=3),
    "adapter": lambda config: small.adapter(config, seed=3),
}
TARGETS = {
    "nnx plain": lambda config: small.net(),
    "nnx adapted": lambda config: small.trained(config, seed=8),
    "nnx abstract": lambda config: nnx.eval_shape(lambda: small.net()),
    "linen plain": lambda config: small.base(),
    "linen adapted": lambda config: small.variables(config, seed=8),
    "linen abstract": lambda config: jax.eval_shape(small.base),
}


@pytest.mark.parametrize("config", [small.LORA, small.IA3], ids=["lora", "ia3"])
@pytest.mark.parametrize("source", SOURCES)
def test_saved_by_any_loaded_by_all(source: str, config: Any, tmp_path: Path):
    jaxadapt.save(SOURCES[source](config), tmp_path / "out", format="orbax", base_model="some/base")
    expected = small.adapter(config, seed=3)
    for target in TARGETS.values():
        got = jaxadapt.extract(jaxadapt.load(tmp_path / "out", target(config)))
        assert same(got.params, expected.params)
        assert got.config == expected.config
    assert names(tmp_path) == ["out"]
    assert jaxadapt.read_config(tmp_path / "out").base_model_name_or_path == "some/base"
    # Without a model it is what PEFT's file would be.
    jaxadapt.save(SOURCES[source](config), tmp_path / "peft", base_model="some/base")
    ours, peft = jaxadapt.read(tmp_path / "out"), jaxadapt.read(tmp_path / "peft")
    assert same(dict(sorted(ours.tensors.items())), dict(sorted(peft.tensors.items())))
    assert ours.config.to_dict() == peft.config.to_dict()
    one, other = jaxadapt.inspect(tmp_path / "out"), jaxadapt.inspect(tmp_path / "peft")
    assert dict(one.tensors) == dict(other.tensors)
    assert (one.nbytes, one.parameters, one.modules) == (other.nbytes, other.parameters, other.modules)


@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_orbax_alone_reads_plain_nested_dicts(tmp_path: Path):
    """No `value` levels, no boxes, no numbered keys: nothing of ours is needed to open it."""
    jaxadapt.save(small.trained(seed=3), tmp_path / "out", format="orbax")
    tree = v1.load(tmp_path / "out", checkpointable_name="adapter")
    assert same(jax.tree.map(np.asarray, tree), jax.tree.map(np.asarray, small.adapter(seed=3).params))
    text = json.loads((tmp_path / "out" / "recipe" / "data.json").read_text())["recipe"]
    assert json.loads(text)["config"]["r"] == 2


@pytest.mark.parametrize("saved", ["unrolled", "scanned"])
def test_scanned_and_unrolled_numbered_layers(saved: str, tmp_path: Path):
    """Lists of layers have numbers as keys; another layout goes by way of PEFT's names."""
    sizes = llama.LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_layers=3, num_heads=2, num_kv_heads=1, head_dim=8
    )
    weights = {k: np.ones(s, "f4") for k, s in llama.hf_shapes(sizes).items()}
    config = jaxadapt.LoraConfig(r=2, target_modules=["q_proj", "down_proj"])

    def model(layout: str) -> Any:
        return llama.to_nnx(dataclasses.replace(sizes, scan=layout == "scanned"), weights)

    source = jaxadapt.adapt(model(saved), config, rngs=nnx.Rngs(1))
    jaxadapt.inject(source, small.noisy(jaxadapt.extract(source)))
    jaxadapt.save(source, tmp_path / "out", format="orbax")
    expected = {k: np.asarray(v) for k, v in jaxadapt.to_peft(source).tensors.items()}
    for layout in ("unrolled", "scanned"):
        loaded = jaxadapt.load(tmp_path / "out", model(layout))
        got = {k: np.asarray(v) for k, v in jaxadapt.to_peft(loaded).tensors.items()}
        assert got.keys() == expected.keys()
        assert all(np.array_equal(got[k], expected[k]) for k in got)


def test_names_dtypes_and_shardings(tmp_path: Path):
    source = small.trained(seed=3)
    jaxadapt.save(source, tmp_path / "out", name="default", format="orbax", dtype=jnp.bfloat16)
    jaxadapt.save(jaxadapt.extract(source), tmp_path / "out2", name="fr", format="orbax")
    assert names(tmp_path / "out2") == ["fr"]
    mesh = jax.make_mesh((8,), ("x",))
    target = small.trained(seed=8, name="fr")
    spread = {"q_proj.kernel.lora_B": PartitionSpec("x"), "up_proj.kernel.lora_A": PartitionSpec(None, "x")}
    flat = {
        path: jax.device_put(leaf, NamedSharding(mesh, spread.get(path, PartitionSpec())))
        for path, leaf in jaxadapt.extract(target, name="fr").flat().items()
    }
    jaxadapt.inject(target, jaxadapt.Adapter(small.LORA, paths.unflatten(flat)), name="fr")
    jaxadapt.load(tmp_path / "out2", target, name="fr")
    got = jaxadapt.extract(target, name="fr").flat()
    for path, leaf in jaxadapt.extract(source).flat().items():
        assert got[path].sharding == flat[path].sharding
        assert np.array_equal(np.asarray(got[path]), np.asarray(leaf))
    half = jaxadapt.extract(jaxadapt.load(tmp_path / "out", small.net()))
    assert {leaf.dtype for leaf in half.flat().values()} == {jnp.dtype(jnp.bfloat16)}
    whole = jaxadapt.extract(jaxadapt.load(tmp_path / "out", small.net(), dtype=jnp.float32))
    assert {leaf.dtype for leaf in whole.flat().values()} == {jnp.dtype(jnp.float32)}


# ---------------------------------------------------------------- out of a whole checkpoint


def moments(tree: Any) -> Any:
    return jax.tree.map(lambda x: x * 0 - 1, tree)


def pure(tree: Any) -> Any:
    """Linen variables as a training script saves them: the configuration is lost, since it is no array."""
    return {k: pure(v) if isinstance(v, dict) else v for k, v in tree.items() if k != "~config"}


def whole_trees() -> dict[str, Any]:
    variables = pure(small.variables(seed=3))
    state = nnx.state(small.trained(seed=3), nnx.Param)
    plain = nnx.to_pure_dict(state)
    return {
        "linen variables": variables,
        "linen train state": {"params": variables, "opt_state": {"0": {"mu": moments(variables)}}, "step": 3},
        "linen collection": {"lora": variables["lora"]},
        "nnx state": state,
        "nnx pure dict": plain,
        "nnx model and optimizer": {"model": plain, "opt_state": [{"mu": moments(plain), "nu": moments(plain)}]},
    }


def save_v1(path: Path, tree: Any) -> None:
    v1.save(path, tree)


def save_v1_items(path: Path, tree: Any) -> None:
    v1.save_checkpointables(path, {"zz": tree, "aa": {"x": jnp.ones(2)}})


def save_v0(path: Path, tree: Any) -> None:
    with v0.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(path, tree)


def save_v0_manager(path: Path, tree: Any) -> None:
    with v0.CheckpointManager(path.parent / "steps") as manager:
        manager.save(3, args=v0.args.StandardSave(tree))
        manager.wait_until_finished()
    (path.parent / "steps" / "3").rename(path)


@pytest.mark.parametrize("save", [save_v1, save_v1_items, save_v0, save_v0_manager])
@pytest.mark.parametrize("kind", whole_trees())
def test_the_adapter_out_of_a_whole_checkpoint(kind: str, save: Any, tmp_path: Path):
    """Whatever holds it besides the base and an optimizer's moments of the same structure."""
    tree = whole_trees()[kind]
    save(tmp_path / "out", tree)
    expected = small.adapter(seed=3)
    for target in (small.trained(seed=8), small.variables(seed=8)):
        got = jaxadapt.load(tmp_path / "out", target)
        assert same(jaxadapt.extract(got).params, expected.params)
    with pytest.raises(jaxadapt.FileError, match="Adapt the model with that configuration first"):
        jaxadapt.load(tmp_path / "out", small.net())
    with pytest.raises(jaxadapt.FileError, match="without an adapter's configuration"):
        jaxadapt.inspect(tmp_path / "out")


def test_a_checkpoint_of_an_adapter_that_changed_its_base_continues_it(tmp_path: Path):
    config = small.LORA.replace(init_lora_weights="pissa")
    started = jaxadapt.initializers.start(small.base()["params"], config)
    params, trained = {"params": started.base}, small.noisy(started.adapter)
    v1.save(tmp_path / "out", pure({**params, **trained.collection}))
    got = jaxadapt.load(tmp_path / "out", {**params, **started.adapter.collection})
    assert same(got["params"], started.base)
    assert same(jaxadapt.extract(got).params, trained.params)


def test_what_is_missing_is_named(tmp_path: Path):
    variables = pure(small.variables(seed=3))
    del variables["lora"]["default"]["up_proj"]["kernel"]["lora_B"]
    v1.save(tmp_path / "out", variables)
    with pytest.raises(jaxadapt.MismatchError, match=r"up_proj\.kernel\.lora_B") as caught:
        jaxadapt.load(tmp_path / "out", small.trained(seed=8))
    assert "lora_A" not in str(caught.value)
    v1.save(tmp_path / "twice", {"one": pure(small.variables(seed=3)), "two": pure(small.variables(seed=4))})
    with pytest.raises(jaxadapt.MismatchError, match=r"several subtrees match the adapter.*\n.*state/one\n.*state/two"):
        jaxadapt.load(tmp_path / "twice", small.trained(seed=8))


# ---------------------------------------------------------------- the codec


def test_a_leaf_that_is_missing_or_another_is_an_error(tmp_path: Path):
    """Orbax leaves a `ShapeDtypeStruct` for the first, and casts the second, silently."""
    orbax.save(tmp_path / "out", {"t": {"a": {"b": jnp.ones(3)}, "c": np.arange(2)}}, {}, single_process=True)
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def spec(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=one)

    for key, wanted, message in [
        (("a", "x"), spec((3,), jnp.float32), "a/x: missing"),
        (("a",), spec((3,), jnp.float32), "a: missing"),
        (("a", "b"), spec((4,), jnp.float32), r"a/b: expected float32 \[4\], found float32 \[3\]"),
        (("a", "b"), spec((3,), jnp.bfloat16), r"a/b: expected bfloat16 \[3\], found float32 \[3\]"),
    ]:
        with pytest.raises(jaxadapt.MismatchError, match=message):
            orbax.load(tmp_path / "out", "t", {key: wanted, ("c",): None})
    got = orbax.load(tmp_path / "out", "t", {("c",): None})
    assert isinstance(got["c",], np.ndarray)
    assert got["c",].tolist() == [0, 1]


@pytest.mark.parametrize("tree", [{"a.b": np.ones(1), "a": {"b": np.zeros(1)}}, {"": np.ones(1)}, {3: np.ones(1)}])
def test_names_that_orbax_would_corrupt_are_refused(tree: Any, tmp_path: Path):
    with pytest.raises(jaxadapt.FileError, match="joins names by dots"):
        orbax.save(tmp_path / "out", {"t": tree}, {}, single_process=True)
    assert names(tmp_path) == []


def test_nothing_is_overwritten(tmp_path: Path):
    jaxadapt.save(small.trained(seed=3), tmp_path / "out", format="orbax")
    (tmp_path / "peft").mkdir()
    (tmp_path / "empty").mkdir()
    (tmp_path / "peft" / "adapter_config.json").write_text("{}")
    for path in ("out", "peft"):
        with pytest.raises(jaxadapt.FileError, match="would delete an old checkpoint"):
            jaxadapt.save(small.trained(seed=4), tmp_path / path, format="orbax")
    jaxadapt.save(small.trained(seed=4), tmp_path / "empty", format="orbax")
    got = jaxadapt.load(tmp_path / "out", small.net())
    assert same(jaxadapt.extract(got).params, small.adapter(seed=3).params)


@pytest.mark.parametrize("path", ["s3://bucket/out", "hdfs://out", "az://x/y"])
def test_places_that_orbax_cannot_write_to(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for name in ("default", "other"):
        with pytest.raises(jaxadapt.FileError, match="Orbax cannot use"):
            jaxadapt.save(small.adapter(), path, name=name, format="orbax")
    assert names(tmp_path) == []
    with pytest.raises(jaxadapt.FileError, match="'safetensors' or 'bin' or 'orbax'"):
        jaxadapt.save(small.adapter(), "out", format="msgpack")


def test_relative_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    jaxadapt.save(small.adapter(), "out", format="orbax")
    jaxadapt.load("out", small.net())
    jaxadapt.save(small.adapter(), "no/such/parent", format="orbax")
    Path("file").write_text("")
    with pytest.raises(jaxadapt.FileError, match="file"):
        jaxadapt.save(small.adapter(), "file/out", format="orbax")


@pytest.mark.filterwarnings("ignore:.*was never awaited:RuntimeWarning")  # Orbax's own
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("spoil", ["recipe", "manifest", "metadata", "tree"])
def test_damage_is_an_error_that_names_the_path(spoil: str, tmp_path: Path):
    out = tmp_path / "out"
    jaxadapt.save(small.adapter(), out, format="orbax")
    if spoil == "recipe":
        (out / "recipe" / "data.json").write_text('{"schema": 1, "recipe": "{}"}')
    elif spoil == "manifest":
        for path in (out / "adapter").rglob("manifest.ocdbt"):
            path.write_bytes(b"\0" * 20)
    elif spoil == "metadata":
        (out / "adapter" / "_METADATA").write_text("{")
    else:
        (out / "adapter" / "_METADATA").unlink()
    with pytest.raises(jaxadapt.FileError) as caught:
        jaxadapt.load(out, small.net())
    assert str(out) in str(caught.value)


def test_a_failing_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(jaxadapt.FileError, match="No space left"):
            jaxadapt.save(small.adapter(), tmp_path / "out", format="orbax")
    assert names(tmp_path) == []
    jaxadapt.save(small.adapter(), tmp_path / "out", format="orbax")


def test_an_error_keeps_the_text_of_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import orbax.checkpoint as ocp

    def fail(*_: Any) -> None:
        raise OSError(errno.EIO, "the second shard is gone")

    monkeypatch.setattr(ocp.v1, "save_checkpointables_async", fail)
    with pytest.raises(jaxadapt.FileError, match="cannot write: the second shard is gone"):
        jaxadapt.save(small.adapter(), tmp_path / "out", format="orbax")


def test_no_sites_are_lost(tmp_path: Path):
    adapter = small.adapter(seed=3)
    jaxadapt.save(adapter, tmp_path / "out", format="orbax")
    part = dict(adapter.params)
    part.pop("up_proj")
    orbax.save(
        tmp_path / "part",
        {"adapter": part},
        {"recipe": orbax.read_json(tmp_path / "out", "recipe")},
        single_process=True,
    )
    with pytest.raises(jaxadapt.AttachError, match="1 of the 2 weights that the adapter"):
        jaxadapt.load(tmp_path / "part", small.base())
