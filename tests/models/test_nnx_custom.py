"""Custom leaf modules, and those of Tunix: axis roles from a trace or a keymap, and refusals."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import jaxadapt
from jaxadapt import AttachError, KeyMapError, TargetError, Weight
from jaxadapt.keymaps.keymap import GENERIC, entry_from_axes
from jaxadapt.models.graph import adapter_variables
from tests.support.twins import layers, layers_nnx

CASE = {case.name: case for case in layers.NNX}


def lora(*targets: str, **fields: Any) -> Any:
    fields = {"r": 2, "lora_alpha": 6, "init_lora_weights": False, **fields}
    return jaxadapt.LoraConfig(target_modules=list(targets), **fields)


def adapt(model: Any, config: Any, **options: Any) -> Any:
    return jaxadapt.adapt(model, config, rngs=nnx.Rngs(1), **options)


def own(use: Any, *shape: int) -> Any:
    return layers_nnx.own(use, *shape)()


def shapes(model: Any) -> dict[str, tuple[int, ...]]:
    return {path: v.shape for path, v in jaxadapt.extract(model).flat().items()}


# ---------------------------------------------------------------- sources of axis roles


def test_a_custom_weight_needs_an_example_or_a_table():
    """The message begins its advice with the argument that helps."""
    with pytest.raises(
        KeyMapError,
        match=r"(?s)which axes .* is not known.*layer.w \(8, 3, 4\)\nFor an NNX model or a pytree, pass example=",
    ):
        adapt(CASE["own_einsum"].make(), lora("layer"))


def test_an_example_is_a_list_of_inputs():
    with pytest.raises(AttachError, match=r"a list of the inputs of one call, as in example=\[x\], found ArrayImpl"):
        adapt(CASE["own_einsum"].make(), lora("layer"), example=layers.x())


def test_a_trace_tells_inputs_from_outputs():
    model = adapt(CASE["own_einsum"].make(), lora("layer"), example=(layers.x(),))
    assert shapes(model) == {"layer.w.lora_A": (2, 8), "layer.w.lora_B": (3, 4, 2)}
    model = adapt(CASE["own_transposed"].make(), lora("layer"), example=(layers.x(),))
    assert shapes(model) == {"layer.w.lora_A": (2, 8), "layer.w.lora_B": (6, 2)}  # w is (out, in)


def test_a_users_table_gives_the_same_as_a_trace():
    case = CASE["own_attention"]
    table = jaxadapt.KeyMap(
        "mine",
        (
            Weight("attn.q_einsum.w", "attn.q_proj.weight", "n d h -> (n h) d"),
            Weight("attn.kv_einsum.w", "attn.{p}_proj.weight", "{p} k d h -> (k h) d", p=("k", "v")),
            Weight("attn.attn_vec_einsum.w", "attn.o_proj.weight", "n h d -> d (n h)"),
        ),
    )
    model = adapt(case.make(), lora("q_proj", "k_proj", "v_proj", "o_proj"), keymap=table)
    assert shapes(model)["attn.kv_einsum.w.lora_A"] == (2, 2, 8)  # one A for k, one for v
    y = model(*case.inputs())
    adapter = jaxadapt.extract(model)
    merged = jaxadapt.merge(jaxadapt.detach(model), adapter)
    np.testing.assert_allclose(merged(*case.inputs()), y, atol=1e-5)

    only_v = adapt(case.make(), lora("v_proj"), keymap=table)
    assert shapes(only_v) == {"attn.kv_einsum.w.lora_A": (1, 2, 8), "attn.kv_einsum.w.lora_B": (1, 2, 2, 2)}
    kv = only_v.attn.kv_einsum(layers.x())
    plain = case.make().attn.kv_einsum(layers.x())
    np.testing.assert_allclose(kv[0], plain[0], atol=1e-6)  # k is unchanged
    assert np.abs(kv[1] - plain[1]).max() > 1e-2


def test_all_linear_takes_what_a_trace_shows_to_be_linear():
    class Net(nnx.Module):
        def __init__(self) -> None:
            self.table = layers_nnx.normal(1, 11, 8)
            self.proj = layers_nnx.OwnEinsum("btd,dnh->btnh", 8, 3, 4)
            self.lin = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
            self.embed = nnx.Embed(11, 8, rngs=nnx.Rngs(0))
            self.conv = nnx.Conv(8, 8, (3,), rngs=nnx.Rngs(0))

        def __call__(self, ids: jax.Array) -> jax.Array:
            x = self.conv(jnp.take(self.table[...], ids, axis=0) + self.embed(ids))
            return self.lin(self.proj(x))

    config = lora().replace(target_modules="all-linear")
    with pytest.raises(KeyMapError, match=r"(?s)may or may not be linear.*proj.w \(8, 3, 4\).*example="):
        adapt(Net(), config)
    model = adapt(Net(), config, example=(layers.ids(),))
    assert {path.rpartition(".")[0] for path in shapes(model)} == {"proj.w", "lin.kernel"}


def test_a_custom_layer_that_never_runs_is_named():
    class Idle(nnx.Module):
        def __init__(self) -> None:
            self.layer = layers_nnx.OwnEinsum("btd,dnh->btnh", 8, 3, 4)

        def __call__(self, x: jax.Array) -> jax.Array:
            return x

    with pytest.raises(AttachError, match="layer.w.*never ran"):
        adapt(Idle(), lora("layer"), example=(layers.x(),))


class TransposedEinsum(nnx.Module):
    """An einsum with the kernel (out, in), which the generic keymap takes for (in, out), behind two tied layers."""

    def __init__(self) -> None:
        self.layer = nnx.Einsum("bi,oi->bo", (4, 8), rngs=nnx.Rngs(0))
        self.first, self.twin = nnx.Linear(8, 8, rngs=nnx.Rngs(1)), nnx.Linear(8, 8, rngs=nnx.Rngs(2))
        self.twin.kernel = self.first.kernel

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.layer(self.twin(self.first(x)))


def test_all_reasons_why_layers_cannot_carry_an_adapter_are_in_one_error():
    with pytest.raises(AttachError, match=r"(?s)first.kernel: several.*layer.kernel: the keymap's .* contradicts"):
        adapt(TransposedEinsum(), lora("layer", "first"))


def test_a_layer_that_contradicts_the_keymap_may_be_quantized():
    """Its codes do not depend on the roles of the axes, and its own call dequantizes them."""
    model, x = TransposedEinsum(), jnp.ones((2, 8))
    y = model(x)
    np.testing.assert_allclose(jaxadapt.models.quantize(model, "int8", modules=["layer"])(x), y, rtol=0.05, atol=0.05)


def test_an_example_on_a_quantized_base():
    """A quantized weight is two arrays of the traced call, and one leaf of the model."""
    model, x = nnx.Sequential(nnx.Linear(64, 64, rngs=nnx.Rngs(0)), nnx.relu), jnp.ones((2, 64))
    model = jaxadapt.models.quantize(model, modules=["layers.0"])
    adapt(model, lora("layers.0"), example=[x])
    assert shapes(model) == {"layers.0.kernel.lora_A": (2, 64), "layers.0.kernel.lora_B": (64, 2)}


def test_two_contradictory_uses_are_named():
    with pytest.raises(AttachError, match=r"layer.w.*several ways"):
        adapt(own(lambda x, w: jnp.tanh(x @ w) @ w.T, 8, 6), lora("layer"), example=(layers.x(),))


def test_examples_may_hold_what_is_no_array():
    class Told(nnx.Module):
        def __init__(self) -> None:
            self.layer = layers_nnx.OwnEinsum("btd,dnh->btnh", 8, 3, 4)

        def __call__(self, x: jax.Array, how: str, mask: Any, train: bool) -> Any:
            assert (how, mask, train) == ("so", None, False)
            return {"y": self.layer(x), "how": how}

    model = adapt(Told(), lora("layer"), example=(layers.x(), "so", None, False))
    assert model(layers.x(), "so", None, False)["y"].shape == (2, 5, 3, 4)


def test_a_custom_layer_inside_a_scan():
    class Layer(nnx.Module):
        def __init__(self, key: jax.Array) -> None:
            self.w = nnx.Param(jax.random.normal(key, (8, 2, 4)) / 3)

        def __call__(self, x: jax.Array) -> jax.Array:
            return jnp.einsum("btd,dnh->btnh", x, self.w[...]).reshape(x.shape)

    class Net(nnx.Module):
        def __init__(self) -> None:
            self.blk = nnx.vmap(Layer)(jax.random.split(jax.random.key(0), 3))

        def __call__(self, x: jax.Array) -> jax.Array:
            return nnx.scan(lambda m, x: m(x), in_axes=(0, nnx.Carry), out_axes=nnx.Carry)(self.blk, x)

    model = adapt(Net(), lora("blk"), example=(layers.x(),))
    assert shapes(model) == {"blk.w.lora_A": (3, 2, 8), "blk.w.lora_B": (3, 2, 4, 2)}
    y = model(layers.x())
    adapter = jaxadapt.extract(model)
    merged = jaxadapt.merge(jaxadapt.detach(model), adapter)
    np.testing.assert_allclose(merged(layers.x()), y, atol=1e-5)


def test_kept_variable_types_and_metadata():
    class Marked(nnx.Param[Any]):
        pass

    class Layer(nnx.Module):
        def __init__(self) -> None:
            self.w = Marked(jnp.ones((8, 3, 4)), sharding_hint="rows")

        def __call__(self, x: jax.Array) -> jax.Array:
            assert isinstance(self.w, Marked)
            assert self.w.get_metadata()["sharding_hint"] == "rows"
            return jnp.einsum("btd,dnh->btnh", x, self.w[...])

    net = layers_nnx.Held(layer=Layer())
    assert adapt(net, lora("layer"), example=(layers.x(),))(layers.x()).shape == (2, 5, 3, 4)


# ---------------------------------------------------------------- refusals, by name


@pytest.mark.parametrize("case", layers.params(layers.NNX, how=layers.EFFECTIVE))
def test_dropout_where_only_the_effective_weight_can_follow(case):
    model = case.make()
    ((leaf, axes),) = case.roles.items()
    shape = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))[tuple(leaf.split("."))].shape
    table = GENERIC.with_entries([entry_from_axes(leaf, shape, axes)])
    config = lora("layer", lora_dropout=0.1)
    with pytest.raises(AttachError, match=f"(?s)dropout.*{leaf}.*the dropout of the configuration to 0.0"):
        adapt(case.make(), config, keymap=table, example=case.inputs())
    unseen = adapt(model, config, keymap=table)
    with pytest.raises(AttachError, match="(?s)Own: cannot apply dropout.*the dropout of the configuration to 0.0"):
        unseen(*case.inputs())
    unseen.eval()
    assert np.isfinite(unseen(*case.inputs())).all()


class Noisy(nnx.Module):
    """A layer that draws numbers, counts calls and reads a variable of a custom type, also in a submodule."""

    def __init__(self, rngs: nnx.Rngs | None = None) -> None:
        self.w, self.seen = layers_nnx.normal(1, 8, 3, 4), nnx.BatchStat(jnp.zeros(()))
        self.rngs, self.drop = rngs or nnx.Rngs(7), nnx.Dropout(0.5, rngs=nnx.Rngs(3))
        self.shift = nnx.Variable(jnp.ones((4,)))

    def __call__(self, x: jax.Array) -> jax.Array:
        self.seen.set_value(self.seen.get_value() + 1)
        x = self.drop(x) + jax.random.normal(self.rngs(), x.shape)
        return jnp.einsum("btd,dnh->btnh", x, self.w[...]) + self.shift[...].reshape(1, 1, 1, 4)


@pytest.mark.parametrize("way", ["plain", "jit", "grad", "quantized", "dropout"])
def test_a_custom_layer_that_draws_and_counts(way):
    """Its random numbers and counts equal those of the merged model in every call."""
    x, extra = layers.x(), {"lora_dropout": 0.5} if way == "dropout" else {}
    model = adapt(layers_nnx.Held(layer=Noisy()), lora("layer", **extra), example=(x,))
    merged = jaxadapt.merge(layers_nnx.Held(layer=Noisy()), jaxadapt.extract(model))
    if way == "quantized":
        table = jaxadapt.KeyMap("mine", (Weight("layer.w", "layer.weight", "d n h -> (n h) d"),))
        few, dense = (
            jaxadapt.models.quantize(layers_nnx.Held(layer=Noisy()), "int8", modules=["layer"], keymap=table)
            for _ in "ab"
        )
        model = adapt(few, lora("layer"), keymap=table)
        merged = jaxadapt.merge(jaxadapt.models.dequantize(dense), jaxadapt.extract(model))
    if way == "dropout":
        model.eval()
        merged.eval()
    run = nnx.jit(lambda model, x: model(x)) if way == "jit" else lambda model, x: model(x)
    if way == "grad":

        def run(model: Any, x: Any) -> Any:
            def loss(model: Any) -> Any:
                y = model(x)
                return (y**2).sum(), y

            return nnx.grad(loss, argnums=nnx.DiffState(0, jaxadapt.AdapterParam), has_aux=True)(model)[1]

    seen = []
    for _ in range(2):
        y = run(model, x)
        np.testing.assert_allclose(y, merged(x), atol=2e-5)
        seen.append(y)
    assert way == "dropout" or np.abs(seen[1] - seen[0]).max() > 0.1
    assert int(model.layer.seen[...]) == int(merged.layer.seen[...]) == 2
    assert jaxadapt.summary(model, x)


def test_a_variable_that_the_layer_does_not_hold():
    shared = nnx.Rngs(0)

    class Outside(nnx.Module):
        def __init__(self) -> None:
            self.w = layers_nnx.normal(1, 8, 6)

        def __call__(self, x: jax.Array) -> jax.Array:
            return (x + jax.random.normal(shared(), x.shape)) @ self.w[...]

    table = jaxadapt.KeyMap("mine", (Weight("layer.w", "layer.weight", "i o -> o i"),))
    model = adapt(layers_nnx.Held(layer=Outside()), lora("layer"), keymap=table)
    with pytest.raises(AttachError, match=r"Outside: .*self.rngs = rngs"):
        model(layers.x())


def test_a_layer_that_makes_variables_while_it_is_called():
    class Sowing(nnx.Module):
        def __init__(self) -> None:
            self.w, self.rngs = layers_nnx.normal(1, 8, 6), nnx.Rngs(0)

        def __call__(self, x: jax.Array) -> jax.Array:
            self.mean = nnx.Variable(x.mean())
            return x @ self.w[...]

    table = jaxadapt.KeyMap("mine", (Weight("layer.w", "layer.weight", "i o -> o i"),))
    model = adapt(layers_nnx.Held(layer=Sowing()), lora("layer"), keymap=table)
    with pytest.raises(AttachError, match=r"Sowing adds variables while it is called \(mean\)"):
        model(layers.x())


def test_a_layer_that_removes_a_variable_while_it_is_called():
    class Popping(nnx.Module):
        def __init__(self) -> None:
            self.w, self.mean = layers_nnx.normal(1, 8, 6), nnx.Variable(jnp.zeros(()))

        def __call__(self, x: jax.Array) -> jax.Array:
            nnx.pop(self, lambda _, value: type(value) is nnx.Variable)
            return x @ self.w[...]

    model, x = adapt(layers_nnx.Held(layer=Popping()), lora("layer"), example=(layers.x(),)), layers.x()
    y, adapter = model(x), jaxadapt.extract(model)
    np.testing.assert_allclose(jaxadapt.merge(jaxadapt.detach(model), adapter)(x), y, atol=1e-5)


class Pair(nnx.Module):
    """A layer with two weights and one bias."""

    def __init__(self) -> None:
        self.w1, self.w2 = layers_nnx.normal(1, 8, 6), layers_nnx.normal(2, 8, 6)
        self.bias = layers_nnx.normal(3, 6)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x @ self.w1[...] + x @ self.w2[...] + self.bias[...].reshape(1, 1, 6)


def test_two_weights_that_share_one_bias():
    model, x = layers_nnx.Held(layer=Pair()), layers.x()
    ia3 = jaxadapt.IA3Config(target_modules=["w1", "w2"], feedforward_modules=[])
    with pytest.raises(AttachError, match=r"layer.w1: .*one bias for several"):
        adapt(model, ia3, example=(x,))
    adapt(model, lora("w1", "w2"), example=(x,))
    y = model(x)
    adapter = jaxadapt.extract(model)
    np.testing.assert_allclose(jaxadapt.merge(jaxadapt.detach(model), adapter)(x), y, atol=1e-5)
    one = adapt(model, ia3.replace(target_modules=["w1"], init_ia3_weights=False), example=(x,))
    y = one(x)
    adapter = jaxadapt.extract(one)
    np.testing.assert_allclose(jaxadapt.merge(jaxadapt.detach(one), adapter)(x), y, atol=1e-5)


def test_weights_that_share_a_module_go_by_their_own_names():
    class Net(nnx.Module):
        def __init__(self) -> None:
            self.layer, self.lin = Pair(), nnx.Linear(6, 6, rngs=nnx.Rngs(0))

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.lin(self.layer(x))

    x = layers.x()
    assert set(shapes(adapt(Net(), lora("w2", "lin"), example=(x,)))) == {
        f"{leaf}.lora_{t}" for leaf in ("layer.w2", "lin.kernel") for t in "AB"
    }
    with pytest.raises(KeyMapError, match=r"(?s)layer.w2 \(8, 6\).*example="):
        adapt(Net(), lora("w2", "lin"))
    with (
        pytest.raises(TargetError, match=r"(?s)layer.w1.*layer.w2"),
        pytest.warns(UserWarning, match="'layer' matches no module"),
    ):
        adapt(Net(), lora("layer", "lin"), example=(x,))
    with pytest.raises(KeyMapError, match=r"(?s)layer.w1"):
        adapt(Net(), lora("layer", "lin"))


def test_a_read_outside_the_call_is_only_seen_with_an_example():
    case = CASE["read_outside"]
    adapt(case.make(), lora("enc"))
    with pytest.raises(AttachError, match="(?s)enc.kernel.*exclude_modules") as error:
        adapt(case.make(), lora("enc"), example=case.inputs())
    assert "outside their own module" in str(error.value)


def test_an_einsum_called_with_another_equation():
    einsum = nnx.Einsum("btd,do->bto", (8, 6), rngs=nnx.Rngs(0))
    model = adapt(layers_nnx.Held(layer=einsum), lora("layer"))
    x = layers.x()
    np.testing.assert_allclose(model.layer(x[0], "td,do->to"), model.layer(x)[0], atol=1e-5)
    with pytest.raises(AttachError, match="'btd,do->bto'.*'bto,do->btd'"):
        model.layer(jnp.ones((2, 5, 6)), "bto,do->btd")


def test_an_odd_einsum_is_an_error_only_when_targeted():
    class Net(nnx.Module):
        def __init__(self) -> None:
            self.odd = nnx.Einsum("btd,dok->bto", (8, 8, 2), rngs=nnx.Rngs(0))
            self.lin = nnx.Linear(8, 8, rngs=nnx.Rngs(0))

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.odd(self.lin(x))

    adapt(Net(), lora("lin"))
    with pytest.raises((AttachError, KeyMapError), match="odd.kernel"):
        adapt(Net(), lora("odd"))


# ---------------------------------------------------------------- Tunix


@pytest.mark.parametrize("family", ["llama3", "qwen3"])
def test_tunix(family, foreign_model):
    pytest.importorskip("tunix")
    module = importlib.import_module(f"tunix.models.{family}.model")
    fields = inspect.signature(module.ModelConfig).parameters
    sizes = {
        "num_layers": 1, "vocab_size": 64, "embed_dim": 32, "hidden_dim": 64, "num_heads": 4, "head_dim": 8,
        "num_kv_heads": 2, "norm_eps": 1e-5, "rope_theta": 10000,
    }  # fmt: skip
    config = module.ModelConfig(**{k: v for k, v in sizes.items() if k in fields})
    cls = getattr(module, {"llama3": "Llama3", "qwen3": "Qwen3"}[family])
    tokens = jnp.arange(16)[None] % 50
    inputs = (tokens, jnp.arange(16)[None], None, jnp.tril(jnp.ones((1, 16, 16), bool)))
    model = nnx.jit(lambda: cls(config, rngs=nnx.Rngs(0)))()
    call = nnx.jit(lambda m, *inputs: m(*inputs)[0])
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    y0 = call(model, *inputs)
    adapt(model, lora(*targets), example=inputs)
    found = shapes(model)
    assert len(found) == 14
    assert found["layers.0.attn.q_proj.w.lora_A"] == (2, 32)
    assert found["layers.0.attn.o_proj.w.lora_A"] == (2, 4, 8)
    y = call(model, *inputs)
    assert np.abs(y - y0).max() > 1e-3
    adapter = jaxadapt.extract(model)
    merged = jaxadapt.merge(jaxadapt.detach(model), adapter)
    np.testing.assert_allclose(call(merged, *inputs), y, atol=1e-4)


class Projector(nnx.Module):
    """A layer that is used through a custom method, as embedders are."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.w = nnx.Param(jax.random.normal(rngs.params(), (4, 6)))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.project(x) + 1

    def project(self, x: jax.Array) -> jax.Array:
        return x @ self.w[...]


