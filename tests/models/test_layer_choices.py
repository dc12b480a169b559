"""Adapters with other settings for each layer, fused part or expert of one array: values, parameters, refusals.

NNX and Linen are compared with changes computed by hand; tests/reference/test_layer_choices.py compares with PEFT.
"""

from __future__ import annotations

import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxadapt
from jaxadapt import AttachError, ConfigError, IA3Config, KeyMap, LoraConfig, MismatchError, Weight
from jaxadapt.arrays.products import PerEntry

LAYERS, WIDTH = 3, 6
FIELDS = {"r": 4, "lora_alpha": 6}
BASE = "base_model.model."


def x() -> jax.Array:
    return jax.random.normal(jax.random.key(0), (2, 5, WIDTH))


# ---- a model with a plain and a fused weight, and experts, in each of its stacked layers -------------------------


class Layer(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.q = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.kv = nnx.Einsum("btd,pdo->pbto", (2, WIDTH, WIDTH), rngs=rngs)
        self.experts = nnx.Einsum("btd,edo->ebto", (3, WIDTH, WIDTH), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        k, v = self.kv(jnp.tanh(self.q(x)))
        return x + k * jnp.tanh(v) + self.experts(x).sum(0)


class Stacked(nnx.Module):
    def __init__(self, axis: int = 0, others: Any = 0) -> None:
        self.axis, self.others = axis, others

        @nnx.split_rngs(splits=LAYERS)
        @nnx.vmap(in_axes=(0,), out_axes=nnx.StateAxes({nnx.Param: axis, ...: 0}))
        def make(rngs: nnx.Rngs) -> Layer:
            return Layer(rngs)

        self.blk = make(nnx.Rngs(0))

    def __call__(self, x: jax.Array) -> jax.Array:
        axes = nnx.StateAxes({nnx.Param: self.axis, ...: self.others})
        return nnx.scan(lambda m, x: m(x), in_axes=(axes, nnx.Carry), out_axes=nnx.Carry)(self.blk, x)


class LinenLayer(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        h = jnp.tanh(nn.Dense(WIDTH, name="q")(x))
        k, v = nn.Einsum((2, WIDTH, WIDTH), "btd,pdo->pbto", use_bias=False, name="kv")(h)
        experts = nn.Einsum((3, WIDTH, WIDTH), "btd,edo->ebto", use_bias=False, name="experts")
        return x + k * jnp.tanh(v) + experts(x).sum(0), None


class LinenStacked(nn.Module):
    axis: int = 0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        stack: Any = nn.scan
        made = stack(LinenLayer, variable_axes={"params": self.axis}, split_rngs={"params": True}, length=LAYERS)
        return made(name="blk")(x, None)[0]


def table(axis: int) -> KeyMap:
    lines = (
        Weight("blk.{l}.q.kernel", "h.{l}.q.weight", "i o -> o i"),
        Weight("blk.{l}.q.bias", "h.{l}.q.bias", "o -> o"),
        Weight("blk.{l}.kv.kernel", "h.{l}.{p}.weight", "{p} i o -> o i", p=("k", "v")),
        Weight("blk.{l}.experts.kernel", "h.{l}.e.{e}.up.weight", "{e} i o -> o i"),
    )
    return KeyMap("tiny", lines).scanned(axis)


def names(layer: int) -> list[str]:
    return [f"h.{layer}.{name}" for name in ("q", "k", "v", "e.0.up", "e.1.up", "e.2.up")]


CONFIGS: dict[str, Any] = {
    "modules": LoraConfig(**FIELDS, target_modules=r"h\.(0|2)\.q|h\.0\.k|h\.2\.v|h\.1\.e\.(0|2)\.up"),
    "ranks": LoraConfig(
        **FIELDS, target_modules=["q", "k", "v", "up"],
        rank_pattern={r"h\.1\.q": 2, r"h\.2\.v": 3, "k": 5, r"e\.1\.up": 1, r"h\.0\.e\.2\.up": 7},
    ),
    "alphas": LoraConfig(
        **FIELDS, target_modules=["q", "k", "up"], exclude_modules=["h.1.k", "h.2.e.1.up"], use_rslora=True,
        alpha_pattern={r"h\.1\.q": 2, r"h\.2\.k": 3, r"h\.0\.e\.2\.up": 7},
    ),
    "dora": LoraConfig(
        **FIELDS, target_modules=r"h\.(0|2)\.q|h\.0\.k|h\.2\.v|h\.1\.e\.(0|2)\.up", use_dora=True,
        rank_pattern={r"h\.2\.q": 2},
    ),
}  # fmt: skip


def noisy(adapter: Any, seed: int = 1) -> Any:
    leaves, tree = jax.tree.flatten(adapter)
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(tree, [x + (0.1 * rng.standard_normal(x.shape)).astype("float32") for x in leaves])


def trained(config: Any, params: Any, axis: int) -> jaxadapt.Adapter:
    """Return an adapter that has an effect, as from a file."""
    fresh = jaxadapt.init(params, config, key=jax.random.key(2), keymap=table(axis))
    tensors = jaxadapt.to_peft(fresh)
    other = {k: np.asarray(v) for k, v in noisy(dict(tensors.tensors)).items()}
    return jaxadapt.from_peft(jaxadapt.PeftTensors(config, other), params, keymap=table(axis))


def by_hand(config: Any, adapter: jaxadapt.Adapter, params: dict[str, Any], axis: int) -> dict[str, Any]:
    """Return the base weights with each module's change added, one matrix at a time."""
    tensors = {k.removeprefix(BASE): np.asarray(v, "float64") for k, v in jaxadapt.to_peft(adapter).tensors.items()}
    out = {name: np.array(np.moveaxis(np.asarray(params["blk"][name]["kernel"]), axis, 0)) for name in params["blk"]}
    for layer in range(LAYERS):
        for name in names(layer):
            if f"{name}.lora_A.weight" not in tensors:
                continue
            a, b = tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"]
            alpha = next((v for k, v in config.alpha_pattern.items() if re.search(rf"{k}$", name)), 6)
            leaf, at = {"q": ("q", ()), "k": ("kv", (0,)), "v": ("kv", (1,))}.get(
                name[4:], ("experts", (int(name.split(".")[3]),) if ".e." in name else ())
            )
            w = out[leaf][(layer, *at)].T + alpha / (len(a) ** (0.5 if config.use_rslora else 1)) * (b @ a)
            if config.use_dora:
                w *= (tensors[f"{name}.lora_magnitude_vector"] / np.linalg.norm(w, axis=1))[:, None]
            out[leaf][(layer, *at)] = w.T
    kernels = {name: {"kernel": jnp.asarray(np.moveaxis(w, 0, axis))} for name, w in out.items()}
    return {"blk": {name: {**params["blk"][name], **kernel} for name, kernel in kernels.items()}}


def linen(axis: int) -> tuple[nn.Module, dict[str, Any]]:
    module = LinenStacked(axis)
    return module, jax.jit(module.init)(jax.random.key(0), x())["params"]


def nnx_like(params: dict[str, Any], axis: int, others: Any = 0) -> Stacked:
    model = Stacked(axis, others)
    for name, held in params["blk"].items():
        for leaf, value in held.items():
            setattr(getattr(model.blk, name), leaf, nnx.Param(value))
    return model


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_layer_part_and_expert_gets_its_own_change(name, axis):
    config, (module, params) = CONFIGS[name], linen(axis)
    adapter = trained(config, params, axis)
    plain = jax.jit(module.apply)
    want = plain({"params": by_hand(config, adapter, params, axis)}, x())
    assert float(jnp.abs(want - plain({"params": params}, x())).max()) > 1e-2
    wrapper = jaxadapt.adapt(module, config, keymap=table(axis))
    np.testing.assert_allclose(jax.jit(wrapper.apply)({"params": params, **adapter.collection}, x()), want, atol=2e-6)
    model = jaxadapt.adapt(nnx_like(params, axis), config, keymap=table(axis), rngs=nnx.Rngs(0))
    jaxadapt.inject(model, adapter)
    np.testing.assert_allclose(nnx.jit(lambda m, x: m(x))(model, x()), want, atol=2e-6)
    merged = jaxadapt.merge(params, adapter)
    np.testing.assert_allclose(plain({"params": merged}, x()), want, atol=2e-6)
    if not config.use_dora:
        back = jaxadapt.unmerge(merged, adapter)
        assert (
            max(float(jnp.abs(a - b).max()) for a, b in zip(*map(jax.tree.leaves, (back, params)), strict=True)) < 1e-6
        )


@pytest.mark.parametrize("name", CONFIGS)
def test_a_fresh_adapter_changes_nothing_and_draws_each_module_as_its_rank_asks(name):
    config, (module, params) = CONFIGS[name], linen(0)
    model = jaxadapt.adapt(nnx_like(params, 0), config, keymap=table(0), rngs=nnx.Rngs(0))
    tolerance = 1e-6 if config.use_dora else 0  # m / ‖W‖ is rounded
    np.testing.assert_allclose(model(x()), module.apply({"params": params}, x()), atol=tolerance)
    for init, bound in ((True, WIDTH**-0.5), ("gaussian", None)):
        made = jaxadapt.init(params, config.replace(init_lora_weights=init), key=jax.random.key(3), keymap=table(0))
        for key, value in jaxadapt.to_peft(made).tensors.items():
            if key.endswith("lora_A.weight"):
                rank = len(value)
                assert value.any(), key
                assert np.abs(value).max() <= (bound if bound is not None else 5 / rank), key
                if bound is None:  # PEFT draws with standard deviation 1/r
                    assert np.abs(value).max() > 1 / rank / 3, key


def test_what_is_not_adapted_is_the_base_bit_for_bit():
    """A model with adapters in its first layer only computes the other layers as the base does."""
    for config in (
        LoraConfig(**FIELDS, target_modules=r"h\.0\.(q|k)|h\.0\.e\.1\.up", use_dora=True),
        LoraConfig(**FIELDS, target_modules=r"h\.0\.(q|k)|h\.0\.e\.1\.up", lora_bias=False),
        IA3Config(target_modules=r"h\.0\.(q|k)", feedforward_modules=[]),
    ):
        _, params = linen(0)
        model = jaxadapt.adapt(nnx_like(params, 0), config, keymap=table(0), rngs=nnx.Rngs(0))
        jaxadapt.inject(model, trained(config, params, 0))
        base = nnx_like(params, 0)

        def layer(model: Stacked, number: int) -> jax.Array:
            graph, state = nnx.split(model.blk)
            return nnx.merge(graph, jax.tree.map(lambda x: x[number], state))(x())

        assert not np.array_equal(layer(model, 0), layer(base, 0))
        for number in (1, 2):
            np.testing.assert_array_equal(layer(model, number), layer(base, number))


@pytest.mark.parametrize("name", CONFIGS)
def test_training_keeps_unused_entries_at_zero(name):
    """AdamW with weight decay leaves unused entries at zero; otherwise save would refuse the result."""
    config, (_, params) = CONFIGS[name], linen(1)
    model = jaxadapt.adapt(nnx_like(params, 1), config, keymap=table(1), rngs=nnx.Rngs(0))
    jaxadapt.inject(model, trained(config, params, 1))
    optimizer = nnx.Optimizer(model, optax.adamw(1e-2, weight_decay=0.1), wrt=jaxadapt.AdapterParam)

    @nnx.jit
    def step(model: Stacked, optimizer: Any) -> None:
        of = nnx.DiffState(0, jaxadapt.AdapterParam)
        optimizer.update(model, nnx.grad(lambda m: jnp.square(m(x())).mean(), argnums=of)(model))

    before = {k: np.asarray(v) for k, v in jaxadapt.to_peft(model).tensors.items()}
    for _ in range(3):
        step(model, optimizer)
    after = jaxadapt.to_peft(model).tensors
    assert all(not np.array_equal(after[key], value) for key, value in before.items())
    numbers = [v for _, v in nnx.to_flat_state(nnx.state(model, jaxadapt.models.LayerNumber))]
    assert all(np.array_equal(v.get_value(), [0, 1, 2]) for v in numbers)


def test_numbers_where_nothing_is_adapted_are_refused_before_a_file_loses_them():
    config, (_, params) = CONFIGS["ranks"], linen(0)
    adapter = trained(config, params, 0)
    odd = jax.tree.map(lambda x: x + 1, adapter)
    with pytest.raises(MismatchError, match=r"(?s)that the configuration excludes.*blk.q.kernel.lora_A \(3, 4, 6\)"):
        jaxadapt.to_peft(odd)


def test_a_scan_that_does_not_cut_the_numbers_is_refused():
    config, (_, params) = CONFIGS["alphas"], linen(0)
    model = jaxadapt.adapt(nnx_like(params, 0, others=None), config, keymap=table(0), rngs=nnx.Rngs(0))
    with pytest.raises(AttachError, match=r"jaxadapt\.models\.LayerNumber along axis 0"):
        model(x())
    # If layers differ only by zeros, no layer needs its number.
    plain = LoraConfig(**FIELDS, target_modules=r"h\.1\.q")
    model = jaxadapt.adapt(nnx_like(params, 0, others=None), plain, keymap=table(0), rngs=nnx.Rngs(0))
    assert model(x()).shape == (2, 5, WIDTH)
    assert not list(nnx.to_flat_state(nnx.state(model, jaxadapt.models.LayerNumber)))


@pytest.mark.parametrize("name", CONFIGS)
def test_shards_and_jit_give_the_same_tensors(name, tmp_path):
    config, (module, params) = CONFIGS[name], linen(1)
    adapter = trained(config, params, 1)
    want = {k: np.asarray(v) for k, v in jaxadapt.to_peft(adapter).tensors.items()}
    traced = jax.jit(lambda adapter: dict(jaxadapt.to_peft(adapter).tensors))(adapter)
    back = jax.jit(lambda t: jaxadapt.from_peft(jaxadapt.PeftTensors(config, t), params, keymap=table(1)))(traced)
    for one, other in zip(jax.tree.leaves(back), jax.tree.leaves(adapter), strict=True):
        np.testing.assert_array_equal(one, other)
    jaxadapt.save({"params": params, **adapter.collection}, tmp_path / "one")
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("a", "b"))

    def spread(x: jax.Array) -> jax.Array:
        return jax.device_put(
            x, NamedSharding(mesh, PartitionSpec(*[None] * (x.ndim - 1), "a") if x.ndim > 2 else PartitionSpec())
        )

    placed = jax.tree.map(spread, params)
    held = jaxadapt.load(tmp_path / "one", {"params": placed}, keymap=table(1))
    assert held["lora"]["default"]["blk"]["q"]["kernel"]["lora_B"].sharding.spec[0] == "a"
    wrapper = jaxadapt.adapt(module, config, keymap=table(1))
    y = wrapper.apply({"params": params, **adapter.collection}, x())
    np.testing.assert_allclose(jax.jit(wrapper.apply)(held, x()), y, atol=2e-6)
    jaxadapt.save(held, tmp_path / "two")
    weights = [(tmp_path / folder / "adapter_model.safetensors").read_bytes() for folder in ("one", "two")]
    assert weights[0] == weights[1]
    assert set(traced) == set(want)
    for key, value in want.items():
        np.testing.assert_array_equal(traced[key], value, err_msg=key)


def test_a_summary_counts_what_is_trained():
    config, (_, params) = CONFIGS["ranks"], linen(0)
    adapter = trained(config, params, 0)
    found = jaxadapt.summary({"params": params, **adapter.collection})
    assert found.trainable == sum(x.size for x in jaxadapt.to_peft(adapter).tensors.values())
    one = LoraConfig(**FIELDS, target_modules=r"h\.1\.q", use_dora=True)
    assert "1 of 3 modules" in str(jaxadapt.summary({"params": params, **trained(one, params, 0).collection}))


def test_resizing_and_combining_keep_each_modules_own_change():
    config, (module, params) = CONFIGS["ranks"], linen(0)
    config = config.replace(target_modules=["q", "k", "v"], rank_pattern={r"h\.1\.q": 2, r"h\.2\.v": 3, "k": 5})
    one, two = (trained(config, params, 0), noisy_like(config, params))
    want = module.apply({"params": jaxadapt.merge(params, one)}, x())
    resized = jaxadapt.merging.resize_rank(one, 5).adapter
    np.testing.assert_allclose(module.apply({"params": jaxadapt.merge(params, resized)}, x()), want, atol=5e-6)
    both = jaxadapt.combine([one, two], [0.5, 0.25], method="cat")
    sums = {}
    for name in ("q", "kv"):
        w = params["blk"][name]["kernel"]
        changes = [jaxadapt.merge(params, a)["blk"][name]["kernel"] - w for a in (one, two)]
        sums[name] = w + 0.5 * changes[0] + 0.25 * changes[1]
    merged = jaxadapt.merge(params, both)
    for name, value in sums.items():
        np.testing.assert_allclose(merged["blk"][name]["kernel"], value, atol=2e-6)


def noisy_like(config: Any, params: Any) -> jaxadapt.Adapter:
    other = config.replace(target_modules=r"h\.1\.(q|k|v)", rank_pattern={r"h\.1\.q": 3})
    return trained(other, params, 0)


def test_a_fused_weight_of_one_layer_holds_parts_of_different_ranks():
    line = Weight("kv", "{p}.weight", "{p} i o -> o i", p=("k", "v"))
    keymap = KeyMap("one", (line,))
    params = {"kv": jax.random.normal(jax.random.key(0), (2, WIDTH, WIDTH))}
    config = LoraConfig(**FIELDS, target_modules=["k", "v"], rank_pattern={"v": 2}, init_lora_weights=False)
    adapter = jaxadapt.init(params, config, key=jax.random.key(1), keymap=keymap)
    tensors = {k.removeprefix(BASE): np.asarray(v) for k, v in jaxadapt.to_peft(adapter).tensors.items()}
    assert tensors["v.lora_A.weight"].shape == (2, WIDTH)
    changed = np.asarray(jaxadapt.merge(params, adapter)["kv"] - params["kv"])
    for i, (name, rank) in enumerate((("k", 4), ("v", 2))):
        b, a = tensors[f"{name}.lora_B.weight"], tensors[f"{name}.lora_A.weight"]
        np.testing.assert_allclose(changed[i].T, 6 / rank * (b @ a), atol=2e-6)


def test_biases_that_peft_names_differently_are_refused():
    _, params = linen(0)
    config = LoraConfig(**FIELDS, target_modules=r"h\.1\.q", bias="all")
    with pytest.raises(ConfigError, match="with bias='all', biases of adapted modules have other names"):
        jaxadapt.init(params, config, key=jax.random.key(0), keymap=table(0))
    only = config.replace(bias="lora_only")
    held = jaxadapt.to_peft(jaxadapt.init(params, only, key=jax.random.key(0), keymap=table(0))).tensors
    assert [key for key in held if "bias" in key] == [f"{BASE}h.1.q.base_layer.bias"]


def test_a_layer_looks_up_its_own_numbers():
    values = PerEntry((1.0, 2.0, 3.0, 4.0), (2,))
    assert values.layers == 2
    assert values.layer_values({"layer": jnp.array([1])}).tolist() == [3, 4]
    with pytest.raises(AttachError, match=r"found numbers of shape \[2\]"):
        values.layer_values({"layer": jnp.arange(2)})
