"""`combine` beside PEFT's `add_weighted_adapter`, on the same adapters of the same Llama, and across our layouts."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxadapt
from jaxadapt import ConfigError, KeyMap, KeyMapError, MismatchError, Weight
from jaxadapt.export import adapter_files
from jaxadapt.merging import combination
from tests.support import small

pytestmark = pytest.mark.filterwarnings("ignore:The density 1.0 is greater")

EQUAL = {
    "one": {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]},
    "two": {"r": 3, "lora_alpha": 2, "target_modules": ["q_proj", "o_proj"]},
    "three": {"r": 3, "lora_alpha": 3, "target_modules": ["q_proj", "down_proj"]},
}
UNEQUAL = {
    "one": {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]},
    "two": {"r": 4, "lora_alpha": 2, "target_modules": ["q_proj", "o_proj"], "rank_pattern": {"o_proj": 3}},
    "three": {"r": 3, "lora_alpha": 3, "target_modules": ["q_proj"], "alpha_pattern": {"layers.1.*q_proj": 7}},
}
WEIGHTS = [0.7, -0.4, 1.2]
# float32 sums of a few dozen terms in another order
CLOSE = {"rtol": 2e-5, "atol": 2e-6}
SEPARATE = [m for m in combination.OPERATORS if m not in ("cat", "svd") and not m.endswith("_svd")]


def options(method, density=0.5):
    return {"density": density} if method.startswith(("ties", "dare", "magnitude")) else {}


def in_peft(configs, weights, method, **given):
    from tests.support import peft_pairs

    model = peft_pairs.model_with(configs)
    with peft_pairs.recorded_bernoulli() as masks:
        model.add_weighted_adapter(list(configs), weights, "mix", combination_type=method, **given)
    return model, masks


def dare_masks(model, drawn, svd, scan):
    """The masks that PEFT drew, module by module, in our layout: `[tree for each adapter]`."""
    from tests.support import peft_pairs

    names = [n for n in model.peft_config if n != "mix"]
    files = {n: {} for n in names}
    drawn = iter(drawn)
    for path, module in model.base_model.model.named_modules():
        if isinstance(module, peft_pairs.LoraLayer):
            having = [n for n in names if n in module.lora_A]
            for side, n in itertools.product("W" if svd else "AB", having):
                files[n][f"{path}.weight" if svd else f"{peft_pairs.PREFIX}{path}.lora_{side}.weight"] = next(drawn)
    assert next(drawn, None) is None
    base = peft_pairs.params(scan)
    if not svd:
        held = [jaxadapt.PeftTensors(peft_pairs.tensors_of(model, n).config, files[n]) for n in names]
        return [jaxadapt.from_peft(tensors, base).params for tensors in held]
    from jaxadapt.demo.llama import to_linen
    from tests.support.twins import llama

    weights = llama.weights_of(peft_pairs.torch_base())
    config = llama.config_of(peft_pairs.torch_base(), scan=scan)
    return [to_linen(config, {**weights, **files[n]})["params"] for n in names]


@pytest.mark.peft
@pytest.mark.parametrize(
    ("method", "signs"),
    [(m, "total") for m in combination.OPERATORS] + [(m, "frequency") for m in combination.OPERATORS if "ties" in m],
)
def test_equal_to_peft(method, signs):
    from tests.support import peft_pairs

    given = options(method) | ({"majority_sign_method": signs} if "ties" in method else {})
    configs = EQUAL if method in SEPARATE else UNEQUAL
    if method.endswith("svd"):  # PEFT cannot hold the alpha_pattern of one layer in a scanned leaf; neither can we
        given |= {"svd_rank": 5}
    model, drawn = in_peft(configs, WEIGHTS, method, **given)
    theirs = peft_pairs.tensors_of(model, "mix")
    for scan in (False, True):
        if scan and configs is UNEQUAL:
            continue
        adapters = peft_pairs.ours(model, list(configs), scan)
        masks = dare_masks(model, drawn, method.endswith("svd"), scan) if "dare" in method else None
        mix = jaxadapt.combine(adapters, WEIGHTS, method=method, **given, **({"masks": masks} if masks else {}))
        assert mix.config == theirs.config
        mine = jaxadapt.to_peft(mix)
        assert {k: v.shape for k, v in mine.tensors.items()} == {k: v.shape for k, v in theirs.tensors.items()}
        if not method.endswith("svd"):  # the factors are determined
            for key, value in theirs.tensors.items():
                np.testing.assert_allclose(mine.tensors[key], value, **CLOSE, err_msg=key)
        expected, found = peft_pairs.deltas(model, "mix"), peft_pairs.our_deltas(mix)
        assert expected.keys() == found.keys()
        for module, value in expected.items():
            # An SVD's rounding is that of its largest value, wherever in the matrix it ends up.
            close = {"rtol": 2e-5, "atol": 5e-6 * np.abs(value).max()} if method.endswith("svd") else CLOSE
            np.testing.assert_allclose(found[module], value, **close, err_msg=module)


@pytest.mark.peft
@pytest.mark.parametrize("density", [0.0, 0.05, 1.0])
def test_densities_at_the_ends(density):
    from tests.support import peft_pairs

    for method in ("ties", "magnitude_prune"):
        model, _ = in_peft(EQUAL, WEIGHTS, method, density=density)
        mix = jaxadapt.combine(peft_pairs.ours(model, list(EQUAL)), WEIGHTS, method=method, density=density)
        for module, value in peft_pairs.deltas(model, "mix").items():
            np.testing.assert_allclose(peft_pairs.our_deltas(mix)[module], value, **CLOSE, err_msg=module)


@pytest.mark.peft
@pytest.mark.parametrize("method", ["cat", "linear", "svd"])
def test_rslora_where_peft_is_wrong(method):
    """PEFT's result keeps use_rslora, so that its scale is r/√r: its ΔW is √r times what was asked for."""
    from tests.support import peft_pairs

    configs = {n: {**fields, "use_rslora": True} for n, fields in EQUAL.items()}
    model, _ = in_peft(configs, WEIGHTS, method)
    mix = jaxadapt.combine(peft_pairs.ours(model, list(configs)), WEIGHTS, method=method)
    assert not mix.config.use_rslora
    for module, value in peft_pairs.deltas(model, "mix").items():
        wrong = mix.config.r**0.5
        np.testing.assert_allclose(wrong * peft_pairs.our_deltas(mix)[module], value, **CLOSE, err_msg=module)
        if method != "linear":  # which is only a rough sum
            parts = [w * peft_pairs.deltas(model, n).get(module, 0) for n, w in zip(configs, WEIGHTS, strict=True)]
            if method == "cat":
                np.testing.assert_allclose(peft_pairs.our_deltas(mix)[module], sum(parts), **CLOSE, err_msg=module)


