"""Gemma's layers under the wrapper: fixtures of the same layout, and the real ones if gemma is installed."""

from __future__ import annotations

import types
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxadapt
from tests.support.twins import layers, layers_linen

KEY = jax.random.key(0)
HEADS, KV, WIDTH, DIM, HIDDEN, R, SCALE = 4, 2, 8, 2, 24, 4, 2.0  # the fixture's
CONFIG = {"r": R, "lora_alpha": R * SCALE}


def fixture(kind: str) -> tuple[nn.Module, tuple[Any, ...]]:
    x = jax.random.normal(jax.random.key(7), (2, 16, WIDTH))
    if kind == "mlp":
        return layers_linen.FeedForward(WIDTH, HIDDEN), (x,)
    return layers_linen.Attention(), (x,)


def real(kind: str) -> tuple[nn.Module, tuple[Any, ...]]:
    modules: types.ModuleType = pytest.importorskip("gemma.gm.nn._modules")
    x = jax.random.normal(jax.random.key(7), (2, 16, WIDTH))
    if kind == "mlp":
        return modules.FeedForward(WIDTH, HIDDEN, False), (x,)
    attention = modules.Attention(
        num_heads=HEADS, num_kv_heads=KV, features=WIDTH, head_dim=DIM,
        attn_type=modules.AttentionType.GLOBAL, query_pre_attn_scalar=DIM**-0.5,
    )  # fmt: skip
    positions = jnp.broadcast_to(jnp.arange(16), (2, 16))
    return attention, (x, positions, None, jnp.ones((2, 16, 16), bool))


SOURCES = pytest.mark.parametrize("source", [fixture, real], ids=["fixture", "real"])
LEAVES = {"mlp": ("gating_einsum", "linear"), "attention": ("q_einsum.w", "kv_einsum.w", "attn_vec_einsum.w")}
TARGETS = {"mlp": ["gating_einsum", "linear"], "attention": ["q_einsum", "kv_einsum", "attn_vec_einsum"]}


class ByHand(nn.Module):
    """A layer with handwritten LoRA; `down` and `up` are the equations of its two small products."""

    shape: tuple[int, ...]
    a: tuple[int, ...]
    b: tuple[int, ...]
    down: str
    up: str

    @nn.compact
    def __call__(self, equation: str, x: jax.Array) -> jax.Array:
        w = self.param("w", nn.initializers.normal(), self.shape)
        a = self.variable("lora", "a", jnp.ones, self.a).value
        b = self.variable("lora", "b", jnp.ones, self.b).value
        return jnp.einsum(equation, x, w) + jnp.einsum(self.up, jnp.einsum(self.down, x, a) * SCALE, b)


