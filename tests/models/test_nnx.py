"""Adapters on NNX models: copies, models under transformations, streams of keys, detaching, and refusals."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxadapt
from jaxadapt import AttachError, TargetError
from tests.support.twins import layers, layers_nnx

R1 = jaxadapt.LoraConfig(r=2, lora_alpha=8, target_modules=["q", "o"], init_lora_weights=False)
X = layers.x()


def block(seed: int = 0) -> Any:
    return layers_nnx.Block(nnx.Rngs(seed))


def adapt(model: Any, config: Any, seed: int = 1, **options: Any) -> Any:
    return jaxadapt.adapt(model, config, rngs=nnx.Rngs(seed), **options)


def close(a: Any, b: Any) -> None:
    np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-5)


def arrays(model: Any) -> dict[tuple[Any, ...], Any]:
    return {path: v.get_value() for path, v in nnx.to_flat_state(nnx.state(model))}


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


def test_merging_what_is_attached_is_refused():
    model = adapt(block(), R1)
    with pytest.raises(AttachError, match="twice"):
        jaxadapt.merge(model, jax.tree.map(jnp.copy, jaxadapt.extract(model)))


def test_base_filter_is_the_frozen_rest():
    model = adapt(block(), R1)
    base = {path for path, _ in nnx.to_flat_state(nnx.state(model, jaxadapt.models.BaseParam))}
    assert base == {path for path, _ in nnx.to_flat_state(nnx.state(block(), nnx.Param))}


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


def test_an_abstract_model_loads(tmp_path):
    real = adapt(block(), R1)
    jaxadapt.save(real, tmp_path)
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


def test_init_under_jit_draws_what_adapt_draws():
    want = jaxadapt.extract(adapt(block(), R1)).flat()
    again = jax.jit(lambda key: jaxadapt.init(block(), R1, key=key))(nnx.Rngs(1).params()).flat()
    for path, value in again.items():
        np.testing.assert_array_equal(value, want[path])


# ---------------------------------------------------------------- dropout


def test_dropout_under_jit():
    model, calm = adapt(block(), R1.replace(lora_dropout=0.5)), adapt(block(), R1)(X)
    step = nnx.jit(lambda m, x: m(x))
    assert not np.array_equal(step(model, X), step(model, X))
    model.eval()
    np.testing.assert_allclose(step(model, X), calm, atol=1e-6)
    model.train()
    assert not np.array_equal(step(model, X), calm)


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
    with pytest.raises(AttachError, match="has no adapter configuration"):
        jaxadapt.extract(plain)
    found = jaxadapt.extract(jaxadapt.models.LoraTree(plain, config=config), keymap=table)
    assert found.flat().keys() == want.flat().keys()
    assert all(found.flat()[path] is x for path, x in want.flat().items())


def test_a_program_with_strict_promotion_of_dtypes():
    """docs/training.md says so: an adapter in float32 and a layer in bfloat16 meet in each call."""
    config = jaxadapt.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    linear = nnx.Linear(4, 4, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    x, results = jnp.ones((1, 4), jnp.bfloat16), list[Any]()
    for mode in ("standard", "strict"):
        with jax.numpy_dtype_promotion(mode), jax.numpy_dtype_promotion("standard"):
            model = adapt(nnx.Sequential(copy.deepcopy(linear)), config)
            results += [model(x), jaxadapt.merge(copy.deepcopy(model))(x)]
    np.testing.assert_array_equal(results[:2], results[2:])
