"""Tunix, gemma, MaxText and keras-hub with LoRA on, as their users train it, against the real PEFT on PyTorch's.

Where a library is in another environment, its tree has the recorded shapes and its logits are the recorded ones.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxadapt
from jaxadapt.keymaps import families
from jaxadapt.models import LoraTree
from tests.keymaps.families import specimen_arrays, specimens
from tests.keymaps.families.specimens import IDS, values
from tests.models.foreign import real
from tests.models.foreign.cases import flat, nest

if importlib.util.find_spec("peft") is not None:
    from tests.keymaps.families import torch_side
    from tests.support import peft_harness as harness

pytestmark = pytest.mark.usefixtures("foreign_model")

CLOSE = {"rtol": 0, "atol": 1e-4}  # as in tests/keymaps/families: logits are about 4, and rounding passes the softmax
HERE = [name for name in real.NAMES if real.here(name)]
RECORDED = [name for name in real.NAMES if (real.RECORDED / f"{name}.json").exists()]
live = pytest.mark.parametrize("name", HERE)
peft = pytest.mark.peft


def test_everything_is_live_or_recorded():
    assert all(name in RECORDED or name.startswith("tunix") for name in real.NAMES)


def theirs(name: str) -> tuple[Any, np.ndarray]:
    """The tree with their LoRA leaves, and their logits."""
    if real.here(name):
        made = real.make(name)
        return made.tree, np.asarray(made.logits(made.tree))
    found = real.recorded(name)
    base = specimen_arrays.base_leaves(real.specimen(name), specimens.recorded(name)["leaves"])
    lora = {path: values(path, shape) for path, shape in found["lora"].items()}
    return nest({**base, **lora}), np.array(found["logits"], np.float32).reshape(*IDS.shape, -1)


@pytest.mark.parametrize("name", [name for name in HERE if name in RECORDED])
def test_what_was_recorded_is_what_the_library_does(name: str):
    made, found = real.make(name), real.recorded(name)
    assert real.shapes(made.tree) == found["lora"]
    np.testing.assert_allclose(np.asarray(made.logits(made.tree)).ravel(), found["logits"], **CLOSE)


@peft
@pytest.mark.parametrize("name", real.NAMES)
def test_peft_computes_what_they_compute(name: str, tmp_path):
    """No head is lost or moved, nothing is scaled twice, every key finds its place."""
    tree, expected = theirs(name)
    jaxadapt.save(LoraTree(tree, **real.told(name)), tmp_path, keymap=real.specimen(name).keymap)
    loaded = harness.load(torch_side.base(name), tmp_path)
    assert not loaded.complaints
    with np.errstate(all="raise"):
        np.testing.assert_allclose(harness.logits(loaded.model, IDS), expected, **CLOSE)
    assert np.abs(expected - torch_side.logits(name, adapter=False)).max() > 0.1
    assert set(jaxadapt.read_config(tmp_path).target_modules) == set(real.specimen(name).targets)
    kept = harness.make_peft(torch_side.base(name), harness.LoraConfig(**jaxadapt.read_config(tmp_path).to_dict()))
    keys = set(harness.specs(harness.get_peft_model_state_dict(kept)))
    assert set(jaxadapt.read(tmp_path).tensors) == keys


def trained() -> tuple[Any, np.ndarray]:
    """What gemma trained, by the record, and its logits."""
    found, base = real.recorded(real.TRAINED), specimens.recorded(real.TRAINED)["leaves"]
    leaves = specimen_arrays.base_leaves(real.specimen(real.TRAINED), base) | real.unpacked(
        found["trained"], found["lora"]
    )
    return nest(leaves), np.array(found["after"], np.float32).reshape(*IDS.shape, -1)


@peft
def test_peft_opens_what_gemma_trained(tmp_path):
    tree, expected = trained()
    before = np.array(real.recorded(real.TRAINED)["logits"], np.float32).reshape(expected.shape)
    assert np.abs(expected - before).max() > 0.5
    jaxadapt.save(tree, tmp_path)
    loaded = harness.load(torch_side.base(real.TRAINED), tmp_path)
    assert not loaded.complaints
    np.testing.assert_allclose(harness.logits(loaded.model, IDS), expected, **CLOSE)


@pytest.mark.skipif(real.TRAINED not in HERE, reason="needs gemma, as Python 3.13 has it")
def test_what_gemma_trained_it_computes():
    """The record, by gemma itself; and training there makes it again, as far as rounding goes."""
    made, (tree, expected) = real.make(real.TRAINED), trained()
    params = jax.tree.map(jnp.asarray, tree.get("params", tree))
    np.testing.assert_allclose(np.asarray(made.logits({"params": params})), expected, **CLOSE)
    np.testing.assert_allclose(np.asarray(made.logits(real.train(made))), expected, rtol=0, atol=1e-2)


@live
def test_they_compute_what_peft_computes(name: str, tmp_path):
    """A PEFT file whose As all differ, into a tree that shares some: side by side, at twice the rank."""
    specimen = real.specimen(name)
    shapes = specimens.recorded(name)["leaves"] if name in RECORDED else real.jax_side.side(specimen).shapes
    specimen_arrays.write_adapter(specimen, shapes, tmp_path)
    if importlib.util.find_spec("peft") is not None:
        expected = torch_side.logits(name, adapter=True)
    else:
        expected = np.array(specimens.recorded(name)["logits"], np.float32).reshape(*IDS.shape, -1)
    fused = "gemma" in name
    rank = real.RANK * (3 if name.endswith("mha") else 2 if fused else 1)
    made = real.make(name, rank)
    more = {"on_shared": "concat"} if fused else {}
    if fused:
        with pytest.raises(jaxadapt.MismatchError, match="kv_einsum|qkv_einsum"):
            jaxadapt.load(tmp_path, LoraTree(made.tree, **made.told), keymap=real.specimen(name).keymap)
    # gemma has no scale, and Tunix and MaxText here another than the file's: 5/3 against 2.
    with pytest.warns(UserWarning, match="rounded once"):
        tree = jaxadapt.load(tmp_path, LoraTree(made.tree, **made.told, **more), keymap=real.specimen(name).keymap)
    np.testing.assert_allclose(np.asarray(made.logits(tree)), expected, **CLOSE)


@pytest.mark.parametrize("name", [name for name in real.NAMES if name.startswith("keras")])
def test_keras_computes_what_peft_computes(name: str, tmp_path):
    """A PEFT file into heads with an A each: the recorded leaves, and the logits keras had with them."""
    specimen, found = real.specimen(name), real.recorded(name)
    shapes = specimens.recorded(name)["leaves"]
    specimen_arrays.write_adapter(specimen, shapes, tmp_path)
    if importlib.util.find_spec("peft") is not None:
        expected = torch_side.logits(name, adapter=True)
        np.testing.assert_allclose(found["loaded"], expected.ravel(), **CLOSE)
    tree, _ = theirs(name)
    wide = {path: wider(path, x) for path, x in flat(tree).items()}
    as_filed = {"lora_alpha": 5.0}  # of rank 3: the file's own scale
    differ = r'(?s)one B for all heads.*query.*rank=12, and pass .*on_shared="concat'
    with pytest.raises(jaxadapt.MismatchError, match=differ):
        jaxadapt.load(tmp_path, LoraTree(tree, **as_filed))
    with pytest.raises(jaxadapt.MismatchError, match=r"(?s)rank is too small.*query.*rank 3, needed 12.*rank=12"):
        jaxadapt.load(tmp_path, LoraTree(tree, on_shared="concat", **as_filed))
    with pytest.warns(UserWarning, match="rounded once"):
        back = jaxadapt.load(tmp_path, LoraTree(nest(wide), lora_alpha=4 * real.ALPHA, on_shared="concat"))
    assert real.crcs({"params": back}) == found["crc"]
    again = jaxadapt.to_peft(LoraTree(back, lora_alpha=4 * real.ALPHA, on_shared="concat"))
    for key, x in jaxadapt.read(tmp_path).tensors.items():  # at the larger rank, the same product
        other = key.replace("lora_A", "lora_B")
        if key != other:
            delta = again.tensors[other] @ again.tensors[key] * 2
            np.testing.assert_allclose(delta, jaxadapt.read(tmp_path).tensors[other] @ x * 5 / 3, rtol=0, atol=5e-6)


def wider(path: str, x: Any) -> Any:
    """As a model with four times the rank has it."""
    if path.endswith("lora_kernel_a"):
        return values(path, (*x.shape[:-1], 4 * x.shape[-1]))
    return values(path, (4 * x.shape[0], *x.shape[1:])) if path.endswith("lora_kernel_b") else np.asarray(x)


@pytest.mark.parametrize("name", [name for name in real.NAMES if name.startswith("keras")])
def test_an_a_for_each_head(name: str, tmp_path):
    """Refused where they differ; side by side, and back bit for bit; at the same rank where they are one."""
    tree, _ = theirs(name)
    differ = r'(?s)one A for all heads.*query.lora_kernel_a.*on_shared="concat"'
    with pytest.raises(jaxadapt.MismatchError, match=differ):
        jaxadapt.save(LoraTree(tree, lora_alpha=real.ALPHA), tmp_path / "no")
    with pytest.raises(jaxadapt.ConfigError, match="stores no alpha"):
        jaxadapt.save(LoraTree(tree, on_shared="concat"), tmp_path / "no")
    assert not (tmp_path / "no").exists()
    leaves = flat(tree)
    table = families.get_family(real.specimen(name).table)
    for path, x in leaves.items():
        if path.endswith("lora_kernel_a"):
            left = table.match(path.replace("lora_kernel_a", "kernel")).weight.left
            heads = left.index("n" if "n" in left else "k") if {"n", "k"} & set(left) else 0
            if "attention_output" not in path and len(left) == 3:
                leaves[path] = np.repeat(np.take(x, [0], heads), x.shape[heads], heads)
    for one, mine, more in ((False, flat(tree), {"on_shared": "concat"}), (True, leaves, {})):
        jaxadapt.save(LoraTree(nest(mine), lora_alpha=real.ALPHA, **more), tmp_path)
        config = jaxadapt.read_config(tmp_path)
        assert dict(config.rank_pattern) == ({} if one else dict.fromkeys(("k_proj", "v_proj"), 6) | {"q_proj": 12})
        zeros = {path: np.zeros_like(x) if "lora_" in path else x for path, x in mine.items()}
        back = flat(jaxadapt.load(tmp_path, LoraTree(nest(zeros), lora_alpha=real.ALPHA)))
        for path, x in mine.items():
            np.testing.assert_array_equal(back[path], x, err_msg=path)
    adapter = jaxadapt.extract(LoraTree(nest(leaves), lora_alpha=real.ALPHA))
    base = {path: x for path, x in leaves.items() if "lora_" not in path}
    for path, x in flat(jaxadapt.merge(nest(base), adapter)).items():
        at = path.removesuffix("kernel") + "lora_kernel_"
        delta = np.einsum("...r,rh->...h", leaves[f"{at}a"], leaves[f"{at}b"]) if f"{at}a" in leaves else 0
        np.testing.assert_allclose(x, base[path] + 2 * delta, rtol=0, atol=2e-5, err_msg=path)


@live
def test_trained_and_loaded_again(name: str, tmp_path):
    """A few steps of gradient descent on the LoRA leaves; a fresh model with the file loaded computes the same."""
    made = real.make(name)

    def loss(tree: Any) -> Any:
        return -jax.nn.log_softmax(made.logits(tree))[..., 3].mean()

    before = np.asarray(made.logits(made.tree))
    if isinstance(made.tree, nnx.Module):
        tree = made.tree
        grads = nnx.grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(tree)
        state = nnx.state(tree, nnx.LoRAParam)
        nnx.update(tree, jax.tree.map(lambda x, g: x - 0.1 * g, state, grads))
    else:
        lora = {path: x for path, x in flat(made.tree["params"]).items() if ".lora." in path}
        base = {path: x for path, x in flat(made.tree["params"]).items() if ".lora." not in path}
        grads = jax.grad(lambda lora: loss({"params": nest({**base, **lora})}))(lora)
        tree = {"params": nest({**base, **{path: lora[path] - 0.1 * g for path, g in grads.items()}})}
    jaxadapt.save(LoraTree(tree, **made.told), tmp_path, keymap=real.specimen(name).keymap)
    fresh = real.make(name)
    again = jaxadapt.load(tmp_path, LoraTree(fresh.tree, **fresh.told), keymap=real.specimen(name).keymap)
    np.testing.assert_array_equal(fresh.logits(again), made.logits(tree))
    assert np.abs(np.asarray(fresh.logits(again)) - before).max() > 1e-3


@pytest.mark.parametrize("name", ["gemma-gemma3"])
def test_its_adapter_of_ours_computes_the_same(name: str):
    """gemma's LoRA extracted into our layout, one A a part, and run by our own wrapper on the plain model."""
    if not real.here(name):
        tree, _ = theirs(name)
        adapter = jaxadapt.extract(tree)
        assert {a.shape[0] for path, a in adapter.flat().items() if "kv_einsum" in path or "gating" in path} == {2}
        return
    made = real.make(name)
    adapter = jaxadapt.extract(made.tree)
    side = real.jax_side.side(real.specimen(name))
    base = jax.tree.map(jnp.asarray, nest(specimen_arrays.base_leaves(real.specimen(name), side.shapes)))
    module = jaxadapt.adapt(side.module, adapter.config)
    found = side.run(module, {"params": base, **adapter.collection})
    np.testing.assert_allclose(found, made.logits(made.tree), **CLOSE)


