"""`import_base` into models of no family, whose own paths are Hugging Face's names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

import jaxadapt
from jaxadapt import KeyMapError, MismatchError
from jaxadapt.core import paths
from jaxadapt.keymaps import families
from jaxadapt.keymaps.keymap import GENERIC
from tests.keymaps.test_keymap import gpt2_shapes, llama_shapes

WIDTH, HEADS, VOCAB = 16, 4, 32


class Attention(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.query_key_value = nnx.Linear(WIDTH, 3 * WIDTH, rngs=rngs)
        self.dense = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        time = jnp.arange(x.shape[1])
        q, k, v = jnp.moveaxis(self.query_key_value(x).reshape(*x.shape[:2], HEADS, 3, -1), 3, 0)
        slopes = 0.25 ** jnp.arange(1, HEADS + 1)  # alibi, of four heads
        scores = (
            jnp.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(WIDTH // HEADS)
            + slopes[None, :, None, None] * time[None, None, None]
        )
        weights = jax.nn.softmax(jnp.where(time[:, None] >= time[None], scores, -jnp.inf))
        return self.dense(jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(x.shape))


class Layer(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.input_layernorm = nnx.LayerNorm(WIDTH, epsilon=1e-5, rngs=rngs)
        self.self_attention = Attention(rngs)
        self.post_attention_layernorm = nnx.LayerNorm(WIDTH, epsilon=1e-5, rngs=rngs)
        up, down = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs), nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)
        self.mlp = nnx.Dict(dense_h_to_4h=up, dense_4h_to_h=down)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.self_attention(self.input_layernorm(x))
        hidden = self.mlp.dense_h_to_4h(self.post_attention_layernorm(x))
        return x + self.mlp.dense_4h_to_h(jax.nn.gelu(hidden, approximate=True))


class Bloom(nnx.Module):
    """A model under the names of `BloomForCausalLM`, with its head tied."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        norms = {name: nnx.LayerNorm(WIDTH, epsilon=1e-5, rngs=rngs) for name in ("word_embeddings_layernorm", "ln_f")}
        layers = nnx.List([Layer(rngs), Layer(rngs)])
        self.transformer = nnx.Dict(word_embeddings=nnx.Embed(VOCAB, WIDTH, rngs=rngs), h=layers, **norms)

    def __call__(self, ids: jax.Array) -> jax.Array:
        x = self.transformer.word_embeddings_layernorm(self.transformer.word_embeddings(ids))
        for layer in self.transformer.h:
            x = layer(x)
        return self.transformer.word_embeddings.attend(self.transformer.ln_f(x))


def random(model: Any) -> Any:
    """A model of transformers with random weights and biases."""
    import torch

    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    return model.eval()


def arrays(model: nnx.Module) -> Any:
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


@pytest.mark.peft
def test_a_model_of_no_family_has_transformers_weights_and_logits(tmp_path: Path):
    import torch
    from transformers import BloomConfig, BloomForCausalLM

    theirs = random(BloomForCausalLM(BloomConfig(vocab_size=VOCAB, hidden_size=WIDTH, n_layer=2, n_head=HEADS)))
    theirs.save_pretrained(tmp_path)
    ids, model = np.random.RandomState(0).randint(4, VOCAB, (2, 6)), Bloom(nnx.Rngs(0))
    shapes = {path: x.shape for path, x in paths.flatten(arrays(model)).items()}
    assert families.resolve_keymap(None, shapes) is GENERIC
    assert jaxadapt.export.import_base(tmp_path, model) is model
    with torch.no_grad():
        want = theirs(torch.from_numpy(ids)).logits.numpy()
    np.testing.assert_allclose(model(jnp.asarray(ids)), want, rtol=0, atol=1e-5)  # float32, logits of about 2

    tree = jaxadapt.export.import_base(tmp_path, arrays(Bloom(nnx.Rngs(1))))  # where no class speaks
    for mine, other in zip(jax.tree.leaves(tree), jax.tree.leaves(arrays(model)), strict=True):
        np.testing.assert_array_equal(mine, other)


