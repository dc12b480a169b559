"""Equinox models trained with adapters, beside PEFT on the same model in PyTorch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxadapt
from jaxadapt.models import AdaptedTree, LoraTree, adapter_filter

eqx: Any = pytest.importorskip("equinox")  # the extra `test`
torch: Any = pytest.importorskip("torch")
peft: Any = pytest.importorskip("peft")

pytestmark = pytest.mark.peft

D, F, V, T, HEADS = 16, 24, 32, 7, 2
IDS = np.random.default_rng(0).integers(0, V, (3, T))
LABELS = np.random.default_rng(1).integers(0, V, (3, T))


class RMSNorm(eqx.Module):
    weight: Any

    def __init__(self) -> None:
        self.weight = jnp.ones(D)

    def __call__(self, x: Any) -> Any:
        return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * self.weight[None]


class Block(eqx.Module):
    """A block of Llama, without rotary embeddings."""

    attn: Any
    gate_proj: Any
    up_proj: Any
    down_proj: Any
    norm1: RMSNorm
    norm2: RMSNorm

    def __init__(self, key: Any) -> None:
        keys = jax.random.split(key, 4)
        self.attn = eqx.nn.MultiheadAttention(HEADS, D, use_query_bias=True, key=keys[0])
        self.gate_proj = eqx.nn.Linear(D, F, use_bias=False, key=keys[1])
        self.up_proj = eqx.nn.Linear(D, F, key=keys[2])
        self.down_proj = eqx.nn.Linear(F, D, use_bias=False, key=keys[3])
        self.norm1, self.norm2 = RMSNorm(), RMSNorm()

    def __call__(self, x: Any) -> Any:
        h = self.norm1(x)
        x = x + self.attn(h, h, h, mask=jnp.tril(jnp.ones((T, T), bool)))
        h = self.norm2(x)
        gated = jax.nn.silu(jax.vmap(self.gate_proj)(h)) * jax.vmap(self.up_proj)(h)
        return x + jax.vmap(self.down_proj)(gated)


class LM(eqx.Module):
    embed: Any
    layers: Any
    head: Any
    scanned: bool = eqx.field(static=True)

    def __init__(self, scanned: bool = False) -> None:
        keys = jax.random.split(jax.random.key(0), 4)
        self.embed = eqx.nn.Embedding(V, D, key=keys[0])
        blocks = jnp.stack(keys[1:3])
        self.layers = eqx.filter_vmap(Block)(blocks) if scanned else [Block(key) for key in blocks]
        self.head = eqx.nn.Linear(D, V, use_bias=False, key=keys[3])
        self.scanned = scanned

    def __call__(self, ids: Any) -> Any:
        x = jax.vmap(self.embed)(ids)
        if self.scanned:
            arrays, rest = eqx.partition(self.layers, eqx.is_array)
            x, _ = jax.lax.scan(lambda x, layer: (eqx.combine(layer, rest)(x), None), x, arrays)
        else:
            for layer in self.layers:
                x = layer(x)
        return jax.vmap(self.head)(x)


class TorchNorm(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(D))

    def forward(self, x: Any) -> Any:
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6) * self.weight


class TorchAttention(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query_proj, self.key_proj = torch.nn.Linear(D, D), torch.nn.Linear(D, D, bias=False)
        self.value_proj, self.output_proj = (torch.nn.Linear(D, D, bias=False) for _ in range(2))

    def forward(self, h: Any) -> Any:
        projections = (self.query_proj, self.key_proj, self.value_proj)
        q, k, v = (f(h).view(*h.shape[:-1], HEADS, D // HEADS).transpose(-3, -2) for f in projections)
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.output_proj(y.transpose(-3, -2).reshape(h.shape))


class TorchBlock(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = TorchAttention()
        self.gate_proj, self.up_proj = torch.nn.Linear(D, F, bias=False), torch.nn.Linear(D, F)
        self.down_proj = torch.nn.Linear(F, D, bias=False)
        self.norm1, self.norm2 = TorchNorm(), TorchNorm()

    def forward(self, x: Any) -> Any:
        x = x + self.attn(self.norm1(x))
        h = self.norm2(x)
        return x + self.down_proj(torch.nn.functional.silu(self.gate_proj(h)) * self.up_proj(h))


class TorchLM(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(V, D)
        self.layers = torch.nn.ModuleList([TorchBlock(), TorchBlock()])
        self.head = torch.nn.Linear(D, V, bias=False)

    def forward(self, ids: Any) -> Any:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def twin() -> Any:
    """The Equinox model's weights in PyTorch: names and layouts are the same."""
    model = TorchLM()
    pairs = jax.tree_util.tree_leaves_with_path(eqx.filter(LM(), eqx.is_array))
    names = {".".join(jax.tree_util.keystr((k,), simple=True) for k in keys): leaf for keys, leaf in pairs}
    model.load_state_dict({name: torch.tensor(np.asarray(leaf)) for name, leaf in names.items()})
    return model.eval()


