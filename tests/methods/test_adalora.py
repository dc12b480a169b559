"""ADALORA: the allocator and the loss beside PEFT's, files with pruned ranks, and what is refused."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxadapt
from jaxadapt import AdaLoraConfig, ConfigError
from jaxadapt.methods import adalora

FIELDS: dict[str, Any] = {
    "target_modules": ["lin"], "init_r": 4, "target_r": 2, "tinit": 2, "tfinal": 3, "deltaT": 2, "total_step": 16,
    "beta1": 0.7, "lora_alpha": 3,
}  # fmt: skip
PREFIX = "base_model.model."


def peft_pair() -> tuple[Any, Any]:
    """A torch network, and PEFT's model of it with a random E."""
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")

    from tests.support.twins.tiny import Net

    base = Net(bias=True).torch()
    torch.manual_seed(0)
    model = peft.get_peft_model(copy.deepcopy(base), peft.AdaLoraConfig(**copy.deepcopy(FIELDS)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape))
    return base, model


def tensors_of(model: Any, gradients: bool = False) -> dict[str, np.ndarray]:
    """PEFT's tensors of an adapter by its keys, before pruning; or their gradients."""
    found = {n: p.grad if gradients else p for n, p in model.named_parameters() if "lora_" in n}
    return {n.replace(".default", ""): p.detach().numpy().copy() for n, p in found.items()}


@pytest.mark.peft
def test_the_allocator_is_pefts_over_a_whole_training(tmp_path: Any):
    """All 20 steps of PEFT's own loop: the same E, the same masks, and in the end the same file."""
    import torch

    from tests.support.twins.tiny import Net

    base, model = peft_pair()
    config = AdaLoraConfig(**FIELDS)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.05)
    x = torch.from_numpy(Net().input())
    state = adalora.Allocation.start(tensors_of(model))
    steps_with_masks = 0
    allocate = jax.jit(adalora.allocate_ranks, static_argnums=(0, 2))
    for step in range(20):
        optimizer.zero_grad()
        (model(x) ** 2).mean().backward()
        optimizer.step()
        before, gradients = tensors_of(model), tensors_of(model, gradients=True)
        model.base_model.update_and_allocate(step)
        state, ours = allocate(config, state, step, before, gradients)
        for key, value in tensors_of(model).items():
            np.testing.assert_allclose(ours[key], value, rtol=1e-6, err_msg=f"{step} {key}")
        theirs = {k.replace(".default", ""): v for k, v in (model.peft_config["default"].rank_pattern or {}).items()}
        assert {key: mask.tolist() for key, mask in state.masks.items()} == theirs
        steps_with_masks += bool(theirs)
    assert steps_with_masks > 10
    assert sum(int(mask.sum()) for mask in state.masks.values()) == 2 * 2

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.eval().save_pretrained(str(tmp_path / "theirs"))
    file = jaxadapt.read(tmp_path / "theirs")
    pruned, kept = adalora.prune(config, ours, state.masks)
    assert pruned.rank_pattern == file.config.get("rank_pattern")
    assert kept.keys() == file.tensors.keys()
    for key, value in file.tensors.items():
        np.testing.assert_allclose(kept[key], value, rtol=1e-6, err_msg=key)
    # The pruned file has PEFT's outputs, here and in PEFT.
    want = model(x).detach().numpy()
    np.testing.assert_allclose(opened(tmp_path / "theirs", base)(Net().input()), want, rtol=1e-5, atol=1e-6)
    jaxadapt.write(jaxadapt.PeftTensors(pruned, kept), tmp_path / "ours")
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():  # PEFT takes the masks for patterns that match no module
        warnings.simplefilter("ignore")
        again = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "ours")).eval()
    np.testing.assert_allclose(again(x).detach().numpy(), want, rtol=1e-5, atol=1e-6)


def opened(folder: Any, base: Any, scan: int | None = None) -> nnx.Module:
    from tests.support.twins.tiny import Net

    net = Net()
    return jaxadapt.load(folder, net.nnx(base, scan), keymap=net.table(scan=scan))


