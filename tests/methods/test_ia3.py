"""IA3 on convolutions and biases, beside the products written out."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxadapt import AttachError, ConfigError, IA3Config, KeyMap, Weight
from jaxadapt.adapters import selection
from jaxadapt.arrays.products import Operation
from jaxadapt.methods import AppliedMethod


def site_of(weight, shape, feedforward):
    config = IA3Config(target_modules=["q"], feedforward_modules=["q"] if feedforward else [])
    (site,) = selection.select_sites(config, KeyMap("t", (weight,)), {"w": shape})
    return site


def conv(groups=1, pattern="x y i o -> o i x y"):
    return Weight("w", "a.q.weight", pattern, kind="conv", groups=groups)


def numbers(*shape, seed=0):
    return jnp.asarray(1 + np.random.default_rng(seed).standard_normal(shape).astype("float32"))


def run(groups):
    def convolve(x, w):
        return jax.lax.conv_general_dilated(
            x, w, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups
        )

    return convolve


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("feedforward", [False, True])
def test_a_convolution_scales_its_outputs_or_its_input_channels(feedforward, groups):
    site = site_of(conv(groups), (2, 2, 4 // groups, 6), feedforward)
    key, (shape,) = site.entries[0].keys[0], site.shapes.values()
    assert key.endswith("q.ia3_l")
    assert site.entries[0].form.shape_of(0) == ((1, 4, 1, 1) if feedforward else (1, 6, 1, 1))
    vector = numbers(*shape, seed=1)
    hook = AppliedMethod(site.method, site.hparams, {"ia3_l": vector}, site.axes)
    x, w = numbers(1, 3, 3, 4), numbers(2, 2, 4 // groups, 6, seed=2)
    convolve, flat = run(groups), vector.reshape(1, 1, 1, -1)
    expected = convolve(x * flat, w) if feedforward else convolve(x, w) * flat
    np.testing.assert_allclose(convolve(x, hook.weight(w)), expected, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(hook.unweight(hook.weight(w)), w, rtol=1e-5)
    assert hook.follows("conv_general_dilated") is not feedforward
    assert not hook.follows("gather")
    if not feedforward:
        y = hook.output(Operation(convolve, 3, site.axes), x, convolve(x, w), w)
        np.testing.assert_allclose(y, expected, rtol=1e-6)


def test_convolutions_that_peft_cannot_scale_are_refused():
    with pytest.raises(ConfigError, match="but not for 1-D"):
        site_of(conv(pattern="x i o -> o i x"), (3, 4, 6), False)
    with pytest.raises(ConfigError, match="no axis of this parameter holds only the input channels"):
        site_of(conv(pattern="x y i j o -> o (i j) x y"), (3, 3, 2, 2, 6), True)
    site_of(conv(pattern="x y i j o -> o (i j) x y"), (3, 3, 2, 2, 6), False)


def test_a_bias_is_scaled_with_the_outputs():
    linear = Weight("w", "a.q.weight", "i n h -> (n h) i")
    site = site_of(linear, (4, 2, 3), False)
    vector, bias = numbers(2, 3), numbers(2, 3, seed=1)
    hook = AppliedMethod(site.method, site.hparams, {"ia3_l": vector}, site.axes)
    np.testing.assert_allclose(hook.bias(bias), vector * bias, rtol=1e-6)
    np.testing.assert_allclose(hook.bias(bias.reshape(6)), (vector * bias).reshape(6), rtol=1e-6)
    np.testing.assert_allclose(hook.merged_bias(hook.bias(bias), -1), bias, rtol=1e-6)
    assert hook.effects.bias == "scales"
    with pytest.raises(AttachError, match=r"the bias has shape \(5,\), the vector \(2, 3\)"):
        hook.bias(numbers(5))
    site = site_of(linear, (4, 2, 3), True)
    hook = AppliedMethod(site.method, site.hparams, {"ia3_l": numbers(4)}, site.axes)
    assert hook.bias(bias) is bias
    assert hook.merged_bias(bias, -1) is bias
    assert hook.effects.bias is None
