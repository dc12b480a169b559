"""Embeddings under their usual names, on which PEFT saves whole layers: tables of tokens and heads, adapted or not."""

from __future__ import annotations

import copy
import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

import torch

import jaxadapt
from tests.support import peft_harness as harness
from tests.support.twins import llama

pytestmark = [pytest.mark.peft, pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")]

IDS = np.random.RandomState(0).randint(0, 64, (2, 7))
TABLE, HEAD = "base_model.model.model.embed_tokens", "base_model.model.lm_head"
FIELDS = {"r": 2, "lora_alpha": 3, "task_type": "CAUSAL_LM"}


@functools.cache
def base(tied: bool = False) -> Any:
    return llama.torch_llama(layers=1, tied=tied)


def adapted(*targets: str, tied: bool = False) -> Any:
    from peft import LoraConfig

    return harness.make_peft(base(tied), LoraConfig(target_modules=list(targets), **FIELDS))


def twin(api: str, tied: bool = False) -> Any:
    return llama.twin_of(base(tied), api)


def load(api: str, folder: Any, tied: bool = False) -> tuple[Any, np.ndarray]:
    """The model or variables after loading, and the output."""
    if api == "nnx":
        model = jaxadapt.load(folder, twin(api, tied))
        return model, np.asarray(model(jnp.asarray(IDS)))
    module, params = twin(api, tied)
    variables = jaxadapt.load(folder, params)
    module = jaxadapt.adapt(module, jaxadapt.extract(variables).config)
    return variables, np.asarray(module.apply(variables, IDS))


@pytest.mark.parametrize("api", ["nnx", "linen"])
def test_the_layers_themselves_go_along_as_pefts_do(api, tmp_path):
    """An adapted table and head bring "base_layer.weight" into the file, and are checked against the base."""
    model = adapted("embed_tokens", "lm_head", "q_proj")
    harness.save(model, tmp_path / "peft")
    theirs = harness.read_tensors(tmp_path / "peft")
    assert {f"{TABLE}.base_layer.weight", f"{HEAD}.base_layer.weight"} <= set(theirs)
    tree, output = load(api, tmp_path / "peft")
    want = harness.logits(model, IDS)
    np.testing.assert_allclose(output, want, rtol=0, atol=1e-5 * abs(want).max())
    jaxadapt.save(tree, tmp_path / "ours")
    mine = harness.read_tensors(tmp_path / "ours")
    assert harness.specs(mine) == harness.specs(theirs)
    assert all(np.array_equal(mine[key], value) for key, value in theirs.items())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = harness.load(base(), tmp_path / "ours")
    assert again.missing == again.unexpected == []
    np.testing.assert_array_equal(harness.logits(again.model, IDS), want)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("api", ["nnx", "linen"])
def test_a_tied_table_is_adapted_in_the_lookup_alone(api, tmp_path):
    """As in PEFT, whose head is another module that shares the weight: its product is the base's own."""
    model = adapted("embed_tokens", "q_proj", tied=True)
    harness.save(model, tmp_path)
    _, output = load(api, tmp_path, tied=True)
    want = harness.logits(model, IDS)
    np.testing.assert_allclose(output, want, rtol=0, atol=1e-5 * abs(want).max())


def test_they_can_be_left_out_or_taken_along(tmp_path):
    harness.save(adapted("embed_tokens", "q_proj"), tmp_path / "peft")
    tree, _ = load("nnx", tmp_path / "peft")
    jaxadapt.save(tree, tmp_path / "without", save_embedding_layers=False)
    assert not any("base_layer" in key for key in harness.read_tensors(tmp_path / "without"))
    jaxadapt.save(jaxadapt.extract(tree), tmp_path / "alone")  # nothing to take them from
    assert not any("base_layer" in key for key in harness.read_tensors(tmp_path / "alone"))
    with pytest.raises(jaxadapt.AttachError, match="an adapter without its model does not hold the embeddings"):
        jaxadapt.save(jaxadapt.extract(tree), tmp_path / "alone", save_embedding_layers=True)
    with pytest.raises(jaxadapt.ConfigError, match="'yes'"):
        jaxadapt.save(tree, tmp_path / "alone", save_embedding_layers="yes")

    harness.save(adapted("q_proj"), tmp_path / "plain", save_embedding_layers=True)
    theirs = harness.read_tensors(tmp_path / "plain")
    assert {f"{TABLE}.weight", f"{HEAD}.weight"} <= set(theirs)
    tree, _ = load("nnx", tmp_path / "plain")
    jaxadapt.save(tree, tmp_path / "all", save_embedding_layers=True)
    assert harness.specs(harness.read_tensors(tmp_path / "all")) == harness.specs(theirs)


def test_other_embeddings_than_the_bases_are_refused(tmp_path):
    """PEFT would put them into the base; here the base stays what it is, and the error says what to do."""
    model = adapted("embed_tokens")
    with torch.no_grad():
        model.base_model.model.model.embed_tokens.base_layer.weight[3] += 1
    harness.save(model, tmp_path)
    for api in ("nnx", "linen"):
        with pytest.raises(
            jaxadapt.MismatchError, match=r"(?s)embed_tokens.base_layer.weight: its values differ.*Replace the base"
        ):
            load(api, tmp_path)
    bigger = copy.deepcopy(base())
    bigger.resize_token_embeddings(70)
    from peft import LoraConfig, get_peft_model

    resized = get_peft_model(bigger, LoraConfig(target_modules=["q_proj"], **FIELDS))
    harness.save(resized, tmp_path / "resized", save_embedding_layers=True)
    with pytest.raises(
        jaxadapt.MismatchError, match=rf"{TABLE}.weight: expected \[64, \d+\] as in the base, found \[70, \d+\]"
    ):
        load("nnx", tmp_path / "resized")


def test_without_values_they_are_taken_on_trust(tmp_path):
    harness.save(adapted("embed_tokens"), tmp_path)
    _, params = twin("linen")
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    with pytest.warns(UserWarning, match="has only shapes here"):
        assert jaxadapt.load(tmp_path, shapes)["lora"]
