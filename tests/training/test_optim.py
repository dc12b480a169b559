"""`jaxadapt.optim` beside PEFT's optimizers: the same batch, the same gradients, the same steps."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxadapt
from jaxadapt import AttachError, ConfigError, optim
from tests.support import small

FIELDS = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj", "down_proj"], "rank_pattern": {"v_proj": 2}}
IDS = np.arange(12).reshape(2, 6) % 64
STEPS = 3


def nnx_loss(model, ids=IDS):
    return jnp.mean(jax.nn.log_softmax(model(jnp.asarray(ids)))[..., 3] ** 2)


@functools.cache
def torch_side(kind, steps=STEPS):
    """PEFT's adapter before, its gradients, and the adapter after some steps."""
    import torch
    from peft.optimizers import create_loraplus_optimizer, create_riemannian_optimizer, lorafa
    from peft.utils.save_and_load import get_peft_model_state_dict

    from tests.support import peft_pairs

    fields = {**FIELDS, **{"fa": {"rank_pattern": {}}, "riemannian": {"use_dora": True}}.get(kind, {})}
    model = peft_pairs.model_with({"default": fields})
    before = peft_pairs.tensors_of(model, "default")
    if kind == "plus":
        optimizer = create_loraplus_optimizer(
            model, torch.optim.AdamW, lr=1e-2, loraplus_lr_ratio=8, loraplus_weight_decay=0.1, eps=1e-6
        )
    elif kind == "riemannian":
        optimizer = create_riemannian_optimizer(model, torch.optim.AdamW, lr=1e-2, weight_decay=0.1, eps=1e-6)
    else:
        optimizer = lorafa.create_lorafa_optimizer(model, r=3, lora_alpha=5, lr=1e-2, weight_decay=0.1)
    grads = None
    for _ in range(steps):
        optimizer.zero_grad()
        logits = model(torch.from_numpy(IDS)).logits
        (torch.log_softmax(logits, -1)[..., 3] ** 2).mean().backward()
        if grads is None:
            named = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
            grads = {n.replace(".default", ""): g.numpy().copy() for n, g in named.items()}
        optimizer.step()
    after = get_peft_model_state_dict(model)
    return before, grads, {k: v.detach().numpy() for k, v in after.items()}


def nnx_side(before, scan=False):
    from tests.support import peft_pairs
    from tests.support.twins import llama

    model = llama.twin_of(peft_pairs.torch_base(), scan=scan)
    jaxadapt.adapt(model, before.config, rngs=nnx.Rngs(0))
    jaxadapt.inject(model, jaxadapt.from_peft(before, peft_pairs.params(scan)))
    return model


def train(model, tx, steps=STEPS):
    optimizer = nnx.Optimizer(model, tx, wrt=jaxadapt.AdapterParam)

    @nnx.jit
    def step(model, optimizer):
        grads = nnx.grad(nnx_loss, argnums=nnx.DiffState(0, jaxadapt.AdapterParam))(model)
        optimizer.update(model, grads)

    for _ in range(steps):
        step(model, optimizer)
    return jaxadapt.to_peft(model).tensors, optimizer


@pytest.mark.peft
@pytest.mark.parametrize("scan", [False, True])
def test_gradients_are_pefts(scan):
    before, expected, _ = torch_side("plus")
    model = nnx_side(before, scan)
    grads = nnx.jit(nnx.grad(nnx_loss, argnums=nnx.DiffState(0, jaxadapt.AdapterParam)))(model)
    found = jaxadapt.to_peft(grads).tensors
    assert set(found) == set(expected)
    for key, value in expected.items():
        np.testing.assert_allclose(found[key], value, rtol=1e-4, atol=1e-5 * abs(value).max(), err_msg=key)


@pytest.mark.peft
@pytest.mark.parametrize("api", ["nnx", "scan", "linen"])
def test_lora_plus_takes_pefts_steps(api):
    before, _, expected = torch_side("plus")
    make = functools.partial(optax.adamw, eps=1e-6)
    if api == "linen":
        found = linen_steps(before, lambda lora: optim.lora_plus(lora, make, 1e-2, 8, weight_decay=0.1))
    else:
        model = nnx_side(before, api == "scan")
        found, _ = train(model, optim.lora_plus(model, make, 1e-2, 8, weight_decay=0.1))
    same(found, expected, before)


def same(found, expected, before):
    assert set(found) == set(expected)
    for key, value in expected.items():
        moved = abs(value - before.tensors[key]).max()
        # Adam divides by the gradient's size, so float32's noise in small gradients counts as much as large ones.
        np.testing.assert_allclose(found[key], value, rtol=0, atol=5e-3 * moved + 1e-7, err_msg=key)


