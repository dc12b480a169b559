"""NNX and Linen alike: one network in both, with adapters that have names, dropout, dtypes and abstract values."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import jaxadapt
from jaxadapt import AttachError, TargetError
from tests.support import small
from tests.support.small import IA3, LORA, X

KEY = jax.random.key(0)
R3 = LORA.replace(r=3, target_modules=["q_proj"])
DROPPED = LORA.replace(lora_dropout=0.5)


class Nnx:
    """The network in NNX, which holds its adapters."""

    def __init__(self) -> None:
        self.model = small.net()

    def attach(self, config: Any, name: str = "default", seed: int = 1, **options: Any) -> Nnx:
        self.model = jaxadapt.adapt(self.model, config, rngs=nnx.Rngs(seed), name=name, **options)
        return self

    def __call__(self, x: Any, dropout: int | None = None) -> Any:
        self.model.eval() if dropout is None else self.model.train()
        return self.model(x)

    @property
    def tree(self) -> Any:
        """What `extract`, `inject`, `save` and `merge` take."""
        return self.model

    def put(self, adapter: jaxadapt.Adapter, name: str = "default") -> None:
        jaxadapt.inject(self.model, adapter, name=name)

    def activate(self, *names: str) -> None:
        jaxadapt.activate(self.model, *names)

    def delete(self, name: str) -> None:
        jaxadapt.delete(self.model, name=name)

    @contextlib.contextmanager
    def disabled(self) -> Iterator[Any]:
        with jaxadapt.disable(self.model) as model:
            yield model

    def detached(self) -> Any:
        return jaxadapt.detach(self.model)

    def merged(self, adapter: jaxadapt.Adapter) -> tuple[Any, Any]:
        """The network with the adapter merged, as a function, and its weights unmerged again."""
        model = jaxadapt.merge(jaxadapt.detach(self.model), adapter)
        again = jaxadapt.unmerge(model, adapter)
        return model, {name: {"kernel": getattr(again, name).kernel[...]} for name in ("q_proj", "up_proj")}

    def train(self, steps: int) -> tuple[list[float], int, int]:
        """The losses of some steps, how often they are traced, and the number of the optimizer's moments."""
        self.model.train()
        optimizer, traces = nnx.Optimizer(self.model, optax.adam(1e-2), wrt=jaxadapt.AdapterParam), []

        @nnx.jit
        def step(model: Any, optimizer: Any) -> Any:
            traces.append(1)
            wanted = nnx.DiffState(0, jaxadapt.AdapterParam)
            value, grads = nnx.value_and_grad(lambda m: jnp.mean((m(X) - 1) ** 2), argnums=wanted)(model)
            optimizer.update(model, grads)
            return value

        losses = [float(step(self.model, optimizer)) for _ in range(steps)]
        moments = sum(v.size for v in jax.tree.leaves(nnx.state(optimizer.opt_state)) if v.size > 1)
        return losses, len(traces), moments

    @staticmethod
    def base() -> Any:
        """The output without an adapter."""
        return small.net()(X)

    @staticmethod
    def abstract(config: Any) -> tuple[Any, Any]:
        """A model without values, and the specification of its output."""
        model = nnx.eval_shape(small.net)
        jaxadapt.adapt(model, config, example=(X,))  # no rngs, because no values are drawn
        return model, nnx.eval_shape(lambda m, x: m(x), model, X)

    @staticmethod
    def bare() -> list[Any]:
        """The network in each form of which `jaxadapt.init` makes an adapter."""
        state = nnx.state(small.net())
        return [small.net(), state, nnx.to_pure_dict(state)]


