"""Prompt methods in PEFT and here, on the same tiny Llama with grouped-query attention in torch and in Flax."""

from __future__ import annotations

import contextlib
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
from jaxadapt.initializers import start
from tests.support.twins import llama

LAYERS, VOCAB, BATCH, TIME, N = 3, 64, 2, 6, 4
IDS = np.random.RandomState(0).randint(0, VOCAB, (BATCH, TIME))
FULL = np.ones((BATCH, TIME), int)
LEFT, RIGHT = FULL.copy(), FULL.copy()
LEFT[0, :2], RIGHT[1, -3:] = 0, 0
MASKS = {"full": FULL, "left": LEFT, "right": RIGHT}
COTANGENT = np.random.RandomState(1).normal(size=(BATCH, TIME + N, VOCAB)).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Case:
    """A configuration in PEFT and here: the class's name, and its fields."""

    name: str
    fields: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        return "-".join([self.name.removesuffix("Config"), *(f"{k}={v}" for k, v in self.fields)])

    def peft(self) -> Any:
        fields = {"num_virtual_tokens": N, "task_type": "CAUSAL_LM", **dict(self.fields)}
        return getattr(peft, self.name)(**{k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()})

    def ours(self) -> Any:
        fields = {"num_virtual_tokens": N, "task_type": "CAUSAL_LM", **dict(self.fields)}
        return getattr(jaxadapt, self.name)(**fields)

    @property
    def peft_data(self) -> dict[str, Any]:
        """What PEFT's call takes besides tokens and mask."""
        return {"task_ids": torch.tensor(TASK_IDS)} if self.name.startswith("Multi") else {}

    @property
    def data(self) -> dict[str, Any]:
        """The arguments of `invoke`."""
        return {"task_ids": jnp.array(TASK_IDS)} if self.name.startswith("Multi") else {}


PREFIX = Case("PrefixTuningConfig")
PROJECTED = Case("PrefixTuningConfig", (("prefix_projection", True), ("encoder_hidden_size", 5)))
ZERO = Case("PrefixTuningConfig", (("init_weights", "zero"),))
CARTRIDGE = Case("CartridgeConfig", (("num_frozen_tokens", 2),))
PROMPT = Case("PromptTuningConfig")
MLP = Case("PromptEncoderConfig", (("encoder_hidden_size", 5),))
LSTM = Case("PromptEncoderConfig", (("encoder_reparameterization_type", "LSTM"), ("encoder_hidden_size", 5)))
TASKS = Case("MultitaskPromptTuningConfig", (("num_tasks", 3), ("num_ranks", 2)))
CPT = Case("CPTConfig", (("cpt_token_ids", (7, 3, 5, 9)), ("cpt_tokens_type_mask", (1, 2, 3, 4))))
TYPES = [PROJECTED, CARTRIDGE, PROMPT, LSTM, TASKS, CPT]
CASES = [PREFIX, PROJECTED, ZERO, CARTRIDGE, PROMPT, MLP, LSTM, TASKS, CPT]
TASK_IDS = [2, 0]
# ---- the two sides


@functools.cache
def torch_base() -> Any:
    return llama.torch_llama(layers=LAYERS, vocab=VOCAB)


@functools.cache
def peft_model(case: Case) -> Any:
    """A PEFT model with a fresh adapter, which for every case but `ZERO` is random."""
    torch.manual_seed(3)
    model = peft.get_peft_model(copy.deepcopy(torch_base()), case.peft()).eval()
    if case is CPT:  # starts with zeros
        torch.nn.init.normal_(model.prompt_encoder["default"].delta_embedding.weight, std=0.01)
    return model


@functools.cache
def peft_logits(case: Case, padding: str) -> np.ndarray:
    with torch.no_grad():
        return call_peft(case, peft_model(case), MASKS[padding]).numpy()


def call_peft(case: Case, model: Any, mask: np.ndarray) -> Any:
    return model(input_ids=torch.tensor(IDS), attention_mask=torch.tensor(mask), **case.peft_data).logits


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


def call(case: Case, model: Any, variables: Any, mask: np.ndarray) -> Any:
    """The logits of an adapted NNX model, or of an adapted Linen module with its variables."""
    context = jaxadapt.models.invoke(model, **case.data) if case.data else contextlib.nullcontext(model)
    with context as prompted:
        run = prompted if variables is None else functools.partial(prompted.apply, variables)
        return run(jnp.asarray(IDS), mask=jnp.asarray(mask))


def loaded(folder: Path, api: str = "nnx", scan: bool = False) -> tuple[Any, Any]:
    """A twin with the adapter of a folder, and the variables of a Linen one."""
    twin = llama.twin_of(torch_base(), api, scan=scan)
    if api == "nnx":
        return jaxadapt.load(folder, twin), None
    return jaxadapt.adapt(twin[0], jaxadapt.read_config(folder)), jaxadapt.load(folder, twin[1])


def fresh(case: Case, api: str = "nnx") -> tuple[Any, Any]:
    """A twin with a new adapter, and the variables of a Linen one."""
    twin, ids = llama.twin_of(torch_base(), api), jnp.asarray(IDS)
    if case is CPT:  # starts from the base's embeddings
        started = start(twin, case.ours(), example=[ids]) if api == "nnx" else start(twin[1]["params"], case.ours())
        if api == "nnx":
            return started.base, None
        return jaxadapt.adapt(twin[0], started.adapter.config), {**twin[1], **started.adapter.collection}
    if api == "nnx":
        return jaxadapt.adapt(twin, case.ours(), rngs=nnx.Rngs(0), example=[ids]), None
    adapted = jaxadapt.adapt(twin[0], case.ours())
    return adapted, {**adapted.init(jax.random.key(0), ids), **twin[1]}


