"""A head that shares the table of tokens' weight: two modules in PEFT, one leaf here."""

from __future__ import annotations

import copy
import dataclasses
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
from peft.utils.save_and_load import get_peft_model_state_dict

import jaxadapt
from tests.support import peft_harness as harness
from tests.support.twins import gpt2, llama, trees
from tests.support.twins.tiny import Net

pytestmark = [pytest.mark.peft, pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")]

IDS = np.random.RandomState(0).randint(0, 64, (2, 7))
APIS = ["nnx", "linen"]
TABLE, HEAD = "base_model.model.model.embed_tokens", "base_model.model.lm_head"
TIED = {"ensure_weight_tying": True}
CASES: dict[str, dict[str, Any]] = {
    "saved_table": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], **TIED},
    "saved_head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], **TIED},
    "saved_both": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"], **TIED},
    "table": {"target_modules": ["q_proj", "embed_tokens"], **TIED},
    "head": {"target_modules": ["q_proj", "lm_head"], **TIED},
    "both": {"target_modules": ["q_proj", "lm_head", "embed_tokens"], **TIED},
    "expression": {"target_modules": r"(.*\.q_proj|.*embed_tokens|lm_head)", **TIED},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [1, 5], **TIED},
    "apart_table": {"target_modules": ["q_proj", "embed_tokens"]},
    "apart_saved": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "apart_tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [1, 5]},
}


@functools.cache
def base() -> Any:
    return llama.torch_llama(layers=1, tied=True)


def wrapped(fields: dict[str, Any]) -> Any:
    from peft import LoraConfig

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's advice on tied weights
        model = harness.make_peft(base(), LoraConfig(r=2, lora_alpha=3, task_type="CAUSAL_LM", **fields))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad and "lora_" not in name:
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model


@functools.cache
def theirs(name: str) -> tuple[Any, np.ndarray]:
    model = wrapped(CASES[name])
    return model, harness.logits(model, IDS)


