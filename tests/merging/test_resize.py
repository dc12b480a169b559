"""`resize_rank` and `to_lora` beside numpy's SVD of the full ΔW."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

import jaxadapt
from jaxadapt import AttachError, ConfigError, MismatchError
from jaxadapt.merging import combination
from tests.merging.test_combine import FANCY, SHAPES, in_both
from tests.support import small

P = "base_model.model."


def deltas(adapter):
    """s·B·A by module, from the file's tensors, in float64."""
    peft, out = jaxadapt.to_peft(adapter), {}
    c = adapter.config
    for key in peft.tensors:
        if key.endswith(".lora_A.weight"):
            stem = key.removesuffix(".lora_A.weight")
            module = stem.removeprefix("base_model.model.")
            a, b = (np.asarray(peft.tensors[f"{stem}.lora_{x}.weight"], "float64") for x in "AB")
            alpha = next((v for k, v in c.alpha_pattern.items() if module.endswith(k)), c.lora_alpha)
            out[module] = alpha / (np.sqrt(len(a)) if c.use_rslora else len(a)) * b @ a
    return out


def best(w, r):
    """The best approximation of rank r, and its relative error."""
    u, s, vh = np.linalg.svd(w, full_matrices=False)
    return (u[:, :r] * s[:r]) @ vh[:r], np.sqrt((s[r:] ** 2).sum() / (s**2).sum())


PATTERNS = jaxadapt.LoraConfig(
    r=4, lora_alpha=5, use_rslora=True, target_modules=["q", "v", "o"], rank_pattern={"o": 2}, alpha_pattern={"q": 9}
)


@pytest.mark.parametrize("r", [1, 3, 4, 7])
@pytest.mark.parametrize("fancy", [False, True])
def test_every_module_gets_its_best_approximation(r, fancy):
    adapter = in_both(PATTERNS, 3)[fancy]
    new, error = jaxadapt.merging.resize_rank(adapter, r)
    assert (new.config.r, new.config.lora_alpha, new.config.use_rslora) == (r, r, False)
    assert not new.config.rank_pattern
    assert not new.config.alpha_pattern
    before, after = deltas(adapter), deltas(new)
    assert before.keys() == after.keys() == error.keys()
    for module, w in before.items():
        expected, cost = best(w, r)
        np.testing.assert_allclose(after[module], expected, rtol=1e-4, atol=1e-5 * abs(w).max(), err_msg=module)
        assert error[module] == pytest.approx(cost, abs=1e-5)
        assert (error[module] == 0) == (r >= (2 if module.endswith("o") else 4))
    lines = {p.rpartition(".")[0] for p in new.flat()}
    assert lines == {p.rpartition(".")[0] for p in adapter.flat()}


def test_the_one_rank_form_runs_as_before_where_patterns_are_not_read(tmp_path):
    """Scale alpha/r and one rank is what llama.cpp, TGI and sglang compute, whatever the configuration says."""
    config = small.LORA.replace(use_rslora=True, rank_pattern={"up_proj": 3}, alpha_pattern={"q_proj": 5})
    model = small.trained(config)
    baked, error = jaxadapt.merging.to_lora(jaxadapt.extract(model))
    assert set(error.values()) == {0.0}
    assert {a.shape for p, a in baked.flat().items() if p.endswith("_A")} == {(3, 6), (3, 8)}
    jaxadapt.save(baked, tmp_path)
    again = jaxadapt.load(tmp_path, small.net())
    np.testing.assert_allclose(again(small.X), model(small.X), rtol=1e-5, atol=1e-6)