@pytest.mark.peft
def test_targets_where_peft_is_wrong():
    """PEFT drops from its result what the first adapter's exclude_modules or layers_to_transform leave out."""
    from tests.support import peft_pairs

    first = {**EQUAL["one"], "exclude_modules": ["o_proj"], "layers_to_transform": [0]}
    model, _ = in_peft({"one": first, "two": EQUAL["two"]}, [1.0, 1.0], "cat")
    assert not any("o_proj" in module or "layers.1" in module for module in peft_pairs.deltas(model, "mix"))
    mix = jaxadapt.combine(peft_pairs.ours(model, ["one", "two"]), [1.0, 1.0], method="cat")
    found, one, two = peft_pairs.our_deltas(mix), peft_pairs.deltas(model, "one"), peft_pairs.deltas(model, "two")
    assert set(found) == one.keys() | two.keys()
    for module, value in found.items():
        np.testing.assert_allclose(value, one.get(module, 0) + two.get(module, 0), **CLOSE)


@pytest.mark.peft
def test_the_result_opens_in_peft_and_here(tmp_path):
    from tests.support import peft_harness as harness
    from tests.support import peft_pairs
    from tests.support.twins import llama

    model = peft_pairs.model_with(UNEQUAL)
    mix = jaxadapt.combine(peft_pairs.ours(model, list(UNEQUAL)), WEIGHTS, method="cat")
    jaxadapt.save(mix, tmp_path)
    loaded = harness.load(peft_pairs.torch_base(), tmp_path)
    assert loaded.complaints == []
    ids = np.arange(10).reshape(2, 5)
    mine = jaxadapt.load(tmp_path, llama.twin_of(peft_pairs.torch_base()))
    np.testing.assert_allclose(mine(jnp.asarray(ids)), harness.logits(loaded.model, ids), rtol=1e-5, atol=1e-5)