class Linen:
    """The network in Linen: a wrapper and its variables."""

    def __init__(self) -> None:
        self.module: Any = small.LinenNet()
        self.variables = small.base()

    def attach(self, config: Any, name: str = "default", seed: int = 1, **options: Any) -> Linen:
        self.module = jaxadapt.adapt(self.module, config, name=name, **options)
        keys = {"params": KEY, "lora": jax.random.key(seed), "ia3": jax.random.key(seed)}
        made = self.module.init(keys, X)
        held = {c: {**tree, **self.variables.get(c, {})} for c, tree in made.items() if c != "params"}
        self.variables = {**held, "params": self.variables["params"]}
        return self

    def __call__(self, x: Any, dropout: int | None = None) -> Any:
        if dropout is not None:
            return self.module.apply(self.variables, x, rngs={"dropout": jax.random.key(dropout)})
        drops = any(getattr(config, "lora_dropout", 0) for _, config in self.module.adapters)
        return (self.module.clone(deterministic=True) if drops else self.module).apply(self.variables, x)

    @property
    def tree(self) -> Any:
        return self.variables

    def put(self, adapter: jaxadapt.Adapter, name: str = "default") -> None:
        self.variables = jaxadapt.inject(self.variables, adapter, name=name)

    def activate(self, *names: str) -> None:
        self.module = jaxadapt.activate(self.module, *names)

    def delete(self, name: str) -> None:
        self.module = jaxadapt.delete(self.module, name=name)
        self.variables = jaxadapt.delete(self.variables, name=name)

    @contextlib.contextmanager
    def disabled(self) -> Iterator[Any]:
        with jaxadapt.disable(self.module) as module:
            yield lambda x: module.apply(self.variables, x)

    def detached(self) -> Any:
        module = jaxadapt.detach(self.module)
        assert isinstance(module, small.LinenNet)
        return lambda x: module.apply({"params": self.variables["params"]}, x)

    def merged(self, adapter: jaxadapt.Adapter) -> tuple[Any, Any]:
        params = jaxadapt.merge(self.variables["params"], adapter)
        return lambda x: small.LinenNet().apply({"params": params}, x), jaxadapt.unmerge(params, adapter)

    def train(self, steps: int) -> tuple[list[float], int, int]:
        base, traces = self.variables["params"], []
        state = TrainState.create(apply_fn=self.module.apply, params=self.variables["lora"], tx=optax.adam(1e-2))

        @jax.jit
        def step(state: TrainState, base: Any) -> tuple[TrainState, Any]:
            traces.append(1)

            def loss(lora: Any) -> Any:
                return jnp.mean((state.apply_fn({"params": base, "lora": lora}, X) - 1) ** 2)

            value, grads = jax.value_and_grad(loss)(state.params)
            return state.apply_gradients(grads=grads), value

        losses = []
        for _ in range(steps):
            state, value = step(state, base)
            losses.append(float(value))
        self.variables = {"params": base, "lora": state.params}
        return losses, len(traces), sum(x.size for x in jax.tree.leaves(state.opt_state) if x.size > 1)

    @staticmethod
    def base() -> Any:
        return small.LinenNet().apply(small.base(), X)

    @staticmethod
    def abstract(config: Any) -> tuple[Any, Any]:
        wrapper = jaxadapt.adapt(small.LinenNet(), config)
        specs = jax.eval_shape(wrapper.init, KEY, X)
        return specs, jax.eval_shape(wrapper.apply, specs, X)

    @staticmethod
    def bare() -> list[Any]:
        return [small.base()["params"]]


FRONT_ENDS = {"nnx": Nnx, "linen": Linen}


@pytest.fixture(params=FRONT_ENDS)
def front(request: pytest.FixtureRequest) -> Any:
    return FRONT_ENDS[request.param]


def with_adapter(front: Any, config: Any = LORA) -> Any:
    return trained(front().attach(config))


def trained(net: Any, name: str = "default", seed: int = 1) -> Any:
    """The same network, its adapter with values that have an effect."""
    net.put(small.noisy(extract(net, name), seed), name)
    return net


def two(front: Any) -> Any:
    net = trained(front().attach(LORA))
    return trained(net.attach(R3, "fr", 2), "fr", 2)


def extract(net: Any, name: str = "default") -> jaxadapt.Adapter:
    return jaxadapt.extract(net.tree, name=name)


def effective(*adapters: jaxadapt.Adapter) -> Any:
    """The output of the network with these adapters merged, whatever the front end."""
    params = small.base()["params"]
    for adapter in adapters:
        params = jaxadapt.merge(params, jax.tree.map(jnp.asarray, adapter))
    return small.LinenNet().apply({"params": params}, X)


def close(a: Any, b: Any) -> None:
    np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-5)


# ---------------------------------------------------------------- several on one base


def test_two_names_on_one_base(front):
    net = two(front)
    default, fr = extract(net), extract(net, "fr")
    close(net(X), effective(fr))  # the last one attached is active
    net.activate("default")
    close(net(X), effective(default))
    net.activate("default", "fr")
    close(net(X), effective(default, fr))
    net.activate()
    np.testing.assert_array_equal(net(X), front.base())
    with pytest.raises(AttachError, match=r"'c'.*\['default', 'fr'\]"):
        net.activate("c")


