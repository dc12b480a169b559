"""Merging: the effective weight in the base's own tree, against W + s·B·A and W·l written out."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from flax.core import FrozenDict, freeze

import jaxadapt
from jaxadapt import AttachError, KeyMap, MismatchError, Weight
from jaxadapt.adapters import selection
from jaxadapt.merging import factors
from tests.support import small
from tests.support.small import IA3, LORA, X

CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def made(config, params, table=None, seed=1, dtype=None):
    """An adapter with values near 1 for these parameters."""
    adapter = jaxadapt.init(params, config, key=jax.random.key(0), keymap=table, dtype=dtype)
    return small.noisy(adapter, seed)


def rand(*shape, dtype="float32", seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


@pytest.mark.parametrize("config", [LORA, IA3], ids=["LORA", "IA3"])
def test_merge_equals_apply_and_unmerge_undoes_it(config):
    model, variables = small.trained(config), small.variables(config)
    adapter = jaxadapt.extract(model)
    merged = jaxadapt.merge(small.base()["params"], adapter)
    out = small.LinenNet().apply({"params": merged}, X)
    np.testing.assert_allclose(out, model(X), **CLOSE)
    np.testing.assert_allclose(out, jaxadapt.adapt(small.LinenNet(), config).apply(variables, X), **CLOSE)
    back = jaxadapt.unmerge(merged, adapter)
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(small.base()["params"]), strict=True):
        np.testing.assert_allclose(a, b, **CLOSE)


@pytest.mark.parametrize("config", [LORA, IA3], ids=["LORA", "IA3"])
@pytest.mark.parametrize("said", [False, True])
def test_a_model_merges_what_it_carries(config, said):
    """As PEFT's merge_and_unload does."""
    model = small.trained(config)
    out = model(X)
    merged = jaxadapt.merge(*([model, jaxadapt.extract(model)] if said else [model]))
    np.testing.assert_allclose(merged(X), out, **CLOSE)
    assert nnx.graphdef(merged) == nnx.graphdef(small.net())
    with pytest.raises(AttachError, match="no active adapter; it has none"):
        jaxadapt.merge(merged)

    variables = small.variables(config)
    given = [variables, jaxadapt.extract(variables)] if said else [variables]
    merged = jaxadapt.merge(*given)
    assert merged.keys() == {"params"}
    np.testing.assert_allclose(small.LinenNet().apply(merged, X), out, **CLOSE)


def test_several_adapters_of_a_model():
    model = small.trained(LORA, 1, "a")
    small.trained(LORA, 2, "b", model)
    small.trained(LORA, 3, "c", model)
    jaxadapt.activate(model, ["a", "b"])
    out, rest = model(X), jaxadapt.extract(model, name="c")
    merged = jaxadapt.merge(model)
    np.testing.assert_allclose(merged(X), out, **CLOSE)
    assert small.same(jaxadapt.extract(merged, name="c"), rest)  # it was not active, and is as it was
    np.testing.assert_allclose(jaxadapt.activate(merged)(X), out, **CLOSE)

    model = small.trained(IA3, 1, "a")
    small.trained(LORA, 2, "b", model)
    jaxadapt.activate(model, "a", "b")
    out = model(X)
    with pytest.raises(AttachError, match=r"several active adapters: .*\n  up_proj.kernel: a \(IA3\), b \(LORA\)"):
        jaxadapt.merge(model)
    np.testing.assert_array_equal(model(X), out)

    both = small.variables()
    both["lora"] = {**small.variables()["lora"], **small.variables(name="other")["lora"]}
    with pytest.raises(AttachError, match=r"have the adapters \['default', 'other'\]"):
        jaxadapt.merge(both)
    assert list(jaxadapt.merge(both, jaxadapt.extract(both, name="other"))["lora"]) == ["default"]


LOHA = jaxadapt.LoHaConfig(r=2, target_modules=["q_proj"], init_weights=False)
SCALES = jaxadapt.IA3Config(target_modules=["q_proj"], feedforward_modules=[])


