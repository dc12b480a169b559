"""export_base and import_base: folders, shards, ties, merged adapters, and what is refused. No PyTorch needed."""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from safetensors.numpy import load_file, save_file

import jaxadapt
from jaxadapt import FileError, FormatError, KeyMap, KeyMapError, MismatchError, Weight
from jaxadapt.export import base_files
from jaxadapt.keymaps import families
from tests.keymaps.families import specimen_arrays
from tests.keymaps.families.specimens import BY_NAME, recorded, values
from tests.support import small
from tests.support.twins import trees

LINES = (
    Weight("emb.embedding", "emb.weight", "v d -> v d", kind="embedding"),
    Weight("h.{l}.q.kernel", "h.{l}.q.weight", "i n k -> (n k) i"),
    Weight("h.{l}.q.bias", "h.{l}.q.bias", "n k -> (n k)"),
    Weight("h.{l}.kv", "h.{l}.{p}.weight", "{p} i o -> o i", p=("k", "v")),
    Weight("head.kernel", "head.weight", "d v -> v d"),
)
TABLE = KeyMap("mine", LINES, tied=(("head.weight", "emb.weight"),), buffers=("h.{l}.mask",))
Q, V = (3, 2, 4), (2, 3, 5)


def rand(*shape, dtype="float32"):
    return values(str(shape), shape).astype(dtype)


def base(head=True, dtype="float32"):
    tree = {"emb": {"embedding": rand(7, 3, dtype=dtype)}}
    tree["h"] = {
        str(l): {
            "q": {"kernel": rand(*Q, dtype=dtype) + l, "bias": rand(2, 4, dtype=dtype)},
            "kv": rand(*V, dtype=dtype) + l,
        }
        for l in range(3)
    }
    if head:
        tree["head"] = {"kernel": rand(3, 7, dtype=dtype)}
    return tree


def torch_of(tree):
    """The same by hand."""
    out = {"emb.weight": tree["emb"]["embedding"]}
    for l, layer in tree["h"].items():
        out[f"h.{l}.q.weight"] = layer["q"]["kernel"].reshape(3, 8).T
        out[f"h.{l}.q.bias"] = layer["q"]["bias"].reshape(8)
        out |= {f"h.{l}.{p}.weight": layer["kv"][i].T for i, p in enumerate("kv")}
    if "head" in tree:
        out["head.weight"] = tree["head"]["kernel"].T
    return out


def zeros(tree):
    return jax.tree.map(jnp.zeros_like, tree)


def equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_file_by_the_format_own_reader_and_back(tmp_path, dtype):
    dtype = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    tree = base(dtype=dtype)
    jaxadapt.export.export_base(tree, tmp_path / "new" / "out", keymap=TABLE)
    found = load_file(tmp_path / "new" / "out" / "model.safetensors")
    expected = torch_of(tree)
    assert set(found) == set(expected)
    for key, x in expected.items():
        np.testing.assert_array_equal(found[key], x)
    equal(jaxadapt.export.import_base(tmp_path / "new" / "out", zeros(tree), keymap=TABLE), tree)
    abstract = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, tree))
    equal(jaxadapt.export.import_base(tmp_path / "new" / "out", {"params": abstract}, keymap=TABLE)["params"], tree)


@pytest.mark.parametrize("how", ["/", "::"])
def test_a_tensor_of_more_than_ten_parts_has_them_in_order(tmp_path, how):
    table = KeyMap("parts", tuple(Weight(f"p{i}.kernel", f"big.weight[{i}{how}12]", "i o -> o i") for i in range(12)))
    tree = {f"p{i}": {"kernel": np.full((3, 2), i, "float32")} for i in range(12)}
    jaxadapt.export.export_base(tree, tmp_path, keymap=table)
    rows = np.repeat(np.arange(12), 2) if how == "/" else np.tile(np.arange(12), 2)
    np.testing.assert_array_equal(load_file(tmp_path / "model.safetensors")["big.weight"], np.tile(rows[:, None], 3))
    equal(jaxadapt.export.import_base(tmp_path, zeros(tree), keymap=table), jax.tree.map(jnp.asarray, tree))


