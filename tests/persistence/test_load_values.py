"""`load` of a value that `read` or `to_peft` returned, and of a model in a `LoraTree`."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

import jaxadapt
from jaxadapt.models import LoraTree
from tests.support import small
from tests.support.twins import layers

EINSUM = next(case for case in layers.NNX if case.name == "own_einsum")


def test_a_value_is_loaded_as_its_file(tmp_path: Path):
    jaxadapt.save(small.trained(seed=3), tmp_path)
    from_file = jaxadapt.load(tmp_path, small.net())
    for value in (jaxadapt.read(tmp_path), jaxadapt.to_peft(small.trained(seed=3))):
        np.testing.assert_array_equal(jaxadapt.load(value, small.net())(small.X), from_file(small.X))
    same, in_linen = (jaxadapt.load(each, small.base()) for each in (tmp_path, jaxadapt.read(tmp_path)))
    jax.tree.map(np.testing.assert_array_equal, same, in_linen)


def test_a_value_is_loaded_under_any_name(tmp_path: Path):
    jaxadapt.save(small.trained(), tmp_path)
    model = jaxadapt.load(jaxadapt.read(tmp_path), small.net(), name="second")
    assert jaxadapt.extract(model, name="second").config.r == small.LORA.r


def test_the_fingerprint_of_a_value_is_compared(tmp_path: Path):
    base = small.base()
    jaxadapt.save({**base, **small.adapter().collection}, tmp_path)
    other = jax.tree.map(lambda x: x + 1, base)
    value = jaxadapt.read(tmp_path)
    jaxadapt.load(value, base, strict="base")
    with pytest.warns(UserWarning, match="was trained on another base"):
        jaxadapt.load(value, other)
    with pytest.raises(jaxadapt.MismatchError, match="was trained on another base"):
        jaxadapt.load(value, other, strict="base")
    with pytest.raises(jaxadapt.MismatchError, match='strict="base": cannot compare'):
        jaxadapt.load(dataclasses.replace(value, fingerprint=None), base, strict="base")
    jaxadapt.save(small.adapter(), tmp_path / "orbax", format="orbax")
    with pytest.raises(jaxadapt.MismatchError, match="has no fingerprint"):
        jaxadapt.load(tmp_path / "orbax", base, strict="base")


def test_an_example_tells_the_layout_of_a_fresh_custom_layer(tmp_path: Path):
    config = jaxadapt.LoraConfig(r=2, target_modules=["layer"], init_lora_weights=False)
    x = layers.x()
    adapted = jaxadapt.adapt(EINSUM.make(), config, rngs=nnx.Rngs(1), example=[x])
    jaxadapt.save(adapted, tmp_path)
    with pytest.raises(jaxadapt.KeyMapError, match="example="):
        jaxadapt.load(tmp_path, EINSUM.make())
    loaded = jaxadapt.load(tmp_path, LoraTree(EINSUM.make(), example=[x]))
    found = jaxadapt.from_peft(jaxadapt.read(tmp_path), LoraTree(EINSUM.make(), example=[x]))
    for adapter in (jaxadapt.extract(loaded), found):
        jax.tree.map(np.testing.assert_array_equal, adapter.params, jaxadapt.extract(adapted).params)


def test_options_without_effect_are_refused(tmp_path: Path):
    jaxadapt.save(small.adapter(), tmp_path)
    value = jaxadapt.read(tmp_path, change_base=True)
    with pytest.raises(jaxadapt.MismatchError, match='expected True, False or "base"'):
        jaxadapt.load(tmp_path, small.net(), strict="bases")
    with pytest.raises(jaxadapt.AttachError, match="only load compares the base"):
        jaxadapt.from_peft(jaxadapt.read(tmp_path), small.base(), strict="base")  # pyright: ignore[reportArgumentType]
    with pytest.raises(jaxadapt.AttachError, match="from_peft changes no base"):
        jaxadapt.from_peft(value, small.base())
    with pytest.raises(jaxadapt.AttachError, match="does not change its base"):
        jaxadapt.load(value, small.net())
    leaves = {"q": {"kernel": np.ones((4, 6)), "kernel_lora_a": np.ones((4, 2)), "kernel_lora_b": np.ones((2, 6))}}
    with pytest.raises(jaxadapt.AttachError, match="fit_vocabulary=True: no effect on parameters of qwix"):
        jaxadapt.load(jaxadapt.read(tmp_path, fit_vocabulary=True), LoraTree(leaves, lora_alpha=4))
    with pytest.raises(jaxadapt.AttachError, match="config: applies to a tree that is read"):
        jaxadapt.load(tmp_path, LoraTree(small.net(), config=small.LORA))
    with pytest.raises(jaxadapt.AttachError, match="example: applies to a model that load or from_peft fills"):
        jaxadapt.save(LoraTree(small.trained(), example=[small.X]), tmp_path)
    with pytest.raises(jaxadapt.AttachError, match="example: applies to a model that load or from_peft fills"):
        jaxadapt.inject(LoraTree(small.trained(), example=[small.X]), small.adapter())
    with pytest.raises(jaxadapt.AttachError, match="config: applies to a tree that is read"):
        jaxadapt.from_peft(jaxadapt.read(tmp_path), LoraTree(small.base()["params"], config=small.LORA))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("damaged", [False, True])
def test_tensors_that_fill_whole_blocks_of_memory(tmp_path: Path, damaged: bool, dtype: str):
    """Tensors of a multiple of 64 bytes that follow one another in the file are read by one call."""
    base = {name: {"kernel": jax.numpy.zeros((32, 64))} for name in "abc"}
    config = jaxadapt.LoraConfig(r=8, target_modules=["a", "b", "c"], init_lora_weights=False)
    adapter = jaxadapt.init(base, config, key=jax.random.key(0), dtype=dtype)
    if damaged:
        b = adapter.params["b"]["kernel"]["lora_B"]
        adapter.params["b"]["kernel"]["lora_B"] = b.at[1, 2].set(np.nan)
    jaxadapt.save(adapter, tmp_path)
    with pytest.warns(UserWarning, match=r"1 value.*\n.*b\.lora_B") if damaged else contextlib.nullcontext():
        loaded = jaxadapt.load(tmp_path, {"params": base})["lora"]["default"]
    for name in "abc":
        for tensor, value in adapter.params[name]["kernel"].items():
            found = loaded[name]["kernel"][tensor]
            assert found.dtype == dtype
            np.testing.assert_array_equal(np.asarray(found, np.float32), np.asarray(value, np.float32))


@pytest.mark.parametrize(
    ("value", "version", "warns"), [(3, "9.0.0", True), (None, "9.0.0", False), (3, "0.21.2", False)]
)
def test_fields_of_a_newer_peft_are_a_warning(tmp_path: Path, value: object, version: str, warns: bool):
    tensors = jaxadapt.to_peft(small.trained())
    config = jaxadapt.Config.from_dict({**tensors.config.to_dict(), "new_field": value, "peft_version": version})
    newer = dataclasses.replace(tensors, config=config)
    with pytest.warns(UserWarning, match=r"PEFT 9\.0\.0.*ignores: new_field") if warns else contextlib.nullcontext():
        jaxadapt.load(newer, small.net())


def test_indices_stay_integers_in_another_dtype(tmp_path: Path):
    base = {"q": {"kernel": jax.numpy.ones((700, 40))}}
    config = jaxadapt.ShiraConfig(r=2, target_modules=["q"])
    jaxadapt.save(jaxadapt.init(base, config, key=jax.random.key(0)), tmp_path)
    key, stored = "base_model.model.q.shira_indices", load_file(tmp_path / "adapter_model.safetensors")
    assert stored[key].max() > 256  # which bfloat16 would round
    read = jaxadapt.read(tmp_path)
    on_device = dataclasses.replace(read, tensors={name: jax.numpy.asarray(x) for name, x in read.tensors.items()})
    for tensors in (read, on_device):
        again = jaxadapt.to_peft(jaxadapt.from_peft(tensors, base, dtype="bfloat16")).tensors
        assert again["base_model.model.q.shira_weight"].dtype == "bfloat16"
        assert again[key].dtype == stored[key].dtype
        np.testing.assert_array_equal(again[key], stored[key])