@pytest.mark.parametrize("configs", [(LOHA, LOHA), (LOHA, LORA), (SCALES, LORA), (LORA, SCALES)])
def test_several_adapters_of_other_types_merge_to_what_they_give_together(configs):
    model = small.net()
    for seed, (name, config) in enumerate(zip("ab", configs, strict=True)):
        small.trained(config, seed, name, model)
    jaxadapt.activate(model, ["a", "b"])
    np.testing.assert_allclose(jaxadapt.merge(model)(X), model(X), **CLOSE)


TURNS = jaxadapt.OFTConfig(r=0, oft_block_size=2, target_modules=["q_proj"], init_weights=False)


OF_THE_BASE = jaxadapt.HiraConfig(r=2, target_modules=["q_proj"], init_weights=False)


@pytest.mark.parametrize("config", [LORA, LOHA, SCALES, TURNS, OF_THE_BASE], ids=lambda config: config.peft_type)
@pytest.mark.parametrize("order", ["ab", "ba"])
def test_an_adapter_changes_the_copy_that_another_one_has_of_its_weight(config, order):
    model = small.trained(config, 1, "a")
    small.trained(LORA.replace(target_modules=["up_proj"], modules_to_save=["q_proj"]), 2, "b", model)
    copied = jaxadapt.merge(jaxadapt.activate(model, "b"))  # it keeps "a"
    want = jaxadapt.activate(copied, "a")(X)
    jaxadapt.activate(model, list(order))
    np.testing.assert_allclose(model(X), want, **CLOSE)
    np.testing.assert_allclose(jaxadapt.merge(model)(X), want, **CLOSE)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_copy_does_not_change_the_order_of_adapters_that_turn_the_input(place):
    model = small.trained(TURNS, 1, "a")
    small.trained(TURNS, 3, "c", model)
    small.trained(LORA.replace(target_modules=["up_proj"], modules_to_save=["q_proj"]), 2, "b", model)
    copied = jaxadapt.merge(jaxadapt.activate(model, "b"))
    want = jaxadapt.activate(copied, ["a", "c"])(X)
    names = ["a", "c"]
    names.insert(place, "b")
    np.testing.assert_allclose(jaxadapt.activate(model, names)(X), want, **CLOSE)
    np.testing.assert_allclose(jaxadapt.merge(model)(X), want, **CLOSE)


def test_what_carries_no_adapter_says_so():
    for given, says in (
        (small.LinenNet(), "holds no parameters"),
        (small.base(), "have the adapters none"),
        (small.base()["params"], r"contain no adapter; pass one: merge\(params, adapter\)"),
    ):
        with pytest.raises(AttachError, match=says):
            jaxadapt.merge(given)


def test_merging_a_model_leaves_it_adapted_and_shares_what_does_not_change(tmp_path):
    model = small.trained(jaxadapt.LoraConfig(r=2, target_modules=["q_proj"]))
    out, before = model(X), nnx.to_flat_state(nnx.state(model))
    kept = {path: var.get_value() for path, var in before}
    merged = jaxadapt.merge(model)
    np.testing.assert_allclose(merged(X), out, **CLOSE)
    np.testing.assert_array_equal(model(X), out)
    assert all(var.get_value() is kept[path] for path, var in nnx.to_flat_state(nnx.state(model)))
    changed = [path for path, var in nnx.to_flat_state(nnx.state(merged)) if var.get_value() is not kept[path]]
    assert changed == [("q_proj", "kernel")]
    back = jaxadapt.unmerge(merged, jaxadapt.extract(model))
    np.testing.assert_allclose(merged(X), out, **CLOSE)
    np.testing.assert_allclose(back(X), small.net()(X), rtol=1e-4, atol=1e-5)
    jaxadapt.save(model, tmp_path)
    with pytest.raises(AttachError, match="in_place=True: expected an NNX model, found dict"):
        jaxadapt.merge(small.variables(), in_place=True)