def test_shards_and_their_index(tmp_path):
    tree = base()
    (tmp_path / "config.json").write_text("{}")
    jaxadapt.export.export_base(tree, tmp_path, keymap=TABLE, max_shard_size=300)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(p.name for p in tmp_path.glob("*.safetensors"))
    assert files == sorted(set(index["weight_map"].values()))
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert len(files) > 3
    expected = torch_of(tree)
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in expected.values())
    assert set(index["weight_map"]) == set(expected)
    for key, name in index["weight_map"].items():
        np.testing.assert_array_equal(load_file(tmp_path / name)[key], expected[key])
    assert all(sum(x.nbytes for x in load_file(tmp_path / name).values()) <= 300 for name in files)
    equal(jaxadapt.export.import_base(tmp_path, zeros(tree), keymap=TABLE), tree)
    assert (tmp_path / "config.json").read_text() == "{}"


def names(folder):
    return {p.name for p in folder.iterdir()}


def test_a_set_of_files_is_replaced_as_a_whole(tmp_path):
    """Several by several of the same number, by one, by several: always the new one, and nothing left over."""
    first, second = base(), jax.tree.map(lambda x: x + 1, base())
    for tree, limit in ((first, 300), (second, 300), (first, 10**6), (second, 500), (first, 500), (second, 10**6)):
        jaxadapt.export.export_base(tree, tmp_path, keymap=TABLE, max_shard_size=limit)
        equal(jaxadapt.export.import_base(tmp_path, zeros(tree), keymap=TABLE), tree)
        index = tmp_path / "model.safetensors.index.json"
        listed = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else set()
        assert names(tmp_path) == (listed | {index.name} if listed else {"model.safetensors"})


@pytest.mark.parametrize("limit", [300, 10**6])
def test_what_fails_on_the_way_leaves_the_old_set(tmp_path, limit, monkeypatch):
    """Whichever tensor it is at, and at the very end."""
    jaxadapt.export.export_base(base(), tmp_path, keymap=TABLE, max_shard_size=300)
    before = names(tmp_path)
    write = os.pwrite
    for broken in range(1, 4):
        calls = []

        def failing(fd, data, at, broken=broken, calls=calls):
            calls.append(1)
            if len(calls) >= min(broken, 1 if limit > 300 else 3):
                raise OSError(28, "No space left on device")
            return write(fd, data, at)

        monkeypatch.setattr(os, "pwrite", failing)
        with pytest.raises(jaxadapt.FileError, match="No space"):
            jaxadapt.export.export_base(
                jax.tree.map(lambda x: x * 2, base()), tmp_path, keymap=TABLE, max_shard_size=limit
            )
        monkeypatch.undo()
        assert names(tmp_path) == before
        equal(jaxadapt.export.import_base(tmp_path, zeros(base()), keymap=TABLE), base())


def test_the_index_takes_its_place_last(tmp_path, monkeypatch):
    """A kill between two renames: the old index names old files, all of them there."""
    jaxadapt.export.export_base(base(), tmp_path, keymap=TABLE, max_shard_size=300)
    renames = []
    replace = Path.replace

    def recorded_replace(self, target):
        equal(jaxadapt.export.import_base(tmp_path, zeros(base()), keymap=TABLE), base())
        renames.append(Path(target).name)
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", recorded_replace)
    new = jax.tree.map(lambda x: x * 2, base())
    jaxadapt.export.export_base(new, tmp_path, keymap=TABLE, max_shard_size=300)
    assert renames[-1] == "model.safetensors.index.json"
    equal(jaxadapt.export.import_base(tmp_path, zeros(base()), keymap=TABLE), new)


# ---- adapters ----------------------------------------------------------------------------------------------


@pytest.fixture
def small_slices(monkeypatch):
    """Merge a few rows at a time, as for large weights."""
    monkeypatch.setattr(base_files, "SLICE", 16)


