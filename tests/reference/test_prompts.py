"""Prompt methods as PEFT has them, on the same tiny Llama with grouped-query attention in torch and in Flax.

Logits, gradients, files in both directions, and configurations. float32; the tolerance 1e-5 of the largest logit covers
the order of the sums, which differs between the libraries.
"""

from __future__ import annotations

import copy
import dataclasses
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
from tests.support.twins import llama

pytestmark = pytest.mark.peft

LAYERS, VOCAB, BATCH, TIME, N = 3, 64, 2, 6, 4
IDS = np.random.RandomState(0).randint(0, VOCAB, (BATCH, TIME))
FULL = np.ones((BATCH, TIME), int)
LEFT, RIGHT = FULL.copy(), FULL.copy()
LEFT[0, :2], RIGHT[1, -3:] = 0, 0
MASKS = {"full": FULL, "left": LEFT, "right": RIGHT}
COTANGENT = np.random.RandomState(1).normal(size=(BATCH, TIME, VOCAB)).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Case:
    """A configuration in PEFT and here: the class's name, and its fields."""

    name: str
    fields: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        return "-".join([self.name.removesuffix("Config"), *(f"{k}={v}" for k, v in self.fields)])

    def peft(self) -> Any:
        fields = {"num_virtual_tokens": N, "task_type": "CAUSAL_LM", **dict(self.fields)}
        return getattr(peft, self.name)(**fields)

    def ours(self) -> Any:
        fields = {"num_virtual_tokens": N, "task_type": "CAUSAL_LM", **dict(self.fields)}
        return getattr(jaxadapt, self.name)(**fields)


PREFIX = Case("PrefixTuningConfig")
PROJECTED = Case("PrefixTuningConfig", (("prefix_projection", True), ("encoder_hidden_size", 5)))
ZERO = Case("PrefixTuningConfig", (("init_weights", "zero"),))
CASES = [PREFIX, PROJECTED, ZERO]
APIS = [("nnx", False), ("nnx", True), ("linen", False), ("linen", True)]
EVERY = pytest.mark.parametrize("case", CASES, ids=str)
EACH_API = pytest.mark.parametrize(("api", "scan"), APIS, ids=lambda value: str(value))


# ---- the two sides


@functools.cache
def torch_base() -> Any:
    return llama.torch_llama(layers=LAYERS, vocab=VOCAB)


@functools.cache
def peft_model(case: Case) -> Any:
    """A PEFT model with a fresh adapter, which for every case but `ZERO` is random."""
    torch.manual_seed(3)
    return peft.get_peft_model(copy.deepcopy(torch_base()), case.peft()).eval()


@functools.cache
def peft_logits(case: Case, padding: str) -> np.ndarray:
    with torch.no_grad():
        out = peft_model(case)(input_ids=torch.tensor(IDS), attention_mask=torch.tensor(MASKS[padding]))
    return out.logits.numpy()


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`folders(case)`: PEFT's own folder of a case."""

    @functools.cache
    def save(case: Case) -> Path:
        folder = tmp_path_factory.mktemp("peft")
        peft_model(case).save_pretrained(folder)
        return folder

    return save


def close(found: Any, expected: Any) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def load_and_call(folder: Path, api: str, scan: bool, mask: np.ndarray) -> np.ndarray:
    """The logits of a twin with the adapter of a folder."""
    if api == "nnx":
        model = jaxadapt.load(folder, llama.twin_of(torch_base(), scan=scan))
        return model(jnp.asarray(IDS), mask=jnp.asarray(mask))
    module, variables = llama.twin_of(torch_base(), "linen", scan=scan)
    adapted = jaxadapt.adapt(module, jaxadapt.read_config(folder))
    return adapted.apply(jaxadapt.load(folder, variables), jnp.asarray(IDS), mask=jnp.asarray(mask))


def new_model(case: Case, api: str = "nnx") -> tuple[Any, Any]:
    """A twin with a fresh adapter, and what `save` takes."""
    ids = jnp.asarray(IDS)
    if api == "nnx":
        model = jaxadapt.adapt(llama.twin_of(torch_base()), case.ours(), rngs=nnx.Rngs(0), example=[ids])
        return model, model
    module, base = llama.twin_of(torch_base(), "linen")
    adapted = jaxadapt.adapt(module, case.ours())
    variables = {**adapted.init(jax.random.key(0), ids), **base}
    return functools.partial(adapted.apply, variables), variables


# ---- PEFT's adapter here