def linen_steps(before, make_tx, steps=STEPS):
    from tests.support import peft_pairs
    from tests.support.twins import llama

    module, variables = llama.twin_of(peft_pairs.torch_base(), "linen")
    module = jaxadapt.adapt(module, before.config)
    lora = jaxadapt.from_peft(before, variables["params"]).collection
    tx = make_tx(lora)
    state = tx.init(lora)

    @jax.jit
    def step(lora, state):
        grads = jax.grad(lambda lora: nnx_loss(lambda ids: module.apply({**variables, **lora}, ids)))(lora)
        updates, state = tx.update(grads, state, lora)
        return optax.apply_updates(lora, updates), state

    for _ in range(steps):
        lora, state = step(lora, state)
    return jaxadapt.to_peft(lora).tensors


@pytest.mark.peft
@pytest.mark.parametrize("api", ["nnx", "scan", "linen"])
def test_lora_fa_takes_pefts_steps(api, monkeypatch):
    from peft.optimizers import lorafa

    monkeypatch.setattr(lorafa, "is_bf16_available", lambda: False)  # else its correction goes through bfloat16
    before, _, expected = torch_side("fa")
    inner = transformers_adamw(1e-2, 0.1)
    if api == "linen":
        found = linen_steps(before, lambda lora: optim.lora_fa(lora, inner))
    else:
        model = nnx_side(before, api == "scan")
        found, optimizer = train(model, optim.lora_fa(model, inner))
        arrays = [x for x in jax.tree.leaves(nnx.state(optimizer)) if x.ndim > 1]
        trained = [v for p, v in jaxadapt.extract(model).flat().items() if p.endswith("lora_B")]
        assert sum(x.size for x in arrays) == 2 * sum(x.size for x in trained)  # no state for A
    for key in expected:
        if key.endswith("lora_A.weight"):
            np.testing.assert_array_equal(found[key], before.tensors[key])
    same(found, expected, before)


@pytest.mark.peft
@pytest.mark.parametrize("api", ["nnx", "scan", "linen"])
def test_riemannian_takes_pefts_steps(api):
    """Ten steps, with DoRA, whose magnitudes keep their gradients, and modules of two ranks."""
    before, _, expected = torch_side("riemannian", 10)
    inner = optax.adamw(1e-2, eps=1e-6, weight_decay=0.1)
    if api == "linen":
        found = linen_steps(before, lambda lora: optim.riemannian(lora, inner), 10)
    else:
        model = nnx_side(before, api == "scan")
        found, _ = train(model, optim.riemannian(model, inner), 10)
    same(found, expected, before)


def transformers_adamw(rate, decay, b1=0.9, b2=0.999, eps=1e-6):
    """The AdamW in PEFT's LoraFAOptimizer: ε is not corrected for bias, and the decay follows the step."""

    def init(params):
        return jnp.zeros([], int), jax.tree.map(jnp.zeros_like, params), jax.tree.map(jnp.zeros_like, params)

    def update(grads, state, params):
        count = state[0] + 1
        m = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state[1], grads)
        v = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, state[2], grads)
        size = rate * jnp.sqrt(1 - b2**count) / (1 - b1**count)
        steps = jax.tree.map(lambda m, v: -size * m / (jnp.sqrt(v) + eps), m, v)
        return jax.tree.map(lambda u, p: u - rate * decay * (p + u), steps, params), (count, m, v)

    return optax.GradientTransformation(init, update)


# ---- without PEFT ----------------------------------------------------------------------------------------


def test_roles_and_decay_of_every_kind():
    config = small.LORA.replace(modules_to_save=["head"], target_modules=["q_proj"], bias="none")
    base = {**small.base()["params"], "head": {"kernel": jnp.ones((6, 2)), "bias": jnp.ones(2)}}
    adapter = jaxadapt.init(base, config, key=jax.random.key(0))
    expected = {
        "q_proj": {"kernel": {"lora_A": "A", "lora_B": "B"}},
        "head": {"kernel": {"copy": "copy"}, "bias": {"copy": "bias"}},
    }
    assert optim.roles(adapter).params == expected
    labels = optim.roles(adapter.collection)
    node = labels["lora"]["default"].pop("~config")
    assert node == adapter.recipe
    assert labels == {"lora": {"default": expected}}
    decay = optim.decay_mask(adapter).params
    assert decay == {
        "q_proj": {"kernel": {"lora_A": True, "lora_B": True}},
        "head": {"kernel": {"copy": True}, "bias": {"copy": False}},
    }
    model = small.trained(small.IA3)
    assert set(jax.tree.leaves(optim.roles(model))) == {"vector"}
    assert not any(jax.tree.leaves(optim.decay_mask(model)))


def test_decay_mask_in_adamw_leaves_vectors_alone():
    model = small.trained(small.IA3)
    before = jaxadapt.extract(model).flat()
    tx = optax.adamw(1.0, weight_decay=0.5, mask=optim.decay_mask(model))
    optimizer = nnx.Optimizer(model, tx, wrt=jaxadapt.AdapterParam)
    zero = jax.tree.map(jnp.zeros_like, nnx.state(model, jaxadapt.AdapterParam))
    optimizer.update(model, zero)
    assert all((x == before[p]).all() for p, x in jaxadapt.extract(model).flat().items())


