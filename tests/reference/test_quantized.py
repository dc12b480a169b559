"""Adapters on quantized bases beside PEFT on the same base made dense."""

from __future__ import annotations

import functools
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
pytest.importorskip("qwix")

import peft
import qwix
import torch

import jaxadapt
from jaxadapt.keymaps import families, plan
from jaxadapt.models.carriers import carrier
from tests.support import peft_harness as harness
from tests.support.twins import llama

pytestmark = pytest.mark.peft

IDS = np.random.RandomState(0).randint(0, 64, (2, 7))
TARGETS = ["q_proj", "v_proj", "down_proj"]
FIELDS: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS}
# what, the API, whether the layers are scanned, and how its weights come to be quantized
CASES = {
    "ours-nf4-nnx": ("nnx", False, "nf4"),
    "ours-nf4-linen-scan": ("linen", True, "nf4"),
    "ours-int8-nnx-scan": ("nnx", True, "int8"),
    "ours-int8-linen": ("linen", False, "int8"),
    "qwix-nf4-nnx": ("nnx", False, {"weight_qtype": "nf4", "tile_size": 16}),
    "qwix-int4-nnx": ("nnx", False, {"weight_qtype": "int4", "tile_size": 16}),
    "qwix-int8-linen": ("linen", False, {"weight_qtype": "int8"}),
    "qwix-nf4-linen": ("linen", False, {"weight_qtype": "nf4", "tile_size": 16}),
}
LAYERS = r".*(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


def close(found: Any, expected: Any) -> None:
    """1e-5 of the largest: float32 sums of the two libraries differ in their order."""
    expected = np.asarray(expected)
    np.testing.assert_allclose(np.asarray(found), expected, rtol=0, atol=1e-5 * abs(expected).max())


@functools.cache
def torch_base() -> Any:
    return llama.torch_llama(layers=1)


class Ours:
    """A model of either API whose base is quantized."""

    def __init__(self, api: str, scan: bool, how: Any) -> None:
        self.api = api
        found = llama.twin_of(torch_base(), api, scan=scan)
        if api == "nnx":
            self.tree = self._nnx(found, how)
            self.bare = self.tree(jnp.asarray(IDS))
            self.dense = jaxadapt.models.dequantize(nnx.clone(self.tree))
        else:
            self.module, base = self._linen(*found, how)
            self.tree = {"params": base}
            with jaxadapt.disable(jaxadapt.adapt(self.module, jaxadapt.LoraConfig(**FIELDS))) as plain:
                self.bare = plain.apply(self.tree, jnp.asarray(IDS))
            self.dense = jaxadapt.models.dequantize(base)

    def _nnx(self, model: Any, how: Any) -> Any:
        if isinstance(how, str):
            return jaxadapt.models.quantize(model, how)
        provider = qwix.PtqProvider([qwix.QuantizationRule(module_path=LAYERS, **how)])
        theirs = qwix.quantize_model(model, provider, jnp.asarray(IDS))
        with pytest.raises(jaxadapt.AttachError, match=r"jaxadapt\.models\.from_qwix"):
            jaxadapt.adapt(theirs, jaxadapt.LoraConfig(**FIELDS), rngs=nnx.Rngs(0))
        y = theirs(jnp.asarray(IDS))
        model = jaxadapt.models.from_qwix(theirs)
        close(model(jnp.asarray(IDS)), y)  # Qwix' own arithmetic with the same weights
        return model

    def _linen(self, module: Any, variables: Any, how: Any) -> Any:
        if isinstance(how, str):
            return module, jaxadapt.models.quantize(variables["params"], how)
        provider = qwix.PtqProvider([qwix.QuantizationRule(module_path=LAYERS, **how)])
        theirs = qwix.quantize_model(module, provider)
        specs = jax.eval_shape(theirs.init, jax.random.key(0), jnp.asarray(IDS))["params"]
        params = qwix.quantize_params(variables["params"], specs)
        plain = jaxadapt.models.from_qwix(theirs)
        assert type(plain) is type(module)
        return plain, params

    def torch(self) -> Any:
        """PEFT's base: torch's model with the very weights that are left."""
        leaves = carrier(self.dense).leaves()
        shapes = {path: tuple(x.shape) for path, x in leaves.items()}
        held = plan.base_plan(families.resolve_keymap(None, shapes), shapes).encode(leaves)
        model = llama.torch_llama(layers=1)
        lost = model.load_state_dict({k: torch.from_numpy(np.array(x)) for k, x in held.items()}, strict=False)
        assert not lost.unexpected_keys
        assert set(lost.missing_keys) <= {"lm_head.weight"}
        return model.eval()

    def load(self, folder: Path) -> None:
        self.tree = jaxadapt.load(folder, self.tree)
        if self.api == "linen":
            self.adapted = jaxadapt.adapt(self.module, jaxadapt.extract(self.tree).config)

    def loss(self) -> tuple[Any, Any]:
        """The logits, and the gradient of their mean square by the adapter, under PEFT's names."""
        if self.api == "nnx":

            def of(model: Any) -> Any:
                y = model(jnp.asarray(IDS))
                return jnp.mean(y**2), y

            find = nnx.grad(of, argnums=nnx.DiffState(0, jaxadapt.AdapterParam), has_aux=True)
            slopes, y = nnx.jit(find)(self.tree)
            grads = jaxadapt.extract(slopes)
        else:

            def at(lora: Any) -> Any:
                y = self.adapted.apply({**self.tree, "lora": lora}, jnp.asarray(IDS))
                return jnp.mean(y**2), y

            slopes, y = jax.jit(jax.grad(at, has_aux=True))(self.tree["lora"])
            grads = jaxadapt.extract(slopes)
        return y, jaxadapt.to_peft(grads).tensors

    def merged(self) -> Any:
        adapter = jaxadapt.extract(self.tree)
        if self.api == "nnx":
            return jaxadapt.merge(jaxadapt.detach(self.tree), adapter, dequantize=True)(jnp.asarray(IDS))
        params = jaxadapt.merge(self.tree["params"], adapter, dequantize=True)
        return self.module.apply({"params": params}, jnp.asarray(IDS))


@pytest.mark.parametrize("name", CASES)
def test_trains_saves_and_merges_as_peft_does_on_the_dense_base(name, tmp_path):
    ours = Ours(*CASES[name])
    base = ours.torch()
    close(ours.bare, harness.logits(base, IDS))
    assert abs(harness.logits(base, IDS) - harness.logits(torch_base(), IDS)).max() > 1e-3  # it was quantized
    theirs = harness.make_peft(base, peft.LoraConfig(task_type="CAUSAL_LM", **FIELDS))
    ours.load(harness.save(theirs, tmp_path / "theirs"))
    y, grads = ours.loss()
    out = theirs(torch.from_numpy(IDS)).logits
    out.square().mean().backward()
    close(y, out.detach())
    expected = {n.replace(".default", ""): p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    assert grads.keys() == expected.keys()
    for key, grad in expected.items():
        close(grads[key], grad)
    jaxadapt.save(ours.tree, tmp_path / "ours")
    back = harness.load(base, tmp_path / "ours")
    assert not back.complaints
    close(harness.logits(back.model, IDS), y)
    close(ours.merged(), harness.logits(back.model.merge_and_unload(), IDS))


# ---- bitsandbytes ----------------------------------------------------------------------------------------