@pytest.mark.usefixtures("small_slices")
@pytest.mark.parametrize("scan", [None, 0, 1])
@pytest.mark.parametrize("method", ["LORA", "IA3"])
def test_an_adapter_is_merged_on_the_way(tmp_path, scan, method):
    """Exactly what `merge` and then exporting gives: stacked layers, fused parts, biases, output by output."""
    table, tree = TABLE, base()
    if scan is not None:
        table, stack = TABLE.scanned(scan), lambda *xs: np.stack(xs, min(scan, xs[0].ndim))
        tree["h"] = jax.tree.map(stack, *tree["h"].values())
    targets = ["q", "k", "v"]
    config = (
        jaxadapt.LoraConfig(r=2, target_modules=targets)
        if method == "LORA"
        else jaxadapt.IA3Config(target_modules=targets, feedforward_modules=[])
    )
    if method == "IA3":
        del (tree["h"]["q"] if scan is not None else tree["h"]["0"]["q"])["bias"]
    adapter = small.noisy(jaxadapt.init(tree, config, key=jax.random.key(0), keymap=table))
    jaxadapt.export.export_base(tree, tmp_path / "a", adapter, keymap=table)
    jaxadapt.export.export_base(jaxadapt.merge(tree, adapter), tmp_path / "b", keymap=table)
    found, expected = load_file(tmp_path / "a" / "model.safetensors"), load_file(tmp_path / "b" / "model.safetensors")
    assert set(found) == set(expected)
    for key, value in expected.items():
        np.testing.assert_allclose(found[key], value, rtol=1e-6, atol=1e-6, err_msg=key)  # vmapped sums there
    plain = torch_of(base())
    assert np.abs(found["h.1.v.weight"] - plain["h.1.v.weight"]).max() > 0.1


SHAPES = (
    Weight("{path}.conv", "{path}.weight", "h w i o -> o i h w", kind="conv"),
    Weight("{path}.rope", "{path}.weight", "d n (c p) -> (n p c) d", p=2, scale=("c p", -0.5)),
    Weight("{path}.emb", "{path}.weight", "v d -> v d", kind="embedding"),
    Weight("{path}.kernel", "{path}.weight", "i o -> o i"),
    Weight("{path}.bias", "{path}.bias", "o -> o"),
)


@pytest.mark.usefixtures("small_slices")
@pytest.mark.parametrize("numpy", [True, False])
@pytest.mark.parametrize("dora", [True, False])
def test_a_merge_slice_by_slice_is_the_merge(tmp_path, dora, numpy):
    """Outputs of every kind of weight, whose rows lie here and there in PyTorch's tensor; norms of whole columns."""
    table = KeyMap("shapes", SHAPES)
    config = jaxadapt.LoraConfig(r=2, use_dora=dora, target_modules=["c", "r", "e", "k"])
    tree = {"c": {"conv": rand(2, 2, 3, 5)}, "r": {"rope": rand(3, 5, 16)}, "e": {"emb": rand(9, 7)}}
    tree["k"] = {"kernel": rand(6, 11), "bias": rand(11)}
    if dora:
        del tree["r"]  # its factor is not known of a norm
        config = config.replace(target_modules=["c", "e", "k"])
    tree = tree if numpy else jax.tree.map(jnp.asarray, tree)
    adapter = small.noisy(jaxadapt.init(tree, config, key=jax.random.key(0), keymap=table))
    seen = []
    sys.setprofile(lambda frame, event, _: event == "call" and seen.append(frame.f_code.co_qualname))
    try:
        jaxadapt.export.export_base(tree, tmp_path / "a", adapter, keymap=table, dtype="float32")
    finally:
        sys.setprofile(None)
    assert seen.count("ChangedLeaf.value") > 4 * len(tree)
    jaxadapt.export.export_base(jaxadapt.merge(tree, adapter), tmp_path / "b", keymap=table, dtype="float32")
    found, expected = load_file(tmp_path / "a" / "model.safetensors"), load_file(tmp_path / "b" / "model.safetensors")
    for key, value in expected.items():
        np.testing.assert_allclose(found[key], value, rtol=1e-6, atol=1e-6, err_msg=key)  # sums in another order