@EVERY
@EACH_API
@pytest.mark.parametrize("padding", MASKS)
def test_pefts_adapter_gives_pefts_logits(case: Case, api: str, scan: bool, padding: str, folders: Any) -> None:
    expected = peft_logits(case, padding)
    close(load_and_call(folders(case), api, scan, MASKS[padding]), expected)
    with torch.no_grad():
        plain = torch_base()(input_ids=torch.tensor(IDS), attention_mask=torch.tensor(MASKS[padding])).logits.numpy()
    assert np.abs(plain - expected).max() > 1e-3  # so the adapter was there


# ---- our adapter in PEFT


@EVERY
@pytest.mark.parametrize("api", ["nnx", "linen"])
def test_peft_opens_ours(case: Case, api: str, tmp_path: Path) -> None:
    call, tree = new_model(case, api)
    jaxadapt.save(tree, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opened = peft.PeftModel.from_pretrained(copy.deepcopy(torch_base()), tmp_path).eval()
    with torch.no_grad():
        expected = opened(input_ids=torch.tensor(IDS), attention_mask=torch.tensor(LEFT)).logits.numpy()
    found = call(jnp.asarray(IDS), mask=jnp.asarray(LEFT))
    close(found, expected)


@EVERY
def test_files_are_alike(case: Case, tmp_path: Path, folders: Any) -> None:
    """Keys, shapes, dtypes and every field of the configuration."""
    _, tree = new_model(case)
    jaxadapt.save(tree, tmp_path)
    theirs, ours = (load_file(folder / "adapter_model.safetensors") for folder in (folders(case), tmp_path))
    assert {k: (v.shape, v.dtype) for k, v in theirs.items()} == {k: (v.shape, v.dtype) for k, v in ours.items()}
    config, expected = (
        json.loads((folder / "adapter_config.json").read_text()) for folder in (tmp_path, folders(case))
    )
    assert config == expected


@EVERY
def test_pefts_file_survives_a_round_trip(case: Case, tmp_path: Path, folders: Any) -> None:
    model = jaxadapt.load(folders(case), llama.twin_of(torch_base()))
    jaxadapt.save(model, tmp_path)
    for name in ("adapter_config.json",):
        assert json.loads((tmp_path / name).read_text()) == json.loads((folders(case) / name).read_text())
    theirs, ours = (load_file(folder / "adapter_model.safetensors") for folder in (folders(case), tmp_path))
    for key, value in theirs.items():
        np.testing.assert_array_equal(ours[key], value)


# ---- training


TORCH_NAMES = {
    "PrefixTuningConfig": {
        "embedding": "embedding.weight",
        "kernel_0": "transform.0.weight",
        "bias_0": "transform.0.bias",
        "kernel_1": "transform.2.weight",
        "bias_1": "transform.2.bias",
        "prompt_embeddings": "embedding.weight",
    },
}
"""`{configuration: {tensor here: parameter of PEFT's encoder}}`."""


def torch_values(case: Case, names: Any, of: Any) -> dict[str, np.ndarray]:
    """`{tensor here: value}` from PEFT's encoder; a dense layer is (in, out) here."""
    parameters = dict(peft_model(case).prompt_encoder["default"].named_parameters())
    values = {name: of(parameters[TORCH_NAMES[case.name][name]]).detach().numpy() for name in names}
    return {name: value.T if name.startswith("kernel") else value for name, value in values.items()}


@EVERY
@pytest.mark.parametrize("api", ["nnx", "linen"])
def test_gradients_are_pefts(case: Case, api: str) -> None:
    """The gradient of a random linear function of the logits, with respect to every trained tensor."""
    model = peft_model(case)
    model.zero_grad()
    logits = model(input_ids=torch.tensor(IDS), attention_mask=torch.tensor(RIGHT)).logits
    (logits * torch.tensor(COTANGENT))[torch.tensor(RIGHT == 1)].sum().backward()
    _, tree = new_model(case, api)
    adapter = jaxadapt.extract(tree)
    expected = torch_values(case, adapter.shared, lambda p: p.grad)
    start = dataclasses.replace(adapter, params={"~shared": torch_values(case, adapter.shared, lambda p: p)})

    def loss(adapter: Any) -> Any:
        if api == "nnx":
            found = jaxadapt.inject(adapter, nnx.clone(tree))(jnp.asarray(IDS), mask=jnp.asarray(RIGHT))
        else:
            module, _ = llama.twin_of(torch_base(), "linen")
            variables = jaxadapt.inject(adapter, tree)
            apply = jaxadapt.adapt(module, case.ours()).apply
            found = apply(variables, jnp.asarray(IDS), mask=jnp.asarray(RIGHT))
        return jnp.sum(jnp.where(RIGHT[..., None] == 1, found * COTANGENT, 0))

    gradients = jax.grad(loss)(start).shared
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        close(gradient, expected[name])
