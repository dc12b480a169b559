"""Copies of weights, of single rows, and several adapters on one weight."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from jaxadapt import AttachError, ConfigError, IA3Config, LoraConfig, Weight
from jaxadapt.adapters import selection
from jaxadapt.arrays.layout import Axes
from jaxadapt.arrays.products import PerEntry, Use
from jaxadapt.keymaps.keymap import KeyMap, Match
from jaxadapt.methods import METHODS, AppliedMethod, Start, Target
from jaxadapt.methods.applied import AppliedMethods, check_biases, refuse_rivals
from jaxadapt.methods.copies import CopyHparams, FullCopy, RowCopy, TokensHparams

LOOKUP, HEAD = Axes((0,), (1,)), Axes((1,), (0,))
W = np.arange(20, dtype="float32").reshape(5, 4)


def applied(method, hparams, axes=LOOKUP, **params):
    return AppliedMethod(method, hparams, {k: jnp.asarray(v) for k, v in params.items()}, axes)


def initial(hook, w):
    """The initial value of the hook's one tensor."""
    (value,) = hook.params.values()
    start = Start(value.shape, w=jnp.asarray(w), axes=hook.axes, hparams=hook.hparams)
    return hook.method.init(LoraConfig(), None, start)


def test_a_copy_replaces_the_weight():
    hook = applied(FullCopy("modules_to_save"), CopyHparams("modules_to_save", None), copy=W + 1)
    assert hook.by_weight
    np.testing.assert_array_equal(hook.weight(jnp.asarray(W)), W + 1)
    assert hook.weight(jnp.asarray(W, "bfloat16")).dtype == "bfloat16"
    with pytest.raises(AttachError, match="cannot unmerge modules_to_save"):
        hook.unweight(jnp.asarray(W))
    np.testing.assert_array_equal(initial(hook, W), W)


def test_a_copy_of_some_layers_leaves_the_others():
    hparams = CopyHparams("modules_to_save", PerEntry((1.0, 0.0, 1.0), (3,)))
    hook = applied(FullCopy("modules_to_save"), hparams, Axes((1,), (2,), (0,)), copy=np.ones((3, 5, 4)))
    found = hook.weight(jnp.zeros((3, 5, 4)))
    np.testing.assert_array_equal(found[:, 0, 0], [1, 0, 1])


def test_a_copy_for_the_lookup_is_not_the_head():
    hook = applied(FullCopy("modules_to_save", lookup=True), CopyHparams("modules_to_save", None), copy=W + 1)
    assert not hook.by_weight
    assert hook.follows("gather")
    assert not hook.follows("dot_general")
    x, y = jnp.eye(5)[:2], jnp.zeros((2, 4))
    np.testing.assert_array_equal(hook.output(Use("bv", "vd", "bd", LOOKUP), x, y, jnp.asarray(W)), W[:2] + 1)
    h, logits = jnp.ones((2, 4)), jnp.zeros((2, 5))
    assert hook.output(Use("bd", "vd", "bv", LOOKUP), h, logits, jnp.asarray(W)) is logits
    with pytest.raises(AttachError, match="only for the token lookup"):
        hook.weight(jnp.asarray(W))


@pytest.mark.parametrize("head", [False, True])
def test_rows_of_tokens_are_replaced(head):
    axes = HEAD if head else LOOKUP
    w = jnp.asarray(W)
    method = RowCopy((3, 1))
    hook = applied(method, TokensHparams((3, 1), head), axes, trainable_tokens_delta=[[9] * 4, [8] * 4])
    rows = np.array([[9] * 4, [8] * 4], "float32")
    expected = W.copy()
    expected[[3, 1]] = rows
    np.testing.assert_array_equal(hook.weight(w), expected)
    np.testing.assert_array_equal(initial(hook, W), W[[3, 1]])
    with pytest.raises(AttachError, match="cannot unmerge trainable_token_indices"):
        hook.unweight(w)
    turned = Axes(axes.out_axes, axes.in_axes)  # the tokens on the other axis
    other = dataclasses.replace(hook, axes=turned)
    np.testing.assert_array_equal(other.weight(w.T), expected.T)


@pytest.mark.parametrize("pattern", ["{l} v d -> v d", "v d x -> v d x"])
def test_tokens_have_one_table(pattern):
    kind = "embedding" if "l" in pattern else "conv"
    match = Match("w", Weight("w", "h.{l}.q.weight" if "l" in pattern else "q.weight", pattern, kind=kind))
    with pytest.raises(ConfigError, match="only to a token embedding or a head"):
        RowCopy((1,)).tensors(LoraConfig(), Target(match))