def test_a_merge_into_another_dtype_is_rounded_once(tmp_path):
    table = KeyMap("shapes", SHAPES)
    tree = {"k": {"kernel": jnp.asarray(rand(6, 11)).astype("bfloat16")}}
    config = jaxadapt.LoraConfig(r=2, target_modules=["k"])
    adapter = small.noisy(jaxadapt.init(tree, config, key=jax.random.key(0), keymap=table))
    jaxadapt.export.export_base(tree, tmp_path, adapter, keymap=table, dtype="float32")
    want = jaxadapt.merge(jax.tree.map(lambda x: x.astype("float32"), tree), adapter)["k"]["kernel"]
    found = load_file(tmp_path / "model.safetensors")["k.weight"].T
    np.testing.assert_allclose(found, want, rtol=1e-6, atol=1e-6)  # rounded to bfloat16 it would be 4e-3 away


def test_an_nnx_model_in_place_and_its_adapter(tmp_path):
    table = KeyMap(
        "net",
        tuple(
            line
            for m in ("q_proj", "up_proj")
            for line in (Weight(f"{m}.kernel", f"{m}.weight", "i o -> o i"), Weight(f"{m}.bias", f"{m}.bias", "o -> o"))
        ),
    )
    model = small.trained()
    out, adapter = model(small.X), jaxadapt.extract(model)
    with jaxadapt.disable(model):
        jaxadapt.export.export_base(model, tmp_path / "base", keymap=table)
    jaxadapt.export.export_base(model, tmp_path / "merged", adapter, keymap=table)
    other = small.net(seed=9)
    kernel = other.q_proj.kernel
    assert jaxadapt.export.import_base(tmp_path / "merged", other, keymap=table) is other
    assert other.q_proj.kernel is kernel
    np.testing.assert_allclose(other(small.X), out, rtol=1e-5, atol=1e-6)
    abstract = nnx.eval_shape(small.net)
    jaxadapt.export.import_base(tmp_path / "base", abstract, keymap=table)
    np.testing.assert_array_equal(abstract(small.X), small.net()(small.X))
    third = jaxadapt.export.import_base(tmp_path / "base", nnx.eval_shape(small.net), adapter, keymap=table)
    np.testing.assert_allclose(third(small.X), out, rtol=1e-5, atol=1e-6)
    with pytest.raises(jaxadapt.AttachError, match="active adapters, which would count twice"):
        jaxadapt.export.import_base(tmp_path / "base", model, adapter, keymap=table)
    with pytest.raises(jaxadapt.AttachError, match="expected an Adapter"):
        jaxadapt.export.import_base(tmp_path / "base", other, jaxadapt.to_peft(adapter), keymap=table)
    adapted = small.trained(seed=4)  # adapters on the target stay
    before = jaxadapt.extract(adapted).flat()
    jaxadapt.export.import_base(tmp_path / "base", adapted, keymap=table)
    equal(jaxadapt.extract(adapted).flat(), before)


def test_the_base_of_an_adapted_model_is_not_exported_without_a_word(tmp_path):
    table = KeyMap("net", tuple(Weight(f"{m}.{p}", f"{m}.{p}", a) for m in ("q_proj", "up_proj")
                                for p, a in (("kernel", "i o -> o i"), ("bias", "o -> o"))))  # fmt: skip
    model, variables = small.trained(), small.variables()
    for given, base in ((model, r"disable\(model\)"), (variables, r"variables\[.params.\]")):
        with pytest.raises(jaxadapt.AttachError, match=rf"active adapter 'default', .*(?s:.)adapter=.*merge.*{base}"):
            jaxadapt.export.export_base(given, tmp_path / "out", keymap=table)
    assert not (tmp_path / "out").exists()
    jaxadapt.export.export_base(model, tmp_path / "passed", jaxadapt.extract(model), keymap=table)
    jaxadapt.export.export_base(jaxadapt.merge(model), tmp_path / "merged", keymap=table)
    assert small.files(tmp_path / "passed") == small.files(tmp_path / "merged")


