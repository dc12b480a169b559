"""Tensors that belong to the whole adapter: their sizes, and files that repeat them for every module."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import jaxadapt
from jaxadapt import ConfigError, MismatchError
from jaxadapt.core import paths

SHAPES = {"q": (8, 12), "up": (12, 6)}
BASE = {n: {"kernel": np.random.default_rng(s[1]).standard_normal(s).astype("float32")} for n, s in SHAPES.items()}


class Layers(nnx.Module):
    """`BASE` as a model."""

    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.q = nnx.Linear(*SHAPES["q"], use_bias=False, rngs=rngs)
        self.up = nnx.Linear(*SHAPES["up"], use_bias=False, rngs=rngs)
        nnx.update(self, nnx.State(BASE))


@pytest.mark.parametrize(
    ("config", "tensor", "axis"),
    [
        ("VeraConfig", "vera_A", 1), ("VeraConfig", "vera_B", 0), ("PveraConfig", "pvera_A", 1),
        ("RandLoraConfig", "randlora_A", 2), ("RandLoraConfig", "randlora_B", 0), ("RandLoraConfig", "randlora_B", 1),
    ],
)  # fmt: skip
def test_projections_that_are_too_small_are_named(config: str, tensor: str, axis: int):
    """PEFT fails in a matrix product, or for too few bases computes with fewer."""
    made = getattr(jaxadapt, config)(r=2, target_modules=["q", "up"])
    file = jaxadapt.to_peft(jaxadapt.init(BASE, made, key=jax.random.key(0)))
    cut = {k: np.take(v, range(v.shape[axis] // 2), axis) if k.endswith(tensor) else v for k, v in file.tensors.items()}
    with pytest.raises(MismatchError, match=rf"(?s)too small.*(q|up) has \d+ .*{tensor} has"):
        jaxadapt.from_peft(jaxadapt.PeftTensors(file.config, cut), BASE)


def test_a_shared_tensor_cannot_start_from_the_base(monkeypatch):
    from jaxadapt.methods.vera import Vera

    shared = Vera.shared
    monkeypatch.setattr(
        Vera, "shared", lambda *args: tuple(dataclasses.replace(t, from_base=True) for t in shared(*args))
    )
    config = jaxadapt.VeraConfig(r=5, target_modules=["q"])
    with pytest.raises(
        jaxadapt.AttachError, match=r"VERA: vera_A is a tensor of the whole adapter and cannot be from_b"
    ):
        jaxadapt.init(BASE, config, key=jax.random.key(0))


def test_a_shared_tensor_that_the_method_does_not_have_is_refused():
    """A file would lose it."""
    adapter = jaxadapt.init(BASE, jaxadapt.LoraConfig(r=2, target_modules=["q"]), key=jax.random.key(0))
    params = {**adapter.params, "~shared": {"x": jnp.ones(3)}}
    with pytest.raises(MismatchError, match=r"shared tensors contradict its configuration:\n  x: unexpected"):
        jaxadapt.to_peft(dataclasses.replace(adapter, params=params))


def randlora() -> Any:
    config = jaxadapt.RandLoraConfig(r=3, target_modules=["q", "up"], init_weights=False)
    return jaxadapt.to_peft(jaxadapt.init(BASE, config, key=jax.random.key(0)))


def test_randlora_reads_bases_once_or_for_each_module():
    file = randlora()
    assert sorted(k for k in file.tensors if k.endswith("_A")) == [
        "base_model.model.q.randlora_A", "base_model.model.up.randlora_A", "base_model.randlora_A",
    ]  # fmt: skip
    copies = [k for k in file.tensors if k.startswith("base_model.model.") and k.endswith(("_A", "_B"))]
    once = {k: v for k, v in file.tensors.items() if k not in copies}
    whole = jaxadapt.from_peft(file, BASE)
    assert sorted(whole.shared) == ["randlora_A", "randlora_B"]
    for path, x in jaxadapt.from_peft(jaxadapt.PeftTensors(file.config, once), BASE).flat().items():
        np.testing.assert_array_equal(x, whole.flat()[path])
    key = "base_model.model.up.randlora_B"
    with pytest.raises(MismatchError, match=f"must be equal.*\n.*{key} and base_model.randlora_B"):
        jaxadapt.from_peft(jaxadapt.PeftTensors(file.config, {**file.tensors, key: file.tensors[key] + 1}), BASE)
    without = {k: v for k, v in once.items() if not k.endswith("randlora_A")}
    with pytest.raises(MismatchError, match="missing"):
        jaxadapt.from_peft(jaxadapt.PeftTensors(file.config, without), BASE)


def test_randlora_without_saved_bases_is_refused():
    config = jaxadapt.RandLoraConfig(target_modules=["q"], save_projection=False)
    with pytest.raises(ConfigError, match="depend on the machine"):
        jaxadapt.init(BASE, config)


def test_a_new_pvera_warns_once_that_its_variance_is_not_trained():
    config = jaxadapt.PveraConfig(r=2, target_modules=["q", "up"])
    with pytest.warns(UserWarning, match="trained without noise unless") as caught:
        adapter = jaxadapt.init(BASE, config, key=jax.random.key(0))
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a file computes as in PEFT, so reading one does not warn
        jaxadapt.from_peft(jaxadapt.to_peft(adapter), BASE)


def test_nnx_holds_shared_tensors_once(tmp_path: Any):
    """All modules hold the same variables, also after a load, a clone and a split."""

    class Net(nnx.Module):
        def __init__(self) -> None:
            self.layers = nnx.List([nnx.Linear(8, 8, rngs=nnx.Rngs(0)) for _ in range(3)])

    config = jaxadapt.VeraConfig(r=2, target_modules=r"layers\.\d")
    model = jaxadapt.adapt(Net(), config, rngs=nnx.Rngs(1))
    jaxadapt.save(model, tmp_path)
    again = jaxadapt.load(tmp_path, Net())
    merged = nnx.merge(*nnx.split(model))
    for each in (model, again, nnx.clone(model), merged):
        names = [path[-1] for path, _ in nnx.to_flat_state(nnx.state(each))]
        assert (names.count("vera_A"), names.count("vera_lambda_d")) == (1, 3)
        held = {id(vars(layer)["vera"]["default"]["kernel"]["vera_A"]) for layer in each.layers}
        assert len(held) == 1


def test_a_compiled_call_and_its_gradients_hold_no_second_copy_of_shared_tensors():
    shapes = {name: {"kernel": jax.ShapeDtypeStruct((256, 256), "float32")} for name in ("a", "b", "c")}
    config = jaxadapt.VeraConfig(r=512, target_modules=["a", "b", "c"])
    adapter = jaxadapt.init(shapes, config)
    shared = sum(4 * x.size for path, x in adapter.flat().items() if path.startswith("~shared"))
    assert shared == 2 * 512 * 256 * 4

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            for name in shapes:
                x = nn.Dense(256, use_bias=False, name=name)(x)
            return x

    def loss(trained: Any, rest: Any, x: jax.Array) -> jax.Array:
        adapted = jaxadapt.adapt(Net(), config)
        return jnp.sum(adapted.apply(paths.unflatten({**trained, **rest}), x))

    held = paths.flatten({"params": shapes, **adapter.collection})
    trained = {path: x for path, x in held.items() if "lambda" in path}
    rest = {path: x for path, x in held.items() if path not in trained}
    x = jax.ShapeDtypeStruct((2, 256), "float32")
    memory: Any = jax.jit(jax.grad(loss)).lower(trained, rest, x).compile().memory_analysis()
    assert memory.argument_size_in_bytes <= 4 * (sum(leaf.size for leaf in jax.tree.leaves(held)) + x.size)
    assert memory.temp_size_in_bytes < shared / 20


@pytest.mark.parametrize("module", ["q", "up"])  # more outputs than inputs, and fewer
def test_few_rows_are_multiplied_as_many_are(module: str):
    """RandLoRA multiplies a call of fewer rows than bases in another order."""
    config = jaxadapt.RandLoraConfig(r=2, randlora_alpha=3, target_modules=[module])
    adapter = jaxadapt.init(BASE, config, key=jax.random.key(0))
    rng = np.random.default_rng(1)
    values = {
        path: jnp.asarray(rng.random(x.shape), x.dtype) if path.endswith("lambda") else x
        for path, x in adapter.flat().items()
    }
    adapter = dataclasses.replace(adapter, params=paths.unflatten(values))
    model = jaxadapt.inject(jaxadapt.adapt(Layers(), config, rngs=nnx.Rngs(0)), adapter)
    weight = getattr(jaxadapt.merge(model), module).kernel
    x = jnp.asarray(rng.random((1, SHAPES[module][0])), "float32")
    np.testing.assert_allclose(getattr(model, module)(x), x @ weight, rtol=1e-5)
