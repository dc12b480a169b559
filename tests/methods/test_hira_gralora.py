"""HIRA and GRALORA: dropout, ranks and sizes that do not fit."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxadapt
from jaxadapt import ConfigError, GraloraConfig, HiraConfig, Weight
from tests.methods.one_layer import hook_of

BASE = {"q": {"kernel": jnp.ones((4, 6))}}


def test_hiras_dropout_drops_the_inputs_of_the_change_only():
    """With the identity as the input, each row of the output shows if its input was dropped for the change."""
    rngs = nnx.Rngs(0)
    model = nnx.Dict(q=nnx.Linear(40, 6, rngs=rngs))
    config = HiraConfig(target_modules=["q"], r=2, hira_dropout=0.5, init_weights=False)
    jaxadapt.adapt(model, config, rngs=nnx.Rngs(1))
    x = jnp.eye(40)
    tensors = jaxadapt.to_peft(jaxadapt.extract(model)).tensors
    a, b = (np.asarray(tensors[f"base_model.model.q.hira_{name}"]) for name in "AB")
    w = np.asarray(nnx.state(model, nnx.Param)["q"]["kernel"].get_value())
    change = w * (b @ a).T
    model.eval()
    np.testing.assert_allclose(model["q"](x), w + change, rtol=1e-5, atol=1e-6)
    model.train()
    y = np.asarray(model["q"](x)) - w
    kept = np.isclose(y, 2 * change, rtol=1e-3, atol=1e-5).all(1)
    dropped = np.isclose(y, 0, atol=1e-5).all(1)
    assert (kept | dropped).all()
    assert 5 < kept.sum() < 35


def test_hiras_rank_is_that_of_the_file():
    """PEFT's second adapter on a model obeys rank_pattern, its first does not."""
    tensors = {"base_model.model.q.hira_A": np.ones((3, 4), "f4"), "base_model.model.q.hira_B": np.ones((6, 3), "f4")}
    config = HiraConfig(target_modules=["q"], r=2, rank_pattern={"q": 3})
    adapter = jaxadapt.from_peft(jaxadapt.PeftTensors(config, tensors), BASE)
    np.testing.assert_allclose(jaxadapt.merge(BASE, adapter)["q"]["kernel"], np.full((4, 6), 4.0))
    with pytest.raises(ConfigError, match="cannot start HIRA with rank_pattern"):
        jaxadapt.init(BASE, config, key=jax.random.key(0))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 3}, "r: expected a multiple of gralora_k = 2, found 3"),
        ({"hybrid_r": -1}, "hybrid_r: expected an integer of at least 0"),
        ({"gralora_k": 3, "r": 3}, "gralora_k = 3 does not divide its 4 inputs"),
        ({"gralora_k": 4, "r": 4}, "gralora_k = 4 does not divide its 6 outputs"),
    ],
)
def test_graloras_blocks_that_do_not_fit_are_refused(fields: Any, message: str):
    with pytest.raises(ConfigError, match=message):
        jaxadapt.init(BASE, GraloraConfig(target_modules=["q"], **fields), key=jax.random.key(0))


def test_a_gralora_file_of_another_model_is_refused():
    config = GraloraConfig(target_modules=["q"], r=2)
    other = jaxadapt.init({"q": {"kernel": jnp.ones((4, 8))}}, config, key=jax.random.key(0))
    with pytest.raises(jaxadapt.MismatchError, match=r"shape \(8, 4\), but the weight has \(6, 4\)"):
        jaxadapt.from_peft(jaxadapt.to_peft(other), BASE)


@pytest.mark.peft
def test_a_new_gralora_has_the_bounds_of_pefts():
    """Each tensor's largest value beside PEFT's: both draw uniformly, hundreds of values a tensor."""
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    fields = {"r": 8, "gralora_k": 4, "hybrid_r": 4, "target_modules": ["q"], "init_weights": False}
    torch.manual_seed(0)
    net = torch.nn.Sequential()
    net.add_module("q", torch.nn.Linear(256, 64))
    state = peft.get_peft_model_state_dict(peft.get_peft_model(net, peft.GraloraConfig(**fields)))
    adapter = jaxadapt.init({"q": {"kernel": jnp.ones((256, 64))}}, GraloraConfig(**fields), key=jax.random.key(0))
    tensors = jaxadapt.to_peft(adapter).tensors
    assert tensors.keys() == state.keys()
    for key, want in state.items():
        assert np.abs(tensors[key]).max() == pytest.approx(want.abs().max().item(), rel=0.05), key


def test_hira_refuses_convolutions_with_groups_as_peft_does():
    groups = Weight("w", "a.q.weight", "k i o -> o i k", kind="conv", groups=2)
    with pytest.raises(ConfigError, match="PEFT does not implement HIRA for convolutions with groups"):
        hook_of(HiraConfig(target_modules=["q"]), (3, 4, 8), weight=groups)