def test_a_weight_that_is_no_parameter_there(tmp_path):
    """As the bias of MaxText's routers, a variable of a kind of its own: the table's line says it is a weight."""

    class Balance(nnx.Variable):
        pass

    class Router(nnx.Module):
        def __init__(self, seed: int) -> None:
            rng = np.random.RandomState(seed)
            self.kernel = nnx.Param(jnp.asarray(rng.standard_normal((4, 3)), "float32"))
            self.bias = Balance(jnp.asarray(rng.standard_normal(3), "float32"))
            self.seen = nnx.Cache(jnp.zeros(()))  # no line, no weight

    table = KeyMap(
        "router", (Weight("kernel", "gate.weight", "d e -> e d"), Weight("bias", "gate.correction", "e -> e"))
    )
    model = Router(0)
    jaxadapt.export.export_base(model, tmp_path, keymap=table)
    found = load_file(tmp_path / "model.safetensors")
    assert set(found) == {"gate.weight", "gate.correction"}
    np.testing.assert_array_equal(found["gate.correction"], model.bias[...])
    for other in (Router(1), nnx.eval_shape(lambda: Router(1))):
        jaxadapt.export.import_base(tmp_path, other, keymap=table)
        np.testing.assert_array_equal(other.bias[...], model.bias[...])
        np.testing.assert_array_equal(other.kernel[...], model.kernel[...])


def test_dtypes_boxes_and_shardings_are_the_targets(tmp_path):
    jaxadapt.export.export_base(base(), tmp_path, keymap=TABLE, dtype="bfloat16")
    assert load_file(tmp_path / "model.safetensors")["emb.weight"].dtype == ml_dtypes.bfloat16
    mesh = jax.make_mesh((2,), ("x",))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "x"))
    target = zeros(base())
    target["h"]["0"]["q"]["kernel"] = jax.device_put(target["h"]["0"]["q"]["kernel"], spread)
    target["emb"]["embedding"] = nn.Partitioned(target["emb"]["embedding"], (None, "x"))
    target["h"]["1"]["kv"] = np.zeros(V, "float16")
    found = jaxadapt.export.import_base(tmp_path, target, keymap=TABLE)
    assert found["h"]["0"]["q"]["kernel"].sharding == spread
    assert isinstance(found["emb"]["embedding"], nn.Partitioned)
    assert isinstance(found["h"]["1"]["kv"], np.ndarray)
    assert found["h"]["1"]["kv"].dtype == "float16"
    wanted = base()["h"]["0"]["q"]["kernel"].astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(found["h"]["0"]["q"]["kernel"], wanted.astype("float32"))


# ---- ties, buffers, and what does not fit ------------------------------------------------------------------


def test_a_norm_that_holds_one_more_is_rounded_once(tmp_path):
    """A file of 16 bits into a model of 32: what is added is not lost to the file's dtype; nor on the way out."""
    table = KeyMap("norms", (Weight("n.{l}.scale", "n.{l}.weight", "d -> d", shift=1.0),))
    w = (values("n", (64,)) / 100).astype(ml_dtypes.bfloat16)
    save_file({f"n.{l}.weight": w + l for l in range(2)}, tmp_path / "model.safetensors")
    mesh = jax.make_mesh((8,), ("x",))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    for where in (None, split):
        target = {"n": {str(l): {"scale": jax.device_put(jnp.zeros(64), where)} for l in range(2)}}
        found = jax.tree.map(np.asarray, jaxadapt.export.import_base(tmp_path, target, keymap=table))
        for l in range(2):
            np.testing.assert_array_equal(found["n"][str(l)]["scale"], 1 + (w + l).astype("float32"))
    jaxadapt.export.export_base(found, tmp_path / "out", keymap=table, dtype="bfloat16")
    again = load_file(tmp_path / "out" / "model.safetensors")
    assert all(np.array_equal(again[f"n.{l}.weight"], w + l) for l in range(2))