@pytest.mark.peft
@pytest.mark.parametrize("masks", [([1, 0, 1, 1], [0, 0, 1, 0]), ([0, 0, 0, 0], [1, 1, 1, 1]), ([0] * 4, [0] * 4)])
def test_ranks_that_differ_between_modules(masks: Any, tmp_path: Any):
    import torch

    from tests.support.twins.tiny import Net

    base, model = peft_pair()
    names = [f"layers.{i}.lin.lora_E" for i in range(2)]
    pattern = {name: [bool(kept) for kept in mask] for name, mask in zip(names, masks, strict=True)}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            key = name.removeprefix(PREFIX).replace(".default", "")
            if key in pattern:
                parameter[~torch.tensor(pattern[key])] = 0.0
    model.peft_config["default"].rank_pattern = pattern
    with warnings.catch_warnings():  # PEFT takes tensors of rank 0 for those of an incomplete model
        warnings.simplefilter("ignore")
        model.eval().save_pretrained(str(tmp_path))
    x = Net().input()
    want = model(torch.from_numpy(x)).detach().numpy()
    ours = opened(tmp_path, base)
    np.testing.assert_allclose(ours(x), want, rtol=1e-5, atol=1e-6)  # float32 in another order
    file = jaxadapt.read(tmp_path).tensors
    again = jaxadapt.to_peft(jaxadapt.extract(ours)).tensors
    assert {key: value.shape for key, value in again.items()} == {key: value.shape for key, value in file.items()}
    np.testing.assert_allclose(jaxadapt.merge(ours)(x), want, rtol=1e-5, atol=1e-6)
    if len({sum(mask) for mask in masks} | {1}) == 2 or all(map(sum, masks)):  # no rank 0 beside another
        scanned = opened(tmp_path, base, scan=0)
        np.testing.assert_allclose(scanned(x), want, rtol=1e-5, atol=1e-6)
        again = jaxadapt.to_peft(jaxadapt.extract(scanned)).tensors
        for key, value in file.items():
            np.testing.assert_array_equal(again[key], value)
    else:
        with pytest.raises(ConfigError, match="rank 0 in some of its modules"):
            opened(tmp_path, base, scan=0)


@pytest.mark.peft
def test_the_orthogonality_loss_is_pefts_with_its_gradients():
    import torch

    class Labelled(torch.nn.Module):
        """A model with an output that has a loss, to which PEFT adds its own."""

        def __init__(self) -> None:
            super().__init__()
            self.lin = torch.nn.Linear(6, 5)

        def forward(self, x: Any) -> Any:
            return type("Output", (), {"loss": 0.0 * self.lin(x).sum()})()

    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(Labelled(), peft.AdaLoraConfig(**{**FIELDS, "orth_reg_weight": 0.25}))
    loss = model.base_model(torch.ones(2, 6)).loss
    loss.backward()
    tensors = {key: jnp.asarray(x) for key, x in tensors_of(model).items()}
    ours, gradients = jax.jit(jax.value_and_grad(lambda t: 0.25 * adalora.orthogonality_loss(t)))(tensors)
    np.testing.assert_allclose(ours, loss.item(), rtol=1e-6)
    for key, value in tensors_of(model, gradients=True).items():
        np.testing.assert_allclose(gradients[key], value, rtol=1e-5, atol=1e-8, err_msg=key)
    perfect = jax.grad(lambda a: adalora.orthogonality_loss({"q.lora_A": a}))(jnp.eye(2, 4))
    np.testing.assert_array_equal(perfect, np.zeros((2, 4)))


def test_the_loss_of_a_model_in_a_jitted_step():
    """From the parameters of a model with split heads, which are not the matrices of the file."""
    keymap = jaxadapt.KeyMap("t", (jaxadapt.Weight("q.kernel", "q.weight", "i n h -> (n h) i"),))
    base = {"q": {"kernel": jnp.ones((4, 2, 3))}}
    config = AdaLoraConfig(target_modules=["q"], init_r=2, total_step=9)
    adapter = jaxadapt.init(base, config, key=jax.random.key(0), keymap=keymap)

    def loss(params: Any) -> Any:
        tensors = jaxadapt.to_peft(jaxadapt.Adapter(config, params, keymap)).tensors
        return adalora.orthogonality_loss(tensors)

    a, b = (np.asarray(jaxadapt.to_peft(adapter).tensors[f"{PREFIX}q.lora_{name}"]) for name in "AB")
    want = (np.linalg.norm(a @ a.T - np.eye(2)) + np.linalg.norm(b.T @ b - np.eye(2))) / 2
    np.testing.assert_allclose(jax.jit(loss)(adapter.params), want, rtol=1e-6)