def test_the_tree_of_keras_paths_with_slashes_is_read():
    """`{v.path: v.value for v in backbone.variables}`, as docs/libraries.md shows it."""
    shapes = specimens.recorded("keras-llama")["leaves"] | real.recorded("keras-llama")["lora"]
    dotted = {path: specimens.values(path, shape) for path, shape in shapes.items()}
    wanted = jaxadapt.to_peft(LoraTree(dotted, lora_alpha=6, on_shared="concat")).tensors
    tree = {path.replace(".", "/"): x for path, x in dotted.items()}
    found = jaxadapt.to_peft(LoraTree(tree, lora_alpha=6, on_shared="concat")).tensors
    assert found.keys() == wanted.keys()
    for key, x in wanted.items():
        np.testing.assert_array_equal(found[key], x)


@pytest.mark.parametrize("names", [("kernel_lora_a", "kernel_lora_bb"), ("loraA", "loraB")])
def test_a_tree_that_is_nearly_a_dialects_is_named(names: tuple[str, str], tmp_path):
    tree = {"q": {"kernel": np.ones((4, 4)), names[0]: np.ones((4, 2)), names[1]: np.ones((2, 4))}}
    with pytest.raises(jaxadapt.AttachError, match=rf"(?s)match no known dialect.*q\.{names[0]}.*q\.{names[1]}"):
        jaxadapt.save(LoraTree(tree, lora_alpha=2), tmp_path)