@pytest.mark.parametrize("merged", [lambda: jaxadapt.merge(small.trained()), lambda: jaxadapt.merge(small.variables())])
def test_saving_a_merged_model_says_that_the_adapter_was_merged(merged, tmp_path):
    with pytest.raises(AttachError, match=r"[Ss]ave (it|a merged adapter) from the (model|variables) before the merge"):
        jaxadapt.save(merged(), tmp_path)


def test_a_copy_and_a_sum_of_one_weight():
    """What modules_to_save replaces comes first, whichever adapter has it; and a merge that fails changes nothing."""
    for order in (["a", "b"], ["b", "a"]):
        model = small.trained(jaxadapt.LoraConfig(r=2, target_modules=["q_proj"]), 1, "a")
        copied = jaxadapt.LoraConfig(r=2, target_modules=["up_proj"], modules_to_save=["q_proj"])
        small.trained(copied, 2, "b", model)
        jaxadapt.activate(model, order)
        flat = {**jaxadapt.extract(model, name="a").flat(), **jaxadapt.extract(model, name="b").flat()}
        want = flat["q_proj.kernel.copy"] + 4 * (flat["q_proj.kernel.lora_B"] @ flat["q_proj.kernel.lora_A"]).T
        np.testing.assert_allclose(jaxadapt.merge(model).q_proj.kernel[...], want, rtol=1e-6)
    model = small.trained(LORA, 1, "a")
    b = small.adapter(LORA, 2)
    small.trained(LORA, 2, "b", model)
    jaxadapt.inject(model, jax.tree.map(lambda x: x * np.float32(1e30), b), name="b")
    jaxadapt.activate(model, ["a", "b"])
    before = np.asarray(model.q_proj.kernel[...])
    with pytest.raises(AttachError, match="are not finite"):
        jaxadapt.merge(model, safe=True, in_place=True)
    np.testing.assert_array_equal(model.q_proj.kernel[...], before)
    assert model.q_proj.active_adapters == ("a", "b")


def test_a_quantized_model_merges_what_it_carries():
    model = jaxadapt.models.quantize(small.net(), "int8")
    small.trained(LORA, 1, model=model)
    out = model(X)
    with pytest.raises(AttachError, match="dequantize=True"):
        jaxadapt.merge(model)
    np.testing.assert_array_equal(model(X), out)
    np.testing.assert_allclose(jaxadapt.merge(model, dequantize=True)(X), out, rtol=1e-4, atol=1e-5)


def test_a_merge_that_fails_leaves_the_model_adapted():
    model = small.trained()
    model.q_proj.kernel[...] = jnp.full((6, 8), jnp.inf)
    out = model(X)
    with pytest.raises(AttachError, match="are not finite"):
        jaxadapt.merge(model, safe=True, allow_nan=True, in_place=True)
    np.testing.assert_array_equal(model(X), out)


def test_variables_are_no_parameters():
    variables = small.base()
    adapter = jaxadapt.init(variables["params"], LORA, key=jax.random.key(0))
    other = adapter.named("other")
    with pytest.raises(AttachError, match=r"have the adapters \['other'\], but 0 are selected"):
        jaxadapt.merge({**variables, **other}, jax.tree.map(jnp.copy, adapter))
    with pytest.raises(MismatchError, match=r'These are Linen variables; .* variables\["params"\]'):
        jaxadapt.unmerge(variables, adapter)
    with pytest.raises(MismatchError) as caught:
        jaxadapt.merge({"q_proj": variables["params"]["q_proj"]}, adapter)
    assert "variables" not in str(caught.value)


@pytest.mark.parametrize("config", [LORA, IA3], ids=["LORA", "IA3"])
def test_models_merge_in_place(config):
    model = small.trained(config)
    out, adapter = model(X), jaxadapt.extract(model)
    with pytest.raises(AttachError, match="active adapters, which would count twice"):
        jaxadapt.merge(model, jax.tree.map(jnp.copy, adapter))
    jaxadapt.detach(model)
    kernel = model.q_proj.kernel
    assert jaxadapt.merge(model, adapter, in_place=True) is model
    assert model.q_proj.kernel is kernel
    assert nnx.graphdef(model) == nnx.graphdef(small.net())
    np.testing.assert_allclose(model(X), out, **CLOSE)
    assert jaxadapt.unmerge(model, adapter, in_place=True) is model
    np.testing.assert_allclose(model(X), small.net()(X), rtol=1e-4, atol=1e-5)
    adapted = small.trained(config)
    assert jaxadapt.merge(adapted, in_place=True) is adapted
    np.testing.assert_allclose(adapted(X), out, **CLOSE)


