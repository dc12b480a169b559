"""torch's nn.MultiheadAttention under PEFT, whose q, k and v share one tensor and one A, and Flax's layers."""

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

import torch

import jaxadapt
from jaxadapt import Weight
from jaxadapt.core import paths
from jaxadapt.models import LoraTree
from tests.support import peft_harness as harness
from tests.support.twins import trees

pytestmark = pytest.mark.peft

WIDTH, HEADS, LAYERS = 8, 2, 2
APIS = ["nnx", "linen"]
TABLE = jaxadapt.KeyMap(
    "attention",
    (
        *Weight.attention("layers_{l}.attn", "layers.{l}.attn"),
        Weight("head.kernel", "head.weight", "i o -> o i"),
        Weight("head.bias", "head.bias", "o -> o"),
    ),
    output="head",
)
X = np.random.RandomState(0).standard_normal((2, 5, WIDTH)).astype("float32")


class TorchNet(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        attention = functools.partial(torch.nn.MultiheadAttention, WIDTH, HEADS, batch_first=True)
        self.layers = torch.nn.ModuleList([torch.nn.ModuleDict({"attn": attention()}) for _ in range(LAYERS)])
        self.head = torch.nn.Linear(WIDTH, 3)

    def forward(self, x: Any) -> Any:
        for layer in self.layers:
            x = x + layer["attn"](x, x, x)[0]
        return self.head(x)


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i in range(LAYERS):
            x = x + Block(name=f"layers_{i}")(x)
        return nn.Dense(3, name="head")(x)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.MultiHeadDotProductAttention(HEADS, name="attn")(x)


class NNXBlock(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.attn = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)


class NNXNet(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.layers_0, self.layers_1 = NNXBlock(rngs), NNXBlock(rngs)
        self.head = nnx.Linear(WIDTH, 3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in (self.layers_0, self.layers_1):
            x = x + layer.attn(x)
        return self.head(x)


@functools.cache
def torch_net() -> Any:
    torch.manual_seed(5)
    net = TorchNet().eval()
    with torch.no_grad():
        for layer in net.layers:  # torch begins with zeros
            layer["attn"].in_proj_bias.normal_()
            layer["attn"].out_proj.bias.normal_()
    return net


def leaves() -> dict[str, np.ndarray]:
    """The torch network's weights at our paths, by the rules of the two libraries (no table of ours)."""
    state = {key: value.detach().numpy() for key, value in torch_net().state_dict().items()}
    split = (WIDTH, HEADS, WIDTH // HEADS)
    out = {"head.kernel": state["head.weight"].T, "head.bias": state["head.bias"]}
    for i in range(LAYERS):
        ours, theirs = f"layers_{i}.attn", f"layers.{i}.attn"
        for n, name in enumerate(("query", "key", "value")):
            rows = slice(n * WIDTH, (n + 1) * WIDTH)
            out[f"{ours}.{name}.kernel"] = state[f"{theirs}.in_proj_weight"][rows].T.reshape(split)
            out[f"{ours}.{name}.bias"] = state[f"{theirs}.in_proj_bias"][rows].reshape(split[1:])
        out[f"{ours}.out.kernel"] = state[f"{theirs}.out_proj.weight"].T.reshape(*split[1:], WIDTH)
        out[f"{ours}.out.bias"] = state[f"{theirs}.out_proj.bias"]
    return out


class Twin:
    """The network of one API, with what a test does to it."""

    def __init__(self, api: str) -> None:
        self.base = trees.nest(leaves())
        if api == "nnx":
            self.tree: Any = NNXNet(nnx.Rngs(0))
            trees.fill(self.tree, leaves())
        else:
            self.tree = {"params": self.base}

    def load(self, folder: Any) -> Twin:
        self.tree = jaxadapt.load(folder, self.tree, keymap=TABLE)
        return self

    def adapt(self, config: jaxadapt.LoraConfig) -> Twin:
        if isinstance(self.tree, nnx.Module):
            jaxadapt.adapt(self.tree, config, rngs=nnx.Rngs(0), keymap=TABLE)
        else:
            self.tree |= jaxadapt.init(self.base, config, key=jax.random.key(0), keymap=TABLE).collection
        return self

    def trained(self) -> Twin:
        values, tree = jax.tree.flatten(jaxadapt.extract(self.tree))
        rng = np.random.RandomState(0)
        values = [v + jnp.asarray(0.2 * rng.standard_normal(v.shape), v.dtype) for v in values]
        put = jaxadapt.inject(self.tree, tree.unflatten(values))
        self.tree = self.tree if isinstance(self.tree, nnx.Module) else put
        return self

    def output(self) -> np.ndarray:
        if isinstance(self.tree, nnx.Module):
            return np.asarray(self.tree(jnp.asarray(X)))
        if "lora" not in self.tree:
            return np.asarray(LinenNet().apply(self.tree, X))
        module = jaxadapt.adapt(LinenNet(), jaxadapt.extract(self.tree).config, keymap=TABLE)
        return np.asarray(module.apply(self.tree, X))


def peft_output(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(X)).numpy()


def peft_net(**fields: Any) -> Any:
    from peft import LoraConfig

    return harness.make_peft(torch_net(), LoraConfig(**{"r": 2, "lora_alpha": 3, **fields}))


def close(found: Any, wanted: np.ndarray) -> None:
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * abs(wanted).max())


@pytest.mark.parametrize("api", APIS)
def test_the_base_is_the_same_network(api):
    close(Twin(api).output(), peft_output(torch_net()))


FIELDS: list[dict[str, Any]] = [
    {"target_modules": ["attn"]},
    {"target_modules": ["attn", "head"], "use_rslora": True, "rank_pattern": {r"layers\.1\.attn": 3}},
    {"target_modules": ["head"], "modules_to_save": ["attn"]},
    {"target_modules": ["head"], "bias": "all"},
]


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("fields", FIELDS, ids=["attn", "patterns", "saved", "biases"])
def test_pefts_file_computes_here_what_it_computes_there(fields, api, tmp_path):
    model = peft_net(**fields)
    harness.save(model, tmp_path / "peft")
    twin = Twin(api).load(tmp_path / "peft")
    close(twin.output(), peft_output(model))
    jaxadapt.save(twin.tree, tmp_path / "ours")
    mine, theirs = (harness.read_tensors(tmp_path / who) for who in ("ours", "peft"))
    assert harness.specs(mine) == harness.specs(theirs)
    assert all(np.array_equal(mine[key], value) for key, value in theirs.items())
    assert harness.read_json(tmp_path / "ours") == harness.read_json(tmp_path / "peft")


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("fields", FIELDS[:2], ids=["attn", "patterns"])
def test_different_as_go_side_by_side(fields, api, tmp_path):
    """Trained here, q, k and v have an A each: refused as PEFT's one A, unless the ranks are put together."""
    twin = Twin(api)
    plain = twin.output()
    close(twin.adapt(jaxadapt.LoraConfig(r=2, lora_alpha=3, **fields)).output(), plain)
    output = twin.trained().output()
    assert abs(output - plain).max() > 0.01
    with pytest.raises(jaxadapt.MismatchError, match=r"(?s)one A for .*layers\.0\.attn\.lora_A.*on_shared"):
        jaxadapt.save(twin.tree, tmp_path)
    assert not any(tmp_path.iterdir())
    jaxadapt.save(LoraTree(twin.tree, on_shared="concat"), tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no base model's name
        loaded = harness.load(torch_net(), tmp_path)
    assert loaded.missing == loaded.unexpected == []
    close(peft_output(loaded.model), output)
    close(Twin(api).load(tmp_path).output(), output)


def test_the_output_projection_counts_twice_as_in_peft(tmp_path):
    """huggingface/peft#3774: its forward pass and its merge add the product to out_proj twice.

    A file that PEFT trained means what PEFT computed in training, so it is followed here: once would be another model.
    """
    model = peft_net(target_modules=["attn"])
    harness.save(model, tmp_path)
    a, b = (harness.read_tensors(tmp_path)[f"{OUT}.lora_{side}.weight"] for side in "AB")
    merged = copy.deepcopy(model).merge_and_unload()
    before, after = (m.layers[0]["attn"].out_proj.weight.detach().numpy() for m in (torch_net(), merged))
    np.testing.assert_allclose(after - before, 2 * 1.5 * b @ a, atol=1e-5)
    twin = Twin("linen").load(tmp_path)
    ours = jaxadapt.merge(twin.base, jaxadapt.extract(twin.tree))
    kernel = np.asarray(ours["layers_0"]["attn"]["out"]["kernel"]).reshape(WIDTH, WIDTH)
    np.testing.assert_allclose(kernel.T, after, atol=1e-5)
    close(LinenNet().apply({"params": ours}, X), peft_output(merged))


OUT = "base_model.model.layers.0.attn.base_layer.out_proj"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"use_dora": True}, "use_dora=True is not supported on an nn.MultiheadAttention"),
        ({"lora_bias": True}, "lora_bias=True is not supported on an nn.MultiheadAttention"),
        ({"bias": "lora_only"}, "bias='lora_only' is not supported on an nn.MultiheadAttention"),
    ],
)
def test_what_pefts_adapter_of_it_cannot_do_is_refused(fields, message):
    with pytest.raises(jaxadapt.ConfigError, match=message):
        jaxadapt.init(trees.nest(leaves()), jaxadapt.LoraConfig(target_modules=["attn"], **fields), keymap=TABLE)


