"""What a banked model compiles to: its FLOPs, and that it lowers for platforms that are not here."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from flax import nnx

import jaxadapt
from benchmarks.methods import dot_flops
from jaxadapt import serving
from jaxadapt.demo.llama import PROJECTIONS, Llama, LlamaConfig

RANK, ROWS, TOKENS, LAYERS = 4, 6, 5, 2
SIZES = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_heads": 4, "num_kv_heads": 2}


@pytest.fixture(scope="module")
def banked():
    model = Llama(LlamaConfig(num_layers=LAYERS, head_dim=4, **SIZES), rngs=nnx.Rngs(0))
    bank = serving.create(model, jaxadapt.LoraConfig(r=RANK, target_modules=list(PROJECTIONS)), slots=4)
    plain = nnx.split(nnx.clone(model))
    serving.attach(model, bank)
    graphdef, state = nnx.split(model)

    def step(state, rows, ids):
        with serving.route(nnx.merge(graphdef, state), rows) as routed:
            return routed(ids)

    return bank, step, state, plain


IDS = np.zeros((ROWS, TOKENS), np.int32)


@pytest.mark.parametrize("implementation", ["gather", "layer", "mask", jax.lax.ragged_dot])
@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_a_routed_call_lowers_for_other_platforms(banked, platform, implementation):
    bank, step, state, _ = banked
    rows = bank.select(np.arange(ROWS) % 4, implementation=implementation)
    leaves, structure = jax.tree.flatten((state, rows, IDS))
    exported = jax.export.export(
        jax.jit(lambda *leaves: step(*jax.tree.unflatten(structure, leaves))), platforms=[platform]
    )(*leaves)
    assert exported.platforms == (platform,)
    assert exported.out_avals[0].shape == (ROWS, TOKENS, SIZES["vocab_size"])


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_put_and_select_lower_for_other_platforms(banked, platform):
    bank = banked[0]
    rows = serving.prepare(bank, None)

    def write(arrays, rows, slot):
        return serving.bank.write(arrays, bank.layout, rows, slot, {})

    def select(arrays, ids):
        return serving.Bank(arrays, bank.layout).select(ids).arrays

    calls = (write, (bank.arrays, rows, np.int32(1))), (select, (bank.arrays, np.zeros(3, np.int32)))
    for function, arguments in calls:
        assert jax.export.export(jax.jit(function), platforms=[platform])(*arguments).platforms == (platform,)


@pytest.mark.parametrize(("implementation", "slots"), [("gather", 1), ("layer", 1), ("mask", 4)])
def test_the_flops_are_those_of_the_formula(banked, implementation, slots):
    """A row's adapter adds 2·r·(in + out) FLOPs a token and site; a mask computes all slots."""
    bank, step, state, (graphdef, plain) = banked
    rows = bank.select(np.arange(ROWS) % 4, implementation=implementation)
    base = dot_flops(jax.make_jaxpr(lambda state: nnx.merge(graphdef, state)(IDS))(plain).jaxpr)
    total = dot_flops(jax.make_jaxpr(step)(state, rows, IDS).jaxpr)
    d, f, kv = SIZES["hidden_size"], SIZES["intermediate_size"], 8
    sizes = {"q": d + d, "k": d + kv, "v": d + kv, "o": d + d, "gate": d + f, "up": d + f, "down": f + d}
    formula = 2 * RANK * sum(sizes.values()) * LAYERS * ROWS * TOKENS * slots
    assert total - base == pytest.approx(formula, rel=0.05)


def test_gathering_has_no_products(banked):
    bank = banked[0]
    jaxpr = jax.make_jaxpr(lambda bank: bank.select(np.arange(3)).arrays)(bank).jaxpr
    assert dot_flops(jaxpr) == 0
