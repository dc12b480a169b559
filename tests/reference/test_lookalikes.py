"""Models of one's own that are called like a family, and hold their weights otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax import nnx

import jaxadapt
from jaxadapt.keymaps import families

WIDTH = 8
X = jax.random.normal(jax.random.key(3), (3, WIDTH))
KEY = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"


def config() -> jaxadapt.LoraConfig:
    return jaxadapt.LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj"], init_lora_weights=False)


class Turned(nnx.Module):
    """(out, in), as PyTorch and Equinox have it."""

    def __init__(self, rngs: nnx.Rngs):
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), (WIDTH, WIDTH)))

    def __call__(self, x: jax.Array) -> jax.Array:
        return x @ self.kernel.T


class Attention(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.q_proj = Turned(rngs)


class Layer(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.self_attn = Attention(rngs)


class Decoder(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.layers = nnx.List([Layer(rngs) for _ in range(2)])


class Llama(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.model = Decoder(rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.model.layers:
            x = layer.self_attn.q_proj(x)
        return x


class LinenTurned(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return x @ self.param("kernel", nn.initializers.normal(1), (WIDTH, WIDTH)).T


class Named(nn.Module):
    """One module below a name, or several, each on the result of the one before."""

    below: dict[str, Any]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for name, inner in self.below.items():
            module = Named(inner, name=name) if isinstance(inner, dict | nn.FrozenDict) else inner(name=name)
            x = module(x)
        return x


def linen_llama(layer: Any) -> Named:
    return Named({"model": {"layers": {str(i): {"self_attn": {"q_proj": layer}} for i in range(2)}}})


def by_hand(folder: Path, weights: list[np.ndarray]) -> np.ndarray:
    """What PyTorch computes with the file: W (out, in), A (r, in), B (out, r), and a scale of 1."""
    tensors, x = jaxadapt.read(folder).tensors, np.asarray(X)
    for i, w in enumerate(weights):
        a, b = (np.asarray(tensors[KEY.format(i, which)]) for which in "AB")
        x = x @ (w + b @ a).T
    return x


def test_nnx_refuses_a_table_that_takes_a_square_kernel_the_wrong_way_round(tmp_path: Path):
    model = Llama(nnx.Rngs(0))
    with pytest.raises(jaxadapt.AttachError, match=r"q_proj.kernel.*contradicts .* keymap='generic'"):
        jaxadapt.adapt(model, config(), rngs=nnx.Rngs(1), example=[X])
    unseen = Llama(nnx.Rngs(0))
    jaxadapt.adapt(unseen, config(), rngs=nnx.Rngs(1))  # nothing to see how its layers use their weights
    with pytest.raises(jaxadapt.AttachError, match=r"Turned: 'kernel': .*contradicts .* keymap='generic'"):
        jax.eval_shape(nnx.jit(lambda m, x: m(x)), unseen, X)

    jaxadapt.adapt(model, config(), rngs=nnx.Rngs(1), example=[X], keymap="generic")
    jaxadapt.save(model, tmp_path)
    weights = [np.asarray(layer.self_attn.q_proj.kernel[...]) for layer in model.model.layers]
    np.testing.assert_allclose(model(X), by_hand(tmp_path, weights), rtol=1e-5, atol=1e-4)


def test_linen_refuses_a_table_that_takes_a_square_kernel_the_wrong_way_round(tmp_path: Path):
    module = jaxadapt.adapt(linen_llama(LinenTurned), config())
    with pytest.raises(jaxadapt.AttachError, match=r"q_proj.kernel.*contradicts .* keymap='generic'"):
        module.init(jax.random.key(0), X)
    base = linen_llama(LinenTurned).init(jax.random.key(0), X)["params"]
    made = jaxadapt.init(base, config(), key=jax.random.key(1))  # from names and shapes alone
    with pytest.raises(jaxadapt.AttachError, match=r"q_proj.*contradicts .* keymap='generic'"):
        module.apply({"params": base, **made.collection}, X)

    module = jaxadapt.adapt(linen_llama(LinenTurned), config(), keymap="generic")
    variables = module.init(jax.random.key(0), X)
    jaxadapt.save(variables, tmp_path)
    layers = variables["params"]["model"]["layers"]
    weights = [np.asarray(layers[i]["self_attn"]["q_proj"]["kernel"]) for i in "01"]
    np.testing.assert_allclose(module.apply(variables, X), by_hand(tmp_path, weights), rtol=1e-5, atol=1e-4)


def test_a_dense_layer_refuses_an_adapter_made_by_a_table_that_turns_it():
    def dense(name: str) -> nn.Module:
        return nn.Dense(WIDTH, use_bias=False, name=name)

    turned = jaxadapt.Weight(
        "model.layers.{l}.self_attn.q_proj.kernel", "model.layers.{l}.self_attn.q_proj.weight", "o i -> o i"
    )
    base = linen_llama(dense).init(jax.random.key(0), X)["params"]
    made = jaxadapt.init(base, config(), key=jax.random.key(1), keymap=jaxadapt.KeyMap("mine", (turned,)))
    module = jaxadapt.adapt(linen_llama(dense), config())
    with pytest.raises(jaxadapt.AttachError, match=r"q_proj: the keymap's .* contradicts"):
        module.apply({"params": base, **made.collection}, X)


class Head(nnx.Module):
    """Its weight runs both ways, so that its call does not contradict a table."""

    def __init__(self, rngs: nnx.Rngs):
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), (WIDTH, WIDTH)))

    def __call__(self, x: jax.Array) -> jax.Array:
        return jax.nn.relu(x @ self.kernel) @ self.kernel.T


def test_a_weight_that_runs_both_ways_is_taken():
    model = Llama(nnx.Rngs(0))
    for layer in model.model.layers:
        layer.self_attn.q_proj = Head(nnx.Rngs(0))
    before = model(X)
    jaxadapt.adapt(model, config().replace(init_lora_weights=True), rngs=nnx.Rngs(1), example=[X])
    np.testing.assert_array_equal(model(X), before)


def test_a_copy_of_a_weight_has_no_sides():
    """A line for a copy alone says how the array lies, and nothing of inputs."""

    class Mixed(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.up = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
            self.mine = Weighted(rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.mine(self.up(x))

    model = Mixed(nnx.Rngs(0))
    before = model(X)
    lora = jaxadapt.LoraConfig(r=2, target_modules=["up"], modules_to_save=["mine"])
    jaxadapt.adapt(model, lora, rngs=nnx.Rngs(1), example=[X])
    np.testing.assert_array_equal(model(X), before)

    module = Named({"up": lambda name: nn.Dense(WIDTH, name=name), "mine": LinenWeighted})
    adapted = jaxadapt.adapt(module, lora)
    variables = adapted.init(jax.random.key(0), X)
    np.testing.assert_array_equal(adapted.apply(variables, X), module.apply({"params": variables["params"]}, X))


class Weighted(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.w = nnx.Param(jax.random.normal(rngs.params(), (WIDTH, WIDTH)))

    def __call__(self, x: jax.Array) -> jax.Array:
        return x @ self.w


class LinenWeighted(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return x @ self.param("w", nn.initializers.normal(1), (WIDTH, WIDTH))


# ---------------------------------------------------------------- by names and shapes alone

SQUARE = (16, 16)


def in_layers(at: str, leaves: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {f"{at}.{i}.{leaf}": shape for i in range(2) for leaf, shape in leaves.items()}


def attention(at: str, names: str) -> dict[str, tuple[int, ...]]:
    return {f"{at}{name}.kernel": SQUARE for name in names.split()}


def mlp(wide: str, down: str) -> dict[str, tuple[int, ...]]:
    return {f"{name}.kernel": (16, 32) for name in wide.split()} | {f"{down}.kernel": (32, 16)}


PROJ = "q_proj k_proj v_proj"
SELF = "query key value"
HUGGING_FACE = {
    "llama": (
        "model.layers",
        attention("self_attn.", f"{PROJ} o_proj"),
        mlp("mlp.gate_proj mlp.up_proj", "mlp.down_proj"),
    ),
    "gptj": ("transformer.h", attention("attn.", f"{PROJ} out_proj"), mlp("mlp.fc_in", "mlp.fc_out")),
    "gpt_neo": ("transformer.h", attention("attn.attention.", f"{PROJ} out_proj"), mlp("mlp.c_fc", "mlp.c_proj")),
    "bert": ("bert.encoder.layer", attention("attention.self.", SELF), mlp("intermediate.dense", "output.dense")),
    "t5": (
        "encoder.block",
        attention("layer.0.SelfAttention.", "q k v o"),
        mlp("layer.1.DenseReluDense.wi", "layer.1.DenseReluDense.wo"),
    ),
    "vit": ("vit.encoder.layer", attention("attention.attention.", SELF), mlp("intermediate.dense", "output.dense")),
    "clip": ("text_model.encoder.layers", attention("self_attn.", f"{PROJ} out_proj"), mlp("mlp.fc1", "mlp.fc2")),
    "whisper": ("model.encoder.layers", attention("self_attn.", f"{PROJ} out_proj"), mlp("fc1", "fc2")),
}


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_kernels_the_other_way_round_are_of_no_family(name: str):
    at, square, wide = HUGGING_FACE[name]
    assert families.resolve_keymap(None, in_layers(at, square | wide)).name == name
    turned = {leaf: shape[::-1] for leaf, shape in wide.items()}
    assert families.resolve_keymap(None, in_layers(at, square | turned)).name == "generic"


HEADS = {f"attn.{p}_proj.w": (16, n, 8) for p, n in (("q", 4), ("k", 2), ("v", 2))} | {"attn.o_proj.w": (4, 8, 16)}
TUNIX = HEADS | mlp("mlp.gate_proj mlp.up_proj", "mlp.down_proj")


def test_heads_on_another_axis_are_not_tunix():
    assert families.resolve_keymap(None, in_layers("layers", TUNIX)).name == "tunix:llama3"
    for order in ((1, 0, 2), (0, 2, 1)):
        other = TUNIX | {leaf: tuple(HEADS[leaf][i] for i in order) for leaf in HEADS if "o_proj" not in leaf}
        assert families.resolve_keymap(None, in_layers("layers", other)).name == "generic"
    assert (
        families.resolve_keymap(None, in_layers("layers", mlp("mlp.gate_proj mlp.up_proj", "mlp.down_proj"))).name
        == "generic"
    )


@pytest.mark.parametrize("more", ["lambda_1", "layer_scale1.lambda1"])
def test_beit_and_dinov2_are_no_vit(more: str):
    """Of a ViT's layers PyTorch has other names than transformers' Flax classes, of theirs the same."""
    _, square, wide = HUGGING_FACE["vit"]
    assert families.resolve_keymap(None, in_layers("encoder.layer", square | wide)).name == "vit"
    other = families.resolve_keymap(None, in_layers("encoder.layer", square | wide | {more: (16,)}))
    sites = {leaf: other.match(f"encoder.layer.0.{leaf}") for leaf in (*square, *wide)}
    for leaf, site in sites.items():
        assert site is None or site.module({}) == f"encoder.layer.0.{leaf}".removesuffix(".kernel")
