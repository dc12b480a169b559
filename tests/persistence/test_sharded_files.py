"""The same file on every layout of devices: saved on one mesh, loaded on another, bit for bit (invariant 5)."""

from __future__ import annotations

import functools
import os
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

import jaxadapt
from jaxadapt.arrays import regions
from jaxadapt.arrays.layout import FileLayout
from jaxadapt.core import paths
from jaxadapt.keymaps.plan import Encoded
from jaxadapt.persistence import save_adapter
from jaxadapt.storage import safetensors
from tests.adapters.test_sharding import check
from tests.support import meshes
from tests.support.meshes import CONFIG, LAYOUTS


@functools.cache
def numbers(scanned: bool, version: int = 0) -> dict[str, np.ndarray]:
    """The values of the adapter of one version; the scanned one holds the same numbers."""
    rng = np.random.default_rng(version)
    plain = jaxadapt.init(meshes.base(False), CONFIG, keymap=meshes.TABLE)
    values = {path: rng.standard_normal(x.shape).astype(jnp.bfloat16) for path, x in plain.flat().items()}
    if not scanned:
        return values
    names = {path.replace(".0.", ".", 1) for path in values if path.startswith("blocks.0.")}
    return {p: np.stack([values[p.replace("blocks.", f"blocks.{i}.")] for i in range(meshes.LAYERS)]) for p in names}


@functools.cache
def original(scanned: bool, version: int = 0) -> jaxadapt.Adapter:
    """On one device."""
    return meshes.adapter({path: jnp.asarray(x) for path, x in numbers(scanned, version).items()}, scanned)


@functools.cache
def on(layout: tuple[str, str], scanned: bool) -> tuple[Any, Any]:
    """A mesh, and the base laid over it."""
    mesh = meshes.mesh_of(layout[0])
    return mesh, meshes.placed(meshes.base(scanned), mesh, *layout)


def placed(layout: tuple[str, str], scanned: bool) -> jaxadapt.Adapter:
    """The adapter laid over a mesh as its base is."""
    like = meshes.like(meshes.mesh_of(layout[0]), layout, scanned)
    return meshes.adapter(jax.device_put(original(scanned).flat(), like), scanned)


@pytest.fixture(scope="module")
def folder() -> Any:
    """The adapter as one device saves it, unrolled."""
    with tempfile.TemporaryDirectory() as place:
        jaxadapt.save({"params": meshes.base(False), **original(False).collection}, place)
        yield Path(place)


def weights(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def equal(found: jaxadapt.Adapter, scanned: bool) -> None:
    want = original(scanned).flat()
    assert found.flat().keys() == want.keys()
    for path, x in found.flat().items():
        assert x.dtype == want[path].dtype
        np.testing.assert_array_equal(np.asarray(x).view(np.uint16), np.asarray(want[path]).view(np.uint16))


def held(api: str, layout: tuple[str, str], scanned: bool) -> Any:
    """The adapter in a model, laid over a mesh as its base is."""
    _, params = on(layout, scanned)
    if api == "linen":
        return {"params": params, **placed(layout, scanned).collection}
    model = jaxadapt.adapt(meshes.model(params, scanned), CONFIG, rngs=nnx.Rngs(0), keymap=meshes.table(scanned))
    return jaxadapt.inject(model, placed(layout, scanned))


@pytest.mark.parametrize("scanned", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS, ids="-".join)
def test_saved_anywhere_it_is_one_file(layout: tuple[str, str], scanned: bool, folder: Path, tmp_path: Path) -> None:
    """And so whatever was saved on one mesh loads on another, if this file loads on every one."""
    for api in ("nnx", "linen"):
        jaxadapt.save(held(api, layout, scanned), tmp_path / api)
        assert weights(tmp_path / api) == weights(folder)


@pytest.mark.parametrize("scanned", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS, ids="-".join)
def test_loaded_anywhere_it_is_the_same_adapter(layout: tuple[str, str], scanned: bool, folder: Path) -> None:
    mesh, params = on(layout, scanned)
    table = meshes.table(scanned)
    variables = jaxadapt.load(folder, {"params": params}, keymap=table)
    model = jaxadapt.load(folder, meshes.model(params, scanned), keymap=table)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params)
    shapes = jaxadapt.load(folder, {"params": abstract}, keymap=table)
    in_memory = jaxadapt.from_peft(jaxadapt.read(folder), params, keymap=table)
    for found in (*map(jaxadapt.extract, (variables, model, shapes)), in_memory):
        check(found, mesh, layout, scanned)
        equal(found, scanned)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(LAYOUTS)), ids=["-".join(layout) for layout in LAYOUTS])
