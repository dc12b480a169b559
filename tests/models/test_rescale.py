"""`rescale`: run-time data (no second trace), PEFT's `rescale_adapter_scale`, and everything as it was afterwards."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxadapt
from jaxadapt import AttachError
from jaxadapt.models import graph
from tests.support import small
from tests.support.small import X

RS = small.LORA.replace(use_rslora=True, alpha_pattern={"q_proj": 3})


def expected(config, factor):
    """The base plus the factor times what the adapter changes, weights written out."""
    base, adapter = small.base()["params"], small.adapter(config)
    merged = jaxadapt.merge(base, adapter)
    params = jax.tree.map(lambda w, m: w + factor * (m - w), base, merged)
    return small.LinenNet().apply({"params": params}, X)


@pytest.mark.parametrize("factor", [0.5, 0.0, -1.5])
@pytest.mark.parametrize("config", [small.LORA, RS], ids=["plain", "rslora"])
def test_nnx_and_linen_compute_the_scaled_change(config, factor):
    model, variables = small.trained(config), small.variables(config)
    before = model(X)
    with jaxadapt.models.rescale(model, factor) as same:
        assert same is model
        np.testing.assert_allclose(model(X), expected(config, factor), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(model(X), before)
    module = jaxadapt.adapt(small.LinenNet(), config)
    with jaxadapt.models.rescale(variables, factor) as scaled:
        np.testing.assert_allclose(module.apply(scaled, X), expected(config, factor), rtol=1e-5, atol=1e-5)
    with jaxadapt.models.rescale(small.adapter(config), factor) as adapter:
        merged = jaxadapt.merge(small.base()["params"], adapter)
        out = small.LinenNet().apply({"params": merged}, X)
        np.testing.assert_allclose(out, expected(config, factor), rtol=1e-5, atol=1e-5)


def test_nothing_is_traced_again():
    model, traces = small.trained(), []

    @nnx.jit
    def run(model, x):
        traces.append("nnx")
        return model(x)

    plain = run(model, X)
    for factor in (0.5, 0.7, jnp.float32(-1), np.float64(2)):
        with jaxadapt.models.rescale(model, factor):
            assert not np.allclose(run(model, X), plain)
    np.testing.assert_array_equal(run(model, X), plain)
    module, variables = jaxadapt.adapt(small.LinenNet(), small.LORA), small.variables()

    @jax.jit
    def apply(variables, x):
        traces.append("linen")
        return module.apply(variables, x)

    apply(variables, X)
    for factor in (0.5, 0.7):
        with jaxadapt.models.rescale(variables, factor) as scaled:
            apply(scaled, X)
    assert traces == ["nnx", "linen"]


def test_the_factor_may_be_traced():
    variables, module, model = small.variables(), jaxadapt.adapt(small.LinenNet(), small.LORA), small.trained()

    def linen(factor):
        with jaxadapt.models.rescale(variables, factor) as scaled:
            return module.apply(scaled, X)

    @nnx.jit
    def inside(model, factor):
        with jaxadapt.models.rescale(model, factor):
            return model(X)

    factors = jnp.array([0.5, -1.0])
    for factor, y in zip(factors, jax.vmap(linen)(factors), strict=True):
        np.testing.assert_allclose(y, expected(small.LORA, factor), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(inside(model, factor), y, rtol=1e-4, atol=1e-5)
    slope = jax.grad(lambda f: jnp.sum(linen(f)))(0.5)
    step = (jnp.sum(linen(0.501)) - jnp.sum(linen(0.499))) / 0.002
    assert float(slope) == pytest.approx(float(step), rel=1e-2)


@pytest.mark.parametrize("kind", ["error", "return"])
def test_restored_whatever_happens(kind):
    model = small.trained()
    values = {p: v.get_value() for p, v in graph.adapter_variables(model)["default"].items()}

    def leave():
        with jaxadapt.models.rescale(model, 3):
            if kind == "return":
                return
            raise RuntimeError

    if kind == "error":
        with pytest.raises(RuntimeError):
            leave()
    else:
        leave()
    assert all(v.get_value() is values[p] for p, v in graph.adapter_variables(model)["default"].items())


def test_training_inside_is_refused_and_undone():
    model = small.trained()
    before = model(X)
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=jaxadapt.AdapterParam)
    state = nnx.DiffState(0, jaxadapt.AdapterParam)

    def train():
        with jaxadapt.models.rescale(model, 0.5):
            optimizer.update(model, nnx.grad(lambda m: jnp.sum(m(X) ** 2), argnums=state)(model))

    with pytest.raises(AttachError, match=r"Train outside(.|\n)*lora_A"):
        train()
    np.testing.assert_array_equal(model(X), before)


def test_one_of_several_by_name():
    model = small.trained(name="one")
    small.trained(small.LORA.replace(r=3), seed=2, name="two", model=model)
    jaxadapt.activate(model, "one", "two")
    both = model(X)
    with jaxadapt.models.rescale(model, 0, name="two"):
        only_one = model(X)
    jaxadapt.activate(model, "one")
    np.testing.assert_allclose(only_one, model(X), rtol=1e-5, atol=1e-5)
    assert not np.allclose(only_one, both)
    with pytest.raises(AttachError, match=r"\['one', 'two'\]"), jaxadapt.models.rescale(model, 2, name="three"):
        pass


def test_a_part_of_a_model():
    """A part has only some of the adapted layers."""
    model = small.trained()
    whole, layer = model.q_proj(X), small.net().q_proj(X)
    with jaxadapt.models.rescale(model.q_proj, 0.5) as part:
        np.testing.assert_allclose(part(X), (whole + layer) / 2, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(model.q_proj(X), whole)


def test_sixteen_bits_and_what_cannot_be_rescaled():
    base = {"q": {"kernel": np.ones((4, 6), "f4")}}
    adapter = jaxadapt.init(
        base,
        jaxadapt.LoraConfig(r=2, target_modules=["q"], init_lora_weights=False),
        key=jax.random.key(0),
        dtype="bfloat16",
    )
    with jaxadapt.models.rescale(adapter, 0.3) as scaled:
        b, new = (np.asarray(a.params["q"]["kernel"]["lora_B"], "f4") for a in (adapter, scaled))
        assert scaled.params["q"]["kernel"]["lora_B"].dtype == "bfloat16"
        np.testing.assert_allclose(new, b * np.float32(0.3), rtol=2**-8)
    for tree in (small.trained(small.IA3), small.variables(small.IA3), small.adapter(small.IA3)):
        with pytest.raises(AttachError, match="IA3 has no scale"), jaxadapt.models.rescale(tree, 0.5):
            pass
    for tree in (small.net(), small.base(), small.LinenNet(), 3):
        with pytest.raises(AttachError), jaxadapt.models.rescale(tree, 0.5):
            pass


@pytest.mark.parametrize("make", [small.trained, small.variables, small.adapter])
def test_a_factor_is_one_number_and_nothing_changes_before_that_is_known(make):
    tree = make()
    before = jaxadapt.extract(tree).flat()
    with pytest.raises(AttachError, match=r"a number, found .*\(2,\)"), jaxadapt.models.rescale(tree, jnp.full(2, 5.0)):
        pass
    assert small.same(jaxadapt.extract(tree).flat(), before)


@pytest.mark.peft
def test_as_in_peft():
    import torch
    from peft.helpers import rescale_adapter_scale

    from tests.support import peft_pairs
    from tests.support.twins import llama

    model = peft_pairs.model_with({"one": {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "down_proj"]}})
    (adapter,) = peft_pairs.ours(model, ["one"])
    ids = np.arange(10).reshape(2, 5)
    with rescale_adapter_scale(model, 0.3), torch.no_grad():
        theirs = model(torch.from_numpy(ids)).logits.numpy()
    twin = llama.twin_of(peft_pairs.torch_base())
    jaxadapt.adapt(twin, adapter.config, rngs=nnx.Rngs(0))
    jaxadapt.inject(twin, adapter)
    with jaxadapt.models.rescale(twin, 0.3):
        np.testing.assert_allclose(twin(jnp.asarray(ids)), theirs, rtol=1e-5, atol=1e-5 * abs(theirs).max())
