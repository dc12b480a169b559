"""Adapters on NNX models: names, copies, abstract models, dropout, detaching, and refusals."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from typing import Any

import flax.errors
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import jaxadapt
from jaxadapt.core.errors import AttachError, TargetError
from jaxadapt.models.nnx.attach import draw_params_key
from tests.support.twins import layers, layers_nnx

R1 = jaxadapt.LoraConfig(r=2, lora_alpha=8, target_modules=["q", "o"], init_lora_weights=False)
R3 = jaxadapt.LoraConfig(r=3, lora_alpha=3, target_modules=["q"], init_lora_weights=False)
IA3 = jaxadapt.IA3Config(target_modules=["q", "o"], feedforward_modules=["o"], init_ia3_weights=False)
X = layers.x()


def block(seed: int = 0) -> Any:
    return layers_nnx.Block(nnx.Rngs(seed))


def adapt(model: Any, config: Any, seed: int = 1, **options: Any) -> Any:
    return jaxadapt.adapt(model, config, rngs=nnx.Rngs(seed), **options)


def effective(*adapters: jaxadapt.Adapter) -> Any:
    """Return the same block with the effective weights of these adapters."""
    model = block()
    for adapter in adapters:
        model = jaxadapt.merge(model, adapter)
    return model(X)


def close(a: Any, b: Any) -> None:
    np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-5)


def arrays(model: Any) -> dict[tuple[Any, ...], Any]:
    return {path: v.get_value() for path, v in nnx.to_flat_state(nnx.state(model))}


# ---------------------------------------------------------------- several on one base


def test_two_names_on_one_base():
    model = adapt(block(), R1)
    adapt(model, R3, 2, name="fr")
    default, fr = jaxadapt.extract(model), jaxadapt.extract(model, name="fr")
    close(model(X), effective(fr))  # the last one attached is active
    jaxadapt.activate(model, "default")
    close(model(X), effective(default))
    jaxadapt.activate(model, "default", "fr")
    close(model(X), effective(default, fr))
    jaxadapt.activate(model)
    np.testing.assert_array_equal(model(X), block()(X))


def test_what_is_deleted_while_disabled_is_not_missed():
    model = adapt(adapt(block(), R1), R3, 2, name="fr")
    jaxadapt.activate(model, "default", "fr")
    with jaxadapt.disable(model):
        jaxadapt.delete(model, name="default")
    close(model(X), effective(jaxadapt.extract(model, name="fr")))


def test_disable_restores_also_after_an_exception():
    model, plain = adapt(block(), R1), block()(X)
    before = model(X)
    with jaxadapt.disable(model) as base:
        np.testing.assert_array_equal(base(X), plain)
    np.testing.assert_array_equal(model(X), before)
    with pytest.raises(ZeroDivisionError), jaxadapt.disable(model):
        raise ZeroDivisionError
    np.testing.assert_array_equal(model(X), before)


def test_delete_leaves_the_other():
    model = adapt(adapt(block(), R1), R3, 2, name="fr")
    default = jaxadapt.extract(model)
    jaxadapt.activate(model, "default", "fr")
    jaxadapt.delete(model, name="fr")
    close(model(X), effective(default))
    with pytest.raises(AttachError, match="'fr'.*'default'"):
        jaxadapt.extract(model, name="fr")
    jaxadapt.delete(model, name="default")
    assert nnx.graphdef(model) == nnx.graphdef(block())


def test_two_methods_on_one_layer():
    model = adapt(adapt(block(), R1), IA3, 2, name="scale")
    lora, ia3 = jaxadapt.extract(model), jaxadapt.extract(model, name="scale")
    assert (lora.config.peft_type, ia3.config.peft_type) == ("LORA", "IA3")
    close(model(X), effective(ia3))
    jaxadapt.activate(model, "default")
    close(model(X), effective(lora))


@pytest.mark.parametrize("name", ["default", "fr"])
def test_a_name_is_taken_once(name):
    model = adapt(block(), R1, name=name)
    with pytest.raises(AttachError, match=f"{name}.*the name is taken"):
        adapt(model, R3, name=name)
    assert jaxadapt.extract(model, name=name).config == R1


# ---------------------------------------------------------------- leaving no trace


@pytest.mark.parametrize("case", [c for c in layers.NNX if c.name in ("mixed_shared", "scan1", "dropout", "mha")])
def test_detach_gives_the_very_same_model(case):
    model = case.make()
    graphdef, before = nnx.graphdef(model), arrays(model)
    targets = [t.rpartition(".")[2] for t in case.targets]
    adapt(model, jaxadapt.LoraConfig(target_modules=targets, lora_dropout=0.1))
    inside = arrays(model)
    assert nnx.graphdef(model) != graphdef
    assert all(inside[path] is value for path, value in before.items())  # the base paths and arrays are unchanged
    assert jaxadapt.detach(model) is model
    after = arrays(model)
    assert nnx.graphdef(model) == graphdef
    assert list(after) == list(before)
    assert all(after[path] is value for path, value in before.items())


def test_base_filter_is_the_frozen_rest():
    model = adapt(block(), R1)
    base = {path for path, _ in nnx.to_flat_state(nnx.state(model, jaxadapt.models.BaseParam))}
    assert base == {path for path, _ in nnx.to_flat_state(nnx.state(block(), nnx.Param))}


def test_merge_equals_attached_and_unmerge_restores():
    for config in (R1, IA3):
        model = adapt(block(), config)
        y = model(X)
        with pytest.raises(AttachError, match="twice"):
            jaxadapt.merge(model, jax.tree.map(jnp.copy, jaxadapt.extract(model)))
        adapter = jaxadapt.extract(model)
        jaxadapt.detach(model)
        merged = jaxadapt.merge(model, adapter)
        close(merged(X), y)
        for path, value in arrays(jaxadapt.unmerge(merged, adapter)).items():
            np.testing.assert_allclose(value, arrays(block())[path], atol=1e-5)


# ---------------------------------------------------------------- copies


def test_copies_are_whole_and_independent():
    model = adapt(block(), R1)
    y = model(X)
    copies = [nnx.clone(model), copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    copies.append(nnx.merge(*nnx.split(model), copy=True))
    jaxadapt.inject(model, jaxadapt.Adapter(R1, jax.tree.map(jnp.zeros_like, jaxadapt.extract(model).params)))
    np.testing.assert_array_equal(model(X), block()(X))
    for other in copies:
        np.testing.assert_array_equal(other(X), y)
        assert jaxadapt.extract(other).config == R1
        assert nnx.graphdef(other) == nnx.graphdef(model)
        assert nnx.graphdef(jaxadapt.detach(other)) == nnx.graphdef(block())


def test_pickles_open_in_a_new_process(tmp_path, root):
    model = adapt(block(), R1)
    graphdef, state = nnx.split(model)
    (tmp_path / "model").write_bytes(pickle.dumps(model))
    (tmp_path / "split").write_bytes(pickle.dumps((graphdef, jax.tree.map(np.asarray, state))))
    np.save(tmp_path / "y.npy", model(X))
    code = f"""