def test_orbax_from_every_layout_to_every_other(number: int, tmp_path: Path) -> None:
    """Its checkpoints are not the same files, so every pair is tried: NNX to Linen, and the reverse."""
    layout, scanned = LAYOUTS[number], bool(number % 2)
    for api in ("nnx", "linen"):
        jaxadapt.save(held(api, layout, scanned), tmp_path / api, format="orbax")

    def loaded(saved: str, api: str, other: tuple[str, str], stacked: bool) -> None:
        mesh, params = on(other, stacked)
        target = meshes.model(params, stacked) if api == "nnx" else {"params": params}
        found = jaxadapt.extract(jaxadapt.load(tmp_path / saved, target, keymap=meshes.table(stacked)))
        check(found, mesh, other, stacked)
        equal(found, stacked)

    for other in LAYOUTS:
        loaded("nnx", "linen", other, scanned)
        loaded("linen", "nnx", other, scanned)
    third = LAYOUTS[(number + 3) % len(LAYOUTS)]
    for api in ("nnx", "linen"):
        loaded(api, api, third, scanned)
        loaded(api, api, third, not scanned)


def test_where_to_is_for_the_caller_to_say(folder: Path) -> None:
    _, params = on(("4x2", "both"), False)
    other = meshes.mesh_of("8")
    rows = NamedSharding(other, PartitionSpec())
    one = jaxadapt.load(folder, {"params": params}, keymap=meshes.TABLE, shardings=rows)
    equal(jaxadapt.extract(one), False)
    assert all(x.sharding == rows for x in jaxadapt.extract(one).flat().values())
    alone = SingleDeviceSharding(jax.devices()[3])
    tree = jax.tree.map(lambda x: alone, original(False))
    each = jaxadapt.load(folder, meshes.model(params, False), keymap=meshes.TABLE, shardings=tree)
    equal(jaxadapt.extract(each), False)
    assert all(x.devices() == {jax.devices()[3]} for x in jaxadapt.extract(each).flat().values())
    third = NamedSharding(other, PartitionSpec("x"))  # the rank is 3
    with pytest.raises(jaxadapt.AttachError, match=r"(?s)q\.kernel\.lora_A \(3, 16\).*size is 3"):
        jaxadapt.load(folder, {"params": params}, keymap=meshes.TABLE, shardings=third)
    some = {k: v for k, v in paths.flatten(tree.params).items() if "down" not in k} | {"x.lora_A": alone}
    found = r"(?s)x\.lora_A: the adapter has no such parameter.*down.*found NoneType"
    with pytest.raises(jaxadapt.AttachError, match=found):
        jaxadapt.load(folder, {"params": params}, keymap=meshes.TABLE, shardings=some)


def test_an_abstract_mesh_needs_devices(folder: Path) -> None:
    mesh = meshes.mesh_of("2x2x2")
    with jax.set_mesh(mesh):
        model = nnx.eval_shape(lambda: meshes.Blocks(nnx.Rngs(0), False))
        for path, var in nnx.to_flat_state(nnx.state(model, nnx.Param)):
            spec = meshes.spec(paths.join(*map(str, path)), "2x2x2", "both", len(var.shape))
            var.set_metadata(out_sharding=tuple(spec))
        model = nnx.as_abstract(model)
        graphdef, state = nnx.split(model)
        found = jaxadapt.load(folder, nnx.merge(graphdef, state), keymap=meshes.TABLE)
        check(jaxadapt.extract(found), mesh, ("2x2x2", "both"))
    equal(jaxadapt.extract(found), False)
    _, params = on(("2x2x2", "both"), False)
    specs = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh.abstract_mesh, x.sharding.spec)),
        params,
    )
    with pytest.raises(jaxadapt.AttachError, match="abstract mesh"):
        jaxadapt.load(folder, {"params": specs}, keymap=meshes.TABLE)
    with jax.set_mesh(mesh):
        found = jaxadapt.load(folder, {"params": specs}, keymap=meshes.TABLE)
    check(jaxadapt.extract(found), mesh, ("2x2x2", "both"))


def test_loaded_arrays_may_be_donated_and_keep_their_values(folder: Path) -> None:
    """Replicas share the host's memory: what a step does with one must not be seen in another."""
    _, params = on(("8", "fsdp"), False)
    first = jaxadapt.from_peft(jaxadapt.read(folder), params, keymap=meshes.TABLE)
    second = jax.jit(lambda a: jax.tree.map(lambda x: x * 2, a), donate_argnums=0)(first)
    for path, x in second.flat().items():
        np.testing.assert_array_equal(np.asarray(x), 2 * np.asarray(original(False).flat()[path]))
        for shard in x.addressable_shards:
            np.testing.assert_array_equal(shard.data, np.asarray(x)[shard.index])