@pytest.mark.parametrize(("kind", "axes"), [("embedding", ("n", "out")), ("linear", ("n", "in"))])
def test_rows_are_of_the_axis_that_is_not_the_tokens(kind, axes):
    match = Match("w", Weight("w", "q.weight", "v d -> v d", kind=kind))
    (tensor,) = RowCopy((1, 4, 2)).tensors(LoraConfig(), Target(match))
    assert (tensor.axes, tensor.own) == (axes, (("n", 3),))
    assert RowCopy((1,)).hparams(LoraConfig(), Target(match)) == TokensHparams((1,), kind == "linear")


# ---- several adapters --------------------------------------------------------------------------------------


def two():
    keymap = KeyMap("t", (Weight("w", "q.weight", "i o -> o i"),))
    (lora,) = selection.select_sites(LoraConfig(r=2, lora_alpha=2, target_modules=["q"]), keymap, {"w": (5, 4)})
    ia3 = IA3Config(target_modules=["q"], feedforward_modules=[])
    (scale,) = selection.select_sites(ia3, keymap, {"w": (5, 4)})
    rng = np.random.default_rng(0)
    a, b, l = (rng.standard_normal(s).astype("float32") for s in ((2, 5), (4, 2), (4,)))
    hooks = (
        applied(lora.method, lora.hparams, lora.axes, lora_A=a, lora_B=b),
        applied(scale.method, scale.hparams, scale.axes, ia3_l=l),
    )
    return AppliedMethods(hooks), (b @ a).T, l


def test_several_adapters_apply_in_order():
    both, delta, l = two()
    w, x = jnp.asarray(W), jnp.asarray(np.random.default_rng(1).standard_normal((3, 5)).astype("float32"))
    use = Use("bi", "io", "bo", both.axes)
    close = {"rtol": 1e-5, "atol": 1e-4}
    np.testing.assert_allclose(both.weight(w), (W + delta) * l, **close)
    np.testing.assert_allclose(both.output(use, both.input(use, x, w), x @ w, w), x @ ((W + delta) * l), **close)
    np.testing.assert_allclose(both.bias(jnp.ones(4)), l, rtol=1e-6)
    turned = both.map(lambda hook: hook)
    assert turned.hooks == both.hooks
    assert not both.by_weight
    assert both.forward
    assert not both.apart
    assert not both.follows("gather")


def test_one_of_several_decides_or_all():
    flags = {"by_weight": all, "forward": any, "apart": any}
    for name, rule in flags.items():
        for values in ((True, True), (True, False), (False, True), (False, False)):
            method = SimpleNamespace(copies=False)
            hooks = tuple(SimpleNamespace(**{"method": method, "by_weight": False, name: value}) for value in values)
            assert getattr(AppliedMethods(hooks), name) is rule(values)
    for values in ((True, True), (True, False), (False, False)):
        hooks = tuple(SimpleNamespace(follows=lambda _, value=value: value) for value in values)
        assert AppliedMethods(hooks).follows("gather") is all(values)


def test_two_copies_of_one_weight_are_rivals():
    copy, tokens, lora = FullCopy("modules_to_save"), RowCopy((1,)), METHODS["LORA"]
    refuse_rivals({"a": {"one": copy, "two": lora}, "b": {"two": tokens}})
    with pytest.raises(AttachError, match=r"Activate one of them:\n.*a: one, two"):
        refuse_rivals({"a": {"one": copy, "two": tokens}, "b": {"two": copy}})


def test_copies_of_other_rows_of_one_weight_are_no_rivals():
    one, two, three = (RowCopy(rows) for rows in ((1, 5), (3,), (7, 3)))
    refuse_rivals({"a": {"one": one, "two": two}})
    with pytest.raises(AttachError, match=r"of the same rows of it(.|\n)*a: one, two, three"):
        refuse_rivals({"a": {"one": one, "two": two, "three": three}})


def test_a_parameter_of_the_outputs_size_may_be_a_bias():
    both, _, _ = two()
    check_biases(both.hooks, {"gain": jnp.ones(5)})
    check_biases(both.hooks[1:], {"gain": jnp.ones(5)})
    check_biases(both.hooks[:1], {"shift": jnp.ones(4)})
    with pytest.raises(AttachError, match="its parameter 'shift' has the size of the output"):
        check_biases(both.hooks, {"gain": jnp.ones(5), "shift": jnp.ones(4)})
