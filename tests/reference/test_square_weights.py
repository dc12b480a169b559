"""Weights that fit PyTorch's transposed as well: whole copies of them, and parameters named by themselves."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import jaxadapt
from jaxadapt import KeyMap, Weight
from tests.reference.test_dense_gpt2 import GPT, WIDTH

SQUARE = "transformer.h.{}.attn.c_proj"
TURNED = tuple(
    Weight(f"{SQUARE.format(i)}.kernel", f"{SQUARE.format(i)}.weight", "i o -> i o", fan_in_fan_out=True)
    for i in (0, 1)
)
DENSE = KeyMap("dense-gpt2", (*TURNED, Weight("{path}.kernel", "{path}.weight", "i o -> o i")))


@pytest.fixture(scope="module")
def theirs() -> Any:
    pytest.importorskip("peft")
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = GPT2Config(
        vocab_size=50,
        n_positions=8,
        n_embd=WIDTH,
        n_layer=2,
        n_head=1,
        bos_token_id=None,
        eos_token_id=None,
        tie_word_embeddings=False,
    )
    return GPT2LMHeadModel(shape)


def params() -> Any:
    return GPT().init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]


def square_of(tree: Any, layer: int) -> Any:
    return tree["transformer"]["h"][str(layer)]["attn"]["c_proj"]["kernel"]


@pytest.mark.peft
def test_a_full_copy_of_a_square_conv1d_lies_as_pefts_or_is_refused(theirs: Any, tmp_path: Path):
    import peft
    import torch

    config = peft.LoraConfig(r=2, target_modules=["c_attn"], modules_to_save=["attn.c_proj"], fan_in_fan_out=True)
    model = peft.get_peft_model(copy.deepcopy(theirs), config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "modules_to_save" in name:
                p.copy_(torch.randn(p.shape))
    model.save_pretrained(tmp_path / "peft")

    base = params()
    for call in (
        lambda: jaxadapt.load(tmp_path / "peft", {"params": base}, keymap="generic"),
        lambda: jaxadapt.init(base, jaxadapt.read_config(tmp_path / "peft"), key=jax.random.key(0), keymap="generic"),
        lambda: jaxadapt.adapt(GPT(), jaxadapt.read_config(tmp_path / "peft"), keymap="generic").init(
            jax.random.key(0), jnp.zeros((1, 4), jnp.int32)
        ),
    ):
        with pytest.raises(jaxadapt.KeyMapError, match=r"(?s)c_proj\.kernel \(16, 16\): square.*fan_in_fan_out=True"):
            call()

    for keymap in (None, DENSE):  # the family "gpt2-dense" is recognized, and knows the layout too
        check_copies(model, base, tmp_path, keymap)


def check_copies(model: Any, base: Any, tmp_path: Path, keymap: KeyMap | None) -> None:
    variables = jaxadapt.load(tmp_path / "peft", {"params": base}, keymap=keymap)
    merged = jaxadapt.merge(base, jaxadapt.extract(variables))
    for layer, block in enumerate(model.base_model.model.transformer.h):
        want = block.attn.c_proj.modules_to_save["default"].weight.detach().numpy()  # (in, out), as nn.Dense has it
        np.testing.assert_array_equal(square_of(merged, layer), want)
    jaxadapt.save(variables, tmp_path / "back")
    ours, before = (jaxadapt.read(tmp_path / folder).tensors for folder in ("back", "peft"))
    assert ours.keys() == before.keys()
    for key, tensor in before.items():
        np.testing.assert_array_equal(ours[key], tensor)


@pytest.mark.peft
def test_a_square_parameter_named_by_itself_is_refused_where_its_layout_is_not_known(theirs: Any, tmp_path: Path):
    """PEFT makes A and B of a Conv1D's (in, out) as of any (out, in), and no field of the file tells."""
    import peft

    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=["attn.c_proj.weight"], init_lora_weights=False)
    peft.get_peft_model(copy.deepcopy(theirs), config).save_pretrained(tmp_path)
    assert not jaxadapt.read_config(tmp_path).get("fan_in_fan_out")
    with pytest.raises(jaxadapt.KeyMapError, match=r"(?s)target_parameters.*Conv1D.*c_proj\.kernel \(16, 16\)"):
        jaxadapt.load(tmp_path, {"params": params()}, keymap="generic")
    with pytest.raises(jaxadapt.TargetError, match=r"stores it \(in, out\)"):
        jaxadapt.load(tmp_path, {"params": params()}, keymap=DENSE)