def parameter_name(case: Case, name: str) -> str:
    """PEFT's name, in its encoder, of a tensor of the trained form."""
    if name == "delta_embedding":
        return "delta_embedding.weight"
    if name in ("prompt_embeddings", "embedding"):
        return "embedding.weight"
    if name.startswith("lstm"):
        _, layer, direction, *kind = name.split("_")
        part = {"input": "ih", "hidden": "hh"}[kind[0]]
        return f"lstm_head.{'bias' if kind[1:] else 'weight'}_{part}_l{layer}{'_reverse' * (direction == 'reverse')}"
    if name.startswith(("kernel", "bias")):
        kind, number = name.split("_")
        stack = "transform" if case.name == "PrefixTuningConfig" else "mlp_head"
        return f"{stack}.{2 * int(number)}.{'weight' if kind == 'kernel' else 'bias'}"
    return name


def torch_values(case: Case, names: Any, of: Any) -> dict[str, np.ndarray]:
    """`{tensor here: value}` from PEFT's encoder; a matrix of a network is (in, out) here."""
    parameters = dict(peft_model(case).prompt_encoder["default"].named_parameters())
    values = {name: of(parameters[parameter_name(case, name)]).detach().numpy() for name in names}
    turned = ("kernel", "lstm")
    return {name: value.T if name.startswith(turned) and value.ndim == 2 else value for name, value in values.items()}


# ---- PEFT's adapter here


def check_logits(case: Case, api: str, scan: bool, padding: str, folders: Any) -> None:
    """PEFT's adapter gives PEFT's logits here."""
    expected = peft_logits(case, padding)
    close(call(case, *loaded(folders(case), api, scan), MASKS[padding]), expected)
    with torch.no_grad():
        plain = torch_base()(input_ids=torch.tensor(IDS), attention_mask=torch.tensor(MASKS[padding])).logits.numpy()
    assert np.abs(plain - expected[:, -TIME:]).max() > 1e-3  # so the adapter was there


# ---- our adapter in PEFT


def check_that_peft_opens_ours(case: Case, api: str, tmp_path: Path) -> None:
    """Our new adapter gives our logits in PEFT, which opens it without a warning."""
    model, variables = fresh(case, api)
    jaxadapt.save(model if variables is None else variables, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opened = peft.PeftModel.from_pretrained(copy.deepcopy(torch_base()), tmp_path).eval()
    with torch.no_grad():
        expected = call_peft(case, opened, LEFT).numpy()
    close(call(case, model, variables, LEFT), expected)


def check_files(case: Case, tmp_path: Path, folders: Any) -> None:
    """Keys, shapes, dtypes and every field of the configuration."""
    jaxadapt.save(fresh(case)[0], tmp_path)
    theirs, ours = (load_file(folder / "adapter_model.safetensors") for folder in (folders(case), tmp_path))
    assert {k: (v.shape, v.dtype) for k, v in theirs.items()} == {k: (v.shape, v.dtype) for k, v in ours.items()}
    config, expected = (
        json.loads((folder / "adapter_config.json").read_text()) for folder in (tmp_path, folders(case))
    )
    assert config == expected


def check_round_trip(case: Case, tmp_path: Path, folders: Any) -> None:
    """A file of PEFT is the same after a load and a save."""
    model = jaxadapt.load(folders(case), llama.twin_of(torch_base()))
    jaxadapt.save(model, tmp_path)
    name = "adapter_config.json"
    assert json.loads((tmp_path / name).read_text()) == json.loads((folders(case) / name).read_text())
    theirs, ours = (load_file(folder / "adapter_model.safetensors") for folder in (folders(case), tmp_path))
    for key, value in theirs.items():
        np.testing.assert_array_equal(ours[key], value)


def check_gradients(case: Case, api: str) -> None:
    """The gradient of a random linear function of the logits, with respect to every tensor of the trained form."""
    model = peft_model(case)
    model.zero_grad()
    logits = call_peft(case, model, RIGHT)
    cotangent = COTANGENT[:, : logits.shape[1]]
    (logits * torch.tensor(cotangent)).sum().backward()
    ours, variables = fresh(case, api)
    adapter = jaxadapt.extract(ours if variables is None else variables)
    expected = torch_values(case, adapter.shared, lambda p: torch.zeros_like(p) if p.grad is None else p.grad)
    start = dataclasses.replace(adapter, params={"~shared": torch_values(case, adapter.shared, lambda p: p)})

    def loss(adapter: Any) -> Any:
        if variables is None:
            found = call(case, jaxadapt.inject(nnx.clone(ours), adapter), None, RIGHT)
        else:
            found = call(case, ours, jaxadapt.inject(variables, adapter), RIGHT)
        return jnp.sum(found * cotangent)

    gradients = jax.jit(jax.grad(loss))(start).shared
    assert gradients.keys() == expected.keys()
    scale = max(np.abs(g).max() for g in expected.values())
    for name, gradient in gradients.items():
        np.testing.assert_allclose(gradient, expected[name], rtol=0, atol=1e-5 * scale, err_msg=name)


def torch_copy() -> Any:
    """A copy of the torch base, for PEFT to change."""
    return copy.deepcopy(torch_base())


replace = dataclasses.replace