def ours(api: str, folder: Any) -> tuple[Any, np.ndarray]:
    if api == "nnx":
        model = jaxadapt.load(folder, llama.twin_of(base(), api))
        return model, np.asarray(model(jnp.asarray(IDS)))
    module, params = llama.twin_of(base(), api)
    variables = jaxadapt.load(folder, params)
    module = jaxadapt.adapt(module, jaxadapt.extract(variables).config)
    return variables, np.asarray(module.apply(variables, IDS))


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("name", CASES)
def test_pefts_file_computes_here_what_it_computes_there(name, api, tmp_path):
    model, want = theirs(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        harness.save(model, tmp_path / "peft")
    tree, output = ours(api, tmp_path / "peft")
    np.testing.assert_allclose(output, want, rtol=0, atol=1e-5 * abs(want).max())
    jaxadapt.save(tree, tmp_path / "ours")
    mine, before = (harness.read_tensors(tmp_path / who) for who in ("ours", "peft"))
    assert harness.specs(mine) == harness.specs(before)
    assert all(np.array_equal(mine[key], value) for key, value in before.items())
    assert harness.read_json(tmp_path / "ours") == harness.read_json(tmp_path / "peft")


@pytest.mark.parametrize("name", CASES)
def test_a_fresh_adapter_has_pefts_keys_and_configuration(name, tmp_path):
    model, _ = theirs(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        harness.save(model, tmp_path / "peft")
    config = jaxadapt.LoraConfig(r=2, lora_alpha=3, task_type="CAUSAL_LM", **CASES[name])
    _, params = llama.twin_of(base(), "linen")
    adapter = jaxadapt.init(params["params"], config, key=jax.random.key(0))
    jaxadapt.save({**params, **adapter.collection}, tmp_path / "ours")
    mine, before = (harness.read_tensors(tmp_path / who) for who in ("ours", "peft"))
    assert harness.specs(mine) == harness.specs(before)
    assert harness.read_json(tmp_path / "ours") == harness.read_json(tmp_path / "peft")


def test_a_tied_adapter_merges_into_both(tmp_path):
    """PEFT's merge adds the product twice then (once for each name), and its own output changes; here it does not."""
    model, want = theirs("table")
    harness.save(model, tmp_path)
    module, params = llama.twin_of(base(), "linen")
    variables = jaxadapt.load(tmp_path, params)
    merged = jaxadapt.merge(params["params"], jaxadapt.extract(variables))
    output = np.asarray(module.apply({"params": merged}, IDS))
    np.testing.assert_allclose(output, want, rtol=0, atol=1e-5 * abs(want).max())


def test_a_copy_for_the_lookup_alone_merges_into_nothing(tmp_path):
    model, _ = theirs("apart_saved")
    harness.save(model, tmp_path)
    _, params = llama.twin_of(base(), "linen")
    adapter = jaxadapt.extract(jaxadapt.load(tmp_path, params))
    with pytest.raises(jaxadapt.AttachError, match="the weight is also the head"):
        jaxadapt.merge(params["params"], adapter)


def test_names_that_say_two_things_of_one_weight_are_refused(tmp_path):
    model, _ = theirs("table")
    harness.save(model, tmp_path)
    tensors = jaxadapt.read(tmp_path)
    key = f"{HEAD}.lora_B.weight"
    other = jaxadapt.PeftTensors(tensors.config, {**tensors.tensors, key: tensors.tensors[key] + 1})
    _, params = llama.twin_of(base(), "linen")
    with pytest.raises(jaxadapt.MismatchError, match=rf"(?s)differ.*{key} and {TABLE}.lora_embedding_A"):
        jaxadapt.from_peft(other, params)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("names", [["lm_head"], ["embed_tokens", "lm_head"]])
def test_a_copy_of_the_head_that_the_model_has_no_place_for_is_told_of(names, tmp_path):
    """PEFT trains a second copy there, and cannot open a file that lacks it."""
    from peft import LoraConfig, PeftModel

    fields = {"r": 2, "target_modules": ["q_proj"], "modules_to_save": names, "task_type": "CAUSAL_LM"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's advice on tied weights
        assert f"{HEAD}.weight" in get_peft_model_state_dict(harness.make_peft(base(), LoraConfig(**fields)))
    _, params = llama.twin_of(base(), "linen")
    with pytest.warns(UserWarning, match="'lm_head' matches no module of its own.*set ensure_weight_tying=True"):
        adapter = jaxadapt.init(params["params"], jaxadapt.LoraConfig(**fields), key=jax.random.key(0))
    jaxadapt.save(adapter, tmp_path)
    with pytest.raises(KeyError, match=r"lm_head\.weight"):
        PeftModel.from_pretrained(copy.deepcopy(base()), str(tmp_path))


def test_a_model_that_ties_nothing_is_refused():
    _, params = llama.twin_of(llama.torch_llama(layers=1, tied=False), "linen")
    config = jaxadapt.LoraConfig(target_modules=["embed_tokens"], **TIED)
    with pytest.raises(jaxadapt.ConfigError, match="this model has no tied weights"):
        jaxadapt.init(params["params"], config)


@pytest.mark.parametrize("fields", [{"use_dora": True}, {"lora_dropout": 0.1}])
def test_what_would_not_be_one_adapter_is_refused(fields):
    _, params = llama.twin_of(base(), "linen")
    config = jaxadapt.LoraConfig(target_modules=["embed_tokens"], **TIED, **fields)
    with pytest.raises(jaxadapt.ConfigError, match="cannot be combined with ensure_weight_tying"):
        jaxadapt.init(params["params"], config)


def test_it_warns_where_it_has_no_effect():
    _, params = llama.twin_of(base(), "linen")
    with pytest.warns(UserWarning, match="ensure_weight_tying=True has no effect"):
        jaxadapt.init(params["params"], jaxadapt.LoraConfig(target_modules=["q_proj"], **TIED))


@pytest.mark.filterwarnings("ignore:You have requested `ensure_weight_tying`")
@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["c_attn", "wte"]},
        {"target_modules": r".*(c_attn|wte)"},
        {"target_modules": ["c_attn"], "modules_to_save": ["wte"]},
    ],
)
def test_peft_ties_no_embedding_of_another_name(fields, api, tmp_path):
    """GPT-2's table is called wte, which PEFT does not know: it adapts the lookup alone, and so do we."""
    from peft import LoraConfig

    torch_model, twin = gpt2.make_gpt2(api, layers=1)
    options = {"r": 2, "lora_alpha": 3, "fan_in_fan_out": True, "task_type": "CAUSAL_LM", **fields, **TIED}
    model = harness.make_peft(torch_model, LoraConfig(**options))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "modules_to_save" in name:
                p.add_(0.3)
    want = harness.logits(model, IDS)
    harness.save(model, tmp_path / "peft")
    with pytest.warns(UserWarning, match="ensure_weight_tying=True has no effect: .* the only names that PEFT ties"):
        tree = jaxadapt.load(tmp_path / "peft", twin if api == "nnx" else twin[1])
    if api == "nnx":
        output = np.asarray(tree(jnp.asarray(IDS)))
    else:
        output = np.asarray(jaxadapt.adapt(twin[0], jaxadapt.extract(tree).config).apply(tree, IDS))
    np.testing.assert_allclose(output, want, rtol=0, atol=1e-5 * abs(want).max())
    jaxadapt.save(tree, tmp_path / "ours")
    loaded = harness.load(torch_model, tmp_path / "ours")
    assert loaded.missing == loaded.unexpected == []
    np.testing.assert_allclose(harness.logits(loaded.model, IDS), want, rtol=0, atol=1e-5 * abs(want).max())


@pytest.mark.parametrize("api", APIS)
def test_a_copied_table_that_may_be_the_head_is_told_of(api, tmp_path):
    """No keymap tells that the head is tied; with one that does, the copy is PEFT's: of the lookup alone."""
    from peft import LoraConfig, get_peft_model

    net = Net(emb=True, tied=True)
    torch_net = net.torch().eval()
    model = get_peft_model(torch_net, LoraConfig(r=2, target_modules=["lin"], modules_to_save=["emb"])).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))))
        want = model(torch.from_numpy(net.input())).numpy()
    harness.save(model, tmp_path)
    unnamed = {"params": trees.nest(net.leaves("nnx", None, net.torch()))}
    with pytest.warns(UserWarning, match=r"modules_to_save copies emb\.embedding, .* PEFT copies the lookup only"):
        jaxadapt.load(tmp_path, net.nnx(net.torch()) if api == "nnx" else unnamed, keymap="generic")
    keymap = dataclasses.replace(net.table(api), tied=(("head.weight", "emb.weight"),))
    if api == "nnx":
        output = jaxadapt.load(tmp_path, net.nnx(net.torch()), keymap=keymap)(net.ours(net.input()))
    else:
        tree = jaxadapt.load(tmp_path, {"params": trees.nest(net.leaves(api, None, net.torch()))}, keymap=keymap)
        module = jaxadapt.adapt(net.linen(), jaxadapt.extract(tree).config, keymap=keymap)
        output = module.apply(tree, net.ours(net.input()))
    np.testing.assert_allclose(output, want, rtol=0, atol=1e-5 * abs(want).max())
