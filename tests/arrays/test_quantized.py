"""Bases in 4 and 8 bits: values against their formulas, and adapters on such bases in both APIs.

PEFT's side is in interchange/test_quantized.py.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from safetensors.numpy import load_file

import jaxadapt
from jaxadapt.arrays import quantized
from jaxadapt.core import paths
from tests.reference.record_bitsandbytes import RECORDED
from tests.support import meshes, small

KINDS = ["nf4", "int8"]
RNG = np.random.default_rng(0)
LORA = dataclasses.replace(small.LORA, init_lora_weights=False)


# ---- the numbers -----------------------------------------------------------------------------------------


def by_formula(w: np.ndarray, kind: str, block: int) -> np.ndarray:
    """Quantize and dequantize a flat array value by value."""
    out = np.empty_like(w)
    for start in range(0, len(w), block):
        part = w[start : start + block].astype("float64")
        most = abs(part).max()
        for i, x in enumerate(part):
            if kind == "nf4":
                level = min(quantized.NF4, key=lambda level: abs(x / most - level)) if most else 0.0
            else:
                level = np.round(127 * x / most) / 127
            out[start + i] = level * most
    return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(4, 64), (6, 10), (3, 4, 5)], ids=str)
def test_numbers_follow_the_formula(kind, shape):
    w = RNG.standard_normal(shape).astype("float32")
    q = quantized.quantize_weight(w, kind, block=64)
    expected = by_formula(w.ravel(), kind, 64).reshape(shape)
    assert q.shape == shape
    assert q.codes.dtype == (jnp.uint8 if kind == "nf4" else jnp.int8)
    np.testing.assert_allclose(q.dense(), expected, rtol=1e-6, atol=1e-6)  # two roundings in float32


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_run_in_the_order_that_is_asked_for_and_within_each_layer(kind):
    w = RNG.standard_normal((2, 6, 5, 16)).astype("float32")  # (layers, in, heads, width): an output's inputs together
    q = quantized.quantize_weight(w, kind, order=(1, 2, 0), stack=1, block=6 if kind == "int8" else 64)
    for layer, found in zip(w, q.dense(), strict=True):
        turned = layer.transpose(1, 2, 0)
        expected = by_formula(turned.ravel(), kind, 6 if kind == "int8" else 64).reshape(turned.shape)
        np.testing.assert_allclose(found, expected.transpose(2, 0, 1), rtol=1e-6, atol=1e-6)
    second = jax.tree.map(lambda x: x[1], q)
    assert second.shape == (6, 5, 16)
    assert bool((second.dense() == q.dense()[1]).all())


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_quantized_again_stays_as_it_is(kind):
    w = jnp.asarray(RNG.standard_normal((24, 40)), "float32").at[0].set(0.0)
    once = quantized.quantize_weight(w, kind).dense()
    np.testing.assert_array_equal(quantized.quantize_weight(once, kind).dense(), once)
    assert not once[0].any()


def test_dtype_and_size():
    w = jnp.ones((64, 64), "bfloat16")
    q = quantized.quantize_weight(w, "nf4")
    assert q.dense().dtype == "bfloat16"
    assert q.nbytes == 64 * 64 / 2 + 64 * 4
    assert quantized.quantize_weight(w, "int8").nbytes == 64 * 64 + 64 * 4


# ---- adapters on them ------------------------------------------------------------------------------------


def nnx_side(kind: str, config: Any) -> tuple[Any, Any]:
    """A model with a quantized base and an adapter, and its call."""
    model = jaxadapt.models.quantize(small.net(), kind, modules=["q_proj", "up_proj"])
    jaxadapt.adapt(model, config, rngs=nnx.Rngs(5))
    jaxadapt.inject(model, small.noisy(jaxadapt.extract(model)))
    model.eval()
    return model, lambda model: model(small.X)


def linen_side(kind: str, config: Any) -> tuple[Any, Any]:
    base = jaxadapt.models.quantize(small.base()["params"], kind, modules=["q_proj", "up_proj"])
    adapter = small.noisy(jaxadapt.init(base, config, key=jax.random.key(0)))
    module = jaxadapt.adapt(small.LinenNet(), adapter.config)
    return {"params": base, **adapter.collection}, lambda variables: module.apply(variables, small.X)


SIDES = {"nnx": nnx_side, "linen": linen_side}
CONFIGS = {
    "lora": LORA,
    "dora": LORA.replace(use_dora=True),
    "one": LORA.replace(target_modules=["q_proj"]),
    "copy": LORA.replace(target_modules=["q_proj"], modules_to_save=["up_proj"]),
    "ia3": small.IA3,
}


@pytest.mark.parametrize("api", SIDES)
@pytest.mark.parametrize("feedforward", [False, True])
def test_the_bias_of_a_quantized_layer_is_scaled_once(api, feedforward):
    config = jaxadapt.IA3Config(
        target_modules=["layers_0"], feedforward_modules=["layers_0"] if feedforward else [], init_ia3_weights=False
    )
    x, bias = jnp.asarray(RNG.standard_normal((2, 8)), "float32"), jnp.arange(1.0, 5)
    kernel = quantized.quantize_weight(jnp.asarray(RNG.standard_normal((8, 4)), "float32"), "int8")
    if api == "nnx":
        model = nnx.Dict(layers_0=nnx.Linear(8, 4, rngs=nnx.Rngs(0)))
        model.layers_0.kernel.set_value(kernel)
        model.layers_0.bias.set_value(bias)
        adapter = jaxadapt.extract(jaxadapt.adapt(model, config, rngs=nnx.Rngs(1)))
        y = model.layers_0(x)
    else:
        base = {"layers_0": {"kernel": kernel, "bias": bias}}
        adapter = jaxadapt.init(base, config, key=jax.random.key(1))
        module = jaxadapt.adapt(nn.Sequential([nn.Dense(4)]), adapter.config)
        y = module.apply({"params": base, **adapter.collection}, x)
    (scale,) = map(np.asarray, adapter.flat().values())
    x, w, bias = map(np.asarray, (x, kernel.dense(), bias))
    expected = (x * scale) @ w + bias if feedforward else (x @ w + bias) * scale
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("api", SIDES)
def test_computes_what_the_dense_base_does(api, kind, config, tmp_path):
    """It also merges, saves and loads like the dense base; the bases differ only by the quantization error."""
    tree, run = SIDES[api](kind, CONFIGS[config])
    y = run(tree)
    jaxadapt.save(tree, tmp_path)
    adapter = jaxadapt.extract(tree)
    base = jaxadapt.detach(tree) if api == "nnx" else tree["params"]
    with pytest.raises(jaxadapt.AttachError, match=r"q_proj.kernel") as caught:
        jaxadapt.merge(base, adapter)
    assert "dequantize=True" in str(caught.value)
    fresh = SIDES[api](kind, CONFIGS[config])[0]
    fresh = jaxadapt.detach(fresh) if api == "nnx" else {"params": fresh["params"]}
    np.testing.assert_array_equal(run(jaxadapt.load(tmp_path, fresh)), y)
    if api == "nnx":
        merged = jaxadapt.merge(base, adapter, dequantize=True)
        assert type(merged.q_proj) is nnx.Linear
        assert type(merged.up_proj) is nnx.Linear
        z = run(merged)
    else:
        z = small.LinenNet().apply({"params": jaxadapt.merge(base, adapter, dequantize=True)}, small.X)
    np.testing.assert_allclose(z, y, rtol=0, atol=1e-5 * abs(y).max())


@pytest.mark.parametrize("api", SIDES)
def test_training_moves_the_adapter_and_keeps_no_dense_weight(api):
    """The residuals of the backward pass are inputs, codes and factors, without an array of a base weight's shape."""
    tree, run = SIDES[api]("nf4", LORA)
    if api == "nnx":
        graphdef, adapter, rest = nnx.split(tree, jaxadapt.AdapterParam, ...)

        def loss(adapter: Any) -> Any:
            return jnp.sum(run(nnx.merge(graphdef, adapter, rest)) ** 2)
    else:
        adapter = tree["lora"]

        def loss(adapter: Any) -> Any:
            return jnp.sum(run({**tree, "lora": adapter}) ** 2)

    kept = jax.eval_shape(lambda adapter: jax.vjp(loss, adapter)[1], adapter)
    shapes = [x.shape for x in jax.tree.leaves(kept)]
    assert (4, 6) not in shapes
    assert (6, 8) not in shapes
    assert (8, 6) not in shapes
    assert shapes
    value, slope = jax.jit(jax.value_and_grad(loss))(adapter)
    moved = jax.tree.map(lambda p, g: p - 1e-5 * g, adapter, slope)
    assert loss(moved) < value
    assert all(bool(jnp.any(g != 0)) for g in jax.tree.leaves(slope))