def test_the_merged_weight_is_the_formula():
    params = {"q": {"kernel": rand(4, 6)}}
    config = jaxadapt.LoraConfig(r=2, lora_alpha=3, target_modules=["q"], use_rslora=True)
    adapter = made(config, params)
    a, b = (np.asarray(adapter.flat()[f"q.kernel.lora_{x}"], "float64") for x in "AB")
    expected = params["q"]["kernel"] + 3 / np.sqrt(2) * (b @ a).T
    np.testing.assert_allclose(jaxadapt.merge(params, adapter)["q"]["kernel"], expected, rtol=1e-6)
    # `merge` gives a new tree
    np.testing.assert_array_equal(params["q"]["kernel"], rand(4, 6))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_stacked_layers(axis):
    """On any axis, as layer by layer; an untouched bias may be stacked as it likes."""
    table = KeyMap("t", (Weight("h.{l}.q.kernel", "h.{l}.q.weight", "i o -> o i"),))
    config = jaxadapt.LoraConfig(r=2, target_modules=["q"])
    layers = {"h": {str(l): {"q": {"kernel": rand(4, 6, seed=l)}} for l in range(3)}}
    stacked = {"h": {"q": {"kernel": np.stack([rand(4, 6, seed=l) for l in range(3)], axis), "bias": rand(3, 6)}}}
    one = made(config, layers, table)
    tensors = jaxadapt.to_peft(one)
    other = jaxadapt.from_peft(tensors, stacked, keymap=table.scanned(axis))
    expected = jaxadapt.merge(layers, one)["h"]
    found = jaxadapt.merge(stacked, other)["h"]["q"]
    for l in range(3):
        np.testing.assert_allclose(np.take(found["kernel"], l, axis), expected[str(l)]["q"]["kernel"], rtol=1e-6)
    assert found["bias"] is stacked["h"]["q"]["bias"]
    back = jaxadapt.unmerge({"h": {"q": found}}, other)["h"]["q"]["kernel"]
    np.testing.assert_allclose(back, stacked["h"]["q"]["kernel"], **CLOSE)


@pytest.mark.parametrize("axis", [0, 1])
def test_stacked_layers_with_ia3_and_their_biases(axis):
    lines = (
        Weight("h.{l}.q.kernel", "h.{l}.q.weight", "i o -> o i"),
        Weight("h.{l}.q.bias", "h.{l}.q.bias", "o -> o"),
    )
    config = jaxadapt.IA3Config(target_modules=["q"], feedforward_modules=[])
    stacked = {
        "h": {
            "q": {
                "kernel": np.stack([rand(4, 6, seed=l) for l in range(3)], axis),
                "bias": np.stack([rand(6, seed=l) for l in range(3)], axis),
            }
        }
    }
    adapter = made(config, stacked, KeyMap("t", lines).scanned(axis))
    found = jaxadapt.merge(stacked, adapter)["h"]["q"]
    scale = np.asarray(adapter.flat()["h.q.kernel.ia3_l"])
    for l in range(3):
        s = np.take(scale, l, axis)
        kernel = np.take(stacked["h"]["q"]["kernel"], l, axis)
        np.testing.assert_allclose(np.take(found["kernel"], l, axis), kernel * s, rtol=1e-6)
        np.testing.assert_allclose(
            np.take(found["bias"], l, axis), np.take(stacked["h"]["q"]["bias"], l, axis) * s, rtol=1e-6
        )


