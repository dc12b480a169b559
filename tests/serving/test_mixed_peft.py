"""A batch that mixes adapters gives the logits of PEFT's own mixed batch (`adapter_names`), from the files of PEFT."""

from __future__ import annotations

import copy

import jax
import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

import torch
from flax import nnx
from peft import LoraConfig, VeraConfig, get_peft_model

import jaxadapt
from jaxadapt import serving
from tests.support.twins import llama

pytestmark = pytest.mark.peft

IDS = np.random.RandomState(0).randint(0, 64, (6, 7))
NAMES = ["fr", "de", "__base__", "it", "fr", "de"]
TARGETS = ["q_proj", "v_proj", "down_proj"]
CONFIGS = {
    "fr": {"r": 2, "lora_alpha": 3, "target_modules": TARGETS},
    "de": {
        "r": 4, "lora_alpha": 5, "use_rslora": True, "target_modules": ["q_proj", "o_proj"],
        "rank_pattern": {"layers.1.self_attn.q_proj": 1}, "alpha_pattern": {"layers.0.self_attn.q_proj": 9},
    },
    "it": {"r": 3, "use_dora": True, "target_modules": TARGETS},
}  # fmt: skip
BANK = [
    jaxadapt.LoraConfig(r=4, target_modules=[*TARGETS, "o_proj"]),
    jaxadapt.LoraConfig(r=4, target_modules=TARGETS, use_dora=True),
]


@pytest.fixture(scope="module")
def torch_base():
    return llama.torch_llama(layers=2)


@pytest.fixture(scope="module")
def mixed(torch_base, tmp_path_factory):
    """The folder that PEFT saved the adapters in, and the logits of its mixed batch."""
    folder = tmp_path_factory.mktemp("peft")
    model = None
    for name, fields in CONFIGS.items():
        if model is None:
            model = get_peft_model(copy.deepcopy(torch_base), LoraConfig(**fields), adapter_name=name)
        else:
            model.add_adapter(name, LoraConfig(**fields))
    model.eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
        # PEFT refuses a DoRA in a mixed batch, so that row is as with this adapter alone.
        plain = ["__base__" if name == "it" else name for name in NAMES]
        logits = model(torch.from_numpy(IDS), adapter_names=plain).logits.numpy()
        model.set_adapter("it")
        row = NAMES.index("it")
        logits[row] = model(torch.from_numpy(IDS[row : row + 1])).logits[0].numpy()
    model.save_pretrained(str(folder))
    return folder, logits


@pytest.mark.parametrize(("api", "scan"), [("nnx", None), ("nnx", 1), ("linen", 0), ("linen", 1)])
def test_a_mixed_batch_is_as_in_peft(torch_base, mixed, api, scan):
    folder, expected = mixed
    twin = llama.twin_of(torch_base, api, scan=scan is not None, scan_axis=scan or 0)
    base = twin if api == "nnx" else twin[1]
    bank = serving.create(base, BANK, slots=5)
    pool = serving.AdapterPool(bank, base, folder)
    attached = serving.attach(twin if api == "nnx" else twin[0], bank)
    with pool.lease(NAMES) as ids:
        rows = pool.select(ids)

    with serving.route(attached, rows) as routed:
        found = (
            nnx.jit(lambda model, ids: model(ids))(routed, IDS) if api == "nnx" else jax.jit(routed.apply)(base, IDS)
        )
    # 1e-5 of the largest logit: float32 sums of the two libraries differ in their order.
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(("api", "scan"), [("nnx", None), ("linen", 0)])
def test_rows_of_several_veras_are_as_each_alone_in_peft(torch_base, tmp_path, api, scan):
    """PEFT has no mixed batch of VeRAs. Their files have the projections that the bank's configuration draws."""
    expected, targets = {"__base__": torch_base}, {"fr": ["q_proj", "v_proj"], "de": ["q_proj", "o_proj"]}
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, modules in targets.items():
            model = get_peft_model(copy.deepcopy(torch_base), VeraConfig(r=4, target_modules=modules)).eval()
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator))
            model.save_pretrained(str(tmp_path / name))
            expected[name] = model
        expected = {name: model(torch.from_numpy(IDS)).logits.numpy() for name, model in expected.items()}
    twin = llama.twin_of(torch_base, api, scan=scan is not None, scan_axis=scan or 0)
    base = twin if api == "nnx" else twin[1]
    room = jaxadapt.VeraConfig(r=4, target_modules=["q_proj", "v_proj", "o_proj"])
    bank = serving.create(base, room, slots=3)
    attached = serving.attach(twin if api == "nnx" else twin[0], bank)
    names = ["fr", "de", "__base__", "de", "fr", "de"]
    with serving.AdapterPool(bank, base, tmp_path).rows(names) as rows, serving.route(attached, rows) as routed:
        found = routed(IDS) if api == "nnx" else jax.jit(routed.apply)(base, IDS)
    for row, name in enumerate(names):
        want = expected[name][row]
        np.testing.assert_allclose(found[row], want, rtol=0, atol=1e-5 * np.abs(want).max())
