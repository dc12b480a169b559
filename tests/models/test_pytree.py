"""Adapters on models that are pytrees: plain functions and registered classes, without a library of models."""

from __future__ import annotations

import dataclasses
import re
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxadapt
from jaxadapt.models import AdaptedTree, Function, LoraTree, adapter_filter

D, F, LAYERS = 8, 16, 3
KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(3), (5, D))
LORA = jaxadapt.LoraConfig(r=2, target_modules=["up", "down"], init_lora_weights=False)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Linear:
    """As Equinox's: the weight is (out, in)."""

    weight: Any
    bias: Any

    def __call__(self, x: Any) -> Any:
        return x @ self.weight.T + self.bias[None]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Block:
    up: Linear
    down: Linear

    def __call__(self, x: Any) -> Any:
        return x + self.down(jax.nn.gelu(self.up(x)))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Net:
    layers: Any

    def __call__(self, x: Any) -> Any:
        for layer in self.layers:
            x = layer(x)
        return x


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scanned:
    """The same with the layers stacked."""

    layers: Any
    remat: bool = dataclasses.field(default=False, metadata={"static": True})

    def __call__(self, x: Any) -> Any:
        def step(x: Any, layer: Any) -> Any:
            return (jax.checkpoint(Block.__call__)(layer, x) if self.remat else layer(x)), None

        return jax.lax.scan(step, x, self.layers)[0]


def linear(key: Any, inputs: int, out: int) -> Linear:
    return Linear(jax.random.normal(key, (out, inputs)) / inputs**0.5, jnp.linspace(-1, 1, out))


BLOCKS = [Block(linear(key, D, F), linear(jax.random.fold_in(key, 1), F, D)) for key in jax.random.split(KEY, LAYERS)]
NET = Net(BLOCKS)
STACKED = jax.tree.map(lambda *xs: jnp.stack(xs), *BLOCKS)
SCANNED = Scanned(STACKED)


def adapted(model: Any = NET, config: Any = LORA, **options: Any) -> AdaptedTree:
    return jaxadapt.adapt(model, config, **{"key": jax.random.key(1), "example": [X]} | options)


def close(a: Any, b: Any, atol: float = 2e-5) -> None:
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=atol)


def by_hand(model: Any, x: Any) -> Any:
    """The model of LoRA written out."""
    sites = model.adapters["default"].sites
    scale = LORA.lora_alpha / LORA.r

    def run(path: str, layer: Linear, x: Any) -> Any:
        own = sites[f"{path}.weight"]
        return layer(x) + scale * (x @ own["lora_A"].T) @ own["lora_B"].T

    for i, block in enumerate(model.base.layers):
        x = x + run(f"layers.{i}.down", block.down, jax.nn.gelu(run(f"layers.{i}.up", block.up, x)))
    return x


def test_a_call_is_that_of_the_layers_written_out():
    model = adapted()
    close(model(X), by_hand(model, X))
    assert float(jnp.abs(model(X) - NET(X)).max()) > 0.1
    assert model.layers is model.base.layers
    close(jax.jit(lambda model, x: model(x))(model, X), model(X))
    with pytest.raises(AttributeError):
        model.nothing  # noqa: B018


def test_a_new_adapter_changes_nothing_and_names_are_pytorchs():
    model = adapted(config=jaxadapt.LoraConfig(r=2, target_modules=["up"]))
    close(model(X), NET(X), 0)
    keys = list(jaxadapt.to_peft(model).tensors)
    assert keys[:2] == ["base_model.model.layers.0.up.lora_A.weight", "base_model.model.layers.0.up.lora_B.weight"]


