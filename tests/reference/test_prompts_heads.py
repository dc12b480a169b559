"""Prompts on BERT, which sees both ways, with a trained classifier beside them, as PEFT trains and saves it.

float32; the tolerance 1e-5 of the largest value covers the order of the sums, which differs between the libraries.
"""

from __future__ import annotations

import contextlib
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
from tests.support.prompts import Case, close
from tests.support.twins import bert

pytestmark = pytest.mark.peft

IDS = np.random.RandomState(0).randint(1, 32, (2, 5))
MASK, TYPES = np.array([[0, 1, 1, 1, 1], [1, 1, 1, 0, 0]]), IDS % 2  # padded on either side
TASK = (("task_type", "SEQ_CLS"), ("num_virtual_tokens", 3))
PREFIX, PROMPT = Case("PrefixTuningConfig", TASK), Case("PromptTuningConfig", TASK)
MULTI = Case("MultitaskPromptTuningConfig", (*TASK, ("num_tasks", 3)))
MLP = Case("PromptEncoderConfig", (*TASK, ("encoder_hidden_size", 5)))
NAMED = {"prefix": PREFIX, "prompt": PROMPT, "mlp": MLP, "tasks": MULTI}
CASES = [pytest.param(case, api, id=f"{name}-{api}") for name, case in NAMED.items() for api in ("nnx", "linen")]
each = pytest.mark.parametrize(("case", "api"), CASES)  # CI: tests/support/matrices.py


@functools.cache
def torch_base() -> Any:
    return bert.torch_bert()


@functools.cache
def peft_model(case: Case) -> Any:
    """A PEFT model whose adapter and classifier are not those of the base."""
    torch.manual_seed(3)
    model = peft.get_peft_model(copy.deepcopy(torch_base()), case.peft()).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter += 0.3 * torch.randn_like(parameter)
    return model


def call_peft(case: Case, model: Any) -> Any:
    given = {"input_ids": IDS, "attention_mask": MASK, "token_type_ids": TYPES}
    return model(**{name: torch.tensor(x) for name, x in given.items()}, **case.peft_data).logits


def call(case: Case, model: Any, variables: Any) -> Any:
    context = jaxadapt.models.invoke(model, **case.data) if case.data else contextlib.nullcontext(model)
    with context as prompted:
        run = prompted if variables is None else functools.partial(prompted.apply, variables)
        return jax.jit(run)(jnp.asarray(IDS), jnp.asarray(MASK), jnp.asarray(TYPES))


@each
def test_peft_and_jaxadapt_open_each_others_files(case: Case, api: str, tmp_path: Path) -> None:
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    peft_model(case).save_pretrained(theirs)
    twin = bert.twin_of(torch_base(), api)
    if api == "nnx":
        model, variables = jaxadapt.load(theirs, twin), None
    else:
        model, variables = jaxadapt.adapt(twin[0], jaxadapt.read_config(theirs)), jaxadapt.load(theirs, twin[1])
    with torch.no_grad():
        close(call(case, model, variables), call_peft(case, peft_model(case)).numpy())
    jaxadapt.save(model if variables is None else variables, ours)
    one, two = (load_file(folder / "adapter_model.safetensors") for folder in (theirs, ours))
    assert {k: (v.shape, v.dtype) for k, v in one.items()} == {k: (v.shape, v.dtype) for k, v in two.items()}
    for key, value in one.items():
        np.testing.assert_array_equal(two[key], value)
    keys = two.keys()
    one, two = (json.loads((folder / "adapter_config.json").read_text()) for folder in (theirs, ours))
    assert one == two

    # a new one
    twin = bert.twin_of(torch_base(), api)
    example = [jnp.asarray(IDS), jnp.asarray(MASK), jnp.asarray(TYPES)]
    if api == "nnx":
        model = jaxadapt.adapt(twin, case.ours(), rngs=nnx.Rngs(0), example=example)
    else:
        model = jaxadapt.adapt(twin[0], case.ours())
        variables = {**jax.jit(model.init)(jax.random.key(0), *example), **twin[1]}
        complete = jaxadapt.extract(variables).config  # `init` has seen the model's call, and drawn a base
        adapter = jaxadapt.init(twin[1]["params"], complete, key=jax.random.key(0))
        variables = jaxadapt.inject(variables, adapter)
    jaxadapt.save(model if variables is None else variables, ours)
    new = json.loads((ours / "adapter_config.json").read_text())
    # PEFT adds the names of the heads twice
    assert sorted(set(one.pop("modules_to_save"))) == sorted(new.pop("modules_to_save"))
    assert new == one
    assert load_file(ours / "adapter_model.safetensors").keys() == keys
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opened = peft.PeftModel.from_pretrained(copy.deepcopy(torch_base()), ours).eval()
    with torch.no_grad():
        close(call(case, model, variables), call_peft(case, opened).numpy())


def test_gradients_of_prompt_and_head_are_pefts() -> None:
    model = peft_model(PREFIX)
    cotangent = np.random.RandomState(1).normal(size=(2, 3)).astype(np.float32)
    model.zero_grad()
    (call_peft(PREFIX, model) * torch.tensor(cotangent)).sum().backward()
    twin = bert.twin_of(torch_base(), "nnx")
    ours = jaxadapt.adapt(twin, PREFIX.ours(), rngs=nnx.Rngs(0), example=[jnp.asarray(IDS)])
    named = dict(model.named_parameters())
    prompt, head = named["prompt_encoder.default.embedding.weight"], "base_model.classifier.modules_to_save.default"
    adapter = jaxadapt.extract(ours)
    values = {"~shared": {"prompt_embeddings": jnp.asarray(prompt.detach().numpy())}}
    for leaf, torch_name in (("kernel", "weight"), ("bias", "bias")):
        x = named[f"{head}.{torch_name}"]
        values.setdefault("classifier", {})[leaf] = {"copy": jnp.asarray(x.detach().numpy().T)}
    adapter = jaxadapt.Adapter(adapter.config, values, adapter.keymap)

    def loss(adapter: Any) -> Any:
        return (call(PREFIX, jaxadapt.inject(nnx.clone(ours), adapter), None) * cotangent).sum()

    gradients = jax.jit(jax.grad(loss))(adapter)
    close(gradients.shared["prompt_embeddings"], prompt.grad.numpy())
    close(gradients.params["classifier"]["kernel"]["copy"], named[f"{head}.weight"].grad.numpy().T)
    close(gradients.params["classifier"]["bias"]["copy"], named[f"{head}.bias"].grad.numpy())