@pytest.mark.parametrize("array", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
def test_a_partly_targeted_fused_weight_keeps_its_other_parts(array):
    table = KeyMap("t", (Weight("kv", "{p}_proj.weight", "i {p} o -> o i", p=("k", "v")),))
    params = {"kv": array(rand(4, 2, 6))}
    adapter = made(jaxadapt.LoraConfig(r=2, lora_alpha=2, target_modules=["v_proj"]), params, table)
    merged = jaxadapt.merge(params, adapter)["kv"]
    assert isinstance(merged, np.ndarray) == isinstance(params["kv"], np.ndarray)
    np.testing.assert_array_equal(merged[:, 0], params["kv"][:, 0])
    a, b = (np.asarray(adapter.flat()[f"kv.lora_{x}"]) for x in "AB")
    np.testing.assert_allclose(merged[:, 1], params["kv"][:, 1] + (b[0] @ a[0]).T, rtol=1e-5)
    np.testing.assert_allclose(jaxadapt.unmerge({"kv": merged}, adapter)["kv"], params["kv"], **CLOSE)


@pytest.mark.parametrize("config", [LORA, IA3], ids=["LORA", "IA3"])
def test_ia3_scales_the_bias_of_outputs_only(config):
    params = jax.tree.map(lambda x: jnp.ones_like(x), small.base()["params"])
    adapter = made(config, params)
    merged = jaxadapt.merge(params, adapter)
    np.testing.assert_array_equal(merged["up_proj"]["bias"], params["up_proj"]["bias"])
    scaled = not np.array_equal(merged["q_proj"]["bias"], params["q_proj"]["bias"])
    assert scaled == (config is IA3)


@pytest.mark.parametrize(("kind", "rtol"), [("bfloat16", 2**-8), ("float8_e4m3fn", 2**-4), ("float8_e5m2", 2**-3)])
def test_narrow_weights_are_rounded_once(kind, rtol):
    params = {"q": {"kernel": rand(32, 32, dtype=getattr(ml_dtypes, kind))}}
    config = jaxadapt.LoraConfig(r=4, lora_alpha=4, target_modules=["q"])
    for dtype in ("float32", "bfloat16"):
        adapter = made(config, params, dtype=dtype)
        a, b = (np.asarray(adapter.flat()[f"q.kernel.lora_{x}"], "float32") for x in "AB")
        exact = np.asarray(params["q"]["kernel"], "float32") + (b @ a).T
        merged = jaxadapt.merge(params, adapter)["q"]["kernel"]
        assert merged.dtype == kind
        # Half a unit in the last place is what one rounding costs; a sum in so few bits would cost more. (Below the
        # normal numbers of 8 bits, 2^-6 and 2^-14, the unit is 2^-9 and 2^-16.)
        atol = 2**-10 if "e4" in kind else 1e-5
        np.testing.assert_allclose(np.asarray(merged, "float32"), exact, rtol=rtol, atol=atol)


class Float32Net(nn.Module):
    """`small.LinenNet`, which computes in float32 whatever its weights are."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(6, name="up_proj", dtype="float32")(jnp.tanh(nn.Dense(8, name="q_proj", dtype="float32")(x)))


@pytest.mark.parametrize("config", [LORA, LORA.replace(use_dora=True), IA3], ids=["LORA", "DoRA", "IA3"])
def test_a_base_of_8_bit_floats_is_adapted_as_its_values_in_float32(config):
    narrow = jax.tree.map(lambda x: x.astype("float8_e4m3fn"), small.base()["params"])
    wide = jax.tree.map(lambda x: x.astype("float32"), narrow)
    fresh = [jaxadapt.init(params, config, key=jax.random.key(0)) for params in (narrow, wide)]
    assert small.same(*fresh)
    values = small.noisy(fresh[0]).named("default")
    linen = jaxadapt.adapt(Float32Net(), config)
    expected = linen.apply({"params": wide, **values}, X)
    np.testing.assert_allclose(linen.apply({"params": narrow, **values}, X), expected, **CLOSE)
    model = small.net()
    nnx.update(model, narrow)
    model.q_proj.dtype = model.up_proj.dtype = jnp.dtype("float32")
    np.testing.assert_allclose(small.trained(config, model=model)(X), expected, **CLOSE)
    merged = jaxadapt.merge(narrow, small.noisy(fresh[0]))
    assert {x.dtype.name for x in jax.tree.leaves(merged)} == {"float8_e4m3fn"}
    for x, y in zip(jax.tree.leaves(merged), jax.tree.leaves(jaxadapt.merge(wide, small.noisy(fresh[0]))), strict=True):
        np.testing.assert_allclose(np.asarray(x, "float32"), y, rtol=2**-4, atol=2**-10)


def test_a_copy_of_8_bit_floats_takes_the_base_s_place():
    params = {n: {"kernel": jnp.ones((4, 4), "float8_e4m3fn")} for n in ("q", "head")}
    config = jaxadapt.LoraConfig(r=2, target_modules=["q"], modules_to_save=["head"])
    adapter = jax.tree.map(lambda x: x + jnp.ones((), x.dtype), jaxadapt.init(params, config, key=jax.random.key(0)))
    head = jaxadapt.merge(params, adapter)["head"]["kernel"]
    np.testing.assert_array_equal(head, jnp.full((4, 4), 2, "float8_e4m3fn"))


def test_trees_keep_their_structure():
    plain = small.base()["params"]
    adapter = made(LORA, plain)
    expected = jaxadapt.merge(plain, adapter)
    frozen = jaxadapt.merge(freeze(plain), adapter)
    assert isinstance(frozen, FrozenDict)
    assert small.same(frozen, freeze(expected))

    boxed = jax.tree.map(lambda x: nn.Partitioned(x, names=(None,) * x.ndim), plain)
    merged = jaxadapt.merge(boxed, adapter)
    assert jax.tree.structure(merged) == jax.tree.structure(boxed)
    assert small.same(nn.meta.unbox(merged), expected)
    assert merged["q_proj"]["kernel"].names == (None, None)

    state = nnx.state(small.net(), nnx.Param)
    merged = jaxadapt.merge(state, adapter)
    assert isinstance(merged, nnx.State)
    np.testing.assert_array_equal(merged["q_proj"]["kernel"][...], expected["q_proj"]["kernel"])
    model = small.net()
    nnx.update(model, merged)
    np.testing.assert_allclose(model(X), small.trained()(X), **CLOSE)

    empty = jaxadapt.merge({**plain, "empty": {}}, adapter)
    assert empty["empty"] == {}


CALLS = {
    "merge": lambda variables, adapter, out: jaxadapt.merge(variables),
    "merge a value": lambda variables, adapter, out: jaxadapt.merge(variables["params"], adapter),
    "merge without one": lambda variables, adapter, out: jaxadapt.merge(jaxadapt.detach(variables), adapter),
    "unmerge": lambda variables, adapter, out: jaxadapt.unmerge(variables["params"], adapter),
    "inject": lambda variables, adapter, out: jaxadapt.inject(variables, adapter),
    "load": lambda variables, adapter, out: jaxadapt.load(out, variables),
    "load without one": lambda variables, adapter, out: jaxadapt.load(out, jaxadapt.detach(variables)),
    "load another": lambda variables, adapter, out: jaxadapt.load(out, variables, name="other"),
    "replace": lambda variables, adapter, out: jaxadapt.load(out / "ia3", variables, replace=True),
    "delete": lambda variables, adapter, out: jaxadapt.delete(variables, name="default"),
    "detach": lambda variables, adapter, out: jaxadapt.detach(variables),
}


@pytest.mark.parametrize("call", CALLS)
def test_frozen_variables_stay_frozen(call, tmp_path):
    """What a call returns for Flax's FrozenDict is that for a dict, frozen, with or without an adapter in it."""
    variables = small.variables(LORA)
    jaxadapt.save(variables, tmp_path)
    jaxadapt.save(small.variables(IA3), tmp_path / "ia3")
    adapter = jaxadapt.extract(variables)
    frozen = CALLS[call](freeze(variables), adapter, tmp_path)
    assert type(frozen) is FrozenDict
    assert small.same(frozen, freeze(CALLS[call](variables, adapter, tmp_path)))


def test_numpy_stays_numpy_and_what_is_not_adapted_stays_itself():
    params = jax.tree.map(np.asarray, small.base()["params"])
    merged = jaxadapt.merge(params, made(LORA, params))
    assert all(type(x) is np.ndarray for x in jax.tree.leaves(merged))
    assert merged["q_proj"]["bias"] is params["q_proj"]["bias"]
    assert merged["q_proj"]["kernel"].flags.writeable


def test_merging_under_jit():
    params = small.base()["params"]
    adapter = made(LORA, params)
    merged = jax.jit(jaxadapt.merge)(params, adapter)
    for a, b in zip(jax.tree.leaves(merged), jax.tree.leaves(jaxadapt.merge(params, adapter)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_what_does_not_fit_is_listed():
    adapter = small.adapter()
    with pytest.raises(MismatchError) as caught:
        jaxadapt.merge({"other": {"kernel": rand(6, 8)}}, adapter)
    assert "q_proj.kernel" in str(caught.value)
    assert "up_proj.kernel" in str(caught.value)
    params = {n: {"kernel": rand(6, 7)} for n in ("q_proj", "up_proj")}
    with pytest.raises(MismatchError) as caught:
        jaxadapt.merge(params, adapter)
    assert "q_proj.kernel [6, 7]: lora_B: expected [7, 2], found [8, 2]" in str(caught.value)
    assert "up_proj.kernel" in str(caught.value)
    with pytest.raises(AttachError, match="expected an Adapter"):
        jaxadapt.merge(params, jaxadapt.to_peft(adapter))  # type: ignore[arg-type]


def test_merging_two_adapters_one_after_the_other():
    params = small.base()["params"]
    first, second = made(LORA, params, seed=1), made(LORA.replace(r=3), params, seed=2)
    model = small.net()
    for name, adapter in (("a", first), ("b", second)):
        jaxadapt.adapt(model, adapter.config, name=name, rngs=nnx.Rngs(0))
        jaxadapt.inject(model, adapter, name=name)
    jaxadapt.activate(model, "a", "b")
    merged = jaxadapt.merge(jaxadapt.merge(params, first), second)
    np.testing.assert_allclose(small.LinenNet().apply({"params": merged}, X), model(X), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("head", [None, (4, 11)], ids=["attend", "head"])
def test_a_table_of_tokens_that_may_be_the_head_is_said(head):
    params = {"embed": {"embedding": rand(11, 4)}, "up": {"kernel": rand(4, 8), "bias": rand(11)}}
    params |= {} if head is None else {"head": {"kernel": rand(*head)}}
    line = Weight("embed.embedding", "embed.weight", "i o -> i o", kind="embedding")
    adapter = made(jaxadapt.LoraConfig(r=2, target_modules=["embed"]), params, KeyMap("generic", (line,)))
    if head is None:
        with pytest.warns(UserWarning, match=r"logits with the embedding too .*:\n  embed\S+ \(11 tokens\)") as caught:
            jaxadapt.merge(params, adapter)
        assert caught[0].filename == __file__
    else:
        jaxadapt.merge(params, adapter)


# ---- in the weights' own memory --------------------------------------------------------------------------


@pytest.mark.parametrize("api", ["nnx", "tree"])
def test_donated_weights_are_changed_in_place_and_nothing_else_is(api):
    adapter = jaxadapt.extract(small.trained())
    expected = jaxadapt.merge(small.base()["params"], adapter)
    base = small.net() if api == "nnx" else small.base()["params"]
    given = base.q_proj.kernel.get_value() if api == "nnx" else base["q_proj"]["kernel"]
    merged = jaxadapt.merge(base, adapter, donate=True)
    assert given.is_deleted()
    state = nnx.to_pure_dict(nnx.state(merged)) if api == "nnx" else merged
    # Two compiled programs, in one of which XLA may round between multiplying and adding: seen with jax 0.12 only.
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), state, expected)
    back = jaxadapt.unmerge(merged, adapter, donate=True)
    state = nnx.to_pure_dict(nnx.state(back)) if api == "nnx" else back
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), state, small.base()["params"])