import pickle, sys
sys.path.insert(0, {str(root)!r})
import jax, numpy as np
jax.config.update("jax_default_matmul_precision", "highest")
from pathlib import Path
here = Path({str(tmp_path)!r})
model = pickle.loads((here / "model").read_bytes())
from flax import linen, nnx
import jaxadapt
from tests.support.twins import layers
x = layers.x()
np.testing.assert_allclose(model(x), np.load(here / "y.npy"), atol=1e-6)
split = nnx.merge(*pickle.loads((here / "split").read_bytes()))
np.testing.assert_allclose(split(x), np.load(here / "y.npy"), atol=1e-6)
assert jaxadapt.extract(split).config == jaxadapt.extract(model).config
print(jaxadapt.extract(model).config.r)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "2"


# ---------------------------------------------------------------- abstract models, adapt inside transforms


def test_abstract_models_adapt_and_load(tmp_path):
    real = adapt(block(), R1)
    jaxadapt.save(real, tmp_path)
    model = nnx.eval_shape(block)
    jaxadapt.adapt(model, R1, example=(X,))  # no rngs, because no values are drawn
    specs = nnx.state(model, jaxadapt.AdapterParam)
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(specs))
    assert {p: v.shape for p, v in jaxadapt.extract(model).flat().items()} == {
        p: v.shape for p, v in jaxadapt.extract(real).flat().items()
    }
    y = nnx.eval_shape(lambda m, x: m(x), model, X)
    assert y.shape == X.shape
    loaded = jaxadapt.load(tmp_path, nnx.eval_shape(block))
    nnx.update(loaded, nnx.state(block()))
    np.testing.assert_array_equal(loaded(X), real(X))