def test_padding_with_a_key_can_be_trained():
    adapter = small.adapter()
    plain, _ = jaxadapt.merging.resize_rank(adapter, 4)
    drawn, _ = jaxadapt.merging.resize_rank(adapter, 4, key=jax.random.key(0))
    for module, w in deltas(adapter).items():
        np.testing.assert_allclose(deltas(plain)[module], w, rtol=1e-6)
        np.testing.assert_allclose(deltas(drawn)[module], w, rtol=1e-6)
    base = small.base()["params"]

    def loss(adapter):
        return jnp.sum(small.LinenNet().apply({"params": jaxadapt.merge(base, adapter)}, small.X) ** 2)

    def new_columns(adapter):
        return abs(np.asarray(jax.grad(loss)(adapter).params["q_proj"]["kernel"]["lora_B"][:, 2:])).max()

    assert new_columns(plain) == 0
    assert new_columns(drawn) > 1e-3
    a = np.asarray(drawn.params["q_proj"]["kernel"]["lora_A"][2:])
    assert 0.2 / np.sqrt(6) < abs(a).max() <= 1 / np.sqrt(6)
    # What is drawn belongs to a weight, in whatever order a tree has them.
    turned = dataclasses.replace(adapter, params=dict(reversed(adapter.params.items())))
    other, _ = jaxadapt.merging.resize_rank(turned, 4, key=jax.random.key(0))
    assert small.same(other.params, drawn.params)


def test_no_weight_sized_array_is_made():
    base = {"q": {"kernel": jax.ShapeDtypeStruct((64, 96), "float32")}}
    adapter = jaxadapt.init(base, jaxadapt.LoraConfig(r=4, target_modules=["q"]), key=jax.random.key(0))
    jaxpr = jax.make_jaxpr(lambda a: jaxadapt.merging.resize_rank(a, 2))(adapter)
    sizes = {v.aval.size for v in all_vars(jaxpr.jaxpr)}
    assert max(sizes) < 64 * 96


def all_vars(jaxpr):
    for eqn in jaxpr.eqns:
        yield from eqn.outvars
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from all_vars(inner)


@pytest.mark.parametrize("r", [2, 6])
def test_a_lora_of_a_difference(r):
    """Full fine-tuning to LoRA; what is not targeted is reported, not dropped silently."""
    rng = np.random.default_rng(0)
    base = jax.tree.map(np.asarray, small.base()["params"])
    tuned = jax.tree.map(lambda x: (x + rng.standard_normal(x.shape)).astype("f4"), base)
    tuned["up_proj"]["bias"] = base["up_proj"]["bias"]
    adapter, error = jaxadapt.merging.to_lora((base, tuned), r, target_modules=["q_proj", "up_proj"])
    assert set(error) == {"q_proj", "up_proj", "q_proj.bias"}
    assert error["q_proj.bias"] == 1
    for name in ("q_proj", "up_proj"):
        expected, cost = best((tuned[name]["kernel"] - base[name]["kernel"]).astype("f8").T, r)
        np.testing.assert_allclose(deltas(adapter)[name], expected, rtol=1e-4, atol=1e-5)
        assert error[name] == pytest.approx(cost, abs=1e-5)
    models = [small.net(), small.net(1)]
    again, _ = jaxadapt.merging.to_lora(models, 6, target_modules="all-linear")
    merged = jaxadapt.merge(small.base(0)["params"], again)
    for name in ("q_proj", "up_proj"):
        np.testing.assert_allclose(merged[name]["kernel"], getattr(models[1], name).kernel[...], atol=1e-5)


def test_a_lora_of_a_difference_in_other_layouts():
    rng = np.random.default_rng(0)
    base, tuned = (jax.tree.map(lambda x: rng.standard_normal(x.shape).astype("f4"), SHAPES["fancy"]) for _ in "ab")
    adapter, error = jaxadapt.merging.to_lora((base, tuned), 2, target_modules=["q", "v"], keymap=FANCY)
    assert error["o"] == 1
    k_and_v = {f"h.{l}.v": tuned["kv"][l, 1, 0].T - base["kv"][l, 1, 0].T for l in range(3)}
    change = 2 * (tuned["q"] - base["q"]).reshape(6, 3, 2, 2, 2).swapaxes(3, 4)
    q = {f"h.{l}.q": change[:, l].reshape(6, 8).T for l in range(3)}
    for module, w in (k_and_v | q).items():
        np.testing.assert_allclose(deltas(adapter)[module], best(w.astype("f8"), 2)[0], rtol=1e-4, atol=1e-5)