@pytest.mark.parametrize("remat", [False, True])
def test_scanned_layers_get_no_dense_change(remat: bool):
    flat, scanned = adapted(), adapted(Scanned(STACKED, remat))
    tensors = jaxadapt.to_peft(scanned)
    flat = jaxadapt.load(tensors, flat)
    assert jaxadapt.to_peft(flat).tensors.keys() == tensors.tensors.keys()
    close(flat(X), scanned(X))
    program = str(jax.make_jaxpr(lambda model, x: model(x))(scanned, X))
    assert not re.search(rf"f32\[({LAYERS},)?({F},{D}|{D},{F})\] = (add|dot_general|mul)", program)

    def value(params: Any, model: Any) -> Any:
        return (with_params(model, params)(X) ** 2).sum()

    grads = jax.jit(jax.grad(value))(scanned.adapters["default"].params, scanned)
    wanted = jax.jit(jax.grad(value))(flat.adapters["default"].params, flat)
    for i in range(LAYERS):
        for name in ("lora_A", "lora_B"):
            want = wanted["layers"][str(i)]["up"]["weight"][name]
            close(grads["layers"]["up"]["weight"][name][i], want, 1e-6 * float(jnp.abs(want).max()))


def with_params(model: AdaptedTree, params: Any) -> AdaptedTree:
    adapter = dataclasses.replace(model.adapters["default"], params=params)
    return jaxadapt.inject(model, adapter)


def flops(f: Any, *args: Any) -> float:
    return jax.jit(f).lower(*args).compile().cost_analysis()["flops"]


def test_flops_are_those_of_lora_written_by_hand():
    model, scanned = adapted(), adapted(SCANNED)
    assert flops(lambda m, x: m(x), model, X) == flops(by_hand, model, X)

    def hand(model: AdaptedTree, x: Any) -> Any:
        def step(x: Any, each: Any) -> Any:
            layer, own = each

            def run(name: str, x: Any) -> Any:
                pair = own[name]["weight"]
                return getattr(layer, name)(x) + LORA.lora_alpha / LORA.r * (x @ pair["lora_A"].T) @ pair["lora_B"].T

            return x + run("down", jax.nn.gelu(run("up", x))), None

        return jax.lax.scan(step, x, (model.base.layers, model.adapters["default"].params["layers"]))[0]

    close(hand(scanned, X), scanned(X))
    assert flops(lambda m, x: m(x), scanned, X) == flops(hand, scanned, X)