class Uses(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.layer = Projector(rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.layer.project(x)


@pytest.mark.parametrize("example", [True, False])
def test_an_adapter_follows_a_layers_own_methods(example: bool) -> None:
    x = jnp.ones((2, 4))
    table = jaxadapt.KeyMap("mine", (jaxadapt.Weight("layer.w", "layer.weight", "i o -> o i"),))
    model = Uses(nnx.Rngs(0))
    config = jaxadapt.LoraConfig(r=2, target_modules=["layer"])
    jaxadapt.adapt(model, config, rngs=nnx.Rngs(1), keymap=table, example=[x] if example else None)
    for var in adapter_variables(model)["default"].values():
        var.set_value(jax.random.normal(jax.random.key(var.size), var.shape))
    got = {"project": model(x), "call": model.layer(x)}
    adapter = jaxadapt.extract(model)
    merged = jaxadapt.merge(jaxadapt.detach(model), adapter)
    np.testing.assert_allclose(got["project"], merged(x), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got["call"], merged.layer(x), rtol=1e-5, atol=1e-5)


class Shifted(nnx.Module):
    """A layer whose bias has a custom name."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.w = nnx.Param(jax.random.normal(rngs.params(), (4, 6)))
        self.shift = nnx.Param(jnp.ones(6))

    def __call__(self, x: jax.Array) -> jax.Array:
        return x @ self.w[...] + self.shift[...][None]


def test_ia3_refuses_a_bias_of_another_name() -> None:
    x = jnp.ones((2, 4))
    model = layers_nnx.Held(layer=Shifted(nnx.Rngs(0)))
    adapt(model, jaxadapt.IA3Config(target_modules=["layer"], feedforward_modules=[]), example=(x,))
    with pytest.raises(AttachError, match="'shift' has the size of the output"):
        model(x)
    other = layers_nnx.Held(layer=Shifted(nnx.Rngs(0)))
    before = other(x)
    jaxadapt.adapt(other, jaxadapt.LoraConfig(r=2, target_modules=["layer"]), rngs=nnx.Rngs(1), example=(x,))
    np.testing.assert_array_equal(other(x), before)  # LoRA does not change biases, whatever their names


class Tied(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.a = nnx.Linear(4, 4, rngs=rngs)
        self.b = nnx.Linear(4, 4, rngs=rngs)
        self.b.kernel = self.a.kernel

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.b(self.a(x))


def test_a_weight_of_two_modules_is_refused() -> None:
    model = Tied(nnx.Rngs(0))
    before = nnx.graphdef(model)
    with pytest.raises(AttachError, match=r"a\.kernel: several modules hold .*b\.kernel"):
        adapt(model, lora("a"))
    assert nnx.graphdef(model) == before


class Experts(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.w = nnx.Param(jax.random.normal(rngs.params(), (3, 4, 5)))

    def __call__(self, x: jax.Array, sizes: jax.Array) -> jax.Array:
        return jax.lax.ragged_dot(x, self.w.get_value(), sizes)


@pytest.mark.parametrize("named", [("0", "2"), ("0", "1", "2")])
def test_some_of_the_experts_in_a_ragged_product(named: tuple[str, ...]) -> None:
    line = Weight("moe.w", "moe.{x}.weight", "{x} i o -> o i", x=("0", "1", "2"))
    model = layers_nnx.Held(moe=Experts(nnx.Rngs(0)))
    w, x = np.asarray(model.moe.w), np.random.default_rng(0).standard_normal((6, 4)).astype("float32")
    adapt(model, lora(*named), keymap=jaxadapt.KeyMap("mine", (line,)))
    tensors = jaxadapt.to_peft(model).tensors
    rows = []
    for row, e in zip(x, (0, 0, 1, 1, 1, 2), strict=True):
        a, b = (tensors.get(f"base_model.model.moe.{e}.lora_{side}.weight", np.zeros((1, 1))) for side in "AB")
        rows.append(row @ (w[e] + 3 * (b @ a).T))
    np.testing.assert_allclose(model.moe(x, jnp.array([2, 3, 1])), rows, rtol=1e-5, atol=1e-5)


class InDict(nnx.Module):
    """A model with a weight that is not an attribute of a module."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.held = nnx.data({"inner": nnx.Param(rngs.params.normal((8, 8)))})
        self.out = nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.out(x @ self.held["inner"][...])


class InLinen(nnx.Module):
    """Linen layers, whose weights the wrapper holds in a tree."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        inner = nnx.bridge.ToNNX(linen.Sequential([linen.Dense(8, use_bias=False)]), rngs=rngs)
        self.held = nnx.bridge.lazy_init(inner, jnp.ones((1, 8)))
        self.out = nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.out(self.held(x))


@pytest.mark.parametrize("make", [InDict, InLinen])
def test_weights_that_no_module_holds_are_not_left_out_in_silence(make, tmp_path):
    model, x = make(nnx.Rngs(0)), jnp.ones((2, 8))
    every = jaxadapt.LoraConfig(r=2, target_modules="all-linear")
    for config in (every, every.replace(target_modules=".*")):
        for example in (None, [x]):
            with pytest.raises(AttachError, match=r"not direct attributes of an nnx\.Module(?s:.)*\n  held\."):
                adapt(model, config, example=example)
    table = jaxadapt.KeyMap(
        "mine", (Weight("out.kernel", "out.weight", "i o -> o i"), Weight("out.bias", "out.bias", "o -> o"))
    )
    for do in (
        jaxadapt.export.export_base,
        lambda model, path, **options: jaxadapt.export.import_base(path, model, **options),
    ):
        with pytest.raises(AttachError, match=r"cannot collect all parameters(?s:.)*\n  held\."):
            do(model, tmp_path, keymap=table)
    adapt(model, every.replace(exclude_modules=["held", "layers_0"]))
    assert set(jaxadapt.extract(model).sites) == {"out.kernel"}
    assert jaxadapt.summary(model).base_parameters == 8 * 8 + 8 * 8 + 8  # includes weights in a dict


def test_a_module_that_scans_over_its_own_weights_is_refused_with_the_way_out():
    def run(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["w"])[0]

    class Stack(nnx.Module):
        def __init__(self) -> None:
            self.w = nnx.Param(jnp.ones((2, 4, 4)))

        def __call__(self, x: jax.Array) -> jax.Array:
            return run({"w": self.w[...]}, x)

    keymap = jaxadapt.KeyMap("mine", (jaxadapt.Weight("w", "layers.{l}.q.weight", "{l} i o -> o i"),))
    config, x = jaxadapt.LoraConfig(r=2, target_modules=["q"]), jnp.ones((1, 4))
    model = Stack()
    with pytest.raises(jaxadapt.AttachError, match=r"'w' of shape \(2, 4, 4\)[^\n]*adapt a jaxadapt.models.Function"):
        jaxadapt.adapt(model, config, rngs=nnx.Rngs(0), keymap=keymap, example=[x])
    assert nnx.state(model, jaxadapt.AdapterParam) == nnx.State({})
    way_out = jaxadapt.models.Function(run, {"w": model.w[...]})
    way_out = jaxadapt.adapt(way_out, config, key=jax.random.key(0), keymap=keymap, example=[x])
    np.testing.assert_array_equal(way_out(x), model(x))