@pytest.mark.parametrize("rslora", [False, True])
def test_rates_by_rank_move_the_weight_as_rslora_does(rslora):
    """One signed step of size lr, as Adam's first: the change of s·B·A is the one of α'/√r."""
    config = small.LORA.replace(rank_pattern={"up_proj": 4}, use_rslora=rslora)
    adapter = small.adapter(config)
    tx = optax.chain(optax.scale(-1e-4), optim.scale_by_rank(adapter, reference=2))
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, adapter), tx.init(adapter), adapter)
    sizes = {p: float(abs(u).max()) for p, u in updates.flat().items()}
    factor = 1.0 if rslora else np.sqrt(2)
    assert sizes["q_proj.kernel.lora_A"] == pytest.approx(1e-4)
    assert sizes["up_proj.kernel.lora_A"] == sizes["up_proj.kernel.lora_B"] == pytest.approx(factor * 1e-4)


def test_schedules_and_other_optimizers():
    model = small.trained()
    rate = optax.linear_schedule(1.0, 0.5, 1)
    tx = optim.lora_plus(model, lambda lr, weight_decay: optax.sgd(lr), rate, 4)
    state = nnx.state(model, jaxadapt.AdapterParam)
    ones = jax.tree.map(jnp.ones_like, state)
    opt = tx.init(state)
    for expected in (1.0, 0.5):
        updates, opt = tx.update(ones, opt, state)
        flat = jax.tree.leaves_with_path(updates)
        sizes = {("A" if "lora_A" in jax.tree_util.keystr(p) else "B"): float(-x.max()) for p, x in flat}
        assert sizes == {"A": expected, "B": 4 * expected}


def test_bad_input():
    model = small.trained()
    with pytest.raises(ConfigError, match="ratio"):
        optim.lora_plus(model, optax.adamw, 1e-3, 0)
    for make, why in ((optax.adamw(1e-3), "not callable"), (optax.adam, "weight_decay")):
        with pytest.raises(ConfigError, match=f"^make: expected optax.adamw or a function that is called .*{why}"):
            optim.lora_plus(model, make, 1e-3, 16)
    for tree in (small.net(), small.variables(), small.base()["params"], 3):
        with pytest.raises(AttachError):
            optim.roles(tree)
    adapter = small.adapter()
    tx = optim.lora_fa(adapter, optax.sgd(1.0))
    with pytest.raises(ConfigError, match="needs the parameters"):
        tx.update(adapter, tx.init(adapter))


def test_lora_fa_and_tensors_of_the_whole_adapter():
    """They belong to no site: trained ones follow the inner optimizer, frozen ones are refused by name."""
    base = {"q": {"kernel": jnp.ones((8, 8))}}
    vera = jaxadapt.init(base, jaxadapt.VeraConfig(r=2, target_modules=["q"]), key=jax.random.key(0))
    with pytest.raises(ConfigError, match=r"default: vera_A is frozen\n  default: vera_B is frozen"):
        optim.lora_fa(vera, optax.sgd(1.0))
    config = jaxadapt.VBLoRAConfig(r=2, num_vectors=8, vector_length=4, target_modules=["q"])
    bank = jaxadapt.init(base, config, key=jax.random.key(0))
    tx = optim.lora_fa(bank, optax.sgd(1.0))
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, bank), tx.init(bank), bank)
    assert all((x == -1).all() for x in jax.tree.leaves(updates))


def test_what_the_riemannian_preconditioner_is_not_for():
    base, key = {"q": {"kernel": jnp.ones((4, 6))}}, jax.random.key(0)
    with pytest.raises(ConfigError, match="reg: expected a number of at least 0, found -1"):
        optim.riemannian(small.adapter(), optax.sgd(1.0), reg=-1)
    vera = jaxadapt.init(base, jaxadapt.VeraConfig(r=2, target_modules=["q"]), key=key)
    with pytest.raises(ConfigError, match="expected LoRA's matrices"):
        optim.riemannian(vera, optax.sgd(1.0))
    adalora = jaxadapt.init(base, jaxadapt.AdaLoraConfig(target_modules=["q"], total_step=9), key=key)
    with pytest.raises(ConfigError, match="not for experts in one array.*\\n.*default: q.kernel"):
        optim.riemannian(adalora, optax.sgd(1.0))
    tx = optim.riemannian(small.adapter(), optax.sgd(1.0))
    with pytest.raises(ConfigError, match="needs the parameters"):
        tx.update(small.adapter(), tx.init(small.adapter()))


def test_a_rank_of_nothing_is_no_reference():
    with pytest.raises(ConfigError, match="reference: expected a positive rank, found 0"):
        optim.scale_by_rank({}, reference=0)


def test_a_state_that_holds_the_base_too_is_refused():
    model = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
    jaxadapt.adapt(model := nnx.Sequential(model), jaxadapt.LoraConfig(r=2, target_modules=["0"]), rngs=nnx.Rngs(0))
    assert jax.tree.leaves(optim.roles(nnx.state(model, jaxadapt.AdapterParam))) == ["A", "B"]
    with pytest.raises(AttachError, match=r"(?s)nnx\.state\(model, jaxadapt\.AdapterParam\).*kernel: Param"):
        optim.roles(nnx.state(model))
