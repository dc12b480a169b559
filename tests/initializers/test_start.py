"""`start` without PEFT: what must hold of every beginning, and what is refused."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxadapt
from jaxadapt import AttachError, ConfigError, MismatchError
from jaxadapt.initializers import Batches, kinds
from tests.support import small


def config(kind, **more):
    return small.LORA.replace(init_lora_weights=kind, **more)


def linen_output(started, config):
    variables = {"params": started.base, **started.adapter.collection}
    return jaxadapt.adapt(small.LinenNet(), config).apply(variables, small.X)


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("kind", [True, "gaussian", "pissa", "pissa_niter_4", "olora", "orthogonal"])
def test_base_and_adapter_together_are_what_the_base_was(kind, use_dora):
    base = small.base()["params"]
    expected = small.LinenNet().apply({"params": base}, small.X)
    made = config(kind, use_dora=use_dora)
    started = jaxadapt.initializers.start(base, made, key=jax.random.key(0))
    np.testing.assert_allclose(linen_output(started, made), expected, rtol=1e-5, atol=1e-5)
    model = small.net()
    assert jaxadapt.initializers.start(model, made, key=jax.random.key(0)).base is model
    np.testing.assert_allclose(model(small.X), expected, rtol=1e-5, atol=1e-5)
    changes = kind in ("pissa", "pissa_niter_4", "olora")
    same = all(x is y for x, y in zip(jax.tree.leaves(started.base), jax.tree.leaves(base), strict=True))
    assert same is not changes
    assert small.same(base, small.base()["params"])  # the caller's own tree is never changed


def test_a_16_bit_base_is_rounded_once():
    base = jax.tree.map(lambda x: x.astype("bfloat16"), small.base()["params"])
    left, adapter = jaxadapt.initializers.start(base, config("pissa"))
    w = np.asarray(base["q_proj"]["kernel"], "float32")
    a, b = (np.asarray(adapter.flat()[f"q_proj.kernel.lora_{x}"]) for x in "AB")
    np.testing.assert_array_equal(left["q_proj"]["kernel"], jnp.asarray(w - 3 * (b @ a).T).astype("bfloat16"))
    assert a.dtype == "float32"


def test_statistics_are_computed_in_flaxs_tree_mode_too():
    given = {"key": jax.random.key(0), "data": Batches([small.X])}
    expected = jaxadapt.initializers.start(small.net(), config("corda"), **given).adapter
    with nnx.set_graph_mode(False):
        found = jaxadapt.initializers.start(small.net(), config("corda"), **given).adapter
    assert small.same(found.flat(), expected.flat())


def test_doras_magnitudes_lie_as_the_outputs_of_the_base():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("model",))
    cut = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "model"))
    params = small.base()["params"]
    base = {name: {**own, "kernel": jax.device_put(own["kernel"], cut)} for name, own in params.items()}
    _, adapter = jaxadapt.initializers.start(base, config("pissa", use_dora=True))
    held = {path.rpartition(".")[2]: x.sharding.spec for path, x in adapter.flat().items()}
    assert held["lora_magnitude_vector"] == jax.sharding.PartitionSpec("model")
    assert held["lora_B"] == jax.sharding.PartitionSpec("model", None)


def test_orthogonal_factors_are_not_zero_and_their_product_is():
    _, adapter = jaxadapt.initializers.start(small.base()["params"], config("orthogonal"), key=jax.random.key(0))
    a, b = (np.asarray(adapter.flat()[f"q_proj.kernel.lora_{x}"]) for x in "AB")
    assert abs(a).min() > 0
    assert abs(b).min() > 0
    np.testing.assert_allclose(b @ a, 0, atol=1e-8)


@pytest.mark.parametrize("shape", [(9, 6), (6, 9)])
def test_the_randomized_svd_is_exact_with_as_many_vectors_as_the_matrix_has(shape):
    w = np.random.default_rng(0).standard_normal(shape).astype("float32")
    u, s, vh = kinds.svd_lowrank(w, 2, jax.random.normal(jax.random.key(0), (6, 6)))
    np.testing.assert_allclose((u * s[None]) @ vh, w, atol=1e-5)
    np.testing.assert_allclose(s, np.linalg.svd(w)[1], rtol=1e-5)


@pytest.mark.parametrize(
    ("made", "given", "error", "says"),
    [
        (config("pissa", r=7), {}, ConfigError, r"q_proj.kernel: rank 7 exceeds 6, the most for 8 x 6"),
        (config("orthogonal", r=3), {"key": 0}, ConfigError, "expected an even rank, found 3"),
        (config("pissa", lora_alpha=-2), {}, ConfigError, r"positive scale, .*found -1.0"),  # PEFT's are NaN
        (config("pissa_niter_4", lora_alpha=0), {"key": 0}, ConfigError, "positive scale"),
        (config("loftq", lora_alpha=0, loftq_config={"loftq_bits": 4}), {}, ConfigError, "positive scale"),
        (config("pissa_niter_4"), {}, AttachError, "key is needed"),
        (config("corda"), {}, AttachError, "data is needed: jaxadapt.initializers.Batches"),
        (config("lora_ga"), {"key": 0}, AttachError, "data is needed: the gradients"),
        (config("pissa"), {"data": {}}, AttachError, "data has no effect"),
        (config("eva"), {"data": Batches([1])}, AttachError, "forward= is required for bare parameters"),
        (config("eva"), {"data": [1]}, AttachError, r"data: expected jaxadapt.initializers.Batches.*, found list"),
        (config("lora_ga"), {"key": 0, "data": Batches([1])}, AttachError, "data: expected the gradients"),
        (config("corda"), {"data": Batches([1], len, len)}, AttachError, "mask has no effect"),
        (config("mica", r=7), {}, ConfigError, r"rank 7 exceeds 6"),
        (config(True, kasa_config={}), {}, AttachError, "kasa_config: key is needed"),
        (config("loftq", loftq_config={"loftq_bits": 3}), {}, ConfigError, "expected 4 or 8 bits"),
        (config("loftq", loftq_config={"loftq_bits": 4, "iter": 2}), {}, ConfigError, "unknown iter"),
        (config("lora_ga"), {"key": 0, "data": {"q_proj": {}}}, MismatchError, "q_proj.kernel, found none"),
        (small.IA3, {}, AttachError, "IA3Config: key is needed"),
        (small.IA3, {"key": 0, "data": Batches([1])}, AttachError, "IA3Config: data has no effect"),
        ({"r": 2}, {}, ConfigError, r"expected a configuration such as .*, found dict.*start\(model, config\)"),
    ],
    ids=str,
)
def test_what_cannot_be_had_is_refused(made, given, error, says):
    given = {k: jax.random.key(v) if k == "key" else v for k, v in given.items()}
    with pytest.raises(error, match=says):
        jaxadapt.initializers.start(small.base()["params"], made, **given)


def test_what_is_left_of_a_weight_is_not_rounded_to_8_bits():
    base = jax.tree.map(lambda x: x.astype("float8_e4m3fn"), small.base()["params"])
    with pytest.raises(ConfigError, match="q_proj.kernel: dtype float8_e4m3fn would round"):
        jaxadapt.initializers.start(base, config("pissa"))
    assert jaxadapt.initializers.start(base, config("mica")).base is base


def test_adapt_and_init_name_start():
    with pytest.raises(ConfigError, match=r"jaxadapt.initializers.start\(base, config"):
        jaxadapt.init(small.base()["params"], config("pissa"), key=jax.random.key(0))


@pytest.mark.parametrize("more", [{"init_lora_weights": "pissa", "use_dora": True}, {"kasa_config": {}}])
def test_a_lora_of_a_change_from_a_changed_base_is_not_one_of_the_original(more):
    base = small.base()["params"]
    left, adapter = jaxadapt.initializers.start(base, small.LORA.replace(**more), key=jax.random.key(0))
    for given in (left, base):
        with pytest.raises(ConfigError, match=r"pass \(original, merged\)"):
            jaxadapt.merging.to_lora(adapter, 4, params=given)
    tuned = jaxadapt.merge(left, small.noisy(adapter))
    plain, error = jaxadapt.merging.to_lora((base, tuned), 6, target_modules=small.LORA.target_modules)
    assert max(error.values()) < 1e-5
    for found, expected in zip(jax.tree.leaves(jaxadapt.merge(base, plain)), jax.tree.leaves(tuned), strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_conversion_refuses_what_is_no_product():
    base = small.base()["params"]
    _, first = jaxadapt.initializers.start(base, config("pissa", use_dora=True))
    with pytest.raises(ConfigError, match="use_dora"):
        jaxadapt.initializers.for_original_base(first, first)
    _, first = jaxadapt.initializers.start(base, config("pissa", use_rslora=True, rank_pattern={"q_proj": 1}))
    with pytest.raises(ConfigError, match="use_rslora with rank_pattern"):
        jaxadapt.initializers.for_original_base(first, first)
    _, first = jaxadapt.initializers.start(base, config(False), key=jax.random.key(0))
    with pytest.raises(ConfigError, match="init_lora_weights=False: .*did not change the base; nothing to undo"):
        jaxadapt.initializers.for_original_base(first, first)  # it is for this base, B₀·A₀ included
    _, first = jaxadapt.initializers.start(base, config("pissa"))
    _, other = jaxadapt.initializers.start(base, config("olora"))
    with pytest.raises(MismatchError, match="configuration"):
        jaxadapt.initializers.for_original_base(first, other)