def test_adapt_inside_jit_and_eval_shape():
    def build() -> Any:
        return adapt(block(), R1)

    eager, jitted = build(), nnx.jit(build)()
    assert nnx.graphdef(eager) == nnx.graphdef(jitted)
    for a, b in zip(jax.tree.leaves(nnx.state(eager)), jax.tree.leaves(nnx.state(jitted)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    shapes = nnx.eval_shape(build)
    assert nnx.graphdef(shapes) == nnx.graphdef(eager)


def changes_layers() -> dict[str, Any]:
    config = R1.replace(init_lora_weights=False)
    return {
        "adapt": (block, lambda model: adapt(model, config)),
        "delete": (lambda: adapt(block(), config), lambda model: jaxadapt.delete(model, name="default")),
        "detach": (lambda: adapt(block(), config), jaxadapt.detach),
        "merge": (lambda: adapt(block(), config), lambda model: jaxadapt.merge(model, in_place=True)),
    }


@pytest.mark.parametrize("verb", changes_layers())
def test_a_model_that_a_jitted_function_was_given_is_refused_and_left_whole(verb):
    """Flax cannot change the class of a module outside: it would raise, and the model would lose its layers."""
    make, change = changes_layers()[verb]
    model = make()
    before, y = nnx.graphdef(model), model(X)
    for do in (
        lambda: nnx.jit(lambda model: change(model)(X))(model),
        lambda: nnx.grad(lambda model: change(model)(X).sum())(model),
        lambda: jax.jit(lambda: change(model)(X))(),
    ):
        with pytest.raises(
            AttachError, match=r"(passed to nnx\.jit|created outside)(?s:.)*Attach, load, delete or detach outside"
        ):
            do()
        assert nnx.graphdef(model) == before
        np.testing.assert_array_equal(model(X), y)


def test_the_ways_out_that_the_error_names_are_ways():
    config, model = R1.replace(init_lora_weights=False), block()
    want = adapt(block(), config)(X)
    copied = nnx.jit(lambda model: adapt(nnx.clone(model), config))(model)
    for made in (copied, nnx.jit(lambda: adapt(block(), config))()):
        np.testing.assert_allclose(made(X), want, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(model(X), block()(X))
    merged = nnx.jit(jaxadapt.merge)(adapt(model, config))  # a copy too
    np.testing.assert_allclose(merged(X), want, rtol=1e-5, atol=1e-5)


def test_a_key_gives_a_leaf_the_same_values_whatever_else_is_adapted():
    both = jaxadapt.extract(adapt(block(), R1)).flat()
    one = jaxadapt.extract(adapt(block(), R1.replace(target_modules=["o"]))).flat()
    assert one.keys() < both.keys()
    for path, value in one.items():
        np.testing.assert_array_equal(value, both[path])
    again = jax.jit(lambda key: jaxadapt.init(block(), R1, key=key))(nnx.Rngs(1).params()).flat()
    for path, value in again.items():
        np.testing.assert_array_equal(value, both[path])


def committed() -> nnx.Rngs:
    rngs = nnx.Rngs(4)
    rngs.default.count[...] = jax.device_put(np.uint32(7), jax.devices()[0])
    return rngs


STREAMS = {
    "default": lambda: nnx.Rngs(0),
    "params": lambda: nnx.Rngs(default=1, params=2**31),
    "another kind of key": lambda: nnx.Rngs(jax.random.key(3, impl="rbg")),
    "on a device of its own": committed,
}


@pytest.mark.parametrize("make", STREAMS.values(), ids=STREAMS)
def test_the_stream_goes_on_as_flaxs_own_call_lets_it(make):
    mine, theirs = make(), make()
    for _ in range(3):
        key, expected = draw_params_key(mine), theirs.params()
        assert key.dtype == expected.dtype
        np.testing.assert_array_equal(jax.random.key_data(key), jax.random.key_data(expected))
    for (path, a), (_, b) in zip(*(nnx.to_flat_state(nnx.state(r)) for r in (mine, theirs)), strict=True):
        a, b = a.get_value(), b.get_value()
        said = [(x.dtype, x.shape, x.weak_type, x.committed, x.sharding) for x in (a, b) if path[-1] == "count"]
        assert said[:1] == said[1:]
        assert bool((a == b).all())


def test_a_stream_of_several_keys_or_of_another_trace_is_refused_as_by_flax():
    outer = nnx.Rngs(0)
    for take in (lambda rngs: rngs.params(), draw_params_key):
        with pytest.raises(ValueError, match="fold_in accepts a single key"):
            take(nnx.Rngs(0).split(3))
        with pytest.raises(flax.errors.TraceContextError):
            jax.vmap(lambda _, take=take: jax.random.key_data(take(outer)))(np.arange(2))
    assert outer.default.count[...] == 0


def test_attaching_compiles_nothing(caplog):
    model, rngs = block(), nnx.Rngs(1)
    jax.clear_caches()
    with jax.log_compiles():
        jaxadapt.adapt(model, jaxadapt.LoraConfig(r=2, target_modules=["q", "o"]), rngs=rngs)
        found = [line for line in caplog.messages if "ompil" in line]
        caplog.clear()
        nnx.Rngs(1).params()
    assert not found
    assert [line for line in caplog.messages if "ompil" in line]  # control: JAX's message has this wording


@pytest.mark.parametrize("config", [R1, IA3], ids=["lora", "ia3"])
def test_adapt_and_init_give_identical_specs(config):
    class Plain(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.q = nnx.Linear(8, 6, rngs=rngs)
            self.o = nnx.Linear(6, 8, rngs=rngs)

    def specs(adapter: jaxadapt.Adapter) -> Any:
        return adapter.recipe, {p: (v.shape, v.dtype) for p, v in adapter.flat().items()}

    def fresh() -> Any:
        return Plain(nnx.Rngs(0))

    want = specs(jaxadapt.extract(adapt(fresh(), config)))
    assert specs(jaxadapt.init(fresh(), config)) == want
    assert specs(jaxadapt.init(nnx.to_pure_dict(nnx.state(fresh())), config, key=jax.random.key(0))) == want
    assert specs(jaxadapt.init(nnx.state(fresh()), config)) == want


# ---------------------------------------------------------------- dtypes and dropout


def test_bf16_base_keeps_f32_adapters():
    def half() -> Any:
        return nnx.Linear(8, 6, param_dtype=jnp.bfloat16, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))

    config = R1.replace(target_modules=[""])
    model = adapt(half(), config)
    assert {v.dtype for v in jaxadapt.extract(model).flat().values()} == {jnp.dtype("float32")}
    assert model(X).dtype == jnp.bfloat16
    assert {v.dtype for v in jaxadapt.extract(adapt(half(), config, dtype=jnp.bfloat16)).flat().values()} == {
        jnp.dtype("bfloat16")
    }


DROPPED = R1.replace(lora_dropout=0.5)


def test_dropout_in_training_and_not_after_eval():
    model = adapt(block(), DROPPED)
    calm = adapt(block(), R1)(X)
    first, second = model(X), model(X)
    assert not np.array_equal(first, second)
    step = nnx.jit(lambda m, x: m(x))
    assert not np.array_equal(step(model, X), step(model, X))
    model.eval()
    np.testing.assert_array_equal(model(X), calm)
    np.testing.assert_allclose(step(model, X), calm, atol=1e-6)
    model.train()
    assert not np.array_equal(model(X), calm)
    with jaxadapt.disable(model):
        np.testing.assert_array_equal(model(X), block()(X))


@pytest.mark.parametrize("axis", [0, 1])
def test_dropout_in_stacked_layers(axis):
    config = R1.replace(lora_dropout=0.5)
    stack = [axis]
    model = adapt(layers_nnx.Stack(nnx.Rngs(0), axis=axis), config, stack_axes=stack)
    calm = adapt(layers_nnx.Stack(nnx.Rngs(0), axis=axis), R1, stack_axes=stack)(X)
    keys = [v for path, v in nnx.to_flat_state(nnx.state(model, nnx.RngKey)) if "adapter_dropout" in path]
    assert all(len(set(map(tuple, jax.random.key_data(k.get_value()).tolist()))) == 3 for k in keys)
    step = nnx.jit(lambda m, x: m(x))
    assert not np.array_equal(step(model, X), step(model, X))
    model.eval()
    np.testing.assert_allclose(step(model, X), calm, atol=1e-5)


def test_dropout_scales_what_it_keeps():
    config = R1.replace(target_modules=[""], lora_dropout=0.5)
    linear = adapt(nnx.Linear(8, 6, rngs=nnx.Rngs(0)), config)
    calm = adapt(nnx.Linear(8, 6, rngs=nnx.Rngs(0)), R1.replace(target_modules=[""]))
    many = jnp.ones((4000, 8))
    np.testing.assert_allclose(linear(many).mean(0), calm(many).mean(0), atol=0.1)


# ---------------------------------------------------------------- refusals


def test_dropout_of_a_loaded_adapter_needs_random_numbers(tmp_path):
    jaxadapt.save(adapt(block(), R1.replace(lora_dropout=0.5)), tmp_path)
    model = jaxadapt.load(tmp_path, block())
    want = model(X)  # no dropout before model.train()
    model.train()
    with pytest.raises(AttachError, match="loaded without rngs"):
        model(X)
    jaxadapt.load(tmp_path, model, rngs=nnx.Rngs(0))
    assert not np.array_equal(model(X), want)
    model.eval()
    np.testing.assert_array_equal(model(X), want)


def test_rngs_are_needed():
    with pytest.raises(AttachError, match="rngs=nnx.Rngs"):
        jaxadapt.adapt(block(), R1)


def test_targets_that_match_nothing_list_near_misses():
    with pytest.raises(TargetError, match="near misses: q"):
        adapt(block(), R1.replace(target_modules=["qq"]))


def test_a_refused_model_is_unchanged():
    model = layers_nnx.Normed(nnx.Rngs(0))
    graphdef = nnx.graphdef(model)
    with pytest.raises(TargetError):
        adapt(model, R1)
    assert nnx.graphdef(model) == graphdef


@pytest.mark.parametrize("case", layers.params(layers.NNX, how=layers.REFUSED))
def test_registry_refusals(case):
    config = jaxadapt.LoraConfig(r=2, target_modules=case.targets)
    model = case.make()
    before = nnx.graphdef(model)
    with pytest.raises(AttachError, match=case.targets[0]) as error:
        adapt(model, config, example=case.inputs())
    assert case.why.lower() in str(error.value).lower()
    assert nnx.graphdef(model) == before


def test_weight_norm_is_refused_without_an_example_too():
    model = nnx.WeightNorm(nnx.Linear(8, 6, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0))
    with pytest.raises(AttachError, match=r"layer_instance.kernel: WeightNorm"):
        adapt(model, R1.replace(target_modules=["layer_instance"]))


@pytest.mark.parametrize("name", ["embed", "embed_attend"])
def test_ia3_on_embeddings_is_refused_by_name(name):
    (case,) = (c for c in layers.NNX if c.name == name)
    (leaf,) = case.roles
    config = jaxadapt.IA3Config(target_modules=[leaf.rpartition(".")[0]], feedforward_modules=[])
    for example in (None, case.inputs()):
        with pytest.raises(TargetError, match=f"{leaf}: kind 'embedding'"):
            adapt(case.make(), config, example=example)


def test_a_layer_whose_attribute_is_taken():
    linear = nnx.Linear(8, 6, rngs=nnx.Rngs(0))
    linear.lora = nnx.Param(jnp.ones(3))
    with pytest.raises(AttachError, match="kernel.*'lora' of its own"):
        adapt(linear, R1.replace(target_modules=[""]))


def test_stacked_on_which_axis():
    class Square(nnx.Module):
        def __init__(self) -> None:
            self.q = nnx.vmap(lambda r: nnx.Linear(3, 3, rngs=r), in_axes=0, out_axes=0)(nnx.Rngs(0).split(3))

    with pytest.raises(AttachError, match=r"stack_axes=\(0,\)"):
        adapt(Square(), R1.replace(target_modules=["q"]))
    adapter = jaxadapt.extract(adapt(Square(), R1.replace(target_modules=["q"]), stack_axes=[0]))
    assert adapter.flat()["q.kernel.lora_A"].shape == (3, 2, 3)
    with pytest.raises(AttachError, match="stack_axes"):
        adapt(layers_nnx.Stack(nnx.Rngs(0)), R1, stack_axes=[1])


# ---------------------------------------------------------------- models and layers of other kinds


def test_a_dict_of_modules_is_a_model(tmp_path):
    """`nnx.Dict` is a module and a mapping, which Linen's variables are too."""

    def pair() -> Any:
        return nnx.Dict(a=nnx.Linear(4, 4, rngs=nnx.Rngs(0)), b=nnx.Linear(4, 4, rngs=nnx.Rngs(1)))

    config = jaxadapt.LoraConfig(r=2, target_modules=["a"], init_lora_weights=False)
    model, x = adapt(pair(), config), jnp.ones((1, 4))
    jaxadapt.save(model, tmp_path)
    again = jaxadapt.load(tmp_path, pair())
    np.testing.assert_array_equal(again.a(x), model.a(x))
    for off in (lambda: jaxadapt.delete(model, name="default"), lambda: jaxadapt.detach(again)):
        found = off()
        assert nnx.graphdef(found) == nnx.graphdef(pair())
        np.testing.assert_array_equal(found.a(x), pair().a(x))


class Normed(nnx.Module):
    def __init__(self) -> None:
        self.q = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
        self.norm = nnx.BatchNorm(4, rngs=nnx.Rngs(1))

    def __call__(self, x: Any) -> Any:
        return self.norm(self.q(x))


def test_the_bias_of_a_layer_with_a_state_is_trained_and_the_state_goes_on():
    config = jaxadapt.LoraConfig(r=2, target_modules=["q"], bias="all")
    model, plain, x = adapt(Normed(), config), Normed(), jax.random.normal(jax.random.key(0), (5, 4))
    grads = nnx.grad(lambda m: jnp.sum(m(x)), argnums=nnx.DiffState(0, jaxadapt.AdapterParam))(model)
    plain(x)
    np.testing.assert_array_equal(model.norm.mean[...], plain.norm.mean[...])
    np.testing.assert_array_equal(grads["norm"]["lora"]["default"]["bias"]["copy"].get_value(), np.full(4, 5.0))
    assert "base_model.model.norm.bias" in jaxadapt.to_peft(model).tensors


def test_a_layer_with_a_state_is_not_saved_in_part():
    with pytest.raises(AttachError, match=r"norm\.scale: BatchNorm keeps state besides .*; leave it out"):
        adapt(Normed(), jaxadapt.LoraConfig(r=2, target_modules=["q"], modules_to_save=["norm"]))


@pytest.mark.parametrize("api", ["nnx", "linen"])
def test_rows_of_tokens_are_trained_in_a_model_without_a_table(api):
    config = jaxadapt.LoraConfig(r=2, target_modules=["q"], trainable_token_indices={"emb": [1, 3]})
    if api == "nnx":
        model = nnx.Dict(emb=nnx.Embed(5, 4, rngs=nnx.Rngs(0)), q=nnx.Linear(4, 4, rngs=nnx.Rngs(1)))
        tensors = jaxadapt.to_peft(adapt(model, config)).tensors
    else:

        class Net(linen.Module):
            @linen.compact
            def __call__(self, ids: Any) -> Any:
                return linen.Dense(4, name="q")(linen.Embed(5, 4, name="emb")(ids))

        variables = jaxadapt.adapt(Net(), config).init(jax.random.key(0), jnp.array([1]))
        tensors = jaxadapt.to_peft(variables).tensors
    assert tensors["base_model.model.emb.token_adapter.trainable_tokens_delta"].shape == (2, 4)


def test_a_state_that_lost_its_configuration_is_not_taken_for_another_librarys():
    """Its leaf names are those of one SkyRL-tx slot, beside leaves with other names."""
    table = jaxadapt.KeyMap("mine", (
        jaxadapt.Weight("emb.embedding", "emb.weight", "v d -> v d", kind="embedding"),
        jaxadapt.Weight("q.kernel", "q.weight", "i o -> o i"),
    ))  # fmt: skip
    model = nnx.Dict(emb=nnx.Embed(5, 4, rngs=nnx.Rngs(0)), q=nnx.Linear(4, 4, rngs=nnx.Rngs(1)))
    config = jaxadapt.LoraConfig(r=2, target_modules=["q", "emb"], init_lora_weights=False)
    want = jaxadapt.extract(adapt(model, config, keymap=table))
    plain = nnx.to_pure_dict(nnx.state(model, jaxadapt.AdapterParam))
    with pytest.raises(AttachError, match="carries no adapter configuration"):
        jaxadapt.extract(plain)
    found = jaxadapt.extract(plain, config=config, keymap=table)
    assert found.flat().keys() == want.flat().keys()
    assert all(found.flat()[path] is x for path, x in want.flat().items())