# ---- our layouts, without PEFT --------------------------------------------------------------------------

PLAIN = KeyMap(
    "plain",
    (
        Weight("h.{l}.q", "h.{l}.q.weight", "i o -> o i"),
        Weight("h.{l}.k", "h.{l}.k.weight", "i o -> o i"),
        Weight("h.{l}.v", "h.{l}.v.weight", "i o -> o i"),
        Weight("h.{l}.o", "h.{l}.o.weight", "i o -> o i"),
    ),
)
FANCY = KeyMap(
    "fancy",
    (
        # interleaved pairs, and half of PyTorch's values
        Weight("q", "h.{l}.q.weight", "d {l} n (c p) -> (n p c) d", p=2, scale=("c p", -0.5)),
        Weight("kv", "h.{l}.{p}.weight", "{l} {p} k d x -> (k x) d", p=("k", "v")),
        Weight("o", "h.{l}.o.weight", "n x {l} d -> d (n x)"),
    ),
)
SHAPES = {
    "plain": {"h": {str(l): {n: jax.ShapeDtypeStruct(s, "f4") for n, s in
              {"q": (6, 8), "k": (6, 4), "v": (6, 4), "o": (8, 6)}.items()} for l in range(3)}},
    "fancy": {
        "q": jax.ShapeDtypeStruct((6, 3, 2, 4), "f4"),
        "kv": jax.ShapeDtypeStruct((3, 2, 1, 6, 4), "f4"),
        "o": jax.ShapeDtypeStruct((2, 4, 3, 6), "f4"),
    },
}  # fmt: skip


def in_both(config, seed):
    plain = small.noisy(jaxadapt.init(SHAPES["plain"], config, key=jax.random.key(0), keymap=PLAIN), seed)
    return plain, jaxadapt.from_peft(jaxadapt.to_peft(plain), SHAPES["fancy"], keymap=FANCY)


@pytest.mark.parametrize("method", ["cat", "svd", "dare_ties", "dare_linear_svd"])
def test_stacked_fused_and_split_axes_give_what_plain_matrices_give(method):
    """Also where one adapter has both parts of a fused weight and another only one."""
    make = jaxadapt.LoraConfig
    configs = [
        make(r=2, lora_alpha=3, target_modules=["q", "v"]),
        make(r=2, target_modules=["k", "v", "o"]),
        make(r=2, lora_alpha=1, target_modules=["k", "q"]),
    ]
    plain, fancy = zip(*(in_both(c, seed) for seed, c in enumerate(configs)), strict=True)
    given = options(method)
    extra = [{}, {}]
    if "dare" in method:
        trees = [SHAPES["plain"]] * 3 if method.endswith("svd") else [a.params for a in plain]
        masks = [drawn_mask(tree, seed) for seed, tree in enumerate(trees)]
        if method.endswith("svd"):
            other = [in_fancy_layout(mask) for mask in masks]
        else:
            held = [jaxadapt.to_peft(jaxadapt.Adapter(a.config, m, PLAIN)) for a, m in zip(plain, masks, strict=True)]
            other = [jaxadapt.from_peft(t, SHAPES["fancy"], keymap=FANCY).params for t in held]
            other = jax.tree.map(lambda mask: mask != 0, other)  # the table's factor is for values
        extra = [{"masks": masks}, {"masks": other}]
    found = [
        jaxadapt.to_peft(jaxadapt.combine(adapters, [0.5, -1, 2], method=method, **given, **more))
        for adapters, more in zip((plain, fancy), extra, strict=True)
    ]
    assert found[0].config == found[1].config
    assert set(found[0].tensors) == set(found[1].tensors)
    for key in found[0].tensors:
        if method.endswith("svd"):
            if key.endswith("lora_A.weight"):
                b = key.replace("lora_A", "lora_B")
                one, two = (np.asarray(t.tensors[b]) @ np.asarray(t.tensors[key]) for t in found)
                np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-5, err_msg=key)
        else:
            np.testing.assert_allclose(*(t.tensors[key] for t in found), rtol=1e-5, atol=1e-6, err_msg=key)


def drawn_mask(tree, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: (rng.random(x.shape) < 0.5).astype("f4"), tree)


