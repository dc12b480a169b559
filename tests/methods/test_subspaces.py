"""MISS, ROAD and OSF: sizes that do not fit, fields that PEFT ignores, and formulas in numpy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxadapt import ConfigError, KeyMap, Weight
from jaxadapt.adapters import initial_values, selection
from jaxadapt.methods import AppliedMethod
from tests.support.configs import class_of

LINEAR = Weight("w", "q.weight", "i o -> o i")


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype("float32")


def sites_of(peft_type, fields, shape=(8, 6), weight=LINEAR):
    config = class_of(peft_type)(**{"target_modules": ["q"], **fields})
    return config, selection.select_sites(config, KeyMap("t", (weight,)), {"w": shape})


@pytest.mark.parametrize(
    ("peft_type", "fields", "message"),
    [
        ("MISS", {"r": 9}, "at most 8 inputs, the size of the module; found r=9"),
        ("MISS", {"r": 4, "init_weights": "bat"}, "divides 8 inputs and 6 outputs; found 4"),
        ("MISS", {"r": 2, "mini_r": 4, "init_weights": "mini"}, "divides the 6 outputs; found 4"),
        ("ROAD", {"group_size": 4}, "divides the 6 outputs; found 4"),
        ("OSF", {"effective_rank": 6}, "from 1 to 5, below min\\(in, out\\).*found 6"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(peft_type, fields, message):
    with pytest.raises(ConfigError, match=message):
        sites_of(peft_type, fields)


@pytest.mark.parametrize("peft_type", ["DEFT", "TINYLORA"])
def test_a_rank_that_peft_lowers_silently(peft_type):
    with pytest.warns(
        UserWarning, match=f"w: {peft_type} with r=6, the most for the sizes of this weight, and not r=9"
    ):
        _, found = sites_of(peft_type, {"r": 9})
    assert 6 in found[0].tensors[0].own[0]


@pytest.mark.parametrize(
    ("peft_type", "fields", "message"),
    [
        ("MISS", {"init_weights": "bone"}, '"bat" or "mini"'),
        ("ROAD", {"group_size": 3}, "an even number"),
        ("ROAD", {"variant": "road_3"}, "road_1"),
        ("BOFT", {"boft_block_num": 2}, "0 if boft_block_num is given"),
        ("OSF", {"effective_rank": -1}, "a positive number or null"),
        ("OSF", {"rank_pattern": {"q": 0}}, "a positive number or null"),
    ],
)
def test_invalid_fields_are_refused(peft_type, fields, message):
    with pytest.raises(ConfigError, match=message):
        class_of(peft_type)(**fields)


def test_the_dropout_that_peft_ignores_is_refused_for_a_new_adapter():
    config, found = sites_of("MISS", {"r": 2, "init_weights": "bat", "miss_dropout": 0.1})
    assert found[0].method.dropout(found[0].hparams) == 0
    with pytest.raises(ConfigError, match="PEFT ignores the dropout of this variant"):
        initial_values.init_values(config, found, jax.random.key(0))


def test_osf_keeps_the_large_directions():
    """A fraction in `rank_pattern` is one of the smaller size."""
    config, found = sites_of("OSF", {"effective_rank": 2, "rank_pattern": {"q": 0.7}})
    w = numbers(8, 6)
    values = initial_values.init_values(config, found, jax.random.key(0), base={"w": jnp.asarray(w)})
    params = {path.rpartition(".")[2]: x for path, x in values.items()}
    assert params["osf_svd_params_S_low"].shape == (2,)  # int(6 · 0.7) = 4 of 6 are kept
    new = {name: numbers(*x.shape, seed=3) if "low" in name else x for name, x in params.items()}
    hook = AppliedMethod(found[0].method, found[0].hparams, {k: jnp.asarray(v) for k, v in new.items()}, found[0].axes)
    u, s, v = np.linalg.svd(w.T, full_matrices=False)
    low_u, low_s, low_v = (np.asarray(new[f"osf_svd_params_{name}_low"]) for name in "USV")
    low_v = low_v.reshape(2, 8)
    expected = (u[:, :4] * s[:4]) @ v[:4] + (low_u.T.reshape(2, 6).T * low_s) @ low_v
    np.testing.assert_allclose(hook.weight(jnp.asarray(w)).T, expected, rtol=1e-4, atol=1e-4)  # two decompositions


def test_osf_projects_the_gradients_off_the_kept_directions():
    config, found = sites_of("OSF", {"effective_rank": 2})
    w = numbers(8, 6)
    values = initial_values.init_values(config, found, jax.random.key(0), base={"w": jnp.asarray(w)})
    params = {path.rpartition(".")[2]: x for path, x in values.items()}

    def loss(params):
        hook = AppliedMethod(found[0].method, found[0].hparams, params, found[0].axes)
        return (hook.weight(jnp.asarray(w)) ** 3).sum()

    grads = jax.grad(loss)(params)
    u, _, v = np.linalg.svd(w.T, full_matrices=False)
    g_u, g_v = (np.asarray(grads[f"osf_svd_params_{name}_low"]) for name in "UV")
    assert abs(g_u).max() > 0.1
    np.testing.assert_allclose(u[:, :2].T @ g_u.reshape(6, -1), 0, atol=1e-4 * abs(g_u).max())
    np.testing.assert_allclose(g_v.reshape(-1, 8) @ v[:2].T, 0, atol=1e-4 * abs(g_v).max())
    assert not np.asarray(grads["osf_U_high"]).any()
