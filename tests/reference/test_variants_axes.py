"""LoRA's variants on kernels of several axes and on GPT-2's Conv1D, beside PEFT on the same weights as matrices."""

from __future__ import annotations

import copy
import functools
import warnings
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

pytest.importorskip("torch")
pytest.importorskip("peft")

import peft
import torch

import jaxadapt
from jaxadapt import Weight
from tests.reference.test_lora_matrix import close
from tests.support import peft_harness as harness
from tests.support.twins import gpt2, trees

pytestmark = pytest.mark.peft

D, HEADS, HEAD = 8, 2, 4
X = np.random.RandomState(0).standard_normal((3, 5, D)).astype("float32")
TABLE = jaxadapt.KeyMap("axes", (
    Weight("q.kernel", "q.weight", "d n h -> (n h) d"),
    Weight("q.bias", "q.bias", "n h -> (n h)"),
    Weight("o.kernel", "o.weight", "n h d -> d (n h)"),
))  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True, "use_rslora": True},
    "kasa": {"kasa_config": {"beta": 1e-4, "gamma": 1e-3}},
    "mica": {"init_lora_weights": "mica"},
    "lora_bias": {"lora_bias": True, "target_modules": ["q"]},
    "bias": {"bias": "lora_only"},
}


class TorchNet(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.q, self.o = torch.nn.Linear(D, D), torch.nn.Linear(D, D, bias=False)

    def forward(self, x: Any) -> Any:
        return self.o(torch.tanh(self.q(x)))


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h = jnp.tanh(nn.DenseGeneral((HEADS, HEAD), name="q")(x))
        return nn.Einsum((HEADS, HEAD, D), "...nh,nhd->...d", use_bias=False, name="o")(h)


class NNXNet(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.q = nnx.LinearGeneral(D, (HEADS, HEAD), rngs=rngs)
        self.o = nnx.Einsum("...nh,nhd->...d", (HEADS, HEAD, D), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.o(jnp.tanh(self.q(x)))


@functools.cache
def torch_net() -> Any:
    return TorchNet().eval()


def leaves() -> dict[str, np.ndarray]:
    """The torch network's weights at our paths, by the rules of the two libraries (no table of ours)."""
    q, bias, o = (x.detach().numpy() for x in (torch_net().q.weight, torch_net().q.bias, torch_net().o.weight))
    heads = (HEADS, HEAD)
    return {"q.kernel": q.T.reshape(D, *heads), "q.bias": bias.reshape(heads), "o.kernel": o.T.reshape(*heads, D)}


def in_peft(model: Any, fields: dict[str, Any]) -> Any:
    """PEFT's adapter on a model, with noise on all that is trained."""
    fields = copy.deepcopy(fields)
    if "kasa_config" in fields:
        fields["kasa_config"] = peft.KasaConfig(**fields["kasa_config"])
    adapted = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**fields)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if p.requires_grad:
                p.add_((0.1 if "magnitude" in name else 0.3) * torch.randn(p.shape, generator=generator))
    return adapted


@pytest.mark.parametrize("api", ["nnx", "linen"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.filterwarnings("ignore:.*have invalid shape")  # PEFT, of a bias of its own
def test_several_axes(variant, api, tmp_path):
    """Outputs, merged weights and the file, there and back."""
    fields = {"r": 2, "lora_alpha": 3, "target_modules": ["q", "o"], **VARIANTS[variant]}
    theirs = in_peft(torch_net(), fields)
    harness.save(theirs, tmp_path / "peft")
    with torch.no_grad():
        want = theirs(torch.from_numpy(X)).numpy()
    file = jaxadapt.read(tmp_path / "peft", change_base=True if variant == "kasa" else None)
    base = trees.nest(leaves())
    if api == "nnx":
        model = NNXNet(nnx.Rngs(0))
        trees.fill(model, leaves())
        tree = jaxadapt.load(file, model, keymap=TABLE)
        output = tree(jnp.asarray(X))
    else:
        tree = jaxadapt.load(file, {"params": base}, keymap=TABLE)
        module = jaxadapt.adapt(LinenNet(), jaxadapt.extract(tree).config, keymap=TABLE)
        output = module.apply(tree, jnp.asarray(X))
    close(output, want)
    jaxadapt.save(tree, tmp_path / "ours")
    mine, before = (harness.read_tensors(tmp_path / who) for who in ("ours", "peft"))
    assert mine.keys() == before.keys()
    assert all(np.array_equal(mine[key], x) for key, x in before.items())
    assert harness.read_json(tmp_path / "ours") == harness.read_json(tmp_path / "peft")
    if api == "linen":
        merged = LinenNet().apply({"params": jaxadapt.merge(tree["params"], jaxadapt.extract(tree))}, X)
        close(merged, want)


CONV1D = {"dora": {"use_dora": True}, "rslora": {"use_rslora": True}, "lora_bias": {"lora_bias": True}}


@pytest.mark.parametrize("variant", CONV1D)
@pytest.mark.filterwarnings("ignore:.*have invalid shape")
def test_conv1d(variant, tmp_path):
    base = gpt2.torch_gpt2(gpt2.Shape(layers=1))
    fields = {"r": 2, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True, **CONV1D[variant]}
    theirs = in_peft(base, fields)
    harness.save(theirs, tmp_path)
    ids = np.random.RandomState(0).randint(0, 64, (2, 7))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        want = harness.logits(theirs, ids)
    model = gpt2.make_gpt2("nnx", scan_axis=None, layers=1)[1]
    close(jaxadapt.load(tmp_path, model)(jnp.asarray(ids)), want)
