"""The noise of PVERA in training, beside the formula in numpy."""

from __future__ import annotations

import zlib
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax import nnx

import jaxadapt
from jaxadapt import AttachError, LoraConfig, PveraConfig
from jaxadapt.core import paths
from tests.methods.one_layer import numbers

R, X, KEY = 3, numbers(2, 5, 8), jax.random.key(4)


class Net(nnx.Module):
    def __init__(self) -> None:
        self.q, self.up = nnx.Linear(8, 8, rngs=nnx.Rngs(0)), nnx.Linear(8, 6, rngs=nnx.Rngs(1))

    def __call__(self, x: Any) -> Any:
        return self.up(self.q(x))


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        return nn.Dense(6, name="up")(nn.Dense(8, name="q")(x))


def adapted() -> Any:
    """A model whose vectors are random."""
    model = jaxadapt.adapt(Net(), PveraConfig(r=R, target_modules=["q", "up"]), rngs=nnx.Rngs(1))
    adapter = jaxadapt.extract(model)
    values = {
        path: numbers(*x.shape, seed=i) if "lambda" in path else x for i, (path, x) in enumerate(adapter.flat().items())
    }
    jaxadapt.inject(model, jaxadapt.Adapter(adapter.config, paths.unflatten(values), adapter.keymap))
    return model


def expected(model: Any, x: np.ndarray) -> np.ndarray:
    """PEFT's training, tuners/pvera/layer.py: B·(μ + ε·exp(log σ² / 2)), with the noise ε of each module's own key."""
    tensors = {key.removeprefix("base_model."): np.asarray(v) for key, v in jaxadapt.to_peft(model).tensors.items()}
    for name in ("q", "up"):
        layer = getattr(model, name)
        b, d = (tensors[f"model.{name}.pvera_lambda_{letter}"] for letter in "bd")
        h = d * (x @ tensors["pvera_A"][:, : x.shape[-1]].T)
        key = jax.random.fold_in(KEY, zlib.crc32(name.encode()) >> 1)
        h = h[..., :R] + np.asarray(jax.random.normal(key, (2, 5, R))) * np.exp(h[..., R:] / 2)
        x = x @ np.asarray(layer.kernel[...]) + np.asarray(layer.bias[...]) + b * (h @ tensors["pvera_B"][: len(b)].T)
    return x


def test_the_noise_of_a_step_is_that_of_the_formula():
    model = adapted()
    plain, want = model(X), expected(model, X)
    with jaxadapt.models.invoke(model, noise=KEY):
        np.testing.assert_allclose(model(X), want, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(model(X), plain)  # outside, the mean
    module = jaxadapt.adapt(LinenNet(), jaxadapt.extract(model).config)
    base = {n: {k: getattr(getattr(model, n), k)[...] for k in ("kernel", "bias")} for n in ("q", "up")}
    variables = {"params": base, **jaxadapt.extract(model).collection}

    @jax.jit
    def step(variables: Any, key: Any) -> Any:
        with jaxadapt.models.invoke(module, noise=key) as called:
            return called.apply(variables, X)

    np.testing.assert_allclose(step(variables, KEY), want, rtol=1e-5, atol=1e-5)
    assert not np.allclose(step(variables, jax.random.key(5)), want, atol=1e-3)
    grads = jax.grad(lambda v: (step(v, KEY) ** 2).sum(), allow_int=True)(variables)
    assert all((g["pvera_lambda_d"][R:] != 0).any() for g in _sites(grads))


def _sites(grads: Any) -> list[Any]:
    (tree,) = grads["pvera"].values()
    return [tree[name]["kernel"] for name in ("q", "up")]


def test_noise_is_for_pvera_alone():
    model = jaxadapt.adapt(Net(), LoraConfig(target_modules=["q"]), rngs=nnx.Rngs(0))
    with pytest.raises(AttachError, match="cannot set noise: no active adapter is a PVERA"), \
            jaxadapt.models.invoke(model, noise=KEY):  # fmt: skip
        pass
