"""Prompts on T5: an encoder with a decoder, cross attention and relative positions, as PEFT computes and saves them.

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
from jaxadapt import AttachError
from tests.support.prompts import Case, close
from tests.support.twins import t5

pytestmark = pytest.mark.peft

IDS = np.random.RandomState(0).randint(2, 32, (2, 5))
LABELS = np.random.RandomState(1).randint(2, 32, (2, 4))
DECODER = np.concatenate([np.zeros((2, 1), int), LABELS[:, :-1]], axis=1)  # shifted to the right
MASK = np.array([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]])  # padded on either side
DECODER_MASK = np.array([[1, 1, 1, 0], [0, 1, 1, 1]])
TASK = (("task_type", "SEQ_2_SEQ_LM"), ("num_virtual_tokens", 3))
PREFIX, PROMPT = Case("PrefixTuningConfig", TASK), Case("PromptTuningConfig", TASK)
MULTI = Case("MultitaskPromptTuningConfig", (*TASK, ("num_tasks", 3)))
MLP = Case("PromptEncoderConfig", (*TASK, ("encoder_hidden_size", 5)))
NAMED = {"prefix": PREFIX, "prompt": PROMPT, "mlp": MLP, "tasks": MULTI}
CASES = [pytest.param(case, api, id=f"{name}-{api}") for name, case in NAMED.items() for api in ("nnx", "linen")]
each = pytest.mark.parametrize(("case", "api"), CASES)  # CI: tests/support/matrices.py


@functools.cache
def torch_base(*depths: int) -> Any:
    return t5.torch_t5(*depths)


@functools.cache
def peft_model(case: Case, *depths: int) -> Any:
    torch.manual_seed(3)
    return peft.get_peft_model(copy.deepcopy(torch_base(*depths)), case.peft()).eval()


def call_peft(case: Case, model: Any, **more: np.ndarray) -> Any:
    given = {"input_ids": IDS, "attention_mask": MASK, "labels": LABELS, **more}
    return model(**{name: torch.tensor(x) for name, x in given.items()}, **case.peft_data)


def call(case: Case, model: Any, variables: Any, tokens: Any = DECODER, **more: Any) -> Any:
    context = jaxadapt.models.invoke(model, **case.data) if case.data else contextlib.nullcontext(model)
    with context as prompted:
        run = prompted if variables is None else functools.partial(prompted.apply, variables)
        compiled = jax.jit(lambda *a: run(*a, mask=jnp.asarray(MASK), **more))  # one compilation for all operations
        return compiled(jnp.asarray(IDS), jnp.asarray(tokens))


def loaded(folder: Path, api: str, *depths: int) -> tuple[Any, Any]:
    twin = t5.twin_of(torch_base(*depths), api)
    if api == "nnx":
        return jaxadapt.load(folder, twin), None
    return jaxadapt.adapt(twin[0], jaxadapt.read_config(folder)), jaxadapt.load(folder, twin[1])


@each
def test_peft_and_jaxadapt_open_each_others_files(case: Case, api: str, tmp_path: Path) -> None:
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    peft_model(case).save_pretrained(theirs)
    model, variables = loaded(theirs, api)
    with torch.no_grad():
        output = call_peft(case, peft_model(case))
    logits = call(case, model, variables)
    close(logits, output.logits.numpy())
    # the labels that belong to these outputs
    config = jaxadapt.read_config(theirs)
    labels = jaxadapt.models.extend_labels(config, jnp.asarray(LABELS))
    assert labels.shape == logits.shape[:2]
    scores = jax.nn.log_softmax(logits)[np.arange(2)[:, None], np.arange(labels.shape[1])[None], labels]
    np.testing.assert_allclose(-scores[labels != -100].mean(), output.loss, rtol=1e-5)

    twin, example = t5.twin_of(torch_base(), api), [jnp.asarray(IDS), jnp.asarray(DECODER)]
    if api == "nnx":
        model = jaxadapt.adapt(twin, case.ours(), rngs=nnx.Rngs(0), example=example)
    else:
        model = jaxadapt.adapt(twin[0], case.ours())
        variables = {**jax.jit(model.init)(jax.random.key(0), *example), **twin[1]}
    jaxadapt.save(model if variables is None else variables, ours)
    one, two = (json.loads((folder / "adapter_config.json").read_text()) for folder in (theirs, ours))
    assert one == two
    one, two = (load_file(folder / "adapter_model.safetensors") for folder in (theirs, ours))
    assert {k: (v.shape, v.dtype) for k, v in one.items()} == {k: (v.shape, v.dtype) for k, v in two.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opened = peft.PeftModel.from_pretrained(copy.deepcopy(torch_base()), ours).eval()
    with torch.no_grad():
        close(call(case, model, variables), call_peft(case, opened).logits.numpy())


@pytest.mark.parametrize("case", [PREFIX, MULTI, PROMPT], ids=["prefix", "tasks", "prompt"])
def test_a_mask_of_the_decoder_is_extended_as_pefts(case: Case, tmp_path: Path) -> None:
    """It gets the virtual tokens of the decoder, where there are some, and none for those of the encoder."""
    peft_model(case).save_pretrained(tmp_path)
    with torch.no_grad():
        want = call_peft(case, peft_model(case), decoder_attention_mask=DECODER_MASK).logits.numpy()
    close(call(case, *loaded(tmp_path, "nnx"), decoder_mask=jnp.asarray(DECODER_MASK)), want)


def test_a_decoder_of_fewer_layers_than_the_encoder(tmp_path: Path) -> None:
    """PEFT's file has the encoder's number of layers; the decoder uses the first of them, in PEFT's order."""
    model = peft_model(PREFIX, 3, 2)
    model.save_pretrained(tmp_path)
    assert jaxadapt.read_config(tmp_path).num_layers == 3
    with torch.no_grad():
        want = call_peft(PREFIX, model).logits.numpy()
    close(call(PREFIX, *loaded(tmp_path, "nnx", 3, 2)), want)