def test_ia3_becomes_a_lora_or_says_why_not():
    config = jaxadapt.IA3Config(target_modules=["q_proj", "up_proj"], feedforward_modules=["q_proj", "up_proj"])
    model = small.trained(config)
    adapter = jaxadapt.extract(model)
    base = small.base()["params"]
    lora, error = jaxadapt.merging.to_lora(adapter, 6, params=base)
    assert max(error.values()) < 1e-5
    np.testing.assert_allclose(
        small.LinenNet().apply({"params": jaxadapt.merge(base, lora)}, small.X), model(small.X), rtol=1e-4, atol=1e-5
    )
    assert lora.config.peft_type == "LORA"
    biased = small.noisy(jaxadapt.init(base, small.IA3, key=jax.random.key(0)))
    ones = jax.tree.map(jnp.ones_like, base)
    with pytest.raises(ConfigError, match=r"q_proj\.bias"):  # outputs scaled, bias included
        jaxadapt.merging.to_lora(biased, 4, params=ones)
    jaxadapt.merging.to_lora(biased, 4, params=base)  # where biases are zero, nothing of them changes


def test_bad_input():
    adapter = small.adapter()
    for r in (0, -1, 2.0, True):
        with pytest.raises(ConfigError, match="positive integer"):
            jaxadapt.merging.resize_rank(adapter, r)
    with pytest.raises(ConfigError, match="to_lora"):
        jaxadapt.merging.resize_rank(small.adapter(small.IA3), 2)
    with pytest.raises(ConfigError, match="pass r \\(the rank\\)"):
        jaxadapt.merging.to_lora(small.adapter(small.IA3), params=small.base()["params"])
    with pytest.raises(AttachError, match="pass params=base"):
        jaxadapt.merging.to_lora(small.adapter(small.IA3), 2)
    with pytest.raises(AttachError, match="a pair"):
        jaxadapt.merging.to_lora(small.base(), 2)
    base = small.base()["params"]
    with pytest.raises(MismatchError, match=r"q_proj\.bias"):
        jaxadapt.merging.to_lora((base, {**base, "q_proj": {"kernel": base["q_proj"]["kernel"]}}), 2)
    with pytest.raises(AttachError, match="expected an Adapter"):
        jaxadapt.merging.resize_rank(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), 2)


PREFIXED = jaxadapt.KeyMap(
    "mine", (jaxadapt.Weight("h.{l}.q", "h.{l}.q.weight", "i o -> o i"),), prefix="base_model.model.lm."
)


def test_names_of_modules_are_without_a_keymaps_own_prefix():
    base = {"h": {"0": {"q": np.zeros((4, 6), "f4")}}}
    tuned = {"h": {"0": {"q": np.random.default_rng(0).standard_normal((4, 6)).astype("f4")}}}
    adapter, error = jaxadapt.merging.to_lora((base, tuned), 4, target_modules=["q"], keymap=PREFIXED)
    assert set(error) == {"h.0.q"}
    assert set(jaxadapt.merging.resize_rank(adapter, 2).error) == {"h.0.q"}
    np.testing.assert_allclose(jaxadapt.merge(base, adapter)["h"]["0"]["q"], tuned["h"]["0"]["q"], atol=1e-5)


