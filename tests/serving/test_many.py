"""Adapters trained side by side in a bank: each as alone, and nothing else moves."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxadapt
from jaxadapt import AttachError, serving
from tests.support import small

LORA = small.LORA.replace(r=3)
FIRST, SECOND = LORA.replace(lora_alpha=4), LORA.replace(r=2, target_modules=["q_proj"])
ROWS = np.array([1, 1, 2, 2, 0, 3])
X = np.random.default_rng(1).standard_normal((6, 4, 6)).astype("f4")
Y = np.random.default_rng(2).standard_normal((6, 4, 6)).astype("f4")


def adapters() -> list[jaxadapt.Adapter]:
    return [small.adapter(FIRST, 1), small.adapter(SECOND, 2), small.adapter(LORA, 3)]


@functools.cache
def empty(config) -> serving.Bank:
    return serving.create(small.base(), config, slots=4)


def filled() -> serving.Bank:
    bank = jax.tree.map(jnp.copy, empty(LORA))
    for slot, adapter in enumerate(adapters(), 1):
        bank = serving.put(bank, slot, adapter)
    return bank


@functools.cache
def trainer(tx: optax.GradientTransformation, config) -> tuple[Any, Any]:
    """The optimizer's `init`, and a compiled step for all banks of a configuration."""
    bank, base = empty(config), small.base()
    module, many = serving.attach(small.LinenNet(), bank), jaxadapt.optim.per_slot(tx, bank)

    @jax.jit
    def step(bank, state, active):
        def loss(bank):
            with serving.route(module, bank.select(ROWS)) as routed:
                errors = (routed.apply(base, X) - Y) ** 2
            return errors.mean((1, 2)).sum()  # every adapter's loss is that of its own rows

        updates, state = many.update(jax.grad(loss)(bank), state, bank, active=active)
        return optax.apply_updates(bank, updates), state

    return many.init, step


def train(bank: serving.Bank, active: list[bool], tx: optax.GradientTransformation, config=LORA) -> tuple[Any, Any]:
    init, step = trainer(tx, config)
    state = init(bank)
    for _ in range(5):
        bank, state = step(bank, state, jnp.array(active))
    return bank, state


ADAMW = optax.adamw(0.02, weight_decay=0.1, eps=1e-3)


def slot_values(bank: serving.Bank, slot: int) -> list[np.ndarray]:
    return [np.asarray(x[slot]) for x in jax.tree.leaves(bank)]


@pytest.mark.parametrize("tx", [ADAMW, optax.sgd(1e-3, momentum=0.9)])
def test_each_adapter_is_trained_as_alone(tx):
    together, _ = train(filled(), [True] * 4, tx)
    for slot in (1, 2, 3):
        only, _ = train(filled(), [n == slot for n in range(4)], tx)
        for found, want in zip(slot_values(together, slot), slot_values(only, slot), strict=True):
            np.testing.assert_array_equal(found, want)  # the same arithmetic: bit for bit
    # By NNX and the adapter's own parameters: float32 in another order of the same sums.
    like = adapters()[1]
    model = jaxadapt.adapt(small.net(), like.config, rngs=nnx.Rngs(0))
    jaxadapt.inject(model, like)
    optimizer = nnx.Optimizer(model, tx, wrt=jaxadapt.AdapterParam)

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            return ((model(X[2:4]) - Y[2:4]) ** 2).mean((1, 2)).sum()

        optimizer.update(model, nnx.grad(loss, argnums=nnx.DiffState(0, jaxadapt.AdapterParam))(model))

    for _ in range(5):
        step(model, optimizer)
    want, found = jaxadapt.extract(model).flat(), serving.get(together, 2, like).flat()
    assert found.keys() == want.keys()
    for path, x in want.items():
        np.testing.assert_allclose(found[path], x, rtol=1e-4, atol=1e-5)
        assert np.abs(x - like.flat()[path]).max() > 1e-3


def test_idle_slots_and_padding_do_not_move():
    before = filled()
    kept = {slot: slot_values(before, slot) for slot in range(4)}
    bank, state = train(before, [True, True, False, False], ADAMW)
    for slot in (0, 2, 3):
        for found, want in zip(slot_values(bank, slot), kept[slot], strict=True):
            np.testing.assert_array_equal(found, want)
    assert state[0].count.tolist() == [0, 5, 0, 0]
    assert any((a != b).any() for a, b in zip(slot_values(bank, 1), kept[1], strict=True))
    # Slot 2 has rank 2 of 3 and one of two targets: what it lacks stays zero.
    bank, _ = train(bank, [False, False, True, False], ADAMW)
    q, up = (arrays for arrays in bank.arrays)
    assert not np.asarray(q["lora_A"][2, 2:]).any()
    assert not np.asarray(q["lora_B"][2, :, 2:]).any()
    assert not any(np.asarray(up[name][2]).any() for name in up)
    np.testing.assert_array_equal(q["scale"][2], kept[2][2])


def test_vectors_of_ia3_train_only_where_an_adapter_has_them():
    ia3 = jaxadapt.IA3Config(target_modules=["q_proj", "up_proj"], feedforward_modules=["up_proj"])
    bank = serving.put(empty(ia3), 1, small.adapter(ia3.replace(target_modules=["q_proj"], feedforward_modules=[]), 1))
    bank, _ = train(bank, [True] * 4, optax.adam(0.1), ia3)
    q, up = bank.arrays
    assert not np.allclose(q["ia3_l"][1], small.adapter(ia3, 1).flat()["q_proj.kernel.ia3_l"])
    np.testing.assert_array_equal(up["ia3_l"], np.ones_like(up["ia3_l"]))


def test_a_trained_adapter_is_saved_as_any_other(tmp_path):
    bank, _ = train(filled(), [True] * 4, ADAMW)
    found = serving.get(bank, 2, adapters()[1])
    jaxadapt.save(found, tmp_path / "a")
    loaded = jaxadapt.load(tmp_path / "a", small.net())
    with serving.route(serving.attach(small.LinenNet(), bank), bank.select([2])) as routed:
        want = routed.apply(small.base(), X[:1])
    np.testing.assert_allclose(loaded(X[:1]), want, rtol=1e-5, atol=1e-5)


def test_what_cannot_be_trained_or_read():
    dora = small.LORA.replace(use_dora=True)
    bank = serving.create(small.base(), dora, slots=2)
    with pytest.raises(AttachError, match="cannot train a DoRA in a bank"):
        jaxadapt.optim.per_slot(optax.sgd(1.0), bank)
    adapter = small.adapter(dora)
    bank = serving.put(bank, 1, adapter, small.base())
    with pytest.raises(AttachError, match="does not hold the magnitude of a DoRA"):
        serving.get(bank, 1, adapter)
    with pytest.raises(AttachError, match="expected 1 to 1, found 0"):
        serving.get(bank, 0, adapter)
    with pytest.raises(AttachError, match="the bank has LORA"):
        serving.get(filled(), 1, small.adapter(jaxadapt.LoraConfig(r=2, target_modules=["q_proj"], use_dora=True)))
