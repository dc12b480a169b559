"""TRAINABLE_TOKENS on tied and untied embeddings, beside PEFT's files and outputs."""

from __future__ import annotations

import functools
import warnings
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxadapt
from jaxadapt import AttachError, ConfigError, MismatchError, TrainableTokensConfig
from jaxadapt.export import merge_files

pytest.importorskip("torch")
pytest.importorskip("peft")

import torch

from tests.support import peft_harness as harness
from tests.support.twins import llama

pytestmark = pytest.mark.peft
IDS = np.array([[3, 1, 7, 20, 5]])
TOKENS = [3, 1, 20]
HEAD, TABLE = (f"base_model.model.{name}.trainable_tokens_delta" for name in ("lm_head", "model.embed_tokens"))


@functools.cache
def base(tied: bool) -> Any:
    return llama.torch_llama(layers=1, tied=tied)


def saved(tied: bool, folder: Path, **fields: Any) -> np.ndarray:
    """Save PEFT's adapter with noise on its rows, and return PEFT's logits."""
    from peft import TrainableTokensConfig as Theirs

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's advice on tied weights
        model = harness.make_peft(base(tied), Theirs(token_indices=TOKENS, task_type="CAUSAL_LM", **fields))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        model.save_pretrained(str(folder))
    return harness.logits(model, IDS)


def ours(tied: bool) -> Any:
    return llama.twin_of(base(tied), "nnx")


@pytest.mark.parametrize(
    ("tied", "targets", "keys"),
    [
        (False, None, {TABLE}), (False, ["lm_head"], {HEAD}), (False, ["embed_tokens", "lm_head"], {TABLE, HEAD}),
        (True, None, {TABLE, HEAD}),
    ],
)  # fmt: skip
def test_pefts_file_gives_its_logits_and_the_same_file(tied: bool, targets: Any, keys: set[str], tmp_path: Path):
    """In a tied model PEFT writes the rows under both names; the file that `save` writes has both too."""
    want = saved(tied, tmp_path / "peft", target_modules=targets)
    theirs = jaxadapt.read(tmp_path / "peft").tensors
    assert set(theirs) == keys
    model = jaxadapt.load(tmp_path / "peft", ours(tied))
    np.testing.assert_allclose(model(jnp.asarray(IDS)), want, rtol=1e-5, atol=1e-5 * abs(want).max())
    jaxadapt.save(model, tmp_path / "ours")
    again = jaxadapt.read(tmp_path / "ours").tensors
    assert set(again) == keys
    for key in keys:
        np.testing.assert_array_equal(again[key], theirs[key])
    merged = jaxadapt.merge(model)
    np.testing.assert_allclose(merged(jnp.asarray(IDS)), want, rtol=1e-5, atol=1e-5 * abs(want).max())


def test_a_tied_file_needs_one_name_and_equal_values(tmp_path: Path):
    saved(True, tmp_path)
    file = jaxadapt.read(tmp_path)
    once = jaxadapt.PeftTensors(file.config, {TABLE: file.tensors[TABLE]})
    whole, short = (jaxadapt.from_peft(tensors, ours(True)).flat() for tensors in (file, once))
    assert whole.keys() == short.keys()
    other = {**file.tensors, HEAD: np.asarray(file.tensors[HEAD]) + 1}
    with pytest.raises(MismatchError, match="the head is tied to the embedding"):
        jaxadapt.from_peft(jaxadapt.PeftTensors(file.config, other), ours(True))
    # Without the base an adapter does not tell if its head is tied.
    adapter = jaxadapt.from_peft(file, ours(True))
    assert set(jaxadapt.to_peft(adapter).tensors) == {TABLE}


def test_the_default_target_is_the_token_embedding():
    model = jaxadapt.adapt(ours(False), TrainableTokensConfig(token_indices=TOKENS), rngs=nnx.Rngs(0))
    assert set(jaxadapt.to_peft(jaxadapt.extract(model)).tensors) == {TABLE}
    np.testing.assert_array_equal(model(jnp.asarray(IDS)), ours(False)(jnp.asarray(IDS)))
    random = jaxadapt.adapt(
        ours(False), TrainableTokensConfig(token_indices=TOKENS, init_weights=False), rngs=nnx.Rngs(0)
    )
    (rows,) = jaxadapt.extract(random).flat().values()
    assert 0.5 < float(rows.std()) < 1.5  # PEFT's: normal with deviation 1


