"""Training of an adapted NNX model: updated parameters, compiled programs, and the configuration in checkpoints."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import jaxadapt
from jaxadapt import AttachError
from jaxadapt.demo.llama import PROJECTIONS, Llama, LlamaConfig
from tests.support import small
from tests.support.twins import layers_nnx

CONFIG = jaxadapt.LoraConfig(r=4, lora_alpha=8, target_modules=list(PROJECTIONS))
TINY = LlamaConfig(
    vocab_size=40, hidden_size=24, intermediate_size=56, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=6
)
TOKENS = jax.random.randint(jax.random.key(0), (2, 5), 0, 40)
TRAINED = nnx.DiffState(0, jaxadapt.AdapterParam)


def llama(config: Any = CONFIG) -> Any:
    return jaxadapt.adapt(Llama(TINY, rngs=nnx.Rngs(0)), config, rngs=nnx.Rngs(1))


def loss(model: Any, tokens: Any) -> Any:
    logits = model(tokens)[:, :-1]
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def size(model: Any) -> Any:
    return sum(jnp.sum(x**2) for x in jax.tree.leaves(nnx.state(model, jaxadapt.AdapterParam)))


def step(model: Any, optimizer: Any, tokens: Any) -> Any:
    value, grads = nnx.value_and_grad(loss, argnums=TRAINED)(model, tokens)
    optimizer.update(model, grads)
    return value


def test_training_one_of_several_adapters_leaves_the_others_as_they_are():
    """The filter of one name excludes the others; with AdapterParam, decay and momentum change inactive adapters."""
    model = small.trained(name="a")
    small.trained(name="b", model=model, seed=3)  # the active one
    before = {name: jaxadapt.extract(model, name=name) for name in "ab"}
    only = jaxadapt.AdapterParam.named(model, "b")
    optimizer = nnx.Optimizer(model, optax.adamw(1e-2, weight_decay=0.1), wrt=only)

    @nnx.jit
    def step(model: Any, optimizer: Any) -> None:
        grads = nnx.grad(lambda model: jnp.mean(model(small.X) ** 2), argnums=nnx.DiffState(0, only))(model)
        optimizer.update(model, grads)

    step(model, optimizer)
    after = {name: jaxadapt.extract(model, name=name) for name in "ab"}
    assert small.same(before["a"], after["a"])
    assert not small.same(before["b"], after["b"])


def test_a_filter_of_names_that_are_not_there_is_refused():
    """It would match nothing, and an optimizer of no parameters raises no error."""
    model = small.trained(name="a")
    named = jaxadapt.AdapterParam.named
    for tree in (model, nnx.state(model), nnx.eval_shape(lambda: small.trained(name="a"))):
        assert len(jax.tree.leaves(nnx.state(model, named(tree, "a")))) > 0
        with pytest.raises(AttachError, match=r"there is no adapter 'b'; this model has \['a'\]"):
            named(tree, "a", "b")
    with pytest.raises(AttachError, match=r"name at least one adapter; this model has \['a'\]"):
        named(model)
    with pytest.raises(AttachError, match=r"found str\. Call named\(model, 'fr'\)"):
        named("a")


def test_only_adapters_get_gradients_and_optimizer_state_and_move():
    model = llama()
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=jaxadapt.AdapterParam)
    before = {p: v.get_value() for p, v in nnx.to_flat_state(nnx.state(model))}
    adapters = {p for p, _ in nnx.to_flat_state(nnx.state(model, jaxadapt.AdapterParam))}
    moments = [v.size for v in jax.tree.leaves(nnx.state(optimizer.opt_state)) if v.size > 1]
    assert sum(moments) == 2 * sum(before[p].size for p in adapters)
    train = nnx.jit(step)
    losses = [float(train(model, optimizer, TOKENS)) for _ in range(6)]
    assert losses[-1] < losses[0] - 0.1
    for path, v in nnx.to_flat_state(nnx.state(model)):
        same = np.array_equal(v.get_value(), before[path])
        assert same is (path not in adapters), path


# ---------------------------------------------------------------- compilation


def compiled_grad(model: Any, *inputs: Any) -> Any:
    graphdef, adapter, rest = nnx.split(model, jaxadapt.AdapterParam, ...)

    def of(adapter: Any, rest: Any, *inputs: Any) -> Any:
        return jax.grad(lambda a: jnp.mean(nnx.merge(graphdef, a, rest)(*inputs).astype(jnp.float32) ** 2))(adapter)

    return jax.jit(of).lower(adapter, rest, *inputs).compile()


@pytest.mark.parametrize("method", ["lora", "ia3"])
def test_the_compiled_step_holds_no_gradient_of_a_frozen_weight(method):
    ia3 = jaxadapt.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])
    model = llama(CONFIG if method == "lora" else ia3)
    kernels = {
        tuple(v.shape)
        for p, v in nnx.to_flat_state(nnx.state(model, jaxadapt.models.BaseParam))
        if p[-1] in ("kernel", "embedding")
    }
    shapes = "|".join(f"{a},{b}" for s in kernels for a, b in (s, s[::-1]))
    frozen = re.compile(rf"f32\[(?:{shapes})\]\S* (?:dot|custom-call|fusion)\(")
    text = compiled_grad(model, TOKENS).as_text()
    assert " dot(" in text or "custom-call" in text
    assert not frozen.findall(text)
    # Control: the gradient of all parameters does contain it.
    graphdef, state = nnx.split(llama())
    full = jax.jit(lambda s, t: jax.grad(lambda s: jnp.mean(nnx.merge(graphdef, s)(t) ** 2))(s))
    assert frozen.findall(full.lower(state, TOKENS).compile().as_text())


class Hand(nnx.Module):
    """A handwritten LoRA around a weight used as `equation`."""

    def __init__(self, equation: str, first: str, second: str, w: jax.Array, a: jax.Array, b: jax.Array) -> None:
        self.equation, self.first, self.second = equation, first, second
        self.w, self.a, self.b = nnx.Param(w), jaxadapt.AdapterParam(a), jaxadapt.AdapterParam(b)

    def __call__(self, x: jax.Array) -> jax.Array:
        low = jnp.einsum(self.first, x, self.a[...]) * 2.0
        return jnp.einsum(self.equation, x, self.w[...]) + jnp.einsum(self.second, low, self.b[...])


class Two(nnx.Module):
    def __init__(self, q: nnx.Module, o: nnx.Module) -> None:
        self.q, self.o = q, o

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.o(jnp.tanh(self.q(x)))


def test_flops_equal_those_of_a_hand_written_layer():
    x = jnp.ones((2, 16, 32))
    up, down = "btd,dnh->btnh", "btnh,nhd->btd"
    kinds = {
        "traced": Two(layers_nnx.OwnEinsum(up, 32, 4, 16), layers_nnx.OwnEinsum(down, 4, 16, 32)),
        "known": Two(nnx.Einsum(up, (32, 4, 16), rngs=nnx.Rngs(0)), nnx.Einsum(down, (4, 16, 32), rngs=nnx.Rngs(0))),
    }
    ones = jnp.ones
    hand = Two(
        Hand(up, "btd,dr->btr", "btr,rnh->btnh", ones((32, 4, 16)), ones((32, 4)), ones((4, 4, 16))),
        Hand(down, "btnh,nhr->btr", "btr,rd->btd", ones((4, 16, 32)), ones((4, 16, 4)), ones((4, 32))),
    )
    want = compiled_grad(hand, x).cost_analysis()["flops"]
    config = jaxadapt.LoraConfig(r=4, lora_alpha=8, target_modules=["q", "o"])
    for name, model in kinds.items():
        jaxadapt.adapt(model, config, rngs=nnx.Rngs(1), example=(x,))
        got = compiled_grad(model, x).cost_analysis()["flops"]
        assert got <= want, (name, got / want)
        assert got >= 0.99 * want, (name, got / want)


def test_updates_and_loading_an_equal_adapter_do_not_retrace(tmp_path):
    traces = 0

    @nnx.jit
    def train(model: Any, optimizer: Any, tokens: Any) -> Any:
        nonlocal traces
        traces += 1
        return step(model, optimizer, tokens)

    model = llama()
    optimizer = nnx.Optimizer(model, optax.sgd(1e-2), wrt=jaxadapt.AdapterParam)
    for _ in range(5):
        train(model, optimizer, TOKENS)
    assert traces == 1
    other = llama(CONFIG.replace(inference_mode=True, peft_version="0.1.0"))
    jaxadapt.save(other, tmp_path)
    jaxadapt.load(tmp_path, model)
    assert not jaxadapt.extract(model).flat()["model.layers.0.mlp.up_proj.kernel.lora_B"].any()
    train(model, optimizer, TOKENS)
    assert traces == 1
    # Another base model's name causes a new trace; otherwise jit would return the first adapter's configuration.
    jaxadapt.save(other, tmp_path, base_model="somebody/elses")
    train(jaxadapt.load(tmp_path, model), optimizer, TOKENS)
    assert traces == 2
    assert jaxadapt.extract(model).config.base_model_name_or_path == "somebody/elses"


# ---------------------------------------------------------------- the configuration in states and files


def _updated(model: Any) -> Any:
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=jaxadapt.AdapterParam)

    @nnx.jit
    def shrink(model: Any, optimizer: Any) -> None:
        optimizer.update(model, nnx.grad(size, argnums=TRAINED)(model))

    shrink(model, optimizer)
    return model


def _from_optax(model: Any) -> Any:
    state = nnx.state(model, jaxadapt.AdapterParam)
    tx = optax.adam(1e-2)
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, state), tx.init(state), state)
    return optax.apply_updates(state, updates)


def _written_back(model: Any) -> Any:
    nnx.update(model, jax.tree.map(lambda x: x + 1, nnx.state(model, jaxadapt.AdapterParam)))
    return model


SURVIVES = {
    "model": lambda m: m,
    "state": nnx.state,
    "adapter state": lambda m: nnx.state(m, jaxadapt.AdapterParam),
    "tree.map": lambda m: jax.tree.map(lambda x: x * 2, nnx.state(m)),
    "jit": lambda m: jax.jit(lambda s: jax.tree.map(lambda x: x * 2, s))(nnx.state(m)),
    "grad": lambda m: nnx.grad(size, argnums=TRAINED)(m),
    "optimizer": _updated,
    "optax": _from_optax,
    "update": _written_back,
    "merge": lambda m: nnx.merge(*nnx.split(m)),
    "eval_shape": lambda m: nnx.eval_shape(lambda: llama()),
    "device_get": lambda m: jax.device_get(nnx.state(m)),
}


@pytest.mark.parametrize("way", SURVIVES)
def test_the_configuration_survives(way):
    model = llama()
    tree = SURVIVES[way](model)
    adapter = jaxadapt.extract(tree)
    assert adapter.config == CONFIG
    assert adapter.keymap.name == "llama"
    assert list(adapter.flat()) == list(jaxadapt.extract(llama()).flat())


def test_a_pure_dict_has_lost_it_and_says_so():
    model = llama()
    want = jaxadapt.extract(model)
    for state in (nnx.state(model), nnx.state(model, jaxadapt.AdapterParam)):
        pure = nnx.to_pure_dict(state)
        with pytest.raises(AttachError, match="config="):
            jaxadapt.extract(pure)
        found = jaxadapt.extract(jaxadapt.models.LoraTree(pure, config=CONFIG), keymap="llama")
        assert found.config == CONFIG
        assert found.flat().keys() == want.flat().keys()
        for path, value in found.flat().items():
            np.testing.assert_array_equal(value, want.flat()[path])


def test_what_orbax_restores_of_a_state_without_a_target(tmp_path):
    model = llama()
    want = jaxadapt.extract(model)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", nnx.state(model, jaxadapt.AdapterParam))
        checkpointer.wait_until_finished()
        bare = checkpointer.restore(tmp_path / "state")
    found = jaxadapt.extract(jaxadapt.models.LoraTree(bare, config=want.config), keymap=want.keymap)
    assert found.flat().keys() == want.flat().keys()
    for path, value in found.flat().items():
        np.testing.assert_array_equal(value, want.flat()[path])


def test_inject_refuses_what_does_not_fit():
    model, other = llama(), llama(CONFIG.replace(r=2))
    with pytest.raises(AttachError, match=r"lora_A: expected \[4, 24\], found \[2, 24\]"):
        jaxadapt.inject(model, jaxadapt.extract(other))
    with pytest.raises(AttachError, match="no adapter 'fr'"):
        jaxadapt.inject(model, jaxadapt.extract(model), name="fr")


@pytest.mark.parametrize("axis", [0, 1])
def test_the_demo_llama_scanned_and_rematerialized(axis):
    config = dataclasses.replace(TINY, scan=True, scan_axis=axis, remat=axis == 1)
    model = Llama(config, rngs=nnx.Rngs(0))
    graphdef = nnx.graphdef(model)
    plain = nnx.jit(loss)(model, TOKENS)
    jaxadapt.adapt(model, CONFIG.replace(lora_dropout=0.1), rngs=nnx.Rngs(1))
    optimizer = nnx.Optimizer(model, optax.adam(3e-2), wrt=jaxadapt.AdapterParam)
    train = nnx.jit(step)
    losses = [float(train(model, optimizer, TOKENS)) for _ in range(6)]
    np.testing.assert_allclose(losses[0], plain, atol=1e-6)
    assert losses[-1] < losses[0] - 0.1
    assert nnx.graphdef(jaxadapt.detach(model)) == graphdef