def count_reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that gets the bytes of each read."""
    read: list[int] = []
    real = os.preadv

    def counted(*args: Any) -> int:
        read.append(real(*args))
        return read[-1]

    monkeypatch.setattr(os, "preadv", counted)
    return read


@pytest.mark.parametrize("spec", [PartitionSpec(None, "x"), PartitionSpec("x", None), PartitionSpec()])
def test_one_read_for_all_shards_of_all_tensors(spec: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that needs all bytes reads the file once, and cuts the shards in memory."""
    names = [f"q{i}" for i in range(20)]
    base = {name: {"kernel": jax.ShapeDtypeStruct((64, 64), jnp.float32)} for name in names}
    adapter = jaxadapt.init(base, jaxadapt.LoraConfig(r=8, target_modules=names), key=jax.random.key(0))
    jaxadapt.save(adapter, tmp_path)
    where = {path: NamedSharding(meshes.mesh_of("8"), spec) for path in adapter.flat()}
    read = count_reads(monkeypatch)
    found = jaxadapt.load(tmp_path, {"params": base}, shardings=where)
    assert sum(size == 40 * 8 * 64 * 4 for size in read) == 1
    assert len(read) <= 4  # the configuration, and the file's header
    for path, x in jaxadapt.extract(found).flat().items():
        assert x.sharding == where[path]
        np.testing.assert_array_equal(np.asarray(x), np.asarray(adapter.flat()[path]))


def test_only_the_needed_bytes_are_read(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A leaf wanted on one device of eight: its eighth of the rows is read, each replica's bytes once."""
    d, r = 1 << 14, 2
    config = jaxadapt.LoraConfig(r=r, target_modules=["q"])
    base = {"q": {"kernel": jax.ShapeDtypeStruct((d, d), jnp.float32)}}
    adapter = jaxadapt.init(base, config, key=jax.random.key(0))
    jaxadapt.save(adapter, tmp_path)
    mesh = meshes.mesh_of("8")
    cut, whole = NamedSharding(mesh, PartitionSpec(None, "x")), NamedSharding(mesh, PartitionSpec())
    where = {"q.kernel.lora_A": cut, "q.kernel.lora_B": whole}
    read = count_reads(monkeypatch)
    jaxadapt.load(tmp_path, {"params": base}, shardings=where)
    assert sum(size for size in read if size > 4096) == 2 * d * r * 4  # the header is smaller
    with safetensors.TensorFile(tmp_path / "adapter_model.safetensors") as file:
        read.clear()
        part = file.read_slice("base_model.model.q.lora_A.weight", (slice(0, r), slice(d // 2, d)))
        np.testing.assert_array_equal(part, np.asarray(adapter.flat()["q.kernel.lora_A"])[:, d // 2 :])
        assert sum(read) == d * r * 2


def test_a_tied_leaf_is_written_under_both_its_names() -> None:
    """PEFT's file holds the factors of a tied table twice; a process that owns them writes both."""
    line = jaxadapt.Weight("embed.embedding", "embed_tokens.weight", "v d -> v d", kind="embedding")
    table = jaxadapt.KeyMap("tied", (line,), output="lm_head", tied=(("lm_head.weight", "embed_tokens.weight"),))
    config = jaxadapt.LoraConfig(r=2, target_modules=["embed_tokens"], ensure_weight_tying=True)
    base = {"embed": {"embedding": jnp.zeros((6, 4))}}
    adapter = jaxadapt.init(base, config, key=jax.random.key(0), keymap=table)
    encoded = jaxadapt.to_peft(adapter).tensors
    assert isinstance(encoded, Encoded)
    assert sum("lm_head" in key for key in encoded) == 2
    parts = {
        part.key: part for part in save_adapter._owned_parts(encoded, save_adapter.owned_regions(encoded.leaves, 0))
    }
    assert parts.keys() == set(encoded)
    for key, part in parts.items():
        np.testing.assert_array_equal(np.reshape(part.array, encoded[key].shape), encoded[key])


def test_parts_are_copied_together_only_where_that_saves_writes() -> None:
    """Rows of several devices become longer ones; what is large and one run in the file is written from where it is."""
    rng = np.random.default_rng(0)
    whole = rng.standard_normal((64, 256)).astype("float32")
    rows, columns = [((0, 32), (0, 256)), ((32, 64), (0, 256))], [((0, 64), (0, 128)), ((0, 64), (128, 256))]
    turned = FileLayout((64, 256), ("i", "o"), (("o",), ("i",)), ())
    few = FileLayout((64, 256), ("{l}", "i"), (("i",),), (0,))  # a tensor of each row
    for laid, parts, expected in [
        ((64, 256), rows, rows), ((64, 256), columns, [regions.full_region((64, 256))]),
        (turned, columns, columns), (turned, rows, [regions.full_region((64, 256))]),
        (few, rows, [regions.full_region((64, 256))]),
    ]:  # fmt: skip
        held = {box: whole[regions.to_slices(box)] for box in parts}
        found = dict(save_adapter.join_regions(held, laid))
        assert list(found) == expected
        for box, values in found.items():
            np.testing.assert_array_equal(values, whole[regions.to_slices(box)])
            assert np.may_share_memory(values, whole) == (expected is parts)
    small = {box: whole[regions.to_slices(box)] for box in [((0, 1), (0, 256)), ((1, 2), (0, 256))]}
    assert list(dict(save_adapter.join_regions(small, (64, 256)))) == [((0, 2), (0, 256))]
