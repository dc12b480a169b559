"""Haiku and Keras models as functions of their parameters, and the example for Equinox."""

from __future__ import annotations

import importlib.util
import runpy
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxadapt
from jaxadapt.models import Function, LoraTree

pytestmark = pytest.mark.peft  # the extra `test` has the libraries

X = jnp.linspace(-1, 1, 12).reshape(3, 4)
CONFIG = jaxadapt.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)


def check(base: Function, folder: Path, modules: list[str]) -> None:
    model = jaxadapt.adapt(base, CONFIG, key=jax.random.key(1), example=[X])
    sites = model.adapters["default"].sites
    assert [key.removeprefix("base_model.model.").removesuffix(".lora_A.weight") for key in
            sorted(jaxadapt.to_peft(model).tensors) if "lora_A" in key] == modules  # fmt: skip
    assert all(x["lora_A"].shape[1] == leaves(base)[leaf].shape[0] for leaf, x in sites.items())  # (in, out) here
    assert float(jnp.abs(model(X) - base(X)).max()) > 0.01
    jaxadapt.save(model, folder)
    again = jaxadapt.load(folder, LoraTree(base, example=[X]))
    np.testing.assert_array_equal(again(X), model(X))
    np.testing.assert_allclose(jaxadapt.merge(model)(X), model(X), atol=1e-4)


def leaves(base: Function) -> dict[str, Any]:
    pairs = jax.tree_util.tree_leaves_with_path(base)
    return {jax.tree_util.keystr(keys, simple=True, separator=".").lstrip("."): leaf for keys, leaf in pairs}


def test_haiku(tmp_path: Path, foreign_model: None):
    import haiku as hk

    net = hk.transform(lambda x: hk.nets.MLP([8, 2])(x))
    params = net.init(jax.random.key(0), X)
    base = Function(lambda params, x: net.apply(params, None, x), params)
    check(base, tmp_path, ["mlp/~/linear_0", "mlp/~/linear_1"])


def test_keras(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, foreign_model: None):
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    import keras

    assert keras.backend.backend() == "jax"
    net = keras.Sequential([keras.layers.Dense(8, name="up"), keras.layers.Dense(2, name="down")])
    net.build((3, 4))
    names = ["up.kernel", "up.bias", "down.kernel", "down.bias"]
    values = {name: v.value for name, v in zip(names, net.trainable_variables, strict=True)}

    def call(params: Any, x: Any) -> Any:
        return net.stateless_call([params[name] for name in names], net.non_trainable_variables, x)[0]

    check(Function(call, values), tmp_path, ["down", "up"])


def test_the_example(root: Path, tmp_path: Path, foreign_model: None):
    main: Any = runpy.run_path(str(root / "examples" / "equinox_lora.py"))["main"]
    assert main(str(tmp_path)) < 0.5


@pytest.mark.parametrize("name", ["equinox", "esm2quinox", "haiku", "keras", "peft", "torch", "transformers"])
def test_the_extra_has_the_libraries(name: str) -> None:
    """Other modules skip their tests without one; here it fails."""
    assert importlib.util.find_spec(name)  # an import of Keras would choose its backend