def in_fancy_layout(mask):
    layers = [mask["h"][str(l)] for l in range(3)]
    return {
        "q": np.stack([m["q"].reshape(6, 2, 2, 2).swapaxes(2, 3).reshape(6, 2, 4) for m in layers], 1),
        "kv": np.stack([np.stack([m["k"].reshape(1, 6, 4), m["v"].reshape(1, 6, 4)]) for m in layers]),
        "o": np.stack([m["o"].reshape(2, 4, 6) for m in layers], 2),
    }


def test_under_jit_and_with_traced_weights():
    one, two = small.adapter(seed=1), small.adapter(seed=2)
    for method in ("cat", "linear", "svd", "ties_svd"):
        given = options(method)
        plain = jaxadapt.combine([one, two], [0.3, -2.0], method=method, **given)

        @jax.jit
        def traced(adapters, weights, method=method, given=given):
            return jaxadapt.combine(adapters, list(weights), method=method, **given)

        again = traced([one, two], jnp.array([0.3, -2.0]))
        assert again.config == plain.config
        for a, b in zip(jax.tree.leaves(merged(again)), jax.tree.leaves(merged(plain)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def merged(adapter):
    return jaxadapt.merge(small.base()["params"], adapter)


def test_dare_with_a_key_keeps_the_expectation_and_is_reproducible():
    adapter = small.adapter()
    given = {"method": "dare_linear", "density": 0.5}
    draw = [jaxadapt.combine([adapter], [1.0], key=jax.random.key(s), **given) for s in (0, 0, 1)]
    assert small.same(draw[0], draw[1])
    assert not small.same(draw[0], draw[2])
    scale = np.sqrt(3.0)  # lora_alpha 6, r 2
    for path, x in adapter.flat().items():
        ratio = np.asarray(draw[0].flat()[path] / (scale * x))
        assert set(np.unique(ratio.round(4))) == {0.0, 2.0}


def test_dtypes_and_host_arrays():
    base = {"q": {"kernel": np.zeros((4, 6), "f4")}}
    config = jaxadapt.LoraConfig(r=2, lora_alpha=2, target_modules=["q"])
    half = [jaxadapt.init(base, config, key=jax.random.key(i), dtype="bfloat16") for i in (0, 1)]
    half = [jax.tree.map(lambda x: jnp.ones_like(x) * 0.1, a) for a in half]
    mix = jaxadapt.combine(half, [1, 2], method="linear")
    assert {x.dtype.name for x in mix.flat().values()} == {"bfloat16"}
    exact = np.float32(jnp.bfloat16(0.1)) * (1 + np.sqrt(np.float32(2)))
    np.testing.assert_array_equal(mix.flat()["q.kernel.lora_A"].astype("f4"), np.float32(jnp.bfloat16(exact)))


def test_a_result_that_overflows_names_its_tensor():
    """In float16, whose largest value is 65504; inside jit nobody can tell."""
    base = {"q": {"kernel": np.zeros((4, 6), "f4")}}
    config = jaxadapt.LoraConfig(r=2, lora_alpha=2, target_modules=["q"])
    half = jaxadapt.init(base, config, key=jax.random.key(0), dtype="float16")
    large = jax.tree.map(lambda x: jnp.full_like(x, 6e4), half)
    with pytest.raises(MismatchError, match=r"(?s)combine: 8 finite values overflow float16.*q\.kernel\.lora_A: 8"):
        jaxadapt.combine([large], [2], method="cat")


# ---- bad input -------------------------------------------------------------------------------------------


def test_numbers_may_be_numpys_and_must_be_numbers():
    one = small.adapter(small.LORA.replace(init_lora_weights=False))
    told = {"method": "svd", "svd_rank": np.int64(1)}
    found = jaxadapt.combine([one], [np.float32(1)], **told)
    equal = jaxadapt.combine([one], [1.0], method="svd", svd_rank=1)
    assert found.config == equal.config
    assert type(found.config.get("r")) is int
    for path, x in equal.flat().items():
        np.testing.assert_array_equal(found.flat()[path], x)
    for weight in (float("nan"), float("inf"), "1", np.float32("nan")):
        with pytest.raises(ConfigError, match="weights: expected finite numbers"):
            jaxadapt.combine([one], [weight], method="cat")


def test_arguments_that_do_not_go_together_are_listed_together():
    one = small.adapter()
    with pytest.raises(ConfigError) as caught:
        jaxadapt.combine([one, "two"], [1], method="dare_ties", density=0, svd_rank=3, majority_sign_method="most")
    text = str(caught.value)
    for what in ("adapter 1: expected an Adapter", "weights: expected one for each", "cannot be 0", "svd_rank=3",
                 "needs key=", "'most'"):  # fmt: skip
        assert what in text
    for given, what in (
        ({"method": "ties"}, "density: method 'ties' needs a number"),
        ({"method": "ties", "density": 1.5}, "from 0 to 1, found 1.5"),
        ({"method": "linear", "density": 0.5}, "has no effect"),
        ({"method": "linear", "key": jax.random.key(0)}, "for DARE"),
        ({"method": "sum"}, "expected one of svd, linear"),
        ({"method": "svd", "svd_rank": 0}, "positive integer"),
    ):
        with pytest.raises(ConfigError, match=what):
            jaxadapt.combine([one], [1], **given)
    with pytest.raises(ConfigError, match="at least one"):
        jaxadapt.combine([], [])


def test_adapters_that_do_not_go_together_are_refused_by_name():
    one = small.adapter()
    with pytest.raises(ConfigError, match="adapter 1: peft_type is IA3"):
        jaxadapt.combine([one, small.adapter(small.IA3)], [1, 1])
    three = small.adapter(small.LORA.replace(r=3))
    with pytest.raises(ConfigError, match=r"q_proj: 2 in adapter 0, 3 in adapter 1") as caught:
        jaxadapt.combine([one, three], [1, 1], method="ties", density=0.5)
    assert "up_proj" in str(caught.value)
    assert "resize_rank" in str(caught.value)
    base = {"q_proj": {"kernel": np.zeros((6, 9), "f4")}, "up_proj": {"kernel": np.zeros((8, 6), "f4")}}
    wide = small.noisy(jaxadapt.init(base, small.LORA, key=jax.random.key(0)))
    with pytest.raises(MismatchError, match=r"q_proj: sizes \(in, out\) \[6, 8\] and \[6, 9\]"):
        jaxadapt.combine([one, wide], [1, 1], method="cat")
    other = KeyMap("other", (Weight("{path}.kernel", "model.{path}.weight", "i o -> o i"),))
    renamed = jaxadapt.Adapter(one.config, one.params, other)
    with pytest.raises(KeyMapError, match="lay out the same weights differently"):
        jaxadapt.combine([one, renamed], [1, 1], method="cat")
    bad = jax.tree.map(lambda x: x[:1], one.params)
    with pytest.raises(MismatchError, match="its shape differs"):
        jaxadapt.combine([one], [1], method="dare_linear", density=0.5, masks=[bad])
    with pytest.raises(jaxadapt.AttachError, match="shapes but no values"):
        jaxadapt.combine([jax.eval_shape(lambda: one)], [1])


def test_targets_of_every_kind_are_united():
    make = jaxadapt.LoraConfig
    base = small.base()["params"]

    def mixed(*targets):
        configs = [make(r=2, target_modules=t) for t in targets]
        adapters = [small.noisy(jaxadapt.init(base, c, key=jax.random.key(0))) for c in configs]
        return jaxadapt.combine(adapters, [1] * len(adapters), method="cat").config.target_modules

    assert mixed(["q_proj"], ["up_proj"]) == ("q_proj", "up_proj")
    assert mixed("q_.*", "up_.*") == "(q_.*)|(up_.*)"
    assert mixed("q_.*", "q_.*") == "q_.*"
    assert mixed(["q_proj"], "up_.*") == ("q_proj", "up_proj")  # PEFT refuses
    assert mixed("q_.*", r"(u)p_pr(o)j") == r"(q_.*)|((u)p_pr(o)j)"
    assert mixed("q_.*", r"u(p)_\1?roj") == ("q_proj", "up_proj")  # joined, \1 would mean another group


def test_what_one_adapter_alone_excludes_is_not_among_the_targets():
    """The second leaves out a.up_proj, and so does the sum."""
    base = {name: small.base()["params"] for name in ("a", "b")}
    configs = [
        jaxadapt.LoraConfig(r=2, target_modules=["q_proj"]),
        jaxadapt.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], exclude_modules=["a.up_proj"]),
    ]
    adapters = [jaxadapt.init(base, config, key=jax.random.key(0)) for config in configs]
    for order in (adapters, adapters[::-1]):
        mix = jaxadapt.combine(order, [1, 1], method="cat")
        assert set(mix.sites) == {"a.q_proj.kernel", "b.q_proj.kernel", "b.up_proj.kernel"}
        assert set(jaxadapt.select(base, mix.config).leaves) == set(mix.sites)


