"""LoRA's options together, on one weight: beside PEFT's formulas, written out in numpy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxadapt import IA3Config, KeyMapError, LoraConfig
from jaxadapt.adapters import initial_values, selection
from jaxadapt.arrays import low_rank
from jaxadapt.arrays.axes import Axes, Use
from jaxadapt.keymaps.keymap import KeyMap
from jaxadapt.keymaps.weight import Weight
from jaxadapt.methods import AppliedMethod

LINEAR = Weight("w", "a.q.weight", "i o -> o i")
TABLE = Weight("w", "a.q.weight", "v d -> v d", kind="embedding")


def site_of(config, weight=LINEAR, shape=(4, 6)):
    (site,) = selection.select_sites(config, KeyMap("t", (weight,)), {"w": shape})
    return site


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype("float32")


@pytest.mark.parametrize(("weight", "rate"), [(LINEAR, 0.5), (TABLE, 0.0)], ids=["linear", "embedding"])
def test_an_embedding_has_no_dropout(weight, rate):
    """PEFT's embedding layer never calls `lora_dropout`."""
    site = site_of(LoraConfig(r=2, target_modules=["q"], lora_dropout=0.5), weight)
    assert site.method.dropout(site.hparams) == rate


def test_dora_with_dropout_scales_the_product_of_what_is_left():
    """PEFT computes the base's product anew from the dropped input; the layer's own output stays as it was."""
    site = site_of(LoraConfig(r=2, lora_alpha=3, target_modules=["q"], use_dora=True, lora_dropout=0.5))
    w, x = numbers(4, 6), numbers(5, 4, seed=1)
    params = {"lora_A": numbers(2, 4, seed=2), "lora_B": numbers(6, 2, seed=3), "lora_magnitude_vector": numbers(6)}
    keep = np.array([[2, 0, 2, 0]], "float32")
    hook = AppliedMethod(
        site.method, site.hparams, {k: jnp.asarray(v) for k, v in params.items()}, site.axes, lambda x: x * keep
    )
    y = hook.output(Use("bd", "di", "bi", site.axes), jnp.asarray(x), jnp.asarray(x @ w), jnp.asarray(w))
    change = 1.5 * (params["lora_B"] @ params["lora_A"]).T
    scale = params["lora_magnitude_vector"] / np.linalg.norm(w + change, axis=0)
    expected = x @ w + (scale - 1) * ((x * keep) @ w) + scale * ((x * keep) @ change)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)  # float32 sums in another order


def test_inputs_are_cast_to_the_dtype_of_a():
    """As PEFT's `_cast_input_dtype` does: 1 + 2^-10 is 1 in bfloat16."""
    axes = Axes(in_axes=(0,), out_axes=(1,))
    one = jnp.ones((1, 1), "bfloat16")
    x = jnp.full((1, 1), 1 + 2**-10, "float32")
    delta = low_rank.low_rank_delta(Use("bd", "di", "bi", axes), 1.0, 1, one, one, x, x)
    assert float(delta[0, 0]) == 1


@pytest.mark.parametrize("ones", [True, False])
def test_ia3_starts_with_ones_or_at_random(ones):
    config = IA3Config(target_modules=["q"], feedforward_modules=[], init_ia3_weights=ones)
    (values,) = initial_values.init_values(config, [site_of(config)], jax.random.key(0)).values()
    assert bool((values == 1).all()) is ones
    assert bool(jnp.std(values) > 0.1) is not ones


@pytest.mark.parametrize(("name", "shape", "ambiguous"), [("cube", (2, 3, 4), True), ("bias", (3, 4), False)])
def test_all_linear_asks_about_weights_of_three_axes_only(name, shape, ambiguous):
    """A stacked bias has two axes as well, and is no matrix."""
    shapes = {"q.kernel": (4, 6), f"other.{name}": shape}
    table = KeyMap("t", (Weight("q.kernel", "q.weight", "i o -> o i"),))
    config = LoraConfig(r=2, target_modules="all-linear")
    if ambiguous:
        with pytest.raises(KeyMapError, match=r"ambiguous.*\n.*other\.cube \(2, 3, 4\)"):
            selection.resolve_config(config, table, shapes)
    else:
        assert selection.resolve_config(config, table, shapes).target_modules == ("q",)


def test_a_bias_of_two_axes_has_no_name_of_its_own():
    """`target_modules` names a matrix by its own path; a bias, stacked or not, belongs to its module."""
    table = KeyMap("t", (Weight("q.kernel", "q.weight", "i o -> o i"),))
    shapes = {"q.kernel": (4, 6), "q.bias": (2, 6)}
    (site,) = selection.select_sites(LoraConfig(r=2, target_modules=r".*(q|bias)"), table, shapes)
    assert site.leaf == "q.kernel"
