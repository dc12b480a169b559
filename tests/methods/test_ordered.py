"""TINYLORA and UNILORA, which depend on the order of PyTorch's modules: files, seeds and order, beside PEFT."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxadapt
from jaxadapt import ConfigError, KeyMap, KeyMapError, MismatchError, TinyLoraConfig, UniLoraConfig
from jaxadapt.adapters import sites
from tests.methods import one_layer

pytest.importorskip("torch")
pytest.importorskip("peft")

import peft
import torch

from tests.support.twins import gpt2, llama

pytestmark = pytest.mark.peft
IDS = np.array([[3, 1, 7, 20, 5]])
BASE = {"up": {"kernel": one_layer.numbers(4, 6)}, "q": {"kernel": one_layer.numbers(6, 4, seed=1)}}
TARGETS = ["up_proj", "q_proj", "v_proj"]  # not in PyTorch's order


def saved(base: Any, config: Any, folder: Path) -> np.ndarray:
    """Save PEFT's adapter with noise on its shared vectors, and return PEFT's logits."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(copy.deepcopy(base), config).eval()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
            model.save_pretrained(str(folder))
            return model(torch.from_numpy(IDS)).logits.numpy()


def close(got: Any, want: np.ndarray) -> None:
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * abs(want).max())


def test_the_trained_vectors_alone_say_how_many_groups_there_are():
    """A tree without the modules, such as the trained parameters of an optimizer's state."""
    config = TinyLoraConfig(target_modules=["up", "q"], u=3)
    found = sites.sites_from_shapes(config, KeyMap("t", ()), {"~shared": {"tinylora_v": (2, 3)}})
    assert [(each.tensor.name, each.entry.shape) for each in found.shared] == [("tinylora_v", (2, 3))]


def test_eleven_layers_are_in_the_order_of_their_numbers(tmp_path: Path):
    """By text "10" is before "2"; each module has its own vector and seed."""
    base = llama.torch_llama(layers=11, width=8, inner=12, heads=2, kv_heads=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's advice on projections
        config = peft.TinyLoraConfig(u=3, target_modules=TARGETS, save_projection=False, init_weights="uniform")
    want = saved(base, config, tmp_path)
    close(jaxadapt.load(tmp_path, llama.twin_of(base, "nnx"))(jnp.asarray(IDS)), want)


@pytest.mark.parametrize("save_indices", [False, True])
def test_unilora_on_conv1d(save_indices: bool, tmp_path: Path):
    base, fresh = gpt2.make_gpt2()
    config = peft.UniLoraConfig(
        theta_d_length=13, target_modules=["c_fc", "c_attn"], save_indices=save_indices, fan_in_fan_out=True
    )
    want = saved(base, config, tmp_path / "peft")
    model = jaxadapt.load(tmp_path / "peft", fresh)
    close(nnx.jit(lambda model, ids: model(ids))(model, jnp.asarray(IDS)), want)
    # PEFT opens the file that we write, with the indices as int32.
    jaxadapt.save(model, tmp_path / "ours")
    theirs, again = (jaxadapt.read(tmp_path / name).tensors for name in ("peft", "ours"))
    assert {key: x.shape for key, x in theirs.items()} == {key: x.shape for key, x in again.items()}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        reloaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "ours")).eval()
        close(reloaded(torch.from_numpy(IDS)).logits.numpy(), want)


def test_tinylora_on_an_embedding_that_is_the_head_too(tmp_path: Path):
    """PEFT adapts the lookup alone."""
    base = llama.torch_llama(layers=1, tied=True)
    config = peft.TinyLoraConfig(u=3, r=2, target_modules=["embed_tokens", "q_proj"], weight_tying=1.0)
    want = saved(base, config, tmp_path)
    close(jaxadapt.load(tmp_path, llama.twin_of(base, "nnx"))(jnp.asarray(IDS)), want)
    with pytest.raises(ConfigError, match="tinylora_dropout is not implemented for embeddings"):
        jaxadapt.adapt(
            llama.twin_of(base, "nnx"),
            TinyLoraConfig(target_modules=["embed_tokens"], tinylora_dropout=0.1),
            rngs=nnx.Rngs(0),
        )


@pytest.mark.parametrize("r", [1, 2])
def test_a_new_tinylora_is_that_of_peft(r: int):
    """The seeds are PEFT's; the singular vectors are so up to their signs."""
    base = llama.torch_llama(layers=1, width=8, inner=12, heads=2, kv_heads=1)
    fields: dict[str, Any] = {"r": r, "u": 3, "target_modules": TARGETS, "weight_tying": 0.5}
    model = peft.get_peft_model(copy.deepcopy(base), peft.TinyLoraConfig(**fields))
    want = {key: x.numpy() for key, x in peft.get_peft_model_state_dict(model).items()}
    ours = jaxadapt.adapt(llama.twin_of(base, "nnx"), TinyLoraConfig(**fields), rngs=nnx.Rngs(0))
    got = jaxadapt.to_peft(jaxadapt.extract(ours)).tensors
    assert {key: x.shape for key, x in want.items()} == {key: x.shape for key, x in got.items()}
    for key, x in want.items():
        signed = key.endswith(("_A", "_B"))
        np.testing.assert_allclose(*(np.abs(y) if signed else y for y in (got[key], x)), rtol=1e-4, atol=1e-5)
    for module in {key.rpartition(".")[0] for key in want if key.endswith("_A")}:
        products = [np.asarray(t[f"{module}.tinylora_B"]) @ np.asarray(t[f"{module}.tinylora_A"]) for t in (got, want)]
        np.testing.assert_allclose(*products, rtol=1e-4, atol=1e-5)


def test_the_file_must_have_the_singular_vectors_and_may_lack_the_projections(tmp_path: Path):
    base = llama.torch_llama(layers=1, width=8, inner=12, heads=2, kv_heads=1)
    want = saved(base, peft.TinyLoraConfig(u=3, target_modules=TARGETS), tmp_path)
    file = jaxadapt.read(tmp_path)
    short = {key: x for key, x in file.tensors.items() if not key.endswith("_P")}
    jaxadapt.write(jaxadapt.PeftTensors(file.config, short), tmp_path / "short")
    close(jaxadapt.load(tmp_path / "short", llama.twin_of(base, "nnx"))(jnp.asarray(IDS)), want)
    for end in ("_A", "_v.1"):
        less = {key: x for key, x in file.tensors.items() if not key.endswith(end)}
        with pytest.raises(MismatchError, match="missing"):
            jaxadapt.from_peft(jaxadapt.PeftTensors(file.config, less), llama.twin_of(base, "nnx"))


@pytest.mark.parametrize("config", [TinyLoraConfig, UniLoraConfig])
def test_an_unknown_order_is_named(config: Any):
    made = config(r=2, target_modules=["q", "up"])
    with pytest.raises(KeyMapError, match=r"(?s)order of PyTorch's modules.*'generic'.*order=.*q.*up"):
        jaxadapt.init(BASE, made, key=jax.random.key(0))
    one = jaxadapt.init(BASE, made.replace(target_modules=["q"]), key=jax.random.key(0))  # has only one order
    assert one.shared
    orders = [KeyMap("mine", (*_entries(),), order=order) for order in (("q", "up"), ("up", "q"))]
    first, second = (jaxadapt.init(BASE, made, key=jax.random.key(0), keymap=keymap).flat() for keymap in orders)
    assert any(not np.array_equal(first[path], second[path]) for path in first)


def _entries() -> list[jaxadapt.Weight]:
    return [jaxadapt.Weight(f"{name}.kernel", f"{name}.weight", "i o -> o i") for name in BASE]
