"""LN_TUNING on a norm with a bias and on a linear layer, beside the formulas in numpy and PEFT's file."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxadapt
from jaxadapt import AttachError
from jaxadapt.core import paths
from tests.support.configs import class_of

X = np.random.default_rng(0).standard_normal((5, 8)).astype("float32")


class Net(nnx.Module):
    def __init__(self) -> None:
        self.norm = nnx.LayerNorm(8, rngs=nnx.Rngs(0))
        self.q = nnx.Linear(8, 4, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.q(self.norm(x))


def trained(targets=("norm",)):
    """A model whose copies differ from the base, and the adapter's tensors by key."""
    model = jaxadapt.adapt(Net(), class_of("LN_TUNING")(target_modules=list(targets)), rngs=nnx.Rngs(1))
    np.testing.assert_array_equal(model(X), Net()(X))  # a new adapter changes nothing
    adapter = jaxadapt.extract(model)
    rng = np.random.default_rng(2)
    values = {path: x + jnp.asarray(rng.standard_normal(x.shape), x.dtype) for path, x in adapter.flat().items()}
    jaxadapt.inject(model, jaxadapt.Adapter(adapter.config, paths.unflatten(values), adapter.keymap))
    return model, dict(jaxadapt.to_peft(jaxadapt.extract(model)).tensors)


def normalized(x, weight, bias):
    centered = x - x.mean(-1, keepdims=True)
    return centered / np.sqrt(centered.var(-1, keepdims=True) + 1e-6) * weight + bias


def test_the_copies_replace_the_norms_weight_and_bias(tmp_path):
    model, tensors = trained()
    prefix = "base_model.model.norm.ln_tuning_layers"
    assert set(tensors) == {f"{prefix}.weight", f"{prefix}.bias"}
    base = Net()
    h = normalized(X, np.asarray(tensors[f"{prefix}.weight"]), np.asarray(tensors[f"{prefix}.bias"]))
    want = h @ np.asarray(base.q.kernel[...]) + np.asarray(base.q.bias[...])
    np.testing.assert_allclose(model(X), want, rtol=1e-4, atol=1e-5)  # another order of float32 sums
    jaxadapt.save(model, tmp_path)
    np.testing.assert_array_equal(jaxadapt.load(tmp_path, Net())(X), model(X))
    merged = jaxadapt.merge(model)
    np.testing.assert_allclose(merged(X), want, rtol=1e-4, atol=1e-5)


def test_any_module_can_be_copied_and_unmerging_is_refused():
    model, tensors = trained(("q",))
    prefix = "base_model.model.q.ln_tuning_layers"
    assert {key: x.shape for key, x in tensors.items()} == {f"{prefix}.weight": (4, 8), f"{prefix}.bias": (4,)}
    base = Net()
    h = normalized(X, np.asarray(base.norm.scale[...]), np.asarray(base.norm.bias[...]))
    want = h @ np.asarray(tensors[f"{prefix}.weight"]).T + np.asarray(tensors[f"{prefix}.bias"])
    np.testing.assert_allclose(model(X), want, rtol=1e-4, atol=1e-5)
    adapter = jaxadapt.extract(model)
    params = {"q": {"kernel": base.q.kernel[...], "bias": base.q.bias[...]}}
    with pytest.raises(AttachError, match="the copy replaced the original weight entirely"):
        jaxadapt.unmerge(params, adapter)


def test_two_copies_of_one_norm_cannot_be_active():
    model, _ = trained()
    jaxadapt.adapt(model, class_of("LN_TUNING")(target_modules=["norm"]), rngs=nnx.Rngs(1), name="b")
    with pytest.raises(AttachError, match="several hold a copy of the same weight"):
        jaxadapt.activate(model, ("default", "b"))