def test_a_tied_head_is_filled_from_the_embedding_and_a_copy_of_it_needs_no_place(tmp_path):
    tied = base(head=False)
    jaxadapt.export.export_base(tied, tmp_path, keymap=TABLE)
    found = jaxadapt.export.import_base(tmp_path, zeros(base()), keymap=TABLE)
    np.testing.assert_array_equal(found["head"]["kernel"], tied["emb"]["embedding"].T)
    jaxadapt.export.export_base(found, tmp_path, keymap=TABLE)  # both, and equal
    equal(jaxadapt.export.import_base(tmp_path, zeros(tied), keymap=TABLE), tied)
    jaxadapt.export.export_base(base(), tmp_path, keymap=TABLE)  # a head of its own
    with pytest.raises(MismatchError, match=r"unexpected \(no parameter of the model uses them\):\n  head\.weight"):
        jaxadapt.export.import_base(tmp_path, zeros(tied), keymap=TABLE)


def test_a_head_of_its_own_is_refused_where_the_folder_ties_it(tmp_path):
    (tmp_path / "config.json").write_text('{"tie_word_embeddings": true}')
    with pytest.raises(MismatchError, match=r"tie_word_embeddings is true.*\n.*head\.weight differs from emb\.weight"):
        jaxadapt.export.export_base(base(), tmp_path, keymap=TABLE)
    assert names(tmp_path) == {"config.json"}
    same = base()
    same["head"]["kernel"] = same["emb"]["embedding"].T
    jaxadapt.export.export_base(same, tmp_path, keymap=TABLE)


def test_buffers_of_the_file_are_no_weights(tmp_path):
    file = torch_of(base()) | {"h.1.mask": np.ones((2, 2), "uint8")}
    # (safetensors' own writer puts down other layouts than this one as if they were it.)
    save_file({k: np.ascontiguousarray(x) for k, x in file.items()}, tmp_path / "model.safetensors")
    equal(jaxadapt.export.import_base(tmp_path / "model.safetensors", zeros(base()), keymap=TABLE), base())


def test_everything_that_does_not_fit_stands_in_one_error(tmp_path):
    file = torch_of(base()) | {"extra.weight": rand(2), "h.0.q.bias": rand(9), "h.1.q.bias": np.zeros(8, "int32")}
    del file["h.2.k.weight"]
    save_file({k: np.ascontiguousarray(x) for k, x in file.items()}, tmp_path / "model.safetensors")
    target = zeros(base())
    with pytest.raises(MismatchError) as caught:
        jaxadapt.export.import_base(tmp_path, target, keymap=TABLE)
    wrong = ("h.0.q.bias: expected [8], found [9]", "h.1.q.bias: int32, expected floats")
    for part in ("'mine'", "h.2.k.weight", "extra.weight", *wrong):
        assert part in str(caught.value)
    assert "strict=False" in str(caught.value)
    equal(target, zeros(base()))


def test_not_strict_takes_what_fits_and_says_what_not(tmp_path):
    file = {k: np.ascontiguousarray(x) for k, x in torch_of(base(head=False)).items()} | {"old.weight": rand(2)}
    del file["h.2.k.weight"]
    save_file(file, tmp_path / "model.safetensors")
    target = zeros(base())
    target["new"] = {"kernel": jnp.ones((2, 2))}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = jaxadapt.export.import_base(tmp_path, target, keymap=TABLE, strict=False)
    text = " ".join(str(w.message) for w in caught)
    assert "tensors not used: old.weight" in text
    assert "keep their values: h.2.kv, new.kernel" in text
    np.testing.assert_array_equal(found["new"]["kernel"], 1)
    np.testing.assert_array_equal(found["h"]["2"]["kv"], 0)
    np.testing.assert_array_equal(found["h"]["1"]["kv"], base()["h"]["1"]["kv"])
    hollow = pytest.raises(MismatchError, match=r"abstract in the target.*:\n  h\.2\.kv")
    with hollow, pytest.warns(UserWarning, match="not used"):
        jaxadapt.export.import_base(tmp_path, jax.eval_shape(lambda: zeros(base())), keymap=TABLE, strict=False)