def test_without_a_rank_to_remove_the_last_step_masks_nothing():
    """PEFT's allocator removes no rank here; a file's other tensors, such as trained biases, stay as they are."""
    config = AdaLoraConfig(**{**FIELDS, "target_r": 4})
    keys = [f"{PREFIX}lin.{name}" for name in ("lora_A", "lora_B", "lora_E", "bias")]
    tensors = dict(zip(keys, map(jnp.ones, ((4, 3), (5, 4), (4, 1), (5,))), strict=True))
    state = adalora.Allocation.start(tensors)
    assert state.importance.keys() == state.uncertainty.keys() == set(keys[:3])
    for step in (12, 13, 14):  # the steps before, at and after total_step - tfinal = 13
        state, after = adalora.allocate_ranks(config, state, step, tensors, tensors)
        assert after.keys() == tensors.keys()
        assert all((after[key] == tensors[key]).all() for key in keys)
    assert not state.masks


@pytest.mark.parametrize(("alpha", "scale"), [(3, 3 / 4), (0, 1)])
def test_the_scale_is_alpha_or_where_it_is_zero_the_ranks_over_init_r(alpha: int, scale: float):
    """PEFT 0.21.2: `scaling = lora_alpha if lora_alpha > 0 else float(r)`, which the layer divides by its rank."""
    keymap = jaxadapt.KeyMap("t", (jaxadapt.Weight("w", "lin.weight", "i o -> o i"),))
    config = AdaLoraConfig(**{**FIELDS, "lora_alpha": alpha})
    a, e, b = (np.random.default_rng(i).normal(size=s).astype("f4") for i, s in enumerate(((4, 3), (4, 1), (5, 4))))
    tensors = {f"{PREFIX}lin.{n}": x for n, x in zip(("lora_A", "lora_E", "lora_B"), (a, e, b), strict=True)}
    base = {"w": jnp.zeros((3, 5))}
    adapter = jaxadapt.from_peft(jaxadapt.PeftTensors(config, tensors), base, keymap=keymap)
    merged = jaxadapt.merge(base, adapter)["w"]
    np.testing.assert_allclose(merged.T, scale * b @ (a * e), rtol=1e-4)  # PEFT divides by r + 1e-5


def test_what_contradicts_itself_is_refused():
    with pytest.raises(ConfigError, match="tinit: expected less than total_step - tfinal, found 5"):
        AdaLoraConfig(tinit=5, tfinal=5, total_step=10)
    with pytest.raises(ConfigError, match="use_dora: expected no value with ADALORA"):
        AdaLoraConfig(use_dora=True)
    with pytest.raises(ConfigError, match="init_r = 2 booleans for a path of lora_E"):
        AdaLoraConfig(init_r=2, rank_pattern={"q.lora_E": [True]})
    base = {"q": {"kernel": jnp.ones((4, 6))}}
    for fields, message in (
        ({"r": 4, "use_rslora": True}, "cannot start ADALORA with r, use_rslora"),
        ({"total_step": None}, "cannot start ADALORA without total_step"),
    ):
        config = AdaLoraConfig(target_modules=["q"], **{"total_step": 9, **fields})
        with pytest.raises(ConfigError, match=message):
            jaxadapt.init(base, config, key=jax.random.key(0))
    tensors = {"q.lora_E": jnp.ones((2, 1))}
    large = AdaLoraConfig(init_r=2, target_r=3, total_step=9)
    with pytest.raises(ConfigError, match="target_r to at most init_r"):
        adalora.allocate_ranks(large, adalora.Allocation.start(tensors), 0, tensors, tensors)
    config = AdaLoraConfig(target_modules=["q"], init_r=2, total_step=9, rank_pattern={"v.lora_E": [True, False]})
    with pytest.warns(UserWarning, match=r"'v.lora_E' matches none of the targets"):
        jaxadapt.init(base, config, key=jax.random.key(0))