@pytest.mark.parametrize(("method", "r"), [("cat", 5), ("svd", 3)])
def test_the_rank_is_enough_for_the_largest_of_a_pattern(method, r):
    config = small.LORA.replace(rank_pattern={"up_proj": 3})
    adapters = [small.adapter(config), small.adapter()]
    mix = jaxadapt.combine(adapters, [1, 1], method=method)
    assert mix.config.r == r
    if method == "cat":
        site = "up_proj.kernel"
        expected = sum(
            adapter.config.lora_alpha / len(values["lora_A"]) * values["lora_B"] @ values["lora_A"]
            for adapter in adapters
            for values in [adapter.sites[site]]
        )
        found = mix.sites[site]
        np.testing.assert_allclose(found["lora_B"] @ found["lora_A"], expected, **CLOSE)


IA3 = {"one": {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}}
IA3 |= {"two": {**IA3["one"], "target_modules": ["down_proj", "k_proj"]}}


@pytest.mark.peft
@pytest.mark.parametrize("scan", [False, True])
def test_ia3_is_the_weighted_sum_of_its_vectors_as_in_peft(scan, tmp_path):
    made = pytest.importorskip("peft").IA3Config
    from tests.support import peft_pairs

    model = peft_pairs.model_with(IA3, made=made)
    model.add_weighted_adapter(list(IA3), WEIGHTS[:2], "mix")
    one, two, mix = (peft_pairs.tensors_of(model, name) for name in (*IA3, "mix"))
    base = peft_pairs.params(scan)
    adapters = [jaxadapt.from_peft(tensors, base) for tensors in (one, two)]
    ours = jaxadapt.to_peft(jaxadapt.combine(adapters, WEIGHTS[:2], method="linear"))
    assert ours.tensors.keys() == mix.tensors.keys()
    for key, x in mix.tensors.items():
        np.testing.assert_allclose(ours.tensors[key], x, **CLOSE)
    for name, tensors in (("one", one), ("two", two)):
        jaxadapt.write(tensors, tmp_path / name)
    adapter_files.combine_folders([tmp_path / name for name in IA3], WEIGHTS[:2], tmp_path / "mix", method="linear")
    for key, x in jaxadapt.read(tmp_path / "mix").tensors.items():
        np.testing.assert_allclose(x, mix.tensors[key], **CLOSE)