@pytest.mark.parametrize(
    ("beside", "says"),
    [
        (["weight.absmax", "weight.nested_absmax", "weight.quant_state.bitsandbytes__nf4"], "with double quantization"),
        (["weight.absmax", "weight.quant_state.bitsandbytes__nf4"], r"4 bits\)"),
        (["SCB"], "8 bits"),
        (["qweight"], "GPTQ or AWQ"),
        (["weight_scale_inv"], "blocks of 8 bits"),
    ],
)
def test_codes_are_no_weights(tmp_path, beside, says):
    """Nor where somebody takes what fits: their numbers would stand in the weights' place."""
    base = {"n": {"kernel": rand(4, 2)}}
    held = {"n.weight": np.ones((2, 4), "uint8")} | {f"n.{name}": np.ones(3, "uint8") for name in beside}
    save_file(held, tmp_path / "model.safetensors")
    for strict in (True, False):
        with pytest.raises(jaxadapt.FormatError, match=rf"quantized \(.*{says}.*(?s:.)*dequantize\(\)"):
            jaxadapt.export.import_base(tmp_path, base, keymap=PACKED, strict=strict)


PACKED = jaxadapt.KeyMap("packed", (jaxadapt.Weight("n.kernel", "n.weight", "i o -> o i"),))


def test_a_model_no_table_knows_is_refused_with_its_weights(tmp_path):
    for do in (jaxadapt.export.export_base, lambda tree, path: jaxadapt.export.import_base(path, tree)):
        save_file({"a": rand(2)}, tmp_path / "model.safetensors")
        with pytest.raises(KeyMapError, match=r"no known model family matches.*\n(.*\n)*.*q\.kernel \(2, 2\)"):
            do({"q": {"kernel": jnp.ones((2, 2))}}, tmp_path)
    with pytest.raises(KeyMapError, match="PyTorch names are unknown.*a KeyMap with an entry for each"):
        jaxadapt.export.export_base({"q": {"kernel": jnp.ones((2, 2))}}, tmp_path, keymap="generic")
    with pytest.raises(KeyMapError, match=r"head2\.kernel \(3, 7\): no entry"):
        jaxadapt.export.export_base({**base(), "head2": {"kernel": rand(3, 7)}}, tmp_path / "x", keymap=TABLE)
    assert not (tmp_path / "x").exists()
    with pytest.raises(jaxadapt.AttachError, match="abstract"):
        jaxadapt.export.export_base(jax.eval_shape(lambda: zeros(base())), tmp_path / "x", keymap=TABLE)


