"""The state dict of a whole PEFT model as an adapter's file: its keys carry the adapter's name."""

from __future__ import annotations

import copy
import shutil
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")

import peft
import torch
from safetensors.torch import save_file

import jaxadapt
from tests.support import peft_harness as harness
from tests.support.twins import gpt2

pytestmark = pytest.mark.peft

IDS = np.random.RandomState(0).randint(0, 64, (2, 5))
NUMBERS = {"layers": 1, "width": 16, "heads": 2}
LORA = {"r": 2, "target_modules": ["c_attn", "mlp.c_proj"], "fan_in_fan_out": True}
CASES = {
    "lora": peft.LoraConfig(**LORA),
    "dora": peft.LoraConfig(**LORA, use_dora=True),
    "bias": peft.LoraConfig(**LORA, bias="lora_only"),
    "saved": peft.LoraConfig(**LORA, modules_to_save=["ln_f"]),
    "tokens": peft.LoraConfig(**LORA, trainable_token_indices={"wte": [3, 5]}),
    "embedding": peft.LoraConfig(r=2, target_modules=["wte"]),
    "ia3": peft.IA3Config(
        target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"], fan_in_fan_out=True
    ),
}
SAYS = "is the state dict of a complete PEFT model: the adapter's name 'default' is removed"


def models(config: Any) -> tuple[Any, Any, Any, Any]:
    """PEFT's model, its own folder's configuration, and our module with its variables."""
    base, (module, variables) = gpt2.make_gpt2("linen", **NUMBERS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = harness.make_peft(base, config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad and not any(part in name for part in ("lora_A", "lora_B", "ia3_")):
                p.add_(0.1 * torch.randn(p.shape))
    return base, model, module, variables


def save_raw(model: Any, folder: Path, form: str, only: str = "") -> None:
    """PEFT's configuration beside a state dict as `torch.save(model.state_dict())` writes it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
    state = {k: v.contiguous().clone() for k, v in model.state_dict().items() if only in k}
    (folder / "adapter_model.safetensors").unlink()
    if form == "bin":
        torch.save(state, folder / "adapter_model.bin")
    else:
        save_file(state, str(folder / "adapter_model.safetensors"))


@pytest.mark.parametrize("form", ["bin", "safetensors"])
@pytest.mark.parametrize("case", CASES)
def test_it_computes_what_peft_computes(case: str, form: str, tmp_path: Path):
    _, model, module, variables = models(CASES[case])
    save_raw(model, tmp_path, form)
    with pytest.warns(UserWarning, match=SAYS):
        loaded = jaxadapt.load(tmp_path, variables)
    found = np.asarray(jaxadapt.adapt(module, jaxadapt.extract(loaded).config).apply(loaded, jnp.asarray(IDS)))
    want = harness.logits(model, IDS)
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-5 * abs(want).max())
    with pytest.warns(UserWarning, match=SAYS):
        assert jaxadapt.inspect(tmp_path).modules
    # saved again it is a file of PEFT's
    jaxadapt.save(loaded, tmp_path / "again")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path / "plain", save_embedding_layers=False)
    theirs = harness.read_tensors(tmp_path / "plain")
    assert harness.specs(harness.read_tensors(tmp_path / "again")) == harness.specs(theirs)


def test_peft_loads_it_under_the_same_name(tmp_path: Path):
    """What is followed here: such keys are the model's own, and are loaded as they are."""
    base, model, _, _ = models(CASES["lora"])
    save_raw(model, tmp_path, "bin")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path)).eval()
    np.testing.assert_array_equal(harness.logits(again, IDS), harness.logits(model, IDS))


@pytest.mark.parametrize("only", ["lora_", ""])
def test_in_memory_too(only: str):
    _, model, _, variables = models(CASES["lora"])
    state = {k: v.detach().numpy() for k, v in model.state_dict().items() if only in k}
    config = jaxadapt.LoraConfig(**LORA)
    with pytest.warns(UserWarning, match=SAYS):
        adapter = jaxadapt.from_peft(jaxadapt.PeftTensors(config, state), variables)
    want = peft.get_peft_model_state_dict(model)
    found = jaxadapt.to_peft(adapter).tensors
    assert found.keys() == want.keys()
    for key, tensor in want.items():
        np.testing.assert_array_equal(found[key], tensor.numpy())