def logits(model: Any) -> np.ndarray:
    return np.asarray(eqx.filter_vmap(model)(jnp.asarray(IDS)))


def torch_logits(model: Any) -> np.ndarray:
    return model.eval()(torch.tensor(IDS)).detach().numpy()


ALL = ["query_proj", "value_proj", "up_proj", "down_proj"]
CONFIGS: dict[str, jaxadapt.Config] = {
    "LORA": jaxadapt.LoraConfig(r=4, lora_alpha=8, target_modules=[*ALL, "embed"]),
    "DORA": jaxadapt.LoraConfig(r=4, lora_alpha=8, use_dora=True, target_modules=ALL),
    "rsLoRA": jaxadapt.LoraConfig(r=2, lora_alpha=8, use_rslora=True, target_modules="all-linear"),
    "LOHA": jaxadapt.LoHaConfig(r=2, alpha=8, target_modules=ALL),
    "IA3": jaxadapt.IA3Config(target_modules=ALL, feedforward_modules=["down_proj"]),
    "OFT": jaxadapt.OFTConfig(r=0, oft_block_size=4, target_modules=ALL),
    "VERA": jaxadapt.VeraConfig(r=4, target_modules=["query_proj", "value_proj"]),
    "saved": jaxadapt.LoraConfig(r=2, bias="all", target_modules=["up_proj"], modules_to_save=["head"]),
}


def loss(trained: Any, rest: Any) -> Any:
    model = eqx.combine(trained, rest)
    likely = jax.nn.log_softmax(eqx.filter_vmap(model)(jnp.asarray(IDS)))
    return -jnp.take_along_axis(likely, jnp.asarray(LABELS)[..., None], -1).mean()


@eqx.filter_jit
def step(trained: Any, rest: Any, state: Any, tx: Any) -> Any:
    value, gradients = eqx.filter_value_and_grad(loss)(trained, rest)
    updates, state = tx.update(gradients, state, trained)
    return eqx.apply_updates(trained, updates), state, value


def train(model: AdaptedTree) -> AdaptedTree:
    """Four steps of Adam on the adapters only."""
    trained, rest = eqx.partition(model, adapter_filter(model))
    tx = optax.adam(3e-2)
    state, losses = tx.init(trained), list[float]()
    for _ in range(4):
        trained, state, value = step(trained, rest, state, tx)
        losses.append(float(value))
    assert losses[-1] < losses[0]
    return eqx.combine(trained, rest)


def adapted(config: jaxadapt.Config, model: Any = None, **options: Any) -> AdaptedTree:
    base = LM() if model is None else model
    return jaxadapt.adapt(base, config, key=jax.random.key(1), example=[jnp.asarray(IDS[0])], **options)


CASES = [(name, False) for name in CONFIGS] + [(name, True) for name in ("LORA", "IA3", "saved")]


