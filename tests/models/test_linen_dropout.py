"""`lora_dropout` on Linen modules: when it is on, how it is switched, and which calls are refused."""

from __future__ import annotations

import warnings
from typing import Any

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxadapt

KEY = jax.random.key(0)
STREAM = {"dropout": jax.random.key(3)}
X = jnp.asarray(np.random.default_rng(0).normal(size=(4, 8)), jnp.float32)


class Layer(nn.Module):
    """One layer of a stack; `drops` adds Flax's own dropout to it."""

    drops: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, _: None = None) -> Any:
        x = nn.Dense(8, name="q")(x) + nn.Dense(8, name="k")(x)
        return (nn.Dropout(0.5, deterministic=False)(x) if self.drops else x), None


class Stack(nn.Module):
    split: Any
    drops: bool = False
    lift: Any = staticmethod(nn.scan)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        made = self.lift(Layer, variable_axes={"params": 0}, split_rngs=dict.fromkeys(self.split, True), length=3)
        return nn.Dense(8, name="head")(made(self.drops, name="layers")(x, None)[0])


class Own(nn.Module):
    """A module with its own argument `deterministic`."""

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool) -> tuple[jax.Array, bool]:
        return nn.Dense(8, name="q")(x), deterministic


def wrapped(module: nn.Module, rate: float = 0.5, **options: Any) -> Any:
    config = jaxadapt.LoraConfig(r=2, lora_dropout=rate, target_modules=r".*(q|k|head)", init_lora_weights=False)
    return jaxadapt.adapt(module, config, **options)


def off(model: Any, variables: Any, *args: Any, **kwargs: Any) -> Any:
    """Return the output of a wrapper whose configuration has no dropout."""
    adapter = jaxadapt.extract(variables)
    plain = jaxadapt.Adapter(adapter.config.replace(lora_dropout=0.0), adapter.params, adapter.keymap)
    return jaxadapt.adapt(model.module, plain.config).apply({**variables, **plain.collection}, *args, **kwargs)


@pytest.mark.parametrize("mode", [None, False])
def test_a_scan_that_hides_the_stream_is_refused_and_named(mode: bool | None):
    model = wrapped(Stack(["params"]), deterministic=mode)
    variables = model.init(KEY, X)
    with pytest.raises(flax.errors.InvalidRngError):  # as Flax's own dropout does in the same place
        Stack(["params"], drops=True).apply({"params": variables["params"]}, X, rngs=STREAM)
    calls = (
        lambda: model.apply(variables, X, rngs=STREAM),
        lambda: jax.jit(model.apply)(variables, X, rngs=STREAM),
        lambda: model.bind(variables, rngs=STREAM)(X),
    )
    for call in calls:
        with pytest.raises(jaxadapt.AttachError) as caught:
            call()
        said = str(caught.value)
        assert "layers.q" in said
        assert "layers.k" in said
        assert "head" not in said
        assert 'split_rngs={"params": True, "dropout": True}' in said
    silent = model.clone(deterministic=True)
    np.testing.assert_array_equal(silent.apply(variables, X, rngs=STREAM), off(model, variables, X))


def test_a_scan_that_splits_the_stream_drops_in_every_layer():
    model = wrapped(Stack(["params", "dropout"]))
    variables = model.init(KEY, X)
    plain, seen = off(model, variables, X), []
    for key in (3, 3, 4):
        seen.append(model.apply(variables, X, rngs={"dropout": jax.random.key(key)}))
    np.testing.assert_array_equal(seen[0], seen[1])
    assert abs(seen[0] - plain).max() > 1e-2
    assert abs(seen[0] - seen[2]).max() > 1e-2
    strict = model.clone(deterministic=False)
    np.testing.assert_array_equal(strict.apply(variables, X, rngs=STREAM), seen[0])
    np.testing.assert_array_equal(model.clone(deterministic=True).apply(variables, X, rngs=STREAM), plain)


def test_a_vmap_that_hides_the_stream_is_refused():
    class Many(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return nn.vmap(nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True})(8, name="q")(x)

    model = wrapped(Many())
    variables = model.init(KEY, X)
    with pytest.raises(jaxadapt.AttachError, match=r"do not get it:\n.*q\n"):
        model.apply(variables, X, rngs=STREAM)


def test_a_wrapper_without_a_stream_warns_once():
    model = wrapped(Own())
    variables = model.init(KEY, X, True)
    plain = off(model, variables, X, True)[0]
    with pytest.warns(UserWarning, match=r"default: dropout is off, .*rngs=\{\"dropout\": key\}") as caught:
        y, _ = model.apply(variables, X, True)
    assert [w.filename for w in caught] == [__file__]
    model.apply(variables, X, True)  # no further warning (warnings are errors here)
    jax.jit(lambda v, x: model.apply(v, x, True))(variables, X)
    jaxadapt.activate(model, "default").apply(variables, X, True)
    np.testing.assert_array_equal(y, plain)
    with pytest.warns(UserWarning, match="dropout is off"):  # another wrapper that compares equal
        wrapped(Own()).apply(variables, X, True)
    with pytest.warns(UserWarning, match="dropout is off"):
        wrapped(Own()).bind(variables)(X, True)
    with pytest.warns(UserWarning, match="dropout is off"):  # a key of another stream does not count
        wrapped(Own()).apply(variables, X, True, rngs={"params": KEY})