def test_dropout_is_drawn_outside_of_what_is_computed_twice():
    model, run = nnx_side("nf4", LORA.replace(lora_dropout=0.5))
    model.train()
    first, second = run(model), run(model)
    assert bool((first != second).any())

    def loss(model: Any) -> Any:
        return jnp.sum(run(model) ** 2)

    nnx.jit(nnx.grad(loss, argnums=nnx.DiffState(0, jaxadapt.AdapterParam)))(model)


class Block(nn.Module):
    """A custom layer whose weight an adapter follows by a trace."""

    @nn.compact
    def __call__(self, x: jax.Array, _: Any = None) -> Any:
        w = self.param("w", nn.initializers.lecun_normal(), (8, 2, 4))
        return x + jnp.tanh(jnp.einsum("bd,dnh->bnh", x, w)).reshape(x.shape), None


class Stack(nn.Module):
    """Three custom layers, scanned."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        layers = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return layers(name="layers")(x, None)[0]


TABLE = jaxadapt.KeyMap("stack", (jaxadapt.Weight("layers.w", "layers.{l}.w.weight", "{l} d n h -> (n h) d"),))


def test_scanned_layers_with_weights_of_their_own():
    x = jnp.asarray(RNG.standard_normal((2, 8)), "float32")
    params = Stack().init(jax.random.key(0), x)["params"]
    config = jaxadapt.LoraConfig(r=2, target_modules=["w"], init_lora_weights=False)
    base = jaxadapt.models.quantize(params, modules=["w"], keymap=TABLE)
    assert base["layers"]["w"].shape == (3, 8, 2, 4)
    assert base["layers"]["w"].codes.shape == (3, 1, 32)
    adapter = jaxadapt.init(base, config, key=jax.random.key(1), keymap=TABLE)
    module = jaxadapt.adapt(Stack(), config, keymap=TABLE)
    run = functools.partial(module.apply, {"params": base, **adapter.collection})
    dense = jaxadapt.models.dequantize(base)
    np.testing.assert_allclose(run(x), module.apply({"params": dense, **adapter.collection}, x), atol=1e-6)
    with jaxadapt.disable(module) as bare:
        np.testing.assert_allclose(bare.apply({"params": base}, x), Stack().apply({"params": dense}, x), atol=1e-6)
    other = jaxadapt.Weight("layers.w", "layers.{l}.w.weight", "d {l} n h -> (n h) d")
    turned = {"layers": {"w": jnp.moveaxis(params["layers"]["w"], 0, 1)}}
    with pytest.raises(jaxadapt.AttachError, match="expected the first axes"):
        jaxadapt.models.quantize(turned, modules=["w"], keymap=jaxadapt.KeyMap("turned", (other,)))


def test_stacked_nnx_layers():
    @nnx.vmap
    def make(key: Any) -> Any:
        return nnx.Linear(8, 8, rngs=nnx.Rngs(key))

    class Net(nnx.Module):
        def __init__(self) -> None:
            self.layers = make(jax.random.split(jax.random.key(0), 3))

        def __call__(self, x: jax.Array) -> jax.Array:
            return nnx.scan(lambda x, layer: jnp.tanh(layer(x)), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(
                x, self.layers
            )

    model, x = Net(), jnp.asarray(RNG.standard_normal((2, 8)), "float32")
    jaxadapt.models.quantize(model, modules=["layers"])
    jaxadapt.adapt(model, LORA.replace(target_modules=["layers"]), rngs=nnx.Rngs(1))
    y = model(x)
    jaxadapt.models.dequantize(model)
    np.testing.assert_allclose(model(x), y, rtol=0, atol=1e-6)


# ---- refusals --------------------------------------------------------------------------------------------


def test_all_linear_leaves_out_the_output_layer_and_what_is_no_matrix():
    from jaxadapt.demo import llama

    config = llama.LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=4
    )
    model = jaxadapt.models.quantize(llama.Llama(config, rngs=nnx.Rngs(0)))
    held = {p for p, x in _values(model).items() if quantized.is_quantized(x)}
    assert {p.rpartition(".")[0].rpartition(".")[2] for p in held} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    with pytest.raises(jaxadapt.AttachError, match="already quantized"):
        jaxadapt.models.quantize(model)


def _values(model: Any) -> dict[str, Any]:
    from jaxadapt.models.carriers import base_params

    return base_params(model).leaves


@pytest.mark.parametrize(
    ("options", "change", "message"),
    [
        ({"kind": "int3"}, lambda w: w, "expected 'nf4' or 'int8'"),
        ({"block": 3}, lambda w: w, "positive even number"),
        ({"block": 0}, lambda w: w, "positive"),
        ({}, lambda w: w.at[0, 0].set(jnp.nan), "not all finite"),
        ({}, lambda w: w.astype(jnp.int32), "floating-point"),
        ({}, lambda w: jax.ShapeDtypeStruct(w.shape, w.dtype), "floating-point"),
    ],
)
def test_refusals_name_the_weight_and_change_nothing(options, change, message):
    model = small.net()
    before = model.q_proj.kernel.get_value()
    model.q_proj.kernel.set_value(change(before))
    with pytest.raises(jaxadapt.AttachError, match=message):
        jaxadapt.models.quantize(model, **{"modules": ["q_proj", "up_proj"], **options})
    assert type(model.up_proj) is nnx.Linear
    assert not quantized.is_quantized(model.up_proj.kernel.get_value())


def test_initializations_that_change_the_base_are_refused_on_one_that_cannot_hold_them():
    base = jaxadapt.models.quantize(small.base()["params"], modules=["q_proj"])
    config = jaxadapt.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa")
    with pytest.raises(jaxadapt.ConfigError, match="quantized"):
        jaxadapt.initializers.start(base, config)


def test_export_asks_for_dense_weights(tmp_path):
    base = jaxadapt.models.quantize(small.base()["params"], modules=["q_proj"])
    with pytest.raises(jaxadapt.AttachError, match="dequantize"):
        jaxadapt.export.export_base(base, tmp_path)


# ---- over devices ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("api", "kind", "layout", "scanned"), [
    ("nnx", "nf4", ("8", "tp"), True), ("linen", "nf4", ("4x2", "both"), False),
    ("linen", "int8", ("2x2x2", "fsdp"), True),
])  # fmt: skip
def test_over_devices_adapters_lie_as_on_the_dense_base(api, kind, layout, scanned, tmp_path):
    """Codes are sharded too if the number of blocks is divisible; outputs, files and dense weights are the same."""
    mesh, table = meshes.mesh_of(layout[0]), meshes.table(scanned)
    dense = meshes.placed(meshes.base(scanned), mesh, *layout)
    wanted = meshes.like(mesh, layout, scanned)
    config = meshes.CONFIG.replace(init_lora_weights=False)
    modules = config.target_modules

    def attached(params: Any, small: bool) -> Any:
        """Return the tree with its adapter, its output and its gradients."""
        tree = meshes.model(params, scanned) if api == "nnx" else params
        if small:
            tree = jaxadapt.models.quantize(tree, kind, modules=modules, block=8, keymap=table)
        if api == "nnx":
            tree = jaxadapt.adapt(tree, config, rngs=nnx.Rngs(0), keymap=table)
            loss = nnx.grad(lambda m: jnp.sum(m(meshes.X) ** 2), argnums=nnx.DiffState(0, jaxadapt.AdapterParam))
            return tree, tree(meshes.X), jaxadapt.extract(nnx.jit(loss)(tree))
        adapter = jaxadapt.init(tree, config, key=jax.random.key(0), keymap=table)
        return {"params": tree, **adapter.collection}, None, adapter

    tree, y, slopes = attached(dense, True)
    held = [x for x in _values(tree if api == "nnx" else tree["params"]).values() if quantized.is_quantized(x)]
    assert len(held) == (4 if scanned else 8)
    assert all(len(x.codes.sharding.device_set) == 8 and not x.codes.is_fully_replicated for x in held)
    assert all(not x.absmax.is_fully_replicated for x in held)
    adapter = jaxadapt.extract(tree)
    for path, x in adapter.flat().items():
        assert x.sharding.is_equivalent_to(wanted[path], x.ndim), path
    alone = jaxadapt.models.quantize(meshes.base(scanned), kind, modules=modules, block=8, keymap=table)
    alone = paths.flatten(jaxadapt.models.dequantize(alone))
    if api == "nnx":
        _, z, expected = attached(paths.unflatten(alone), False)
        np.testing.assert_allclose(y, z, rtol=0, atol=1e-5 * abs(z).max())
        for path, x in expected.flat().items():
            np.testing.assert_allclose(slopes.flat()[path], x, rtol=0, atol=1e-5 * abs(x).max())
    jaxadapt.save(tree, tmp_path)
    fresh = meshes.model(dense, scanned) if api == "nnx" else dense
    fresh = jaxadapt.models.quantize(fresh, kind, modules=modules, block=8, keymap=table)
    loaded = jaxadapt.load(tmp_path, fresh if api == "nnx" else {"params": fresh}, keymap=table)
    for path, x in jaxadapt.extract(loaded).flat().items():
        assert x.sharding.is_equivalent_to(wanted[path], x.ndim), path
        np.testing.assert_array_equal(x, adapter.flat()[path])
    back = jaxadapt.models.dequantize(jaxadapt.detach(tree) if api == "nnx" else tree["params"])
    flat = _values(back) if api == "nnx" else paths.flatten(back)
    for path, x in paths.flatten(dense).items():
        assert flat[path].sharding.is_equivalent_to(x.sharding, x.ndim), path
        np.testing.assert_array_equal(flat[path], alone[path])


def test_blocks_that_come_out_uneven_are_on_every_device():
    mesh, layout = meshes.mesh_of("4x2"), ("4x2", "both")
    params = meshes.placed(meshes.base(False), mesh, *layout)
    base = jaxadapt.models.quantize(params, modules=["q"], keymap=meshes.table(False))
    q = base["blocks"]["0"]["q"]["kernel"]
    assert q.codes.shape == (4, 32)
    assert q.codes.is_fully_replicated
    assert q.sharding == params["blocks"]["0"]["q"]["kernel"].sharding


def test_explicit_axes_are_refused():
    mesh, layout = meshes.mesh_of("8", AxisType.Explicit), ("8", "tp")
    params = meshes.placed(meshes.base(False), mesh, *layout)
    with pytest.raises(jaxadapt.AttachError, match=r"blocks\.0\.q\.kernel: sharded on a mesh with explicit axes"):
        jaxadapt.models.quantize(params, modules=["q"], keymap=meshes.table(False))


def test_qwix_codes_say_where_they_lie():
    qwix = pytest.importorskip("qwix")
    mesh = meshes.mesh_of("8")
    place = NamedSharding(mesh, PartitionSpec(None, "x"))
    w = jax.device_put(RNG.standard_normal((16, 32)).astype("float32"), place)
    base = {"q": {"kernel": jax.device_put(qwix.quantize(w, "int8", channelwise_axes=(1,)), place)}}
    adapter = jaxadapt.init(base, jaxadapt.LoraConfig(r=2, target_modules=["q"]), key=jax.random.key(0))
    b = adapter.sites["q.kernel"]["lora_B"]
    assert b.sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec("x", None)), 2)


# ---- bitsandbytes' own numbers, as recorded ----------------------------------------------------------------


@functools.cache
def recorded() -> dict[str, np.ndarray]:
    return load_file(RECORDED)


def test_nf4_is_bitsandbytes_to_the_bit():
    found, q = recorded(), quantized.quantize_weight(recorded()["weight"], "nf4")
    np.testing.assert_array_equal(np.ravel(q.codes), found["nf4.codes"].ravel())
    np.testing.assert_array_equal(np.ravel(q.absmax), found["nf4.absmax"])
    np.testing.assert_array_equal(q.dense(), found["nf4.dense"])


def test_int8_is_bitsandbytes():
    """Its last product is taken in another order: one rounding in float32."""
    found, q = recorded(), quantized.quantize_weight(recorded()["weight"], "int8")
    np.testing.assert_array_equal(q.codes, found["int8.codes"])
    np.testing.assert_array_equal(np.ravel(q.absmax), found["int8.absmax"])
    np.testing.assert_allclose(q.dense(), found["int8.dense"], rtol=2e-7)


def test_nf4_in_torch():
    """The formula of the paper, in torch: the nearest of the levels, times the largest magnitude."""
    torch = pytest.importorskip("torch")
    w = torch.from_numpy(recorded()["weight"]).reshape(-1, 64)
    most = w.abs().amax(1, keepdim=True)
    levels = torch.tensor(quantized.NF4)
    expected = levels[((w / most)[..., None] - levels).abs().argmin(-1)] * most
    q = quantized.quantize_weight(recorded()["weight"], "nf4")
    np.testing.assert_allclose(np.ravel(q.dense()), expected.ravel(), rtol=1e-6)
