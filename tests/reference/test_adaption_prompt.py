"""ADAPTION_PROMPT as PEFT has it on Llama: logits, files in both directions, gradients; what is refused.

float32; the tolerance 1e-5 of the largest value covers the order of the sums, which differs between the libraries.
"""

from __future__ import annotations

import copy
import functools
import json
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

import peft
import torch
from safetensors.numpy import load_file

import jaxadapt
from jaxadapt import AttachError, ConfigError, TargetError
from jaxadapt.methods import METHODS
from tests.support import prompts
from tests.support.prompts import IDS, RIGHT, Case, close, loaded, torch_base
from tests.support.twins import llama

pytestmark = pytest.mark.peft

FIELDS = {"adapter_len": 4, "adapter_layers": 2, "task_type": "CAUSAL_LM"}
CASE = Case("AdaptionPromptConfig", tuple(FIELDS.items()))
CONFIG = jaxadapt.AdaptionPromptConfig(**FIELDS)


@functools.cache
def peft_model() -> Any:
    torch.manual_seed(3)
    model = peft.get_peft_model(copy.deepcopy(torch_base()), peft.AdaptionPromptConfig(**FIELDS)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "adaption_gate" in name:
                parameter.fill_(0.7 if ".1." in name else -1.3)
    return model


def run(model: Any, variables: Any = None) -> Any:
    call = model if variables is None else functools.partial(model.apply, variables)
    return jax.jit(lambda *a: call(a[0], mask=a[1]))(jnp.asarray(IDS), jnp.asarray(RIGHT))


def call_peft(model: Any) -> Any:
    return model(input_ids=torch.tensor(IDS), attention_mask=torch.tensor(RIGHT)).logits


@pytest.mark.parametrize(("api", "scan"), [("nnx", False), ("linen", True), ("nnx", True), ("linen", False)])
def test_peft_and_jaxadapt_open_each_others_files(api: str, scan: bool, tmp_path: Path) -> None:
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    peft_model().save_pretrained(theirs)
    model, variables = loaded(theirs, api, scan)
    with torch.no_grad():
        want, plain = (call_peft(m).numpy() for m in (peft_model(), torch_base()))
    close(run(model, variables), want)
    assert np.abs(want - plain).max() > 1e-2
    jaxadapt.save(model if variables is None else variables, ours)
    one, two = (load_file(folder / "adapter_model.safetensors") for folder in (theirs, ours))
    assert one.keys() == two.keys()
    for key, value in one.items():
        np.testing.assert_array_equal(two[key], value)
    one, two = (json.loads((folder / "adapter_config.json").read_text()) for folder in (theirs, ours))
    assert one == two
    assert not [finding for finding in jaxadapt.verify(ours) if finding.severity == "error"]

    twin = llama.twin_of(torch_base(), api, scan=scan)
    if api == "nnx":
        model = jaxadapt.adapt(twin, CONFIG, rngs=nnx.Rngs(0))
    else:
        model = jaxadapt.adapt(twin[0], CONFIG)
        variables = {**twin[1], **jaxadapt.init(twin[1]["params"], CONFIG, key=jax.random.key(0)).collection}
    close(run(model, variables), plain)  # the gates are closed
    adapter = jaxadapt.extract(model if variables is None else variables)
    opened = jax.tree.map(lambda x: x + 0.5, adapter)
    variables = jaxadapt.inject(model if variables is None else variables, opened)
    model, variables = (variables, None) if api == "nnx" else (model, variables)
    jaxadapt.save(model if variables is None else variables, ours)
    assert json.loads((ours / "adapter_config.json").read_text()) == one
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = peft.PeftModel.from_pretrained(copy.deepcopy(torch_base()), ours).eval()
    with torch.no_grad():
        close(run(model, variables), call_peft(again).numpy())


def test_gradients_are_pefts(tmp_path: Path) -> None:
    model = peft_model()
    model.zero_grad()
    cotangent = prompts.COTANGENT[:, : IDS.shape[1]]
    (call_peft(model) * torch.tensor(cotangent)).sum().backward()
    model.save_pretrained(tmp_path)
    ours, _ = loaded(tmp_path, "nnx")
    adapter = jaxadapt.extract(ours)

    def loss(adapter: Any) -> Any:
        return (run(jaxadapt.inject(nnx.clone(ours), adapter)) * cotangent).sum()

    gradients = jax.jit(jax.grad(loss))(adapter).shared
    want = {n.removeprefix("base_model.model."): p.grad.numpy() for n, p in model.named_parameters() if p.requires_grad}
    assert {name.replace(":", ".") for name in gradients} == want.keys()
    for name, gradient in gradients.items():
        close(gradient, want[name.replace(":", ".")])


def test_a_fresh_adapter_has_normal_prompts_and_closed_gates_as_in_peft() -> None:
    config = CONFIG.replace(adapter_len=40)
    fresh = jaxadapt.init(nnx.state(llama.twin_of(torch_base(), "nnx")), config, key=jax.random.key(0)).shared
    torch.manual_seed(0)
    theirs = peft.get_peft_model(
        copy.deepcopy(torch_base()), peft.AdaptionPromptConfig(**{**FIELDS, "adapter_len": 40})
    )
    want = {name: x.detach().numpy() for name, x in theirs.named_parameters() if x.requires_grad}
    assert len(fresh) == len(want) == 4
    for values in (fresh, want):
        for name, value in values.items():
            if name.endswith("gate"):
                np.testing.assert_array_equal(value, 0)
            else:  # 1,280 values
                assert abs(np.mean(value)) < 0.15, name
                assert np.std(value) == pytest.approx(1, rel=0.1), name


def test_bad_input() -> None:
    twin = llama.twin_of(torch_base(), "nnx")
    with pytest.raises(ConfigError, match="adapter_layers must be set"):
        jaxadapt.adapt(twin, jaxadapt.AdaptionPromptConfig(adapter_len=2), rngs=nnx.Rngs(0))
    with pytest.raises(TargetError, match="expected at least adapter_layers=9 attention modules"):
        jaxadapt.adapt(twin, CONFIG.replace(adapter_layers=9), rngs=nnx.Rngs(0))
    with pytest.raises(ConfigError, match="adapter_len: expected a positive integer"):
        jaxadapt.AdaptionPromptConfig(adapter_len=0)
    adapter = jaxadapt.init(nnx.state(twin), CONFIG, key=jax.random.key(0))
    values = {name.replace(":2:", ":7:"): x for name, x in adapter.shared.items()}
    model = jaxadapt.adapt(twin, CONFIG, rngs=nnx.Rngs(0))
    with pytest.raises(jaxadapt.AdapterError):
        jaxadapt.inject(model, jaxadapt.Adapter(adapter.config, {"~shared": values}, adapter.keymap))
    with pytest.raises(AttachError, match="changes no weight"):
        jaxadapt.merge(model)
    bias = {"model.layers.0.self_attn.o_proj.bias": jnp.zeros(32)}
    base = {
        ".".join(map(str, path)): x.get_value()
        for path, x in nnx.to_flat_state(nnx.state(twin, jaxadapt.models.BaseParam))
    }
    with pytest.raises(AttachError, match="has a bias, which PEFT adds once more"):
        METHODS["ADAPTION_PROMPT"].layers(adapter.config, adapter.keymap, adapter.shared, base | bias)
    with pytest.raises(AttachError, match="layer 7: the base has no self_attn with k_proj"):
        METHODS["ADAPTION_PROMPT"].layers(adapter.config, adapter.keymap, values, base)