def test_names_start_from_keys_of_their_own(front):
    net = front().attach(LORA).attach(LORA, "fr", 2)
    one, other = (extract(net, name).flat()["q_proj.kernel.lora_A"] for name in ("default", "fr"))
    assert (one != other).any()


def test_what_is_deleted_while_disabled_is_not_missed(front):
    net = two(front)
    net.activate("default", "fr")
    with net.disabled():
        net.delete("default")
    close(net(X), effective(extract(net, "fr")))


def test_disable_restores_also_after_an_exception(front):
    net = with_adapter(front)
    before = net(X)
    with net.disabled() as base:
        np.testing.assert_array_equal(base(X), front.base())
    np.testing.assert_array_equal(net(X), before)
    with pytest.raises(ZeroDivisionError), net.disabled():
        raise ZeroDivisionError
    np.testing.assert_array_equal(net(X), before)


def test_delete_leaves_the_other(front):
    net = two(front)
    default = extract(net)
    net.activate("default", "fr")
    net.delete("fr")
    close(net(X), effective(default))
    with pytest.raises(AttachError, match="'fr'.*'default'"):
        extract(net, "fr")
    net.delete("default")
    np.testing.assert_array_equal(net(X), front.base())
    if isinstance(net, Nnx):
        assert nnx.graphdef(net.model) == nnx.graphdef(small.net())


def test_two_methods_on_one_layer(front):
    net = trained(front().attach(LORA))
    trained(net.attach(IA3, "scale", 2), "scale", 2)
    lora, ia3 = extract(net), extract(net, "scale")
    assert (lora.config.peft_type, ia3.config.peft_type) == ("LORA", "IA3")
    close(net(X), effective(ia3))
    net.activate("default")
    close(net(X), effective(lora))
    net.activate("default", "scale")
    close(net(X), effective(lora, ia3))


@pytest.mark.parametrize("name", ["default", "fr"])
def test_a_name_is_taken_once(front, name):
    net = front().attach(LORA, name)
    with pytest.raises(AttachError, match=f"{name}.*the name is taken"):
        net.attach(R3, name)
    assert extract(net, name).config == LORA


def test_activating_an_adapter_of_a_model_without_any_says_how_to_attach_one(front):
    net = front().attach(LORA)
    net.delete("default")
    with pytest.raises(AttachError, match=r"cannot activate 'fr': the model has no adapter; attach one with jaxadapt"):
        net.activate("fr")


# ---------------------------------------------------------------- the same adapter by every way


@pytest.mark.parametrize("config", [LORA, IA3], ids=["lora", "ia3"])
def test_adapt_and_init_give_identical_specs(front, config):
    def specs(adapter: jaxadapt.Adapter) -> Any:
        return adapter.recipe, {p: (v.shape, v.dtype) for p, v in adapter.flat().items()}

    want = specs(extract(front().attach(config)))
    assert all(specs(jaxadapt.init(tree, config, key=KEY)) == want for tree in front.bare())


def test_a_key_gives_a_leaf_the_same_values_whatever_else_is_adapted(front):
    both = extract(front().attach(LORA)).flat()
    one = extract(front().attach(LORA.replace(target_modules=["up_proj"]))).flat()
    assert one.keys() < both.keys()
    for path, value in one.items():
        np.testing.assert_array_equal(value, both[path])


def test_abstract_models(front):
    real = extract(front().attach(LORA))
    tree, y = front.abstract(LORA)
    found = jaxadapt.extract(tree)
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in found.flat().values())
    assert {p: v.shape for p, v in found.flat().items()} == {p: v.shape for p, v in real.flat().items()}
    assert found.config == real.config
    assert y.shape == X.shape


@pytest.mark.parametrize("config", [LORA, IA3], ids=["lora", "ia3"])
def test_merge_equals_attached_and_unmerge_restores(front, config):
    net = with_adapter(front, config)
    y, adapter = net(X), jax.tree.map(jnp.copy, extract(net))
    merged, again = net.merged(adapter)
    close(merged(X), y)
    for name, leaves in small.base()["params"].items():
        np.testing.assert_allclose(again[name]["kernel"], leaves["kernel"], atol=1e-5)


# ---------------------------------------------------------------- training