def test_a_copy_that_is_not_square_needs_no_line():
    config = jaxadapt.LoraConfig(r=2, target_modules=["c_attn"], modules_to_save=["c_fc"], fan_in_fan_out=True)
    adapter = jaxadapt.init(params(), config, key=jax.random.key(0), keymap="generic")
    assert jaxadapt.to_peft(adapter).tensors["base_model.model.transformer.h.0.mlp.c_fc.weight"].shape == (64, 16)


class Turned(nnx.Module):
    """A transposed convolution, all of whose axes have one size."""

    def __init__(self, rngs: nnx.Rngs, size: int = 3) -> None:
        self.up = nnx.ConvTranspose(3, 3, (size, size), rngs=rngs)
        self.head = nnx.Linear(3, 2, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(self.up(x).mean((1, 2)))


class TurnedLinen(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(2, name="head")(nn.ConvTranspose(3, (3, 3), name="up")(x).mean((1, 2)))


@pytest.mark.parametrize("size", [3, 2])
def test_a_copy_of_a_transposed_convolution_is_refused_whatever_its_sizes(size: int, tmp_path: Path):
    config = jaxadapt.LoraConfig(r=2, target_modules=["head"], modules_to_save=["up"])
    a, b = np.ones((2, 3), "float32"), np.ones((2, 2), "float32")
    prefix = "base_model.model."
    tensors = {
        f"{prefix}head.lora_A.weight": a,
        f"{prefix}head.lora_B.weight": b,
        f"{prefix}up.weight": np.ones((3, 3, size, size), "float32"),
        f"{prefix}up.bias": np.ones(3, "float32"),
    }
    jaxadapt.write(jaxadapt.PeftTensors(config, tensors), tmp_path)
    refused = pytest.raises(jaxadapt.KeyMapError, match=r"(?s)in full.*up\.kernel.*ConvTranspose")
    with refused:
        jaxadapt.load(tmp_path, Turned(nnx.Rngs(0), size))
    with refused:
        jaxadapt.adapt(Turned(nnx.Rngs(0), size), config)
    x = jnp.ones((1, 4, 4, 3))
    with refused:
        jaxadapt.load(tmp_path, TurnedLinen().init(jax.random.key(0), x))
    with refused:
        jaxadapt.adapt(TurnedLinen(), config).init(jax.random.key(0), x)


@pytest.mark.peft
@pytest.mark.parametrize("targets", [["c_attn"], ["c_fc", "lm_head"], ["lm_head"]])
@pytest.mark.parametrize("said", [False, True])
@pytest.mark.parametrize("kind", ["LoraConfig", "IA3Config"])
def test_fan_in_fan_out_is_written_as_peft_writes_it(theirs, targets, said, kind, tmp_path):
    """Of several kinds of modules the last one counts."""
    import peft

    from tests.support.twins import gpt2

    fields = {"target_modules": targets, "fan_in_fan_out": said} | (
        {"feedforward_modules": []} if kind == "IA3Config" else {"r": 2}
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT says that it changes the field
        model = peft.get_peft_model(copy.deepcopy(theirs), getattr(peft, kind)(**fields))
        model.save_pretrained(tmp_path / "peft")
    width = {"vocab": 50, "width": WIDTH, "positions": 8, "heads": 1}
    tree: Any = gpt2.make_gpt2("linen", **width)[1][1]["params"]
    tree["lm_head"] = {"kernel": jnp.ones((WIDTH, 50))}
    adapter = jaxadapt.init(tree, getattr(jaxadapt, kind)(**fields), key=jax.random.key(0))
    assert adapter.keymap.name == "gpt2"
    jaxadapt.save(adapter, tmp_path / "ours")
    want = jaxadapt.read_config(tmp_path / "peft").get("fan_in_fan_out")
    assert jaxadapt.read_config(tmp_path / "ours").get("fan_in_fan_out") is want


@pytest.mark.peft
@pytest.mark.parametrize("targets", [["c_attn", "attn.c_proj", "lm_head"], ["c_attn", "attn.c_proj"]])
def test_a_merge_of_files_does_not_guess_how_a_square_weight_lies(theirs, targets, tmp_path):
    import peft

    from jaxadapt.export import merge_files
    from jaxadapt.storage import safetensors

    theirs.save_pretrained(tmp_path / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(
            copy.deepcopy(theirs), peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
        )
        model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    if "lm_head" in targets:
        with pytest.raises(jaxadapt.MismatchError, match=r"(?s)square.*h\.0\.attn\.c_proj"):
            merge_files.merge_folder(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return
    merge_files.merge_folder(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    got = safetensors.read(tmp_path / "out" / "model.safetensors")["transformer.h.0.attn.c_proj.weight"]
    want = model.merge_and_unload().transformer.h[0].attn.c_proj.weight.detach().numpy()
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)  # sums in another order
