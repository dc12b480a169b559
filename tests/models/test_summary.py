"""What `summary` tells: it must agree with the arrays themselves."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import jaxadapt
from jaxadapt import LoHaConfig


class Net(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(6, 6, rngs=rngs) for _ in range(3)])
        self.head = nnx.Linear(6, 2, rngs=rngs)

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def test_a_model(tmp_path):
    model = Net(nnx.Rngs(0))
    config = jaxadapt.LoraConfig(r=2, lora_alpha=8, target_modules=r"layers\.\d+|head", alpha_pattern={"head": 2})
    jaxadapt.adapt(model, config, rngs=nnx.Rngs(1))
    found = jaxadapt.summary(model)
    sizes = [x.size for x in jax.tree.leaves(nnx.state(model))]
    adapters = [x.size for x in jax.tree.leaves(nnx.state(model, jaxadapt.AdapterParam))]
    assert found.trainable == sum(adapters)
    assert found.base_parameters == sum(sizes) - sum(adapters)
    text = str(found)
    assert "layers.*.kernel" in text
    assert "head.kernel" in text
    assert f"trainable {sum(adapters)} of {sum(sizes)}" in text
    assert "Linear's own call" in text


def test_groups_are_shown_for_a_grouped_convolution_only():
    rngs = nnx.Rngs(0)
    convolution = nnx.Conv(4, 4, (3,), feature_group_count=2, rngs=rngs)
    model = nnx.Dict(grouped=convolution, up=nnx.Linear(4, 8, rngs=rngs))
    jaxadapt.adapt(model, jaxadapt.LoraConfig(r=2, target_modules=["grouped", "up"]), rngs=rngs)
    lines = str(jaxadapt.summary(model)).splitlines()
    assert [line.split()[1] for line in lines if "groups" in line] == ["grouped.kernel"]


def test_variables_and_inactive_adapters():
    class Two(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(4, name="up")(x)

    config = jaxadapt.LoraConfig(r=2, target_modules=["up"])
    module = jaxadapt.adapt(jaxadapt.adapt(Two(), config, name="a"), config, name="b")
    variables = module.init(jax.random.key(0), jnp.ones((1, 3)))
    found = jaxadapt.summary(module, variables)
    assert {row.adapter for row in found.rows} == {"a", "b"}
    assert found.trainable == 2 * (3 * 2 + 2 * 4)
    assert found.base_parameters == 3 * 4 + 4
    assert "a (inactive)" in str(found)
    assert jaxadapt.summary(variables).trainable == found.trainable


def test_the_scale_of_every_kind_of_method_is_a_number():
    """The hyperparameters of a method written in PyTorch's layout are in a dataclass of their own."""
    base = {"head": {"kernel": jnp.ones((6, 2))}}
    config = LoHaConfig(target_modules=["head"], r=2, alpha=3)
    adapter = jaxadapt.init(base, config, key=jax.random.key(0))
    text = str(jaxadapt.summary({"params": base, **adapter.collection}))
    assert "Hparams" not in text
    assert "1.5" in text


@pytest.mark.parametrize("family", ["llama/scan0", "generic"])
def test_the_count_is_that_of_the_modules_in_the_file_and_the_names_are_said_to_be_whose_they_are(family: str):
    kernel = jnp.ones((3, 8, 8))
    base = {"model": {"layers": {"self_attn": {"q_proj": {"kernel": kernel}}}}}
    if family == "generic":
        base = {"other": {str(n): {"kernel": kernel[0]} for n in range(3)}}
    config = jaxadapt.LoraConfig(r=2, target_modules="all-linear")
    adapter = jaxadapt.init(base, config, key=jax.random.key(0), keymap=family)
    row, names, _ = str(jaxadapt.summary({"params": base, **adapter.collection})).splitlines()[1:]
    files = [key for key in jaxadapt.to_peft(adapter).tensors if "lora_A" in key]
    assert row.split()[2] == str(len(files)) == "3"
    assert ("PyTorch names by the keymap 'llama/scan0'" in names) == (family != "generic")
    assert ("the model's own paths" in names) == (family == "generic")


def test_nothing_adapted_is_an_error():
    with pytest.raises(jaxadapt.AttachError, match="no adapter"):
        jaxadapt.summary(Net(nnx.Rngs(0)))


class Custom(nnx.Module):
    def __init__(self, gather, rngs):
        self.w = nnx.Param(jax.random.normal(rngs.params(), (6, 6)))
        self.gather = gather

    def __call__(self, x):
        return self.w[...][jnp.arange(3)] if self.gather else x @ self.w[...]


class Mixed(nnx.Module):
    def __init__(self, rngs):
        self.product, self.rows = Custom(False, rngs), Custom(True, rngs)

    def __call__(self, x):
        return self.product(x) + self.rows(x)


def test_with_inputs_it_tells_where_the_effective_weight_is_needed():
    lines = [jaxadapt.Weight(f"{m}.w", f"{m}.weight", "i o -> o i") for m in ("product", "rows")]
    config = jaxadapt.LoraConfig(r=2, target_modules=["product", "rows"])
    model = jaxadapt.adapt(Mixed(nnx.Rngs(0)), config, rngs=nnx.Rngs(1), keymap=jaxadapt.KeyMap("mine", tuple(lines)))
    how = {row.leaf: row.how for row in jaxadapt.summary(model, jnp.ones((3, 6))).rows}
    assert how["product.w"] == "traced Custom"
    assert how["rows.w"].startswith("effective weight in Custom (")


def test_linen_with_inputs():
    class Product(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x @ self.param("w", nn.initializers.normal(1.0), (6, 6))

    class Both(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Product(name="own")(nn.Dense(6, name="up")(x))

    x = jnp.ones((2, 6))
    module = jaxadapt.adapt(Both(), jaxadapt.LoraConfig(r=2, target_modules=["own", "up"]))
    variables = module.init(jax.random.key(0), x)
    how = {row.leaf: row.how for row in jaxadapt.summary(module, variables, x).rows}
    assert how == {"own.w": "traced Product", "up.kernel": "Dense's own call"}


def test_a_linen_module_without_its_variables_is_told_so():
    module = jaxadapt.adapt(nn.Dense(4, name="up"), jaxadapt.LoraConfig(r=2, target_modules="all-linear"))
    with pytest.raises(jaxadapt.AttachError, match="expected variables, found ArrayImpl"):
        jaxadapt.summary(module, jnp.ones((1, 3)))