def test_ia3_has_none_of_it():
    config = jaxadapt.IA3Config(target_modules=["attn"], feedforward_modules=[])
    with pytest.raises(jaxadapt.TargetError, match="kind 'attention'"):
        jaxadapt.init(trees.nest(leaves()), config, keymap=TABLE)


def test_all_linear_leaves_it_out():
    """PEFT would put an adapter on its out_proj that its forward pass never asks for."""
    net = jaxadapt.LoraConfig(target_modules="all-linear")
    with pytest.raises(jaxadapt.TargetError, match="matches nothing"):
        jaxadapt.init(trees.nest(leaves()), net, keymap=TABLE)


def test_a_file_of_another_shape_is_refused(tmp_path):
    harness.save(peft_net(target_modules=["attn"]), tmp_path)
    tensors = jaxadapt.read(tmp_path)
    key = "base_model.model.layers.0.attn.lora_B.weight"
    for odd, message in (
        (None, r"missing from"),
        (np.zeros((23, 2), "float32"), "unexpected"),
        (np.zeros((12, 2), "float32"), r"wrongly shaped"),
    ):
        held = {k: v for k, v in tensors.tensors.items() if k != key}
        held |= {} if odd is None else {key: odd}
        with pytest.raises(jaxadapt.MismatchError, match=rf"(?s){message}.*layers\.0\.attn\.lora_B"):
            jaxadapt.from_peft(jaxadapt.PeftTensors(tensors.config, held), trees.nest(leaves()), keymap=TABLE)


def test_whole_models_go_both_ways(tmp_path):
    params = trees.nest(leaves())
    jaxadapt.export.export_base(params, tmp_path, keymap=TABLE)
    from safetensors.numpy import load_file

    written = load_file(tmp_path / "model.safetensors")
    state = {key: value.numpy() for key, value in torch_net().state_dict().items()}
    assert set(written) == set(state)
    assert all(np.array_equal(written[key], value) for key, value in state.items())
    again = jaxadapt.export.import_base(tmp_path, jax.tree.map(jnp.zeros_like, params), keymap=TABLE)
    for path, leaf in paths.flatten(again).items():
        np.testing.assert_array_equal(leaf, leaves()[path])