def test_donated_weights_are_safe_until_all_sums_are_finite():
    adapter = jax.tree.map(lambda x: x * jnp.inf, jaxadapt.extract(small.trained()))
    base = small.base()["params"]
    with pytest.raises(jaxadapt.AttachError, match="are not finite"):
        jaxadapt.merge(base, adapter, safe=True, donate=True, allow_nan=True)
    assert not base["q_proj"]["kernel"].is_deleted()


def test_donated_weights_are_safe_where_another_cannot_be_merged():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.a = nnx.Linear(4, 4, rngs=rngs)
            self.b = nnx.Conv(4, 4, (3,), feature_group_count=2, rngs=rngs)

    config = jaxadapt.LoraConfig(r=2, target_modules=["a", "b"])
    model = jaxadapt.adapt(Net(nnx.Rngs(0)), config, rngs=nnx.Rngs(1))
    adapter = jaxadapt.extract(model)
    jaxadapt.detach(model)
    with pytest.raises(AttachError, match=r"b\.kernel: .*grouped convolution"):
        jaxadapt.merge(model, adapter, donate=True)
    np.testing.assert_array_equal(model.a.kernel, Net(nnx.Rngs(0)).a.kernel)


def test_numpy_weights_are_never_given_up():
    base = jax.tree.map(np.array, small.base()["params"])
    kept = jax.tree.map(np.copy, base)
    merged = jaxadapt.merge(base, jaxadapt.extract(small.trained()), donate=True)
    assert isinstance(merged["q_proj"]["kernel"], np.ndarray)
    jax.tree.map(np.testing.assert_array_equal, base, kept)