CONFIGS: dict[str, jaxadapt.Config] = {
    "dora": LORA.replace(use_dora=True),
    "rslora": LORA.replace(use_rslora=True),
    "loha": jaxadapt.LoHaConfig(r=2, target_modules=["up", "down"], init_weights=False),
    "ia3": jaxadapt.IA3Config(target_modules=["up", "down"], feedforward_modules=["down"], init_ia3_weights=False),
    "oft": jaxadapt.OFTConfig(r=0, oft_block_size=4, target_modules=["up", "down"], init_weights=False),
    "boft": jaxadapt.BOFTConfig(boft_block_size=4, target_modules=["up", "down"], init_weights=False),
    "vera": jaxadapt.VeraConfig(r=2, target_modules=["up"], init_weights=False),
    "bias": LORA.replace(bias="all"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_methods_on_scanned_layers_and_merged(name: str):
    flat, scanned = adapted(config=CONFIGS[name]), adapted(SCANNED, CONFIGS[name])
    tensors = jaxadapt.to_peft(scanned)
    close(jaxadapt.load(tensors, flat, replace=True)(X), scanned(X), 1e-4)
    merged = jaxadapt.merge(scanned)
    assert isinstance(merged, Scanned)
    close(merged(X), scanned(X), 1e-4)
    if name in ("rslora", "loha"):
        close(jaxadapt.unmerge(merged, scanned.adapters["default"])(X), SCANNED(X), 1e-3)


def test_saved_loaded_extracted_and_injected(tmp_path: Path):
    model = adapted()
    jaxadapt.save(model, tmp_path)
    for target in (model, LoraTree(NET, example=[X])):
        again = jaxadapt.load(tmp_path, target)
        assert (again(X) == model(X)).all()
    adapter = jaxadapt.extract(model)
    zero = jaxadapt.inject(model, jax.tree.map(jnp.zeros_like, adapter))
    close(zero(X), NET(X), 0)
    made = jaxadapt.init(NET, LORA, key=jax.random.key(1), example=[X])
    assert all((made.flat()[path] == x).all() for path, x in adapter.flat().items())
    assert jaxadapt.init(NET, LORA, keymap=adapter.keymap).shapes == adapter.shapes
    from_peft = jaxadapt.from_peft(jaxadapt.read(tmp_path), LoraTree(NET, example=[X]))
    assert all((from_peft.flat()[path] == x).all() for path, x in adapter.flat().items())
    with pytest.raises(jaxadapt.AttachError, match="there is no adapter 'b'"):
        jaxadapt.extract(model, name="b")


def test_several_adapters():
    both = adapted(adapted(name="a"), name="b", key=jax.random.key(2))
    assert both.active == ("a", "b")
    a, b = (jaxadapt.activate(both, name)(X) for name in ("a", "b"))
    assert float(jnp.abs(a - b).max()) > 0.1
    close(jaxadapt.delete(both, name="b")(X), a, 0)
    close(jaxadapt.activate(both)(X), NET(X), 0)
    close(jaxadapt.merge(both)(X), both(X), 1e-4)
    assert jaxadapt.detach(both) is NET
    one = jaxadapt.merge(jaxadapt.activate(both, "a"))
    assert list(one.adapters) == ["b"]
    assert one.active == ()
    close(one(X), a)
    with jaxadapt.disable(both) as base, jaxadapt.models.rescale(jaxadapt.activate(both, "a"), 0.0) as none:
        close(base(X), none(X), 0)
    stacked = adapted(adapted(SCANNED, name="a"), name="b", key=jax.random.key(2))
    unstacked = jaxadapt.load(jaxadapt.to_peft(stacked, name="a"), LoraTree(NET, example=[X]), name="a")
    unstacked = jaxadapt.load(jaxadapt.to_peft(stacked, name="b"), unstacked, name="b")
    close(stacked(X), jaxadapt.activate(unstacked, "a", "b")(X))
    with pytest.raises(jaxadapt.AttachError, match="taken"):
        adapted(both, name="a")


def test_the_filter_marks_the_trained_tensors():
    model = adapted(config=jaxadapt.VeraConfig(r=2, target_modules=["up"]))
    marks = adapter_filter(model)
    assert marks.base is False
    assert marks.adapters["default"].params["~shared"] == {"vera_A": False, "vera_B": False}
    assert set(jax.tree.leaves(marks.adapters["default"].params["layers"])) == {True}
    with pytest.raises(jaxadapt.AttachError, match="expected an adapted model"):
        adapter_filter(NET)


def test_dropout():
    config = LORA.replace(lora_dropout=0.5)
    model = adapted(config=config)
    with pytest.warns(UserWarning, match="dropout is off"):
        off = model(X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        close(model(X), off, 0)
        close(model.clone(deterministic=True)(X), off, 0)
        one, two = (model.clone(dropout_key=jax.random.key(i))(X) for i in (0, 1))
    assert float(jnp.abs(one - off).max()) > 0.01
    assert float(jnp.abs(one - two).max()) > 0.01
    with pytest.raises(jaxadapt.AttachError, match="deterministic=False asks for it"):
        adapted(config=config, deterministic=False)(X)


def test_dropout_differs_between_the_layers_of_a_scan():
    """With layers that are alike and return their input's product, the steps differ by dropout only."""

    def f(params: Any, x: Any) -> Any:
        return jax.lax.scan(lambda c, w: (c, x @ w), 0, params["one"])[1], jax.lax.scan(
            lambda c, _: (c, x @ params["two"]), 0, None, 2
        )[1]

    base = Function(f, {"one": jnp.zeros((2, D, F)), "two": jnp.zeros((D, F))})
    config = LORA.replace(target_modules=["one", "two"], lora_dropout=0.5)
    model = adapted(base, config, deterministic=True)
    site = model.adapters["default"].params["one"]
    same = {name: jnp.stack([x[0]] * 2) for name, x in site.items()}
    model = with_params(model, {**model.adapters["default"].params, "one": same})
    for y in model(X):
        close(y[0], y[1], 0)
    for y in model.clone(deterministic=None, dropout_key=KEY)(X):
        assert float(jnp.abs(y[0] - y[1]).max()) > 0.01


def test_vmap_over_adapters_and_inputs():
    model = adapted()
    xs = jnp.stack([X, 2 * X])
    close(jax.vmap(model)(xs)[1], model(2 * X))
    keys = jax.random.split(KEY, 2)
    many = jax.vmap(lambda key: adapted(key=key))(keys)
    outs = jax.vmap(lambda adapter: model.with_adapters({"default": adapter})(X))(many.adapters["default"])
    close(outs[1], adapted(key=keys[1])(X))


def test_eight_devices():
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("x", "y"))
    cut = {2: PartitionSpec("x", "y"), 1: PartitionSpec("y")}
    sharded = jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, cut[x.ndim])), NET)
    model = adapted(sharded)
    site = model.adapters["default"].sites["layers.0.up.weight"]
    assert site["lora_A"].sharding.spec == PartitionSpec(None, "y")
    assert site["lora_B"].sharding.spec == PartitionSpec("x", None)
    close(jax.jit(lambda m, x: m(x))(model, X), adapted()(X))