@pytest.mark.peft
def test_what_a_family_has_no_line_for_goes_by_its_own_path(tmp_path: Path):
    """Phi has Llama's names in part, and others beside them."""
    from transformers import PhiConfig, PhiForCausalLM

    sizes = {"hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": HEADS}
    theirs = random(PhiForCausalLM(PhiConfig(vocab_size=VOCAB, **sizes, pad_token_id=0)))
    theirs.save_pretrained(tmp_path)
    want: dict[str, Any] = {}
    for key, x in theirs.state_dict().items():
        last = "scale" if "norm" in key else "embedding" if "embed" in key else "kernel"
        leaf = key.removesuffix("weight") + last if key.endswith(".weight") else key
        want[leaf] = x.numpy().T if last == "kernel" and x.ndim == 2 else x.numpy()
    target = zeros({leaf: x.shape for leaf, x in want.items()})
    assert families.resolve_keymap(None, {leaf: x.shape for leaf, x in want.items()}).name == "llama"
    found = paths.flatten(jaxadapt.export.import_base(tmp_path, target))
    assert found.keys() == want.keys()
    for leaf, x in want.items():
        np.testing.assert_array_equal(found[leaf], x, err_msg=leaf)


@pytest.mark.peft
def test_convolutions_and_heads_go_by_their_classes(tmp_path: Path):
    import torch

    class Net(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.conv = nnx.Conv(3, 4, (2, 3), padding="VALID", rngs=rngs)
            self.heads = nnx.LinearGeneral(4, (2, 5), rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.heads(self.conv(x).mean((1, 2)))

    net = torch.nn.ModuleDict({"conv": torch.nn.Conv2d(3, 4, (2, 3)), "heads": torch.nn.Linear(4, 10)})
    save_file({key: x.detach().numpy() for key, x in net.state_dict().items()}, tmp_path / "model.safetensors")
    model = jaxadapt.export.import_base(tmp_path / "model.safetensors", Net(nnx.Rngs(0)))
    x = np.random.RandomState(0).standard_normal((2, 5, 6, 3)).astype("float32")
    with torch.no_grad():
        want = net["heads"](net["conv"](torch.from_numpy(x.transpose(0, 3, 1, 2))).mean((2, 3))).numpy()
    np.testing.assert_allclose(model(jnp.asarray(x)).reshape(2, 10), want, rtol=0, atol=1e-6)


def test_a_square_kernel_of_an_unknown_layer_is_refused(tmp_path: Path):
    class Mine(nnx.Module):
        def __init__(self) -> None:
            self.kernel = nnx.Param(jnp.zeros((3, 3)))

    save_file({"fc.weight": np.ones((3, 3), "float32")}, tmp_path / "model.safetensors")
    with pytest.raises(KeyMapError, match=r"cannot decide the layout of these square matrices.*\n.*fc\.kernel"):
        jaxadapt.export.import_base(tmp_path, nnx.Dict(fc=Mine()))
    with pytest.raises(KeyMapError, match=r"square matrices.*\n.*fc\.weight"):
        jaxadapt.export.import_base(tmp_path, {"fc": {"weight": np.zeros((3, 3), "float32")}})


def zeros(shapes: dict[str, tuple[int, ...]]) -> Any:
    return paths.unflatten({path: np.zeros(shape, "float32") for path, shape in shapes.items()})


def test_the_error_says_what_keeps_a_family_from_fitting(tmp_path: Path):
    save_file({"model.norm.weight": np.ones(8, "float32")}, tmp_path / "model.safetensors")
    nearly = llama_shapes() | {"model.norm.weight": (2, 3)}
    says = r"most similar keymap is 'llama', with entries for (\d+) of \1 weights.*\n"
    says += r".*'model\.norm\.weight' has shape \(2, 3\), but the pattern of its entry, 'd -> d', names 1 axes"
    with pytest.raises(MismatchError, match=says):
        jaxadapt.export.import_base(tmp_path, zeros(nearly))
    with pytest.raises(KeyMapError, match=says):
        jaxadapt.export.export_base(zeros(nearly), tmp_path / "out")
    mixed = gpt2_shapes(dense=True) | {"transformer.h.1.mlp.c_fc.kernel": (64, 16)}
    with pytest.raises(
        KeyMapError, match=r"keymap is 'gpt2-dense'(?s:.)*h\.1\.mlp\.c_fc\.kernel \(64, 16\).*where d is 64"
    ):
        jaxadapt.export.export_base(zeros(mixed), tmp_path / "out")


def test_no_advice_to_pass_what_was_passed(tmp_path: Path):
    save_file({"fc.weight": np.ones((5, 3), "float32")}, tmp_path / "model.safetensors")
    target = {"fc": {"kernel": np.zeros((3, 4), "float32"), "bias": np.zeros(4, "float32")}}
    with pytest.raises(MismatchError, match="strict=False loads the tensors that fit"):
        jaxadapt.export.import_base(tmp_path, target)
    with pytest.raises(MismatchError) as caught:
        jaxadapt.export.import_base(tmp_path, target, strict=False)
    assert "loads the tensors that fit" not in str(caught.value)
    assert re.search(r"fc\.weight: expected \[4, 3\]", str(caught.value))
