"""Dropout of parts of a change (LOHA, LOKR, BOFT) beside PEFT's layers in training, and on whole models."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxadapt
from jaxadapt import LoHaConfig, LoKrConfig, OFTConfig, Weight
from jaxadapt.methods import AppliedMethod, Drop
from tests.methods.one_layer import OneLayer, hook_of, numbers, run

KEYS = jax.random.split(jax.random.key(0), 300)
BOTH = {"rank_dropout": 0.4, "module_dropout": 0.3}


def dropping(hook: Any, key: Any) -> AppliedMethod:
    """The same adapter in one call with dropout."""
    drop = Drop(hook.method.dropout(hook.hparams), lambda: key)
    return AppliedMethod.in_call(hook, hook.params, drop)


@pytest.mark.peft
@pytest.mark.parametrize(
    ("config", "fields"),
    [
        ("LoHaConfig", {"r": 2, **BOTH}),
        ("LoKrConfig", {"r": 1, **BOTH}),
        ("LoKrConfig", {"r": 1, "rank_dropout_scale": True, **BOTH}),
        ("BOFTConfig", {"boft_block_size": 2, "boft_dropout": 0.6}),
        ("OFTConfig", {"oft_block_size": 2, "module_dropout": 0.6}),
    ],
    ids=["LOHA", "LOKR", "LOKR scaled", "BOFT", "OFT"],
)
@pytest.mark.filterwarnings("ignore:.*(CUDA|ninja|butterfly)")
def test_calls_in_training_give_pefts_outputs_as_often_as_peft(config: str, fields: dict[str, Any]):
    torch = pytest.importorskip("torch")
    layer, x = OneLayer(config, (3, 8), **fields), numbers(2, 8, seed=5)
    layer.module.train()
    torch.manual_seed(0)
    theirs = np.array([layer.peft(x) for _ in KEYS])
    theirs = np.where(np.isnan(theirs), x @ layer.w.T, theirs)  # PEFT divides by 0 where it drops all rows
    ours = np.asarray(jax.jit(jax.vmap(lambda key: layer.run(dropping(layer.hook, key), x)))(KEYS))
    kinds = np.unique(theirs.round(4), axis=0)
    found = [np.abs(kinds - each[:, None]).max((-2, -1)) for each in (theirs[:, None], ours[:, None])]
    found = [each.reshape(len(KEYS), len(kinds)) for each in found]
    assert max(each.min(1).max() for each in found) < 1e-3  # outputs of float32 in another order, up to 30
    shares = [np.bincount(each.argmin(1), minlength=len(kinds)) / len(KEYS) for each in found]
    np.testing.assert_allclose(shares[0], shares[1], atol=0.1)  # 300 draws: three deviations of a share of a third
    assert len(kinds) == {"OFTConfig": 1, "BOFTConfig": 6}.get(config, 8)


def test_fused_modules_drop_each_for_itself():
    """The modules of one array are modules of their own in PEFT."""
    fused = Weight("w", "a.{p}.weight", "{p} o i -> o i", p=("q", "k"))
    config = LoKrConfig(r=1, target_modules=["q", "k"], init_weights=False, module_dropout=0.5)
    hook, w = hook_of(config, (2, 3, 8), weight=fused), jnp.asarray(numbers(2, 3, 8))
    changes = jax.jit(jax.vmap(lambda key: dropping(hook, key).weight(w) - w))(KEYS[:40])
    changed = np.abs(np.asarray(changes)).max((2, 3)) > 0.01
    assert len(np.unique(changed, axis=0)) == 4


def test_an_oft_dropout_without_effect_warns():
    with pytest.warns(UserWarning, match="OFT: module_dropout has no effect"):
        hook_of(OFTConfig(target_modules=["q"], oft_block_size=4, module_dropout=0.1), (6, 8))


LOHA = LoHaConfig(r=2, target_modules=["q"], init_weights=False, module_dropout=0.5)
X = jnp.asarray(numbers(2, 8))


class Net(nnx.Module):
    def __init__(self) -> None:
        self.q = nnx.Linear(8, 3, rngs=nnx.Rngs(0))

    def __call__(self, x: Any) -> Any:
        return self.q(x)


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        return nn.Dense(3, name="q")(x)


def test_a_new_adapter_drops_modules_in_training_on_a_model_of_either_kind():
    model = jaxadapt.adapt(Net(), LOHA, rngs=nnx.Rngs(1))
    base = Net()(X)
    runs = [np.asarray(model(X)) for _ in range(12)]
    model.eval()
    kinds = {tuple(np.isclose(each, want, atol=1e-5).all() for want in (base, model(X))) for each in runs}
    assert kinds == {(True, False), (False, True)}

    linen = jaxadapt.adapt(LinenNet(), LOHA)
    variables = linen.init(jax.random.key(0), X)
    still = linen.clone(deterministic=True)
    calm, plain = still.apply(variables, X), LinenNet().apply({"params": variables["params"]}, X)
    runs = [np.asarray(linen.apply(variables, X, rngs={"dropout": key})) for key in KEYS[:12]]
    kinds = {tuple(np.isclose(each, want, atol=1e-5).all() for want in (plain, calm)) for each in runs}
    assert kinds == {(True, False), (False, True)}


def test_dropout_does_not_reach_a_merge():
    hook = hook_of(LOHA.replace(rank_dropout=0.5), (3, 8))
    still = dataclasses.replace(hook, hparams=hook_of(LOHA.replace(module_dropout=0.0), (3, 8)).hparams)
    w = jnp.asarray(numbers(3, 8))
    np.testing.assert_array_equal(hook.merged(w), still.merged(w))
    np.testing.assert_array_equal(run(hook, w, X), run(still, w, X))