def test_embeddings_lookups_and_convolutions():
    def f(params: Any, ids: Any) -> Any:
        rows = jax.vmap(lambda i: params["emb"]["weight"][i])(ids), params["emb"]["weight"][ids]
        last = params["emb"]["weight"][ids[0]]
        x = rows[0].T[None]
        y = jax.lax.conv_general_dilated(x, params["conv"]["weight"], (1,), "SAME")
        return rows, last, y

    key, ids = jax.random.split(KEY), jnp.array([1, 2, 10])
    params = {"emb": {"weight": jax.random.normal(key[0], (11, D))}, "conv": {"weight": jnp.ones((F, D, 3))}}
    model = adapted(Function(f, params), LORA.replace(target_modules=["emb", "conv"]), example=[ids])
    sites = model.adapters["default"].sites
    assert sites["emb.weight"]["lora_embedding_A"].shape == (2, 11)
    assert sites["conv.weight"]["lora_A"].shape[:1] == (2,)
    rows, last, y = model(ids)
    want = f(merged_params(model), ids)
    close(rows[0], want[0][0])
    close(rows[1], want[0][1])
    close(last, want[1])
    close(y, want[2], 1e-3)
    program = str(jax.make_jaxpr(lambda m: m(ids))(model))
    assert not re.search(rf"f32\[11,{D}\] = (add|dot_general|mul)", program)


def merged_params(model: AdaptedTree) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return jaxadapt.merge(model).params


def test_layouts_come_from_the_products():
    """(in, out), split heads and a product with experts: PyTorch's layout is (out, in) all the same."""

    def f(params: Any, x: Any) -> Any:
        q = jnp.einsum("td,dnh->tnh", x, params["q"]["w"])
        return jnp.einsum("tnh,nhd->td", q, params["o"]["w"]) @ params["out"]

    params = {
        "q": {"w": jax.random.normal(KEY, (D, 2, 4))},
        "o": {"w": jax.random.normal(KEY, (2, 4, D))},
        "out": jax.random.normal(KEY, (D, F)),
    }
    model = adapted(Function(f, params), LORA.replace(target_modules=["q", "o", "out"]))
    shapes = {key.removeprefix("base_model.model."): x.shape for key, x in jaxadapt.to_peft(model).tensors.items()}
    assert shapes["q.lora_B.weight"] == (8, 2)
    assert shapes["o.lora_A.weight"] == (2, 8)
    assert shapes["out.lora_B.weight"] == (F, 2)
    close(model(X), jaxadapt.merge(model)(X), 1e-3)


def test_a_keymap_names_the_weights():
    keymap = jaxadapt.KeyMap(
        "mine",
        tuple(jaxadapt.Weight(f"layers.{{l}}.{n}.weight", f"h.{{l}}.{n}.weight", "o i -> o i") for n in ("up", "down")),
    )
    model = adapted(keymap=keymap, example=None)
    assert next(iter(jaxadapt.to_peft(model).tensors)) == "base_model.model.h.0.up.lora_A.weight"
    close(model(X), by_hand(model, X))
    wrong = jaxadapt.KeyMap("wrong", (jaxadapt.Weight("layers.{l}.up.weight", "h.{l}.up.weight", "i o -> o i"),))
    config = LORA.replace(target_modules=["up"])
    for options in ({}, {"example": None}):
        with pytest.raises(jaxadapt.AttachError, match=r"layers.0.up.weight|out"):
            adapted(config=config, keymap=wrong, **options)(X)