def test_only_the_adapter_trains_in_one_program(front):
    net = front().attach(LORA)
    before = extract(net).flat()
    losses, traces, moments = net.train(20)
    assert losses[-1] < 0.8 * losses[0]
    assert traces == 1
    assert moments == 2 * sum(x.size for x in before.values())
    after = extract(net)
    assert all((x != after.flat()[path]).any() for path, x in before.items())
    close(net(X), effective(after))
    close(net.detached()(X), effective())


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
@pytest.mark.parametrize("api", FRONT_ENDS)
def test_a_base_of_16_bits_has_adapters_of_32_unless_told(api, dtype):
    config, half = LORA.replace(target_modules=[""]), {"param_dtype": jnp.bfloat16, "dtype": jnp.bfloat16}
    if api == "nnx":
        model = jaxadapt.adapt(nnx.Linear(6, 8, rngs=nnx.Rngs(0), **half), config, rngs=nnx.Rngs(1), dtype=dtype)
        adapter, y = jaxadapt.extract(model), model(X)
    else:
        wrapper = jaxadapt.adapt(nn.Dense(8, **half), config, dtype=dtype)
        variables = wrapper.init(KEY, X)
        adapter, y = jaxadapt.extract(variables), wrapper.apply(variables, X)
    assert {x.dtype for x in adapter.flat().values()} == {jnp.dtype(dtype or jnp.float32)}
    assert y.dtype == jnp.bfloat16


def test_dropout_in_training_only(front):
    net, calm = with_adapter(front, DROPPED), with_adapter(front)(X)
    close(net(X), calm)
    first, second = net(X, dropout=1), net(X, dropout=2)
    assert abs(first - second).max() > 1e-3
    assert abs(first - calm).max() > 1e-3
    if front is Linen:  # NNX draws anew in each call
        np.testing.assert_array_equal(net(X, dropout=1), first)
    close(net(X), calm)
    with net.disabled() as base:
        close(base(X), effective())


def test_dropout_scales_what_it_keeps(front):
    """The mean over many rows is the output without dropout, where the layers are linear in what is dropped."""
    net = with_adapter(front, DROPPED.replace(target_modules=["up_proj"]))
    many = jnp.repeat(jnp.asarray(X[:1]), 4000, 0)
    np.testing.assert_allclose(net(many, dropout=1).mean(0), net(X[:1])[0], atol=0.3)


# ---------------------------------------------------------------- refusals


def test_targets_that_match_nothing_list_near_misses(front):
    with pytest.raises(TargetError, match="(?s)qproj.*near misses: q_proj"):
        front().attach(LORA.replace(target_modules=["qproj"]))


class NnxNormed(nnx.Module):
    def __init__(self) -> None:
        self.q = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
        self.norm = nnx.BatchNorm(4, rngs=nnx.Rngs(1))

    def __call__(self, x: Any) -> Any:
        return self.norm(self.q(x))


class LinenNormed(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.BatchNorm(use_running_average=False, name="norm")(nn.Dense(4, name="q")(x))


@pytest.mark.parametrize("api", FRONT_ENDS)
def test_a_layer_with_a_state_is_not_saved_in_part(api):
    def attached(**fields: Any) -> Any:
        config = jaxadapt.LoraConfig(r=2, target_modules=["q"], **fields)
        if api == "nnx":
            return jaxadapt.adapt(NnxNormed(), config, rngs=nnx.Rngs(1))
        return jaxadapt.adapt(LinenNormed(), config).init(KEY, jnp.ones((5, 4)))

    with pytest.raises(
        AttachError, match=r"(?s)norm\.scale: BatchNorm keeps state|copies only parameters.*norm\.scale"
    ):
        attached(modules_to_save=["norm"])
    assert set(jaxadapt.extract(attached(bias="all")).sites) == {"q.kernel", "q.bias", "norm.bias"}


@pytest.mark.parametrize("api", FRONT_ENDS)
def test_rows_of_tokens_are_trained_in_a_model_without_a_table(api):
    config = jaxadapt.LoraConfig(r=2, target_modules=["q"], trainable_token_indices={"emb": [1, 3]})
    if api == "nnx":
        model = nnx.Dict(emb=nnx.Embed(5, 4, rngs=nnx.Rngs(0)), q=nnx.Linear(4, 4, rngs=nnx.Rngs(1)))
        tree = jaxadapt.adapt(model, config, rngs=nnx.Rngs(1))
    else:

        class Net(nn.Module):
            @nn.compact
            def __call__(self, ids: Any) -> Any:
                return nn.Dense(4, name="q")(nn.Embed(5, 4, name="emb")(ids))

        tree = jaxadapt.adapt(Net(), config).init(KEY, jnp.array([1]))
    tensors = jaxadapt.to_peft(tree).tensors
    assert tensors["base_model.model.emb.token_adapter.trainable_tokens_delta"].shape == (2, 4)