def by_hand(kind: str, module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the replacements of gemma's Einsum for each call, in order."""
    if kind == "mlp":
        gate = ByHand((2, WIDTH, HIDDEN), (WIDTH, R), (R, 2, HIDDEN), "btf,fr->btr", "btr,rnh->btnh")
        return [gate, ByHand((HIDDEN, WIDTH), (HIDDEN, R), (R, WIDTH), "bth,hr->btr", "btr,rf->btf")]
    q = ByHand((HEADS, WIDTH, DIM), (WIDTH, R), (R, HEADS, DIM), "btd,dr->btr", "btr,rnh->btnh")
    kv = ByHand((2, KV, WIDTH, DIM), (WIDTH, R), (R, 2, KV, DIM), "bsd,dr->bsr", "bsr,rckh->cbskh")
    out = ByHand((HEADS, DIM, WIDTH), (HEADS, DIM, R), (R, WIDTH), "btnh,nhr->btr", "btr,rd->btd")
    return [q, kv, out]


class Replaced(nn.Module):
    """Return the module with its einsum layers replaced by an interceptor without jaxadapt."""

    kind: str
    inside: nn.Module

    @nn.compact
    def __call__(self, *args: Any) -> Any:
        hand = [m.copy(name=f"hand_{i}") for i, m in enumerate(by_hand(self.kind, self.inside))]
        calls = iter(hand)

        def swap(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
            if type(context.module).__name__ in ("OwnEinsum", "Einsum") and context.method_name == "__call__":
                return next(calls)(*args)
            return next_fun(*args, **kwargs)

        with nn.intercept_methods(swap):
            return self.inside(*args)


def output(y: Any) -> jax.Array:
    return y[1] if isinstance(y, tuple) else y


def flops(module: Any, variables: Any, args: tuple[Any, ...]) -> float:
    """Return the FLOPs of the compiled gradient with respect to the adapter."""
    base = {c: t for c, t in variables.items() if c != "lora"}

    def loss(lora: Any, base: Any, *args: Any) -> jax.Array:
        return output(module.apply({**base, "lora": lora}, *args)).sum()

    arrays = [a for a in args if a is not None]
    where = [i for i, a in enumerate(args) if a is not None]

    def step(lora: Any, base: Any, arrays: Any) -> Any:
        full: list[Any] = [None] * len(args)
        for i, a in zip(where, arrays, strict=True):
            full[i] = a
        return jax.value_and_grad(loss)(lora, base, *full)

    cost = jax.jit(step).lower(variables["lora"], base, arrays).compile().cost_analysis()
    return (cost[0] if isinstance(cost, list) else cost)["flops"]


def random(tree: Any) -> Any:
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda a: (0.2 * rng.standard_normal(a.shape)).astype(a.dtype), tree)


@pytest.mark.usefixtures("foreign_model")
@SOURCES
@pytest.mark.parametrize("kind", ["mlp", "attention"])
def test_adapts_equals_merged_and_costs_what_hand_written_costs(source, kind):
    module, args = source(kind)
    # One layer of gemma alone is no model of a family.
    model = jaxadapt.adapt(module, jaxadapt.LoraConfig(**CONFIG, target_modules=TARGETS[kind]), keymap="generic")
    variables = model.init(KEY, *args)
    assert set(jaxadapt.extract(variables).sites) == set(LEAVES[kind])
    variables = {**variables, "lora": random(variables["lora"])}
    merged = jaxadapt.merge(variables["params"], jaxadapt.extract(variables))
    got, want = model.apply(variables, *args), module.apply({"params": merged}, *args)
    np.testing.assert_allclose(output(got), output(want), rtol=1e-5, atol=1e-5)

    hand = Replaced(kind, module)
    theirs = hand.init(KEY, *args)
    assert sum(a.size for a in jax.tree.leaves(theirs["lora"])) == sum(
        a.size for a in jax.tree.leaves(variables["lora"])
    )
    mine, written = flops(model, variables, args), flops(hand, theirs, args)
    assert mine <= 1.002 * written, (mine, written)


FUSED = jaxadapt.KeyMap(
    "gemma-like",
    (
        jaxadapt.Weight("layer_{l}.attn.q_einsum.w", "layers.{l}.q_proj.weight", "n d h -> (n h) d"),
        jaxadapt.Weight(
            "layer_{l}.attn.kv_einsum.w", "layers.{l}.{p}_proj.weight", "{p} n d h -> (n h) d", p=("k", "v")
        ),
        jaxadapt.Weight("layer_{l}.attn.attn_vec_einsum.w", "layers.{l}.o_proj.weight", "n h d -> d (n h)"),
        jaxadapt.Weight(
            "layer_{l}.mlp.gating_einsum", "layers.{l}.{p}_proj.weight", "{p} d h -> h d", p=("gate", "up")
        ),
        jaxadapt.Weight("layer_{l}.mlp.linear", "layers.{l}.down_proj.weight", "h d -> d h"),
    ),
)


@pytest.mark.parametrize("targets", [["v_proj"], ["k_proj", "v_proj"], ["q_proj", "v_proj", "up_proj", "down_proj"]])
@pytest.mark.parametrize("method", ["LORA", "IA3"])
def test_fused_parts(targets, method):
    """k and v are parts of one leaf: a targeted part has its own matrices, the other part is unchanged."""
    if method == "LORA":
        config: Any = jaxadapt.LoraConfig(**CONFIG, target_modules=targets)
    else:
        config = jaxadapt.IA3Config(
            target_modules=targets, feedforward_modules=[t for t in targets if t == "down_proj"]
        )
    module = layers_linen.GemmaStack()
    model = jaxadapt.adapt(module, config, keymap=FUSED)
    variables = model.init(KEY, layers.x())
    fresh = model.apply(variables, layers.x())
    np.testing.assert_allclose(fresh, module.apply({"params": variables["params"]}, layers.x()), rtol=1e-6, atol=1e-6)
    collection = method.lower()
    variables = {**variables, collection: random(variables[collection])}
    adapter = jaxadapt.extract(variables)
    kv = adapter.sites["layer_0.attn.kv_einsum.w"]
    parts = sum(p in targets for p in ("k_proj", "v_proj"))
    if method == "LORA":
        assert kv["lora_A"].shape == (parts, R, 8)
        assert kv["lora_B"].shape == (parts, 2, 2, R)
    else:
        assert kv["ia3_l"].shape == (parts, 2, 2)
    merged = jaxadapt.merge(variables["params"], adapter)
    for part, name in enumerate(("k_proj", "v_proj")):
        for layer in ("layer_0", "layer_1"):
            before, after = (p[layer]["attn"]["kv_einsum"]["w"][part] for p in (variables["params"], merged))
            assert bool((before == after).all()) == (name not in targets)
    got, want = model.apply(variables, layers.x()), module.apply({"params": merged}, layers.x())
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    keys = jaxadapt.to_peft(variables).tensors
    assert {key.split(".")[-3 if method == "LORA" else -2] for key in keys} == set(targets)
    back = jaxadapt.from_peft(jaxadapt.to_peft(variables), variables)
    jax.tree.map(np.testing.assert_array_equal, dict(back.params), dict(adapter.params))
    # Parts that are not targeted equal the base exactly, in the running model too.
    if targets == ["v_proj"]:
        (ours,), (base,) = (
            m.apply(v, layers.x(), capture_intermediates=True, mutable=["intermediates"])[1]["intermediates"][
                "layer_0"
            ]["attn"]["kv_einsum"]["__call__"]
            for m, v in ((model, variables), (module, {"params": variables["params"]}))
        )
        np.testing.assert_array_equal(ours[0], base[0])
        assert abs(ours[1] - base[1]).max() > 1e-3