def test_base_weights_that_differ_are_refused(tmp_path: Path):
    """PEFT would put them into the model."""
    _, model, _, variables = models(CASES["lora"])
    with torch.no_grad():
        model.base_model.model.transformer.ln_f.weight.add_(1)
        model.base_model.model.transformer.h[0].attn.c_attn.base_layer.weight.add_(1)
    save_raw(model, tmp_path, "bin")
    says = (
        r"(?s)base weights that differ.*c_attn\.base_layer\.weight: its values differ.*ln_f\.weight: its values differ"
    )
    with pytest.raises(jaxadapt.MismatchError, match=says), pytest.warns(UserWarning, match=SAYS):
        jaxadapt.load(tmp_path, variables)


def test_several_adapters_are_refused_with_their_names(tmp_path: Path):
    _, model, _, variables = models(CASES["lora"])
    model.add_adapter("other", copy.deepcopy(CASES["lora"]))
    save_raw(model, tmp_path, "bin")
    with pytest.raises(jaxadapt.MismatchError, match=r"several adapters, 'default', 'other'.*selected_adapters"):
        jaxadapt.load(tmp_path, variables)
    with pytest.raises(jaxadapt.MismatchError, match="several adapters"):
        jaxadapt.read(tmp_path)


def test_another_name_than_default(tmp_path: Path):
    base, (_, variables) = gpt2.make_gpt2("linen", **NUMBERS)
    model = peft.get_peft_model(copy.deepcopy(base), CASES["lora"], adapter_name="mine")
    state = {k: v.detach().numpy() for k, v in model.state_dict().items()}
    tensors = jaxadapt.PeftTensors(jaxadapt.LoraConfig(**LORA), state)
    blind = pytest.warns(UserWarning, match="assumed to equal the base's")
    with blind, pytest.warns(UserWarning, match="the adapter's name 'mine'"):
        adapter = jaxadapt.from_peft(tensors, jax.eval_shape(lambda: variables))
    assert len(jaxadapt.to_peft(adapter).tensors) == 4


@pytest.mark.parametrize("which", ["all", "one"])
def test_the_magnitudes_of_dora_under_their_name_in_a_model(which: str, tmp_path: Path):
    """PEFT reads `lora_magnitude_vector.weight` and `lora_magnitude_vector`; it writes the second."""
    base, model, module, variables = models(CASES["dora"])
    harness.save(model, tmp_path / "plain")
    tensors = harness.read_tensors(tmp_path / "plain")
    ends = ".lora_magnitude_vector" if which == "all" else "c_attn.lora_magnitude_vector"
    other = {f"{key}.weight" if key.endswith(ends) else key: torch.tensor(x) for key, x in tensors.items()}
    assert len(other.keys() - tensors.keys()) == (2 if which == "all" else 1)
    (tmp_path / "other").mkdir()
    shutil.copy(tmp_path / "plain" / harness.CONFIG, tmp_path / "other")
    save_file(other, str(tmp_path / "other" / harness.WEIGHTS))
    want = harness.logits(model, IDS)
    np.testing.assert_array_equal(harness.logits(harness.load(base, tmp_path / "other").model, IDS), want)

    stored = jaxadapt.read(tmp_path / "other")
    assert stored.tensors.keys() == tensors.keys()
    in_memory = jaxadapt.PeftTensors(stored.config, {key: np.asarray(x) for key, x in other.items()})
    for loaded in (jaxadapt.load(tmp_path / "other", variables), jaxadapt.load(in_memory, variables)):
        found = np.asarray(jaxadapt.adapt(module, jaxadapt.extract(loaded).config).apply(loaded, jnp.asarray(IDS)))
        np.testing.assert_allclose(found, want, rtol=0, atol=1e-5 * abs(want).max())
    codes = {each.code: each.severity for each in jaxadapt.verify(tmp_path / "other")}
    assert codes["tensor-names"] == "warning"
    assert "missing" not in codes
    jaxadapt.repair(tmp_path / "other", tmp_path / "repaired")
    harness.assert_same_files(tmp_path / "repaired", tmp_path / "plain")


def test_magnitudes_under_both_names_are_refused():
    _, model, _, variables = models(CASES["dora"])
    state = {key: x.numpy() for key, x in peft.get_peft_model_state_dict(model).items()}
    key = next(key for key in state if key.endswith(".lora_magnitude_vector"))
    tensors = jaxadapt.PeftTensors(
        jaxadapt.LoraConfig(**LORA, use_dora=True), {**state, f"{key}.weight": state[key] + 1}
    )
    with pytest.raises(jaxadapt.MismatchError, match=rf"(?s)these tensors twice.*{key}"):
        jaxadapt.load(tensors, variables)