@pytest.mark.parametrize(("name", "scanned"), CASES)
@pytest.mark.filterwarnings("ignore:no other weight has as many")
def test_trained_saved_and_read_by_peft(name: str, scanned: bool, tmp_path: Path, foreign_model: None):
    base = LM(scanned)
    np.testing.assert_allclose(logits(base), torch_logits(twin()), atol=1e-5)
    model = train(adapted(CONFIGS[name], base))
    got = logits(model)
    assert np.abs(got - logits(base)).max() > 0.01
    jaxadapt.save(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(twin(), str(tmp_path))
    np.testing.assert_allclose(got, torch_logits(theirs), atol=1e-4)
    for target in (adapted(CONFIGS[name], base), LoraTree(base, example=[jnp.asarray(IDS[0])])):
        np.testing.assert_array_equal(logits(jaxadapt.load(tmp_path, target)), got)
    merged = jaxadapt.merge(model)
    assert isinstance(merged, LM)
    np.testing.assert_allclose(logits(merged), got, atol=1e-4)
    assert jax.tree.structure(merged) == jax.tree.structure(base)


@pytest.mark.parametrize("scanned", [False, True])
def test_adapters_of_peft_are_loaded(scanned: bool, tmp_path: Path, foreign_model: None):
    config = peft.LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, target_modules=[*ALL, "embed"])
    theirs = peft.get_peft_model(twin(), config)
    theirs.save_pretrained(str(tmp_path))
    model = jaxadapt.load(tmp_path, LoraTree(LM(scanned), example=[jnp.asarray(IDS[0])]))
    np.testing.assert_allclose(logits(model), torch_logits(theirs), atol=1e-4)
    jaxadapt.save(model, tmp_path / "again")
    written, own = (json.loads((p / "adapter_config.json").read_text()) for p in (tmp_path / "again", tmp_path))
    assert sorted(written["target_modules"]) == sorted(own["target_modules"])


def test_two_adapters(tmp_path: Path, foreign_model: None):
    model = adapted(CONFIGS["LOHA"], train(adapted(CONFIGS["LORA"].replace(target_modules=ALL))), name="second")
    model = train(model)
    for name in ("default", "second"):
        jaxadapt.save(model, tmp_path, name=name)
    theirs = peft.PeftMixedModel.from_pretrained(twin(), str(tmp_path))
    theirs.load_adapter(str(tmp_path / "second"), "second")
    theirs.set_adapter(["default", "second"])
    np.testing.assert_allclose(logits(model), torch_logits(theirs), atol=1e-4)
    one = jaxadapt.activate(model, "default")
    alone = peft.PeftModel.from_pretrained(twin(), str(tmp_path))
    np.testing.assert_allclose(logits(one), torch_logits(alone), atol=1e-4)


def test_gradients_are_for_adapters_only():
    model = adapted(CONFIGS["VERA"])
    trained, rest = eqx.partition(model, adapter_filter(model))
    gradients = eqx.filter_grad(loss)(trained, rest)
    assert jax.tree.leaves(gradients.base) == []
    params = gradients.adapters["default"].params
    assert params["~shared"] == {"vera_A": None, "vera_B": None}
    assert len(jax.tree.leaves(gradients)) == 2 * 2 * 2
    assert jax.tree.structure(trained) == jax.tree.structure(gradients)


def test_many_adapters_by_filter_vmap():
    """One adapter for each key, trained at once as an ensemble."""
    base = LM()
    config = CONFIGS["LORA"].replace(init_lora_weights=False)
    keys = jax.random.split(jax.random.key(2), 3)

    def make(key: Any) -> Any:
        model = jaxadapt.adapt(base, config, key=key, example=[jnp.asarray(IDS[0])])
        return eqx.filter(model, adapter_filter(model))

    many = eqx.filter_vmap(make)(keys)
    model = jaxadapt.adapt(base, config, key=keys[1], example=[jnp.asarray(IDS[0])])
    rest = eqx.partition(model, adapter_filter(model))[1]
    outs = eqx.filter_vmap(lambda trained, ids: eqx.combine(trained, rest)(ids), in_axes=(0, None))(many, IDS[0])
    np.testing.assert_allclose(outs[1], model(jnp.asarray(IDS[0])), atol=2e-5)


def test_the_models_own_dropout_and_key():
    class Net(eqx.Module):
        up: Any
        drop: Any

        def __call__(self, x: Any, *, key: Any = None) -> Any:
            return self.drop(self.up(x), key=key, inference=key is None)

    base = Net(eqx.nn.Linear(4, 8, key=jax.random.key(0)), eqx.nn.Dropout(0.5))
    model = jaxadapt.adapt(
        base, jaxadapt.LoraConfig(r=2, target_modules=["up"]), key=jax.random.key(1), example=[jnp.ones(4)]
    )
    for key in (None, jax.random.key(2)):
        np.testing.assert_array_equal(model(jnp.ones(4), key=key), base(jnp.ones(4), key=key))
    assert eqx.nn.inference_mode(model).base.drop.inference