@pytest.mark.parametrize(
    ("index", "error", "says"),
    [
        ("{", FormatError, "expected JSON"),
        ("[]", FormatError, "weight_map"),
        ('{"weight_map": {"a": 1}}', FormatError, "weight_map"),
        ('{"weight_map": {"a": "../x.safetensors"}}', FormatError, "names of files beside it"),
        ('{"weight_map": {"a": "b.safetensors"}}', FileError, r"(?s)do not exist.*b\.safetensors"),
        ('{"weight_map": {"nothing": "c.safetensors"}}', FormatError, "nothing is not in c.safetensors"),
        ('{"weight_map": {"a": "c.safetensors"}}', FormatError, "b of c.safetensors is not in the index"),
    ],
)
def test_an_index_that_does_not_hold_is_named(tmp_path, index, error, says):
    save_file({"a": rand(2), "b": rand(2)}, tmp_path / "c.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(error, match=says):
        jaxadapt.export.import_base(tmp_path, base(), keymap=TABLE)
    with pytest.raises(FileError, match=r"no folder with model\.safetensors"):
        jaxadapt.export.import_base(tmp_path / "..", base(), keymap=TABLE)


def test_a_proved_family_by_itself(tmp_path):
    """No keymap=: recognized, exported, read back in another layout of the same model."""
    specimen = BY_NAME["maxtext-qwen3"]
    leaves = specimen_arrays.base_leaves(specimen, recorded(specimen.name)["leaves"])
    with pytest.warns(UserWarning, match=r"has no config\.json, so transformers' .* default sizes.*like=folder"):
        jaxadapt.export.export_base(trees.nest(leaves), tmp_path)
    (tmp_path / "config.json").write_text("{}")
    jaxadapt.export.export_base(trees.nest(leaves), tmp_path)
    other = recorded("maxtext-qwen3-scan1")["leaves"]
    target = trees.nest({path: np.zeros(shape, "float32") for path, shape in other.items()})
    found = jaxadapt.export.import_base(tmp_path, target)
    equal(found, trees.nest(specimen_arrays.base_leaves(BY_NAME["maxtext-qwen3-scan1"], other)))
    assert families.resolve_keymap(None, other).name == "maxtext:qwen3/scan1"


def test_an_export_says_how_far_it_is(tmp_path):
    table = jaxadapt.KeyMap("mine", tuple(jaxadapt.Weight(f"{n}.kernel", f"{n}.weight", "i o -> o i") for n in "ab"))
    seen = []
    params = {n: {"kernel": np.ones((2, 3), "float32")} for n in "ab"}
    jaxadapt.export.export_base(params, tmp_path, keymap=table, progress=lambda *at: seen.append(at))
    assert seen == [("export", 0, 48), ("export", 24, 48), ("export", 48, 48)]


class Normed(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.q = nnx.Linear(3, 4, use_bias=False, rngs=rngs)
        self.bn = nnx.BatchNorm(4, rngs=rngs)


def test_statistics_are_written_by_a_line_or_refused(tmp_path):
    model = Normed(nnx.Rngs(0))
    model.bn.mean.set_value(jnp.arange(4.0))
    lines = (
        Weight("q.kernel", "q.weight", "i o -> o i"),
        Weight("bn.scale", "bn.weight", "c -> c"),
        Weight("bn.bias", "bn.bias", "c -> c"),
    )
    with pytest.raises(KeyMapError, match=r"(?s)statistics of batch normalization.*bn\.mean\n.*bn\.var"):
        jaxadapt.export.export_base(model, tmp_path, keymap=KeyMap("mine", lines))
    assert not tmp_path.exists()
    params = {"q": {"kernel": model.q.kernel.get_value()}}
    variables = {"params": params, "batch_stats": {"bn": {"mean": jnp.arange(4.0)}}}
    with pytest.raises(KeyMapError, match=r"batch_stats\.bn\.mean"):
        jaxadapt.export.export_base(variables, tmp_path, keymap=KeyMap("mine", lines[:1]))
    more = Weight("bn.mean", "bn.running_mean", "c -> c"), Weight("bn.var", "bn.running_var", "c -> c")
    jaxadapt.export.export_base(model, tmp_path, keymap=KeyMap("mine", (*lines, *more)))
    written = load_file(tmp_path / "model.safetensors")
    assert np.array_equal(written["bn.running_mean"], np.arange(4.0))
    assert len(written) == 5


@pytest.mark.parametrize("kind", ["folder", "tensors", "model"])
def test_only_an_adapter_is_merged_into_the_file(kind: str, tmp_path: Path):
    keymap = jaxadapt.KeyMap("mine", (jaxadapt.Weight("q.kernel", "q.weight", "i o -> o i"),))
    base = {"q": {"kernel": jnp.ones((2, 3))}}
    other = {"folder": str(tmp_path), "tensors": jaxadapt.PeftTensors(jaxadapt.LoraConfig(), {}), "model": base}[kind]
    with pytest.raises(jaxadapt.AttachError, match=rf"expected an Adapter, found {type(other).__name__}\..*from_peft"):
        base_files.export_base(base, tmp_path / "out", other, keymap=keymap)
    assert not (tmp_path / "out").exists()
