"""Integer tensors of an adapter, which no gradient reaches: through jit, grad, optimizers, checkpoints and files."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxadapt
from jaxadapt import AttachError, optim

CONFIG = jaxadapt.ShiraConfig(r=1, target_modules=["q"], random_seed=0)
X = np.random.default_rng(0).standard_normal((3, 4)).astype("float32")


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.q = nnx.Linear(4, 6, use_bias=False, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.q(x)


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        return nn.Dense(6, use_bias=False, name="q")(x)


@pytest.fixture
def variables() -> Any:
    variables = jaxadapt.adapt(LinenNet(), CONFIG).init(jax.random.key(0), X)
    noise = np.random.default_rng(1).standard_normal(10).astype("float32")
    adapter = jaxadapt.extract(variables)
    values = {"q": {"kernel": {**adapter.params["q"]["kernel"], "shira_weight": jnp.asarray(noise)}}}
    return jaxadapt.inject(variables, jaxadapt.Adapter(adapter.config, values, adapter.keymap))


def by_hand(variables: Any) -> np.ndarray:
    tensors = jaxadapt.extract(variables).params["q"]["kernel"]
    (rows, columns), values = tensors["shira_indices"], tensors["shira_weight"]
    w = np.array(variables["params"]["q"]["kernel"]).T
    for row, column, value in zip(rows, columns, values, strict=True):
        w[row, column] += value
    return X @ w.T


def test_linen_keeps_integers_in_a_collection_of_their_own(variables: Any):
    assert sorted(variables) == ["params", "shira", "shira_integers"]
    assert variables["shira_integers"]["default"]["q"]["kernel"]["shira_indices"].dtype == jnp.int32
    module = jaxadapt.adapt(LinenNet(), CONFIG)
    np.testing.assert_allclose(module.apply(variables, X), by_hand(variables), rtol=1e-5, atol=1e-6)
    assert sorted(jaxadapt.extract(variables).collection) == ["shira", "shira_integers"]
    y, changed = module.apply(variables, X, mutable=["shira", "shira_integers"])
    jax.tree.map(np.testing.assert_array_equal, changed, {k: variables[k] for k in changed})
    assert sorted(jaxadapt.detach(variables)) == sorted(jaxadapt.delete(variables, name="default")) == ["params"]
    merged = jaxadapt.merge(variables)
    assert sorted(merged) == ["params"]
    np.testing.assert_allclose(LinenNet().apply(merged, X), y, rtol=1e-5, atol=1e-6)


def test_gradients_and_optimizers_see_the_floats_only(variables: Any):
    module = jaxadapt.adapt(LinenNet(), CONFIG)
    rest = {k: v for k, v in variables.items() if k != "shira"}
    trained = {"shira": variables["shira"]}

    def loss(trained: Any) -> Any:
        return (module.apply({**rest, **trained}, X) ** 2).sum()

    grads = jax.jit(jax.grad(loss))(trained)
    rows, columns = jaxadapt.extract(variables).params["q"]["kernel"]["shira_indices"]
    want = (2 * by_hand(variables).T @ X)[rows, columns]
    np.testing.assert_allclose(grads["shira"]["default"]["q"]["kernel"]["shira_weight"], want, rtol=1e-4, atol=1e-5)
    tx = optax.adamw(0.1, weight_decay=0.5)
    updates, _ = tx.update(grads, tx.init(trained), trained)
    after = {**rest, **optax.apply_updates(trained, updates)}
    assert float(loss({"shira": after["shira"]})) < float(loss(trained))
    np.testing.assert_allclose(module.apply(after, X), by_hand(after), rtol=1e-5, atol=1e-6)
    assert optim.roles(trained)["shira"]["default"]["q"]["kernel"] == {"shira_weight": "other"}
    whole = optim.roles({**trained, "shira_integers": rest["shira_integers"]})
    assert whole["shira_integers"]["default"]["q"]["kernel"] == {"shira_indices": "frozen"}


def test_the_trained_part_alone_is_refused_by_save(variables: Any, tmp_path: Any):
    adapter = jaxadapt.extract({"shira": variables["shira"]})
    with pytest.raises(AttachError, match="lacks tensors"):
        jaxadapt.save(adapter, tmp_path)


def test_nnx_holds_integers_in_frozen_variables(tmp_path: Any):
    model = jaxadapt.adapt(Net(nnx.Rngs(0)), CONFIG, rngs=nnx.Rngs(1))
    indices = model.q.shira["default"]["kernel"]["shira_indices"]
    assert isinstance(indices, jaxadapt.models.FrozenParam)
    optimizer = nnx.Optimizer(model, optax.adamw(0.1), wrt=jaxadapt.AdapterParam)

    @nnx.jit
    def step(model: Any, optimizer: Any) -> Any:
        grads = nnx.grad(lambda m: ((m(X) - 1) ** 2).sum(), argnums=nnx.DiffState(0, jaxadapt.AdapterParam))(model)
        optimizer.update(model, grads)

    before = np.array(indices[...])
    step(model, optimizer)
    np.testing.assert_array_equal(indices[...], before)
    assert indices[...].dtype == jnp.int32
    y = model(X)
    jaxadapt.save(model, tmp_path)
    assert jaxadapt.read(tmp_path).tensors["base_model.model.q.shira_indices"].dtype == np.int32
    np.testing.assert_array_equal(jaxadapt.load(tmp_path, Net(nnx.Rngs(0)))(X), y)


@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_checkpoints_keep_integers(kind: str, variables: Any, tmp_path: Any):
    """A run is restored into an adapter whose random positions differ."""

    def nnx_model(seed: int) -> Any:
        drawn = CONFIG.replace(random_seed=None)
        return jaxadapt.adapt(Net(nnx.Rngs(0)), drawn, rngs=nnx.Rngs(seed))

    if kind == "linen":
        model = variables
        zeros = jax.tree.map(jnp.zeros_like, variables["shira_integers"])
        like: Any = {**variables, "shira_integers": zeros}
    else:
        model, like = nnx_model(1), nnx_model(2)
    want = jaxadapt.extract(model).flat()
    assert not np.array_equal(want["q.kernel.shira_indices"], jaxadapt.extract(like).flat()["q.kernel.shira_indices"])
    with jaxadapt.CheckpointManager(tmp_path) as manager:
        manager.save(1, model)
        manager.wait()
        restored = manager.restore(like)
    for path, x in jaxadapt.extract(restored.model).flat().items():
        assert x.dtype == want[path].dtype
        np.testing.assert_array_equal(x, want[path])