def test_no_warning_where_the_dropout_is_known_of():
    """Warnings are errors here."""
    variables = wrapped(Own()).init(KEY, X, True)
    model = wrapped(Own())
    model.apply(variables, X, True, rngs=STREAM)
    model.apply(variables, X, True)  # an evaluation after training
    model.clone().apply(variables, X, True)
    wrapped(Own(), deterministic=True).apply(variables, X, True)
    with jaxadapt.disable(wrapped(Own())) as base:
        base.apply(variables, X, True)
    jaxadapt.summary(wrapped(Own()), variables, X, True)
    none = wrapped(Own(), 0.0, deterministic=False)
    none.apply(none.init(KEY, X, True), X, True)


def test_deterministic_false_wants_the_stream():
    model = wrapped(Own(), deterministic=False)
    variables = model.init(KEY, X, True)
    for call in (model.apply, jax.jit(model.apply, static_argnums=2)):
        with pytest.raises(jaxadapt.AttachError, match=r"default: .* deterministic=False asks for it"):
            call(variables, X, True)
    with pytest.raises(jaxadapt.AttachError, match="deterministic=False asks for it"):
        model.bind(variables)
    y, _ = model.apply(variables, X, True, rngs=STREAM)
    assert abs(y - off(model, variables, X, True)[0]).max() > 1e-2


@pytest.mark.parametrize("own", [True, False])
def test_the_modules_own_argument_reaches_the_module(own: bool):
    model = wrapped(Own())
    variables = model.init(KEY, X, own)
    for mode in (None, False, True):
        y, told = model.clone(deterministic=mode).apply(variables, X, deterministic=own, rngs=STREAM)
        assert told is own
        assert (abs(y - off(model, variables, X, own)[0]).max() > 1e-2) == (mode is not True)


def test_a_jit_inside_the_model_does_not_keep_an_older_choice():
    class Inner(nn.Module):
        hide: bool = False

        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            if self.hide:
                split = nn.vmap(Jitted, variable_axes={"params": 0}, split_rngs={"params": True})
                return split(8, name="q")(x)
            return Jitted(8, name="q")(x)

    Jitted = nn.jit(nn.Dense)  # one class, so one cache
    stacked = jaxadapt.KeyMap("stacked", [jaxadapt.Weight("q.kernel", "{l}.q.weight", "{l} i o -> o i")])
    for hide in (False, True):
        model = wrapped(Inner(hide), keymap=stacked if hide else None)
        variables = model.init(KEY, X)
        with pytest.warns(UserWarning, match="dropout is off"):
            plain = model.apply(variables, X)
        if hide:
            with pytest.raises(jaxadapt.AttachError, match="do not get it"):
                model.apply(variables, X, rngs=STREAM)
        else:
            assert abs(model.apply(variables, X, rngs=STREAM) - plain).max() > 1e-2
        np.testing.assert_array_equal(model.clone(deterministic=True).apply(variables, X, rngs=STREAM), plain)


def test_the_choice_is_part_of_what_a_wrapper_is():
    """An outer jit must distinguish wrappers that compute different things."""
    model = wrapped(Own())
    variables, traced = model.init(KEY, X, True), []

    def run(model: Any, variables: Any) -> Any:
        traced.append(model.deterministic)
        return model.apply(variables, X, True, rngs=STREAM)[0]

    jitted = jax.jit(run, static_argnums=0)
    silent = model.clone(deterministic=True)
    assert model != silent
    assert hash(model) == hash(wrapped(Own()))
    assert model == wrapped(Own())
    assert abs(jitted(model, variables) - jitted(silent, variables)).max() > 1e-2
    jitted(wrapped(Own()), variables)
    assert traced == [None, True]


def test_where_the_keyword_does_not_belong():
    from flax import nnx

    model = wrapped(Own(), deterministic=True)
    other = jaxadapt.LoraConfig(r=2, target_modules=["q"])
    assert jaxadapt.adapt(model, other, name="b").deterministic is True
    with pytest.raises(jaxadapt.AttachError, match=r"deterministic=False: all adapters of a wrapper share"):
        jaxadapt.adapt(model, other, name="b", deterministic=False)
    with pytest.raises(jaxadapt.AttachError, match=r"deterministic: .*model\.train\(\) or model\.eval\(\)"):
        jaxadapt.adapt(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), other, rngs=nnx.Rngs(0), deterministic=True)


def test_two_adapters_and_the_names_of_those_that_drop():
    model = jaxadapt.adapt(wrapped(Own()), jaxadapt.LoraConfig(r=2, target_modules=["q"]), name="b")
    variables = model.init(KEY, X, True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.apply(variables, X, True)  # only "b" is active, and it has no dropout
    with pytest.warns(UserWarning, match="^the adapter default: dropout"):
        jaxadapt.activate(model, "default", "b").apply(variables, X, True)


def test_the_methods_that_a_layer_of_flax_uses_in_its_call_get_no_adapter():
    """`nn.Einsum` computes the shape of its bias in a method of its own, which must draw no dropout key."""
    config = jaxadapt.LoraConfig(r=2, target_modules=["layers_0"], lora_dropout=0.5, init_lora_weights=False)
    x, rngs = jnp.ones((2, 5, 4)), {"dropout": jax.random.key(3)}
    outputs: list[Any] = []
    for use_bias in (False, True):
        layer = nn.Einsum((4, 4), "bti,io->bto", use_bias=use_bias)
        module = jaxadapt.adapt(nn.Sequential([layer, layer]), config)
        variables = module.init(jax.random.key(0), x)
        outputs.append(module.apply(variables, x, rngs=rngs))
        assert "Einsum's own call" in str(jaxadapt.summary(module, variables, x))
    np.testing.assert_array_equal(*outputs)