def test_what_is_refused():
    with pytest.raises(jaxadapt.KeyMapError, match=r"example=\[inputs of one call\]"):
        adapted(example=None)
    with pytest.raises(jaxadapt.AttachError, match="pass key="):
        adapted(key=None)
    with pytest.raises(jaxadapt.AttachError, match="rngs: for NNX models only"):
        adapted(rngs=nnx.Rngs(0))
    with pytest.raises(jaxadapt.AttachError, match="virtual tokens"):
        adapted(config=jaxadapt.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    with pytest.raises(jaxadapt.AttachError, match="alora_invocation_tokens"):
        adapted(config=LORA.replace(alora_invocation_tokens=[1]))
    with pytest.raises(jaxadapt.AttachError, match="cannot be quantized"):
        jaxadapt.models.quantize(NET, keymap=adapted().adapters["default"].keymap, block=8)
    with pytest.raises(jaxadapt.AttachError, match="key: for models that are pytrees only"):
        jaxadapt.adapt(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), LORA, key=KEY)
    with pytest.raises(jaxadapt.AttachError, match="never used"):
        adapted(Function(lambda p, x: x, {"up": {"weight": jnp.ones((2, 2))}}))
    state = optax.adam(0.1).init({"w": X})
    for other in (3, ["up"], state, [X], {1, 2}, jax.tree_util.Partial(jnp.dot, X), lambda x: x):
        with pytest.raises(jaxadapt.AttachError, match="expected an NNX model"):
            adapted(other)
    scaled = Function(
        lambda p, x: x @ p["up"]["w"] + p["up"]["b"][None], {"up": {"w": jnp.ones((D, F)), "b": jnp.ones(F)}}
    )
    model = adapted(scaled, jaxadapt.IA3Config(target_modules=["up"], feedforward_modules=[]))
    with pytest.raises(jaxadapt.AttachError, match="may be a bias under another name.*Rename the parameter to 'bias'"):
        model(X)
    with pytest.raises(jaxadapt.AttachError, match="the base lacks"):
        adapted().clone(base=Function(lambda p, x: x, {"up": X}))(X)


def test_other_methods_of_a_model():
    model = adapted()
    close(model.apply(lambda net, x: net.layers[0](x), X), by_hand(model.clone(base=Net(BLOCKS[:1])), X))


def tied_logits(params: Any, ids: Any) -> Any:
    table = params["model"]["embed_tokens"]["embedding"]
    return table[ids] @ table.T


@pytest.mark.parametrize("is_called", [True, False])
def test_a_tied_embedding_is_merged_for_both_uses_or_not_at_all(is_called: bool):
    """The same for a model that is called and for its parameters alone."""
    params = {"model": {"embed_tokens": {"embedding": jax.random.normal(jax.random.key(0), (16, 8))}}}
    ids = jnp.arange(3)

    def adapted(**fields: Any) -> Any:
        config = jaxadapt.LoraConfig(r=2, target_modules=["embed_tokens"], init_lora_weights=False, **fields)
        model = Function(tied_logits, params)
        return jaxadapt.adapt(model, config, key=jax.random.key(1), example=[ids], keymap="llama")

    def merged(model: Any) -> Any:
        if is_called:
            return jaxadapt.merge(model)(ids)
        return tied_logits(jaxadapt.merge(params, jaxadapt.extract(model)), ids)

    with pytest.raises(jaxadapt.AttachError, match="both the token embedding and the head"):
        merged(adapted())
    both = adapted(ensure_weight_tying=True)
    assert not np.allclose(both(ids), tied_logits(params, ids), atol=1)
    np.testing.assert_allclose(merged(both), both(ids), rtol=1e-4, atol=1e-3)