def test_a_merge_of_files(tmp_path: Path):
    want = saved(False, tmp_path / "peft")
    base(False).save_pretrained(str(tmp_path / "base"))
    merge_files.merge_folder(tmp_path / "base", tmp_path / "peft", tmp_path / "merged")
    merged = type(base(False)).from_pretrained(str(tmp_path / "merged")).eval()
    np.testing.assert_allclose(harness.logits(merged, IDS), want, rtol=1e-6, atol=1e-6)


def test_bad_tokens_and_targets_are_named():
    with pytest.raises(ConfigError, match="token_indices: expected each token once"):
        TrainableTokensConfig(token_indices=[1, 1])
    with pytest.raises(ConfigError, match="token_indices"):
        TrainableTokensConfig(token_indices=[-1])
    with pytest.raises(ConfigError, match="expected the tokens to train"):
        jaxadapt.adapt(ours(False), TrainableTokensConfig(), rngs=nnx.Rngs(0))
    with pytest.raises(ConfigError, match="outside the vocabulary of 64"):
        jaxadapt.adapt(ours(False), TrainableTokensConfig(token_indices=[2, 64]), rngs=nnx.Rngs(0))
    with pytest.raises(ConfigError, match="token_indices applies only to a token embedding or a head"):
        jaxadapt.adapt(ours(False), TrainableTokensConfig(token_indices=[2], target_modules=["norm"]), rngs=nnx.Rngs(0))


@pytest.mark.parametrize("tied", [False, True])
def test_two_adapters_with_other_rows_are_active_together_as_peft_merges_them(tied: bool, tmp_path: Path):
    from peft import LoraConfig

    def config(tokens: list[int]) -> Any:
        return LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=tokens, task_type="CAUSAL_LM")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's advice on tied weights
        theirs = harness.make_peft(base(tied), config([3, 1]))
        theirs.add_adapter("other", config([20, 5]))
        with torch.no_grad():
            for name, parameter in theirs.named_parameters():
                if ".lora_" in name or "trainable_tokens_delta" in name:
                    parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        theirs.save_pretrained(str(tmp_path))
        # PEFT refuses `set_adapter` with both beside LoRA (a TODO in its `utils/other.py`), but merges both.
        merged = theirs.merge_and_unload(adapter_names=["default", "other"])
    want = harness.logits(merged, IDS)
    close = {"rtol": 1e-5, "atol": 1e-5 * abs(want).max()}
    model = jaxadapt.load(tmp_path, ours(tied))
    jaxadapt.load(tmp_path, model, name="other")
    jaxadapt.activate(model, ("default", "other"))
    np.testing.assert_allclose(model(jnp.asarray(IDS)), want, **close)
    np.testing.assert_allclose(jaxadapt.merge(model)(jnp.asarray(IDS)), want, **close)

    module, variables = llama.twin_of(base(tied), "linen")
    for name in ("default", "other"):
        variables = jaxadapt.load(tmp_path, variables, name=name)
    configs = {name: jaxadapt.extract(variables, name=name).config for name in ("default", "other")}
    adapted = jaxadapt.adapt(jaxadapt.adapt(module, configs["default"]), configs["other"], name="other")
    adapted = jaxadapt.activate(adapted, ("default", "other"))
    np.testing.assert_allclose(adapted.apply(variables, jnp.asarray(IDS)), want, **close)


def test_rows_cannot_be_unmerged_and_two_adapters_of_one_row_not_be_active():
    model = jaxadapt.adapt(ours(False), TrainableTokensConfig(token_indices=TOKENS), rngs=nnx.Rngs(0))
    adapter = jaxadapt.extract(model)
    _, variables = llama.twin_of(base(False), "linen")
    with pytest.raises(AttachError, match="cannot unmerge token_indices"):
        jaxadapt.unmerge(variables["params"], jaxadapt.from_peft(jaxadapt.to_peft(adapter), variables["params"]))
    jaxadapt.adapt(model, TrainableTokensConfig(token_indices=[9, 20]), rngs=nnx.Rngs(0), name="b")
    with pytest.raises(AttachError, match="several hold a copy of the same weight, or of the same rows"):
        jaxadapt.activate(model, ("default", "b"))