def test_a_decoder_of_more_layers_than_the_encoder(tmp_path: Path) -> None:
    """PEFT itself fails with the number of layers that it takes from the encoder."""
    model = peft_model(PREFIX, 1, 2)
    model.save_pretrained(tmp_path)
    with pytest.raises(IndexError, match="out of range"), torch.no_grad():
        call_peft(PREFIX, model)
    with pytest.raises(AttachError, match=r"for 1 attention layers.* computes 2 with a prefix, and 3 without one"):
        call(PREFIX, *loaded(tmp_path, "nnx", 1, 2))


@pytest.mark.parametrize("depths", [(3, 2), (1, 2)], ids=str)
def test_a_new_prefix_has_the_depth_of_the_decoder_and_peft_opens_it(depths: tuple[int, int], tmp_path: Path) -> None:
    twin, example = t5.twin_of(torch_base(*depths), "nnx"), [jnp.asarray(IDS), jnp.asarray(DECODER)]
    model = jaxadapt.adapt(twin, PREFIX.ours(), rngs=nnx.Rngs(0), example=example)
    jaxadapt.save(model, tmp_path)
    assert jaxadapt.read_config(tmp_path).num_layers == depths[1]
    opened = peft.PeftModel.from_pretrained(copy.deepcopy(torch_base(*depths)), tmp_path).eval()
    with torch.no_grad():
        close(call(PREFIX, model, None), call_peft(PREFIX, opened).logits.numpy())


def test_gradients_are_pefts() -> None:
    model = peft_model(PREFIX)
    model.zero_grad()
    cotangent = np.random.RandomState(2).normal(size=(2, 4, 32)).astype(np.float32)
    (call_peft(PREFIX, model).logits * torch.tensor(cotangent)).sum().backward()
    parameter = model.prompt_encoder["default"].embedding.weight
    ours = jaxadapt.adapt(
        t5.twin_of(torch_base(), "nnx"),
        PREFIX.ours(),
        rngs=nnx.Rngs(0),
        example=[jnp.asarray(IDS), jnp.asarray(DECODER)],
    )
    adapter = jaxadapt.extract(ours)
    values = {"~shared": {"prompt_embeddings": jnp.asarray(parameter.detach().numpy())}}

    def loss(adapter: Any) -> Any:
        return (call(PREFIX, jaxadapt.inject(nnx.clone(ours), adapter), None) * cotangent).sum()

    gradient = jax.jit(jax.grad(loss))(jaxadapt.Adapter(adapter.config, values, adapter.keymap)).shared[
        "prompt_embeddings"
    ]
    close(gradient, parameter.grad.numpy())


@pytest.mark.parametrize("case", [PREFIX, PROMPT], ids=["prefix", "prompt"])
def test_generation_as_peft_generates(case: Case, tmp_path: Path) -> None:
    """Greedy tokens: PEFT with its cache, here a call of all tokens for each."""
    given = {"input_ids": torch.tensor(IDS), "attention_mask": torch.tensor(MASK)}
    want = peft_model(case).generate(**given, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    peft_model(case).save_pretrained(tmp_path)
    model, _ = loaded(tmp_path, "nnx")
    tokens = np.zeros((2, 5), int)  # those to come do not matter, and one length is compiled once
    run = jax.jit(lambda tokens: call(case, model, None, tokens))
    for i in range(4):
        logits = run(tokens)[:, i].at[..., 1].set(-jnp.inf)  # not the end yet
        tokens[:, i + 1] = logits.argmax(-1)
    np.testing.assert_array_equal(tokens, want.numpy())


def test_a_decoder_keeps_no_virtual_tokens_of_embeddings() -> None:
    model = jaxadapt.adapt(t5.twin_of(torch_base(), "nnx"), PROMPT.ours(), rngs=nnx.Rngs(0))
    with pytest.raises(AttachError, match="not implemented for models with an encoder"):  # noqa: SIM117
        with jaxadapt.models.invoke(model, prefilled=True):
            model(jnp.asarray(IDS), jnp.asarray(DECODER))