def test_a_difference_of_convolutions_is_refused():
    line = jaxadapt.Weight("c.kernel", "c.weight", "h w i o -> o i h w", kind="conv")
    base, tuned = ({"c": {"kernel": np.full((2, 3, 4, 5), x, "f4")}} for x in (0, 1))
    with pytest.raises(jaxadapt.ConfigError, match=r"expected one pair of matrices(.|\n)*c\.kernel"):
        jaxadapt.merging.to_lora((base, tuned), 2, target_modules=["c"], keymap=jaxadapt.KeyMap("mine", (line,)))


def test_resize_takes_keys_with_a_name_and_8_bits_and_leaves_copies_of_the_base_out():
    rng = np.random.default_rng(0)
    config = jaxadapt.LoraConfig(r=2, lora_alpha=3, target_modules=["q"])
    plain = {
        f"{P}q.lora_{side}.weight": rng.standard_normal(shape, "f4") for side, shape in (("A", (2, 3)), ("B", (4, 2)))
    }
    named = {key.replace(".weight", ".default.weight"): x for key, x in plain.items()}
    wanted, _ = combination.resize_rank(jaxadapt.PeftTensors(config, plain), 4)
    with pytest.warns(UserWarning, match="'default' is removed from its 2 keys"):
        found, _ = combination.resize_rank(jaxadapt.PeftTensors(config, named), 4)
    assert found.tensors.keys() == plain.keys()
    for key, x in wanted.tensors.items():
        np.testing.assert_array_equal(found.tensors[key], x)
    narrow = {key: x.astype(ml_dtypes.float8_e4m3fn) for key, x in plain.items()}
    resized, _ = combination.resize_rank(jaxadapt.PeftTensors(config, narrow), 4)
    assert {x.dtype.name for x in resized.tensors.values()} == {"float32"}
    copies = plain | {f"{P}q.base_layer.weight": np.ones((4, 3), "f4")}
    with pytest.warns(UserWarning, match="leaves out these copies of base weights"):
        resized, _ = combination.resize_rank(jaxadapt.PeftTensors(config, copies), 4)
    assert resized.tensors.keys() == plain.keys()


HUGE = 99_999_999_999


@pytest.mark.parametrize("way", ["resize", "pair", "factors", "change", "combine"])
def test_a_rank_that_would_fill_the_memory_is_refused_before_anything_is_allocated(way: str):
    base = {"q": {"kernel": jnp.ones((4, 6))}, "v": {"kernel": jnp.ones((8, 12))}}
    lora = jaxadapt.LoraConfig(r=3, target_modules=["q", "v"], init_lora_weights=False)
    adapter, vera, hra = (
        jaxadapt.init(base, config, key=jax.random.key(0))
        for config in (
            lora,
            *(kind(r=2, target_modules=["q", "v"]) for kind in (jaxadapt.VeraConfig, jaxadapt.HRAConfig)),
        )
    )
    calls = {
        "resize": lambda: combination.resize_rank(adapter, HUGE),
        "pair": lambda: combination.to_lora((base, jax.tree.map(lambda x: x + 1, base)), HUGE),
        "factors": lambda: combination.to_lora(vera, HUGE, params=base),
        "change": lambda: combination.to_lora(hra, HUGE, params=base),
        "combine": lambda: jaxadapt.combine([adapter, adapter], [1, 1], method="svd", svd_rank=HUGE),
    }
    with pytest.raises(ConfigError, match=rf"rank: expected at most \d+, found {HUGE}; no change .* above 8"):
        calls[way]()


def test_a_rank_above_the_sizes_of_the_weights_still_pads():
    """Some programs take a few ranks only, and a head has few outputs."""
    base = {"head": {"kernel": jnp.ones((16, 2))}}
    config = jaxadapt.LoraConfig(r=3, target_modules=["head"], init_lora_weights=False)
    adapter = jaxadapt.init(base, config, key=jax.random.key(0))
    larger, error = combination.resize_rank(adapter, 64)
    assert (larger.config.r, error) == (64, {"head": 0.0})
    np.testing.assert_allclose(deltas(larger)["head"], deltas(adapter)["head"], rtol=1e-6)
