"""LoHa on convolutions, beside PEFT's layers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxadapt import ConfigError, LoHaConfig, Weight
from tests.methods.one_layer import hook_of, numbers

PATTERNS = {1: "x i o -> o i x", 2: "x y i o -> o i x y"}
# Products of three tensors of float32 in another order.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.mark.peft
@pytest.mark.parametrize("effective", [False, True], ids=["plain", "effective"])
@pytest.mark.parametrize(("window", "groups"), [((3, 2), 1), ((3, 3), 2), ((1, 1), 1), ((3,), 1), ((1,), 2)])
def test_a_convolution_has_pefts_tensors_and_weight(window, groups, effective):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    kind = {1: torch.nn.Conv1d, 2: torch.nn.Conv2d}[len(window)]
    base = torch.nn.ModuleDict({"a": torch.nn.ModuleDict({"q": kind(4, 6, window, groups=groups)})})
    shape = (*window, 4 // groups, 6)
    w = numbers(*shape)
    to_torch = (len(shape) - 1, len(shape) - 2, *range(len(window)))
    fields = {"r": 3, "alpha": 5, "use_effective_conv2d": effective}
    config = peft.LoHaConfig(target_modules=["q"], init_weights=False, **fields)
    model = peft.inject_adapter_in_model(config, base)
    layer = model["a"]["q"]
    with torch.no_grad():
        layer.get_base_layer().weight.copy_(torch.from_numpy(w.transpose(to_torch).copy()))
    file = {f"base_model.model.{k}": x.numpy() for k, x in peft.get_peft_model_state_dict(model).items()}

    weight = Weight("w", "a.q.weight", PATTERNS[len(window)], kind="conv", groups=groups)
    ours = LoHaConfig(target_modules=["q"], **fields)
    new = hook_of(ours, shape, weight=weight)
    hook = hook_of(ours, shape, file, weight=weight)
    assert {n: x.shape for n, x in hook.params.items()} == {n: x.shape for n, x in new.params.items()}
    assert len(file) == (6 if effective and np.prod(window) > 1 else 4)

    layer.merge()
    want = layer.get_base_layer().weight.detach().numpy()
    np.testing.assert_allclose(hook.weight(jnp.asarray(w)).transpose(to_torch), want, **CLOSE)
    np.testing.assert_allclose(hook.unweight(hook.weight(jnp.asarray(w))), w, **CLOSE)
    layer.unmerge()

    weights = numbers(*shape, seed=4)
    torch_weights = torch.from_numpy(weights.transpose(to_torch).copy())
    (layer.get_delta_weight("default") * torch_weights).sum().backward()
    leaves = {key.rpartition(".")[2]: torch.from_numpy(x).requires_grad_() for key, x in file.items()}
    if len(leaves) == 6:
        sides = [
            torch.einsum("abxy,bi,ao->oixy", leaves[f"hada_t{n}"], leaves[f"hada_w{n}_b"], leaves[f"hada_w{n}_a"])
            for n in "12"
        ]
    else:
        sides = [leaves[f"hada_w{n}_a"] @ leaves[f"hada_w{n}_b"] for n in "12"]
    (5 / 3 * (sides[0] * sides[1]).reshape(torch_weights.shape) * torch_weights).sum().backward()

    def loss(params):
        return (hook.method.weight(hook.hparams, params, hook.axes, jnp.asarray(w)) * weights).sum()

    want = {key: leaves[key.rpartition(".")[2]].grad.numpy() for key in file}
    expected = hook_of(ours, shape, want, weight=weight).params
    grads = jax.jit(jax.grad(loss))(dict(hook.params))
    for name, x in leaves.items():
        np.testing.assert_allclose(grads[name], expected[name], err_msg=name, **CLOSE)
        theirs = getattr(layer, name)["default"].grad
        faulty = len(leaves) == 6 and name in ("hada_w1_a", "hada_w2_a")  # PEFT's fault
        assert np.allclose(theirs, x.grad, rtol=1e-4, atol=1e-5) is not faulty, name


def test_stacked_convolutions_with_tensors_for_the_window_share_one_rank():
    weight = Weight("w", "h.{l}.q.weight", "{l} x y i o -> o i x y", kind="conv")
    config = LoHaConfig(target_modules=["q"], r=2, use_effective_conv2d=True, rank_pattern={"1.q": 3})
    with pytest.raises(ConfigError, match="rank_pattern differs"):
        hook_of(config, (2, 3, 3, 4, 6), weight=weight)


def test_a_new_adapter_of_a_convolution_changes_nothing():
    weight = Weight("w", "a.q.weight", PATTERNS[2], kind="conv")
    config = LoHaConfig(target_modules=["q"], r=2, use_effective_conv2d=True)
    hook, w = hook_of(config, (3, 3, 4, 6), weight=weight, noise=False), jnp.asarray(numbers(3, 3, 4, 6))
    np.testing.assert_array_equal(hook.weight(w), w)
