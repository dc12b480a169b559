"""bias="<type>_only", for every registered method that has it, against PEFT: this file names none."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
from flax import nnx

import jaxadapt
from jaxadapt import ConfigError, methods
from tests.support.configs import class_of

pytest.importorskip("torch")
pytest.importorskip("peft")

import torch
from peft import PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.numpy import load_file

pytestmark = pytest.mark.peft
X = np.random.default_rng(0).standard_normal((3, 8)).astype("float32")


class TorchNet(torch.nn.Module):
    """8 -> 16 -> 8."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.up = torch.nn.Linear(8, 16), torch.nn.Linear(16, 8)

    def forward(self, x: Any) -> Any:
        return self.up(torch.tanh(self.q(x)))


class Net(nnx.Module):
    """The same, with PyTorch's values."""

    def __init__(self, net: TorchNet) -> None:
        self.q, self.up = nnx.Linear(8, 16, rngs=nnx.Rngs(0)), nnx.Linear(16, 8, rngs=nnx.Rngs(0))
        for name in ("q", "up"):
            layer, theirs = getattr(self, name), getattr(net, name)
            layer.kernel[...], layer.bias[...] = theirs.weight.detach().numpy().T, theirs.bias.detach().numpy()

    def __call__(self, x: Any) -> Any:
        return self.up(nnx.tanh(self.q(x)))


def fields_of(peft_type: str) -> dict[str, Any]:
    return {**methods.METHODS[peft_type].examples[0], "target_modules": ["q"], "bias": f"{peft_type.lower()}_only"}


def has_it(peft_type: str) -> bool:
    try:
        class_of(peft_type)(**fields_of(peft_type))
    except ConfigError:
        return False
    return methods.METHODS[peft_type].scope == "site"


TYPES = [peft_type for peft_type in sorted(methods.METHODS) if has_it(peft_type)]


def test_some_methods_have_it():
    assert len(TYPES) > 2


@pytest.mark.parametrize("peft_type", TYPES)
def test_the_biases_of_adapted_modules_are_trained_and_saved_as_peft_does(peft_type: str, tmp_path: Any):
    torch.manual_seed(0)
    base = TorchNet()
    ours = Net(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = PEFT_TYPE_TO_CONFIG_MAPPING[peft_type](**fields_of(peft_type))
        theirs = get_peft_model(base, config).eval()
        trained = {name.replace(".default", "") for name, p in theirs.named_parameters() if p.requires_grad}
        with torch.no_grad():
            for parameter in theirs.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.2 * torch.randn(parameter.shape))
        theirs.save_pretrained(str(tmp_path / "peft"))
        want = theirs(torch.from_numpy(X)).detach().numpy()
    jaxadapt.load(tmp_path / "peft", ours)
    np.testing.assert_allclose(ours(X), want, rtol=1e-5, atol=1e-5)  # products in another order
    jaxadapt.save(ours, tmp_path / "ours")
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("peft", "ours"))
    assert one.keys() == two.keys()
    assert "base_model.model.q.base_layer.bias" in two
    for key, x in one.items():
        np.testing.assert_array_equal(two[key], x, err_msg=key)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        again = PeftModel.from_pretrained(TorchNet(), str(tmp_path / "ours")).eval()
    np.testing.assert_array_equal(again(torch.from_numpy(X)).detach().numpy(), want)
    # A new adapter trains what PEFT trains.
    torch.manual_seed(0)
    new = jaxadapt.adapt(Net(TorchNet()), class_of(peft_type)(**fields_of(peft_type)), rngs=nnx.Rngs(0))
    keys = {key for key in jaxadapt.to_peft(jaxadapt.extract(new)).tensors if key.endswith("bias")}
    assert keys == {name for name in trained if name.endswith("bias")} == {"base_model.model.q.base_layer.bias"}


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_disable_gives_the_base_also_where_peft_keeps_trained_biases(bias: str, tmp_path: Any):
    """As docs/several.md and the docstring say; PEFT itself warns that its output is not the base's."""
    torch.manual_seed(0)
    base = TorchNet()
    ours, want = Net(base), base(torch.from_numpy(X)).detach().numpy()
    fields: dict[str, Any] = {"r": 2, "target_modules": ["q"], "bias": bias}
    theirs = get_peft_model(base, PEFT_TYPE_TO_CONFIG_MAPPING["LORA"](**fields)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape))
    theirs.save_pretrained(str(tmp_path))
    with pytest.warns(UserWarning, match="does not produce the same output"), theirs.disable_adapter():
        kept = theirs(torch.from_numpy(X)).detach().numpy()
    assert abs(kept - want).max() > 0.1
    jaxadapt.load(tmp_path, ours)
    assert abs(ours(X) - want).max() > 0.1
    with jaxadapt.disable(ours):
        np.testing.assert_allclose(ours(X), want, rtol=1e-5, atol=1e-6)
    assert "keeps these biases" in (jaxadapt.disable.__doc__ or "")
