"""C3A on one layer, beside PEFT's layer: outputs, gradients, and several adapters."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxadapt import C3AConfig, ConfigError
from jaxadapt.configs.frozen import find_value_after_dot
from jaxadapt.methods.applied import AppliedMethods
from tests.methods.one_layer import OneLayer, hook_of, numbers, run

CLOSE = {"rtol": 1e-5, "atol": 1e-6}  # transforms of float32


def test_a_block_size_must_divide_inputs_and_outputs():
    with pytest.raises(ConfigError, match="divides the 8 inputs and the 12 outputs, found 3"):
        hook_of(C3AConfig(target_modules=["q"], block_size=3), (12, 8))


def test_the_modules_of_one_leaf_have_one_block_size():
    config = C3AConfig(target_modules=["q"], block_size=2, block_size_pattern={"1.q": 4})
    with pytest.raises(ConfigError, match="block_size differs"):
        hook_of(config, (12, 8), stacked=True)


@pytest.mark.parametrize("pattern", ["q|v", "(q|v)|k"])
def test_alternatives_of_a_pattern_need_parentheses(pattern):
    with pytest.raises(ConfigError, match="put them in parentheses"):
        C3AConfig(block_size_pattern={pattern: 2})


@pytest.mark.parametrize("pattern", ["(q|v)_proj", "[q|v]", r"a\|b", "((q|v)|k)"])
def test_grouped_alternatives_are_accepted(pattern):
    assert C3AConfig(block_size_pattern={pattern: 2}).block_size_pattern == {pattern: 2}


@pytest.mark.peft
@pytest.mark.parametrize(
    "pattern",
    [{"q": 4}, {r"h\.0\.q": 4}, {".*": 4}, {"h.0.q": 4}, {"q": 2, "h.0.q": 4}],
    ids=lambda pattern: "-".join(pattern),
)
@pytest.mark.parametrize("name", ["q", "h.0.q", "model.h.0.q"])
def test_a_pattern_matches_as_in_peft(name: str, pattern: dict[str, int]):
    """PEFT's expression begins with a dot, also for FOURIERFT; a pattern may be the whole name as well."""
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    net = torch.nn.Module()
    net.add_module(name.partition(".")[0], module := torch.nn.Module() if "." in name else torch.nn.Linear(8, 8))
    for part in name.split(".")[1:]:
        module.add_module(part, inner := torch.nn.Linear(8, 8) if part == "q" else torch.nn.Module())
        module = inner
    theirs = peft.get_peft_model(net, peft.C3AConfig(target_modules=["q"], block_size=1, block_size_pattern=pattern))
    (kernel,) = [x for key, x in theirs.named_parameters() if "c3a_kernel" in key]
    assert find_value_after_dot(pattern, name, 1) == kernel.shape[-1]


@pytest.mark.peft
def test_outputs_are_pefts_and_gradients_are_those_of_the_product():
    torch = pytest.importorskip("torch")
    layer = OneLayer("C3AConfig", (12, 8), block_size=4)
    hook, x, weights = layer.hook, numbers(3, 8), numbers(3, 12, seed=1)
    np.testing.assert_allclose(layer.run(hook, x), layer.peft(x), **CLOSE)
    np.testing.assert_allclose(hook.weight(layer.w), layer.peft_weight(), **CLOSE)

    def loss(x, kernel):
        return (layer.run(layer.with_params({"c3a_kernel": kernel}), x) * weights).sum()

    at_x, at_kernel = jax.jit(jax.grad(loss, argnums=(0, 1)))(x, hook.params["c3a_kernel"])
    np.testing.assert_allclose(at_x, weights @ np.asarray(hook.weight(layer.w)), **CLOSE)
    theirs = torch.from_numpy(x).requires_grad_()
    (layer.module(theirs) * torch.from_numpy(weights)).sum().backward()
    np.testing.assert_allclose(at_kernel, layer.module.c3a_kernel["default"].grad.numpy(), **CLOSE)
    assert not np.allclose(at_x, theirs.grad, atol=0.1)  # PEFT's fault


def test_two_adapters_add_their_changes():
    """Where PEFT's layer gives the output of the first to the second; its merge adds."""
    one, two = (hook_of(C3AConfig(target_modules=["q"], block_size=b), (8, 8), seed=b) for b in (2, 4))
    w, x = numbers(8, 8), numbers(3, 8, seed=1)
    hooks = AppliedMethods((one, two))
    changes = [np.asarray(hook.weight(w)) - w for hook in (one, two)]
    np.testing.assert_allclose(run(hooks, w, x), x @ (w + sum(changes)).T, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(hooks.weight(jnp.asarray(w)), w + sum(changes), rtol=1e-5, atol=1e-6)
