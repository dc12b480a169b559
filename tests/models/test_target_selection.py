"""`select`: what a configuration would adapt is what `adapt` then adapts, and nothing is attached."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx

import jaxadapt
from tests.support import small

CONFIGS = [
    jaxadapt.LoraConfig(r=3, target_modules="all-linear"),
    jaxadapt.LoraConfig(r=2, target_modules=["q_proj"], use_dora=True, modules_to_save=["head"]),
    jaxadapt.IA3Config(target_modules=["q_proj", "up_proj"], feedforward_modules=["up_proj"]),
]


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.q_proj = nnx.Linear(6, 8, rngs=rngs)
        self.up_proj = nnx.Linear(8, 5, rngs=rngs)
        self.head = nnx.Linear(5, 3, rngs=rngs)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.peft_type)
@pytest.mark.parametrize("abstract", [False, True])
def test_it_is_what_adapt_adapts(config: jaxadapt.Config, abstract: bool) -> None:
    model = nnx.eval_shape(lambda: Net(nnx.Rngs(0))) if abstract else Net(nnx.Rngs(0))
    before = nnx.graphdef(model)
    found = jaxadapt.select(model, config)
    assert nnx.graphdef(model) == before
    adapter = jaxadapt.extract(jaxadapt.adapt(model, config, rngs=None if abstract else nnx.Rngs(1)))
    assert set(found.leaves) == set(adapter.sites)
    for target in found.targets:
        assert {name: tuple(x.shape) for name, x in adapter.sites[target.leaf].items()} == dict(target.tensors)
    assert found.config == adapter.config
    assert found.parameters == sum(x.size for x in adapter.flat().values())


def test_variables_parameters_and_shapes_select_alike() -> None:
    module = nn.Dense(4, name="q_proj")
    variables = {"params": {"q_proj": module.init(jax.random.key(0), jnp.ones((1, 3)))["params"]}}
    config = jaxadapt.LoraConfig(r=2, target_modules=["q_proj"])
    one = jaxadapt.select(variables, config)
    assert (
        one
        == jaxadapt.select(variables["params"], config)
        == jaxadapt.select(jax.eval_shape(lambda: variables), config)
    )
    assert one.modules == ("q_proj",)
    assert "q_proj.kernel (3, 4); lora_A (2, 3), lora_B (4, 2)" in str(one)


def test_what_adapt_refuses_is_refused() -> None:
    with pytest.raises(jaxadapt.TargetError, match="nothing_here"):
        jaxadapt.select(small.net(), jaxadapt.LoraConfig(target_modules=["nothing_here"]))
    with pytest.raises(jaxadapt.AttachError, match="holds no parameters"):
        jaxadapt.select(nn.Dense(3), jaxadapt.LoraConfig(target_modules=["q_proj"]))


class Patches(nnx.Module):
    """A convolution called as a linear layer of the blocks, as in many vision models."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.proj = nnx.Conv(4, 4, (3,), rngs=rngs)


class Vision(nnx.Module):
    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.patches = Patches(rngs)
        self.blocks = nnx.List([nnx.Dict(proj=nnx.Linear(4, 4, rngs=rngs)) for _ in range(20)])


@pytest.mark.parametrize("more", [{}, {"modules_to_save": ["patches.proj"]}])
def test_all_linear_does_not_name_a_layer_of_another_kind(more: dict[str, Any], tmp_path: Path) -> None:
    """From twenty modules on PEFT stores suffixes of their names, which must select no other module."""
    model = Vision()
    jaxadapt.adapt(model, jaxadapt.LoraConfig(r=2, target_modules="all-linear", **more), rngs=nnx.Rngs(1))
    jaxadapt.save(model, tmp_path)
    adapter = jaxadapt.extract(jaxadapt.load(tmp_path, Vision()))
    copied = {"patches.proj.kernel", "patches.proj.bias"} if more else set[str]()
    assert set(adapter.sites) == {f"blocks.{i}.proj.kernel" for i in range(20)} | copied


def test_a_convolution_without_its_kind_is_refused_with_the_remedy() -> None:
    params, config = {"patch": jnp.ones((4, 4, 3, 8))}, jaxadapt.LoraConfig(r=2, target_modules=["stem"])
    entry = ("patch", "stem.weight", "y x i o -> o i y x")
    with pytest.raises(jaxadapt.TargetError, match="patch: kind 'other'.*keymap entry needs kind='conv'"):
        jaxadapt.init(params, config, keymap=jaxadapt.KeyMap("mine", (jaxadapt.Weight(*entry),)))
    keymap = jaxadapt.KeyMap("mine", (jaxadapt.Weight(*entry, kind="conv"),))
    found = jaxadapt.init(params, config, keymap=keymap).flat()
    assert {path: x.shape for path, x in found.items()} == {"patch.lora_A": (2, 3, 4, 4), "patch.lora_B": (8, 2)}