def test_weights_of_integers_are_refused():
    base = small.base()["params"]
    base["up_proj"]["kernel"] = base["up_proj"]["kernel"].astype("int32")
    with pytest.raises(AttachError, match=r"into weights of integers(.|\n)*up_proj.kernel: int32"):
        jaxadapt.merge(base, small.adapter())


@pytest.mark.parametrize("pattern", ["{p} i {l} o -> o i", "{l} {p} i o -> o i", "i {l} o {p} -> o i"])
def test_the_matrices_of_three_layers_of_fused_parts_and_back(pattern):
    keymap = KeyMap("t", (Weight("w", "h.{l}.{p}.weight", pattern, p=("k", "v")),))
    sizes = {"{p}": 2, "{l}": 3, "i": 4, "o": 5}
    shape = tuple(sizes[axis] for axis in pattern.partition(" ->")[0].split())
    (site,) = selection.select_sites(jaxadapt.LoraConfig(r=2, target_modules=["k", "v"]), keymap, {"w": shape})
    leaf = jnp.asarray(rand(*shape))
    weights = factors.site_weights(keymap, site, leaf)
    matrices = np.stack(list(weights.values()))
    moved = jnp.moveaxis(leaf, [pattern.split().index(axis) for axis in ("{l}", "{p}", "o", "i")], range(4))
    assert {matrix.tobytes() for matrix in matrices} == {
        matrix.tobytes() for matrix in np.asarray(moved).reshape(6, 5, 4)
    }
    np.testing.assert_array_equal(factors.with_site_weights(keymap, site, jnp.zeros_like(leaf), weights), leaf)


def test_nothing_of_a_zero_matrix_is_lost():
    np.testing.assert_array_equal(factors.truncation_error(jnp.zeros((2, 4)), 1), [0, 0])
    np.testing.assert_allclose(factors.truncation_error(jnp.array([4.0, 3.0, 0.0]), 1), 3 / 5, rtol=1e-6)


def test_the_svd_of_an_infinity_is_nan():
    """LAPACK's does not end on it."""
    u, s, vh = factors.svd(np.array([[[1, np.inf], [0, 1]], [[2, 0], [0, 1]]], "f4"))
    assert np.isnan(s[0]).all()
    np.testing.assert_allclose(u[1] @ np.diag(s[1]) @ vh[1], [[2, 0], [0, 1]], atol=1e-6)