@pytest.mark.peft
def test_copies_of_modules_are_not_summed():
    """PEFT refuses two copies of one module too; their sum with weights 1 and 1 would be twice the module."""
    made = pytest.importorskip("peft").IA3Config
    from tests.support import peft_pairs

    model = peft_pairs.model_with({n: {**f, "modules_to_save": ["o_proj"]} for n, f in IA3.items()}, made=made)
    with pytest.raises(ValueError, match="same module with modules_to_save"):
        model.add_weighted_adapter(list(IA3), [1, 1], "mix")
    for adapters in (peft_pairs.ours(model, list(IA3)), [peft_pairs.tensors_of(model, name) for name in IA3]):
        with pytest.raises(ConfigError, match=r"modules_to_save=\('o_proj',\)"):
            jaxadapt.combine(adapters, [1, 1], method="linear")


def test_what_cannot_be_summed():
    base = {name: {"kernel": jnp.ones((3, 3))} for name in ("q", "v")}
    one, two = (
        jaxadapt.init(base, jaxadapt.IA3Config(target_modules=targets, feedforward_modules=[]), key=jax.random.key(0))
        for targets in (["q"], ["q", "v"])
    )
    with pytest.raises(ConfigError, match="method 'svd' is for LoRA adapters; use method='linear'"):
        jaxadapt.combine([one, one], [1, 1])
    with pytest.raises(
        MismatchError, match=r"(?s)not adapt the same modules.*v.kernel.ia3_l: none in adapter 0, \(3,\)"
    ):
        jaxadapt.combine([one, two], [1, 1], method="linear")
    with pytest.raises(ConfigError, match="weights: expected one for each of the 2 adapters, found 1"):
        jaxadapt.combine([one, one], [1], method="linear")
