"""LORA and IA3 on every layout of a weight, and their formulas. `test_conformance` has what every method must be."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxadapt
from jaxadapt import ConfigError, GenericConfig, KeyMap, KeyMapError, Weight, methods
from jaxadapt.adapters import initial_values, selection
from jaxadapt.adapters.adapter import make_file_plan
from jaxadapt.arrays import products
from jaxadapt.arrays.layout import Axes
from jaxadapt.arrays.products import LETTERS, Use
from jaxadapt.core import paths
from jaxadapt.methods import METHODS, AppliedMethod, Method
from jaxadapt.methods.lora import REFUSED_FIELDS
from tests.support import small
from tests.support.configs import class_of

TYPES = ["IA3", "LORA"]
# One line a way a weight may look: plain, flattened heads, transposed, fused, partly fused, stacked.
LINES = {
    "plain": (Weight("w", "a.q.weight", "i o -> o i"), (4, 6), ["q"]),
    "heads out": (Weight("w", "a.q.weight", "i n h -> (n h) i"), (4, 2, 3), ["q"]),
    "heads in": (Weight("w", "a.q.weight", "n h o -> o (n h)"), (2, 3, 4), ["q"]),
    "turned": (Weight("w", "a.q.weight", "o i -> i o", fan_in_fan_out=True), (6, 4), ["q"]),
    "mixed": (Weight("w", "a.q.weight", "n i h -> (h n) i"), (2, 4, 3), ["q"]),
    "split": (Weight("w", "a.q.weight", "i n (c p) -> (n p c) i", p=2), (4, 2, 6), ["q"]),
    "scaled": (Weight("w", "a.q.weight", "i n h -> (n h) i", scale=("h", -0.5)), (4, 2, 3), ["q"]),
    "fused": (Weight("w", "{p}.weight", "{p} i o -> o i", p=("k", "v")), (2, 4, 6), ["k", "v"]),
    "one part": (Weight("w", "{p}.weight", "i {p} o -> o i", p=("q", "k", "v")), (4, 3, 6), ["k"]),
    "two parts": (Weight("w", "{p}.weight", "{p} i o -> o i", p=("q", "k", "v")), (3, 4, 6), ["q", "v"]),
}
STACKED = (Weight("w", "h.{l}.q.weight", "{l} i o -> o i"), (3, 4, 6), ["q"])


def config_of(peft_type, targets, **fields):
    """A small valid configuration of any method."""
    cls = class_of(peft_type)
    names = {f.name for f in dataclasses.fields(cls)}
    if "feedforward_modules" in names:
        fields.setdefault("feedforward_modules", [])
    if "r" in names:
        fields.setdefault("r", 2)
    return cls(target_modules=targets, **fields)


def variants(peft_type, targets):
    """Configurations that take every way through the arithmetic."""
    if peft_type == "LORA":
        yield config_of(peft_type, targets, lora_alpha=3)
        yield config_of(peft_type, targets, lora_alpha=5, use_rslora=True, r=3)
    elif peft_type == "IA3":
        yield config_of(peft_type, targets)
        yield config_of(peft_type, targets, feedforward_modules=targets)
    else:
        yield config_of(peft_type, targets)


def bound_of(config, line):
    weight, shape, _ = line
    (bound,) = selection.select_sites(config, KeyMap("t", (weight,)), {"w": shape})
    return bound


def applied(config, line, seed=None, dtype=None):
    """The adapter of one weight, fresh (no seed) or with values near 1."""
    bound = bound_of(config, line)
    values = initial_values.init_values(config, [bound], jax.random.key(0), dtype)
    if seed is not None:
        values = small.noisy(values, seed)
    params = {p.rpartition(".")[2]: v for p, v in values.items()}
    return AppliedMethod(methods.get_method(config), bound.hparams, params, bound.axes)


def use_of(axes: Axes, transposed=False):
    """x over (batch-free) two leading axes, contracted with the inputs (or outputs) of a weight."""
    w = LETTERS[: axes.rank]
    x_role, y_role = (axes.out_axes, axes.in_axes) if transposed else (axes.in_axes, axes.out_axes)
    x = "YX" + "".join(w[i] for i in x_role)
    y = "YX" + "".join(w[i] for i in axes.batch_axes) + "".join(w[i] for i in y_role)
    return Use(x, w, y, axes)


def through(hook, use, x, w):
    x = hook.input(use, x, w)
    return hook.output(use, x, jnp.einsum(f"{use.x},{use.w}->{use.y}", x, w), w)


def near_one(shape, seed, dtype="float32"):
    return jnp.asarray(1 + 0.3 * np.random.default_rng(seed).standard_normal(shape), dtype)


def x_of(use, w, seed=3):
    size = dict(zip(use.w, w.shape, strict=True)) | {"Y": 2, "X": 3}
    return near_one([size[c] for c in use.x], seed)


CASES = [
    pytest.param(config, line, id=f"{t}{i}-{name}")
    for t in TYPES
    for name, line in LINES.items()
    for i, config in enumerate(variants(t, line[2]))
]


def shares_an_input(config, line):
    """A feedforward IA3 vector over a fused weight whose parts share x: refused, see below."""
    return bool(config.get("feedforward_modules")) and "{p}" in line[0].left


# ---- the interface -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("peft_type", TYPES)
def test_a_method_is_stateless_and_named(peft_type):
    method = METHODS[peft_type]
    assert isinstance(method, Method)
    assert method.peft_type == peft_type
    assert vars(method) == {}
    assert class_of(peft_type) is not None
    assert method.kinds


@pytest.mark.parametrize(("config", "line"), CASES)
def test_statics_are_hashable_and_equal_for_equal_configurations(config, line):
    one, other = bound_of(config, line), bound_of(config.replace(), line)
    assert hash(one.hparams) == hash(other.hparams)
    assert one.hparams == other.hparams


@pytest.mark.parametrize(("config", "line"), CASES)
def test_tensors_have_distinct_names_and_keys_and_the_shapes_they_say(config, line):
    bound = bound_of(config, line)
    names = [t.name for t in bound.tensors]
    keys = [k for e in bound.entries for k in e.keys]
    assert len(set(names)) == len(names)
    assert len(set(keys)) == len(keys)
    fresh = initial_values.init_values(config, [bound], jax.random.key(0))
    assert {p.rpartition(".")[2]: v.shape for p, v in fresh.items()} == bound.shapes
    assert {v.dtype for v in fresh.values()} == {np.dtype("float32")}
    abstract = initial_values.init_values(config, [bound], None, abstract=True)
    assert {p: (v.shape, v.dtype) for p, v in abstract.items()} == {p: (v.shape, v.dtype) for p, v in fresh.items()}
    assert {v.dtype for v in initial_values.init_values(config, [bound], jax.random.key(0), "bfloat16").values()} == {
        np.dtype("bfloat16")
    }


@pytest.mark.parametrize("peft_type", TYPES)
def test_initial_values_follow_the_key_and_the_place(peft_type):
    for config in variants(peft_type, ["q"]):
        table = KeyMap("t", (Weight("h.{l}", "h.{l}.q.weight", "i o -> o i"),))
        bounds = selection.select_sites(config, table, {f"h.{l}": (4, 6) for l in range(2)})
        one = initial_values.init_values(config, bounds, jax.random.key(0))
        assert small.same(one, initial_values.init_values(config, bounds, jax.random.key(0)))
        assert small.same(one, {**initial_values.init_values(config, bounds[::-1], jax.random.key(0))})
        a, b = (paths.unflatten(one)["h"][l] for l in "01")
        constant = all(bool((x == x.ravel()[0]).all()) for x in a.values())
        assert constant or not small.same(a, b)


# ---- the arithmetic ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("config", "line"), CASES)
def test_a_fresh_adapter_changes_nothing(config, line):
    hook = applied(config, line)
    w = near_one(line[1], 1)
    np.testing.assert_array_equal(hook.weight(w), w)
    np.testing.assert_array_equal(hook.unweight(w), w)
    if not shares_an_input(config, line):
        use = use_of(hook.axes)
        x = x_of(use, w)
        np.testing.assert_array_equal(through(hook, use, x, w), jnp.einsum(f"{use.x},{use.w}->{use.y}", x, w))


@pytest.mark.parametrize("transposed", [False, True], ids=["straight", "transposed"])
@pytest.mark.parametrize(("config", "line"), CASES)
def test_the_output_is_that_of_the_effective_weight(config, line, transposed):
    """`input` and `output` together do to one contraction what `weight` does to the weight."""
    hook = applied(config, line, seed=2)
    w = near_one(line[1], 1)
    use = use_of(hook.axes, transposed)
    x = x_of(use, w)
    shared = "{p}" in line[0].left and (bool(config.get("feedforward_modules")) != transposed)
    if config.peft_type == "IA3" and shared:
        with pytest.raises(jaxadapt.AttachError, match="fused weight share one input"):
            through(hook, use, x, w)
        return
    expected = jnp.einsum(f"{use.x},{use.w}->{use.y}", x, hook.weight(w))
    np.testing.assert_allclose(through(hook, use, x, w), expected, rtol=2e-5, atol=1e-5)


def test_dora_of_small_weights_in_float16_begins_as_the_base():
    """Their squares are no numbers of 16 bits."""
    w = (np.random.default_rng(0).standard_normal((64, 32)) * 2e-4).astype("float16")
    config = jaxadapt.LoraConfig(r=2, target_modules=["q"], use_dora=True)
    adapter = jaxadapt.init({"q": {"kernel": w}}, config, key=jax.random.key(0), dtype="float16")
    lengths = np.linalg.norm(w.astype("float64"), axis=0)
    np.testing.assert_allclose(adapter.params["q"]["kernel"]["lora_magnitude_vector"], lengths, rtol=2**-10)


@pytest.mark.parametrize("transposed", [False, True], ids=["straight", "transposed"])
@pytest.mark.parametrize("line", LINES.values(), ids=LINES)
def test_dora_is_the_direction_times_the_magnitude(line, transposed):
    """Per output, over all its inputs; fused parts each have their own, and the others stay as they are."""
    w = near_one(line[1], 1)
    config = config_of("LORA", line[2], use_dora=True, lora_alpha=3)
    bound = bound_of(config, line)
    values = small.noisy(initial_values.init_values(config, [bound], jax.random.key(0), base={"w": w}), 2)
    params = {p.rpartition(".")[2]: v for p, v in values.items()}
    hook = AppliedMethod(bound.method, bound.hparams, params, bound.axes)
    axes = dataclasses.replace(bound.axes, parts=None)
    part = w if hook.axes.parts is None else jnp.take(w, np.array(hook.axes.parts), axes.batch_axes[0])
    changed = part + 1.5 * products.multiply_factors(axes, params["lora_A"], params["lora_B"])
    direction = changed / jnp.linalg.norm(jnp.moveaxis(changed, axes.in_axes, range(len(axes.in_axes))).reshape(
        -1, *(part.shape[i] for i in range(axes.rank) if i not in axes.in_axes)), axis=0).reshape(
        [1 if i in axes.in_axes else n for i, n in enumerate(part.shape)])  # fmt: skip
    expected = direction * products.expand_over_weight(axes, params["lora_magnitude_vector"])
    found = hook.merged(w)
    if hook.axes.parts is not None:
        found = jnp.take(found, np.array(hook.axes.parts), axes.batch_axes[0])
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    use = use_of(hook.axes, transposed)
    x = x_of(use, w)
    y = jnp.einsum(f"{use.x},{use.w}->{use.y}", x, hook.merged(w))
    np.testing.assert_allclose(through(hook, use, x, w), y, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize(("config", "line"), CASES)
def test_unweight_inverts_weight(config, line):
    hook = applied(config, line, seed=2)
    w = near_one(line[1], 1)
    changed = hook.weight(w)
    assert not np.allclose(changed, w)
    np.testing.assert_allclose(hook.unweight(changed), w, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["fused", "one part", "two parts", "plain"])
def test_the_input_and_the_output_get_the_adapted_parts_of_the_weight(name):
    seen = []

    class Sees(type(methods.METHODS["LORA"])):
        def input(self, hparams, params, use, x, w):
            seen.append(w)
            return x

        def output(self, hparams, params, use, x, y, drop, w):
            seen.append(w)
            return y

    hook, w = applied(config_of("LORA", LINES[name][2]), LINES[name]), near_one(LINES[name][1], 1)
    use = use_of(hook.axes)
    through(dataclasses.replace(hook, method=Sees()), use, x_of(use, w), w)
    for found in seen:
        np.testing.assert_array_equal(found, hook.part(w))
    assert len(seen) == 2


@pytest.mark.parametrize("peft_type", TYPES)
def test_unbias_inverts_bias(peft_type):
    for config in variants(peft_type, ["q"]):
        hook = applied(config, LINES["plain"], seed=2)
        bias = near_one((6,), 4)
        np.testing.assert_allclose(hook.merged_bias(hook.merged_bias(bias, 1), -1), bias, rtol=1e-6)


@pytest.mark.parametrize(("config", "line"), CASES)
def test_untargeted_parts_stay_bit_for_bit(config, line):
    hook = applied(config, line, seed=2)
    if hook.axes.parts is None:
        return
    w = near_one(line[1], 1)
    names = line[0].index_names("{p}")
    rest = [i for i in range(len(names)) if i not in hook.axes.parts]
    axis = hook.axes.batch_axes[0]
    np.testing.assert_array_equal(np.take(hook.weight(w), rest, axis), np.take(w, rest, axis))
    if shares_an_input(config, line):
        return
    use = use_of(hook.axes)
    x = x_of(use, w)
    plain = jnp.einsum(f"{use.x},{use.w}->{use.y}", x, w)
    at = use.y.index(use.w[axis])
    np.testing.assert_array_equal(np.take(through(hook, use, x, w), rest, at), np.take(plain, rest, at))


@pytest.mark.parametrize("dtypes", [("bfloat16", "float32"), ("float32", "bfloat16"), ("float16", "float16")])
@pytest.mark.parametrize("peft_type", TYPES)
def test_outputs_and_weights_keep_the_bases_dtype(peft_type, dtypes):
    base, mine = dtypes
    for config in variants(peft_type, ["q"]):
        hook = applied(config, LINES["plain"], seed=2, dtype=mine)
        w = near_one((4, 6), 1, base)
        assert hook.weight(w).dtype == base
        assert hook.unweight(w).dtype == base
        use = use_of(hook.axes)
        assert through(hook, use, x_of(use, w).astype(base), w).dtype == base


@pytest.mark.parametrize("peft_type", TYPES)
def test_stacked_layers_are_the_layers_one_by_one(peft_type):
    for config in variants(peft_type, ["q"]):
        bound = bound_of(config, STACKED)
        params = small.noisy({t: jnp.zeros(s) for t, s in bound.shapes.items()}, 2)
        w = near_one((3, 4, 6), 1)
        method = methods.get_method(config)

        def weight(params, w, bound=bound, method=method):
            return AppliedMethod(method, bound.hparams, params, bound.axes).weight(w)

        whole = jax.vmap(weight)(params, w)
        for l in range(3):
            one = weight({t: v[l] for t, v in params.items()}, w[l])
            np.testing.assert_allclose(whole[l], one, rtol=1e-6)


# ---- formulas ----------------------------------------------------------------------------------------------


def test_lora_is_w_plus_scale_b_a():
    for fields, scale in (
        ({"lora_alpha": 3}, 3 / 2),
        ({"lora_alpha": 3, "use_rslora": True}, 3 / np.sqrt(2)),
        ({"lora_alpha": 3, "rank_pattern": {"q": 4}}, 3 / 4),
        ({"lora_alpha": 3, "alpha_pattern": {"q": 5}}, 5 / 2),
    ):
        config = config_of("LORA", ["q"], **fields)
        hook = applied(config, LINES["plain"], seed=2)
        assert hook.hparams.scale == pytest.approx(scale, abs=0)
        a, b = (np.asarray(hook.params[f"lora_{x}"], "float64") for x in "AB")
        w, x = np.asarray(near_one((4, 6), 1), "float64"), np.asarray(near_one((5, 4), 3), "float64")
        np.testing.assert_allclose(hook.weight(jnp.asarray(w, "float32")), w + scale * (b @ a).T, rtol=1e-5)
        use = Use("bd", "di", "bi", hook.axes)
        y = through(hook, use, jnp.asarray(x, "float32"), jnp.asarray(w, "float32"))
        np.testing.assert_allclose(y, x @ w + scale * x @ a.T @ b.T, rtol=1e-5)


def test_loras_initial_values_have_pefts_distribution():
    line = (Weight("w", "a.q.weight", "i o -> o i"), (400, 300), ["q"])
    for init, check in {
        True: lambda a: abs(a).max() <= 1 / 20 and a.std() == pytest.approx(1 / 20 / np.sqrt(3), rel=0.05),
        "gaussian": lambda a: a.std() == pytest.approx(1 / 8, rel=0.05),
        "Gaussian": lambda a: a.std() == pytest.approx(1 / 8, rel=0.05),  # PEFT ignores its case
    }.items():
        config = config_of("LORA", ["q"], r=8, init_lora_weights=init)
        params = applied(config, line).params
        assert check(np.asarray(params["lora_A"])), init
        assert not params["lora_B"].any()
    params = applied(config_of("LORA", ["q"], r=8, init_lora_weights=False), line).params
    assert params["lora_B"].any()
    with pytest.raises(ConfigError, match="cannot initialize with init_lora_weights='orthogonal' from random"):
        applied(config_of("LORA", ["q"], init_lora_weights="orthogonal"), line)


def test_ia3_scales_outputs_and_biases_or_inputs():
    w, x = np.asarray(near_one((4, 6), 1)), np.asarray(near_one((5, 4), 3))
    for feedforward in (False, True):
        config = config_of("IA3", ["q"], feedforward_modules=["q"] if feedforward else [])
        hook = applied(config, LINES["plain"], seed=2)
        l = np.asarray(hook.params["ia3_l"])
        expected = (x * l) @ w if feedforward else (x @ w) * l
        use = Use("bd", "di", "bi", hook.axes)
        np.testing.assert_allclose(through(hook, use, jnp.asarray(x), jnp.asarray(w)), expected, rtol=1e-5)
        np.testing.assert_allclose(hook.weight(w), w * (l[:, None] if feedforward else l), rtol=1e-6)
        bias = np.arange(1, 7, dtype="f4")
        np.testing.assert_allclose(hook.bias(bias), bias if feedforward else bias * l, rtol=1e-6)


# ---- what is not honoured is refused -----------------------------------------------------------------------

ASKED = {
    "use_qalora": True,
    "use_bdlora": {"nblocks": 2},
    "arrow_config": {"arrow_top_k": 2},
    "velora_config": {"num_groups": 2},
    "monteclora_config": {"n": 2},
    "megatron_config": {"tensor_model_parallel_size": 1},
}


def test_every_refused_field_is_tried():
    assert set(ASKED) == set(REFUSED_FIELDS) - {"enable_lora"}


@pytest.mark.parametrize("field", sorted(ASKED))
def test_lora_fields_that_would_be_ignored_are_refused(field):
    config = config_of("LORA", ["q"], **{field: ASKED[field]})
    with pytest.raises(ConfigError, match=f"{field}=") as caught:
        methods.get_method(config)
    assert "are not supported" in str(caught.value)


def test_a_field_of_peft_0_2_is_refused_too():
    config = config_of("LORA", ["q"], extra={"enable_lora": [True, False], "merge_weights": False})
    with pytest.raises(ConfigError, match=r"enable_lora=\(True, False\), which is a field of PEFT 0.2"):
        methods.get_method(config)
    methods.get_method(config_of("LORA", ["q"], extra={"enable_lora": None}))


def test_all_refused_fields_stand_in_one_error():
    with pytest.raises(ConfigError) as caught:
        methods.get_method(config_of("LORA", ["q"], arrow_config={"top_k": 1}, use_qalora=True))
    for part in ("arrow_config=", "use_qalora="):
        assert part in str(caught.value)


def test_every_field_of_lora_is_honoured_refused_or_known_to_be_without_effect():
    """A new field of LoraConfig has to be put in one of these lists, by somebody who has read what it does."""
    honoured = {
        "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "rank_pattern", "alpha_pattern",
        "use_rslora", "init_lora_weights", "layers_to_transform", "layers_pattern", "fan_in_fan_out",
        "modules_to_save", "bias", "use_dora", "lora_bias", "trainable_token_indices",
        "ensure_weight_tying", "layer_replication", "target_parameters", "kasa_config",
        "alora_invocation_tokens",
    }  # fmt: skip
    # Of use to PEFT only where init_lora_weights (or use_qalora, megatron_config) asks for them, or bookkeeping.
    idle = {
        "loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size", "megatron_core",
        "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
        "inference_mode", "extra",
    }  # fmt: skip
    names = {f.name for f in dataclasses.fields(jaxadapt.LoraConfig)}
    assert names == honoured | idle | set(REFUSED_FIELDS) - {"enable_lora"}


def test_methods_without_a_class_are_refused_by_name():
    with pytest.raises(ConfigError, match=r"cannot apply peft_type 'XLORA'.*IA3,.* LOHA,.* LORA"):
        methods.get_method(GenericConfig(peft_type="XLORA"))


def test_one_array_cannot_scale_both_inputs_and_outputs():
    config = config_of("IA3", ["k", "v"], feedforward_modules=["v"])
    with pytest.raises(ConfigError, match="feedforward differs"):
        bound_of(config, LINES["fused"])


@pytest.mark.parametrize("peft_type", TYPES)
def test_a_weight_held_times_a_factor_gives_the_same_adapted_weight(peft_type):
    """One file, on W and on f·W: the adapted weights differ by f. What a method cannot say so of is refused."""
    line = (Weight("w", "a.q.weight", "i n h -> (n h) i"), (4, 2, 3), ["q"])
    scaled = LINES["scaled"]
    w, f = np.random.default_rng(0).standard_normal((4, 2, 3)).astype("float32"), 3**-0.5
    for config in variants(peft_type, ["q"]):
        one = bound_of(config, line)
        if any(t.scale_power is None for t in one.tensors):
            with pytest.raises(KeyMapError, match="effect of a factor"):
                bound_of(config, scaled)
            continue
        other = bound_of(config, scaled)
        leaves = {
            p: np.asarray(x)
            for p, x in small.noisy(initial_values.init_values(config, [one], jax.random.key(0)), 1).items()
        }
        file = dict(make_file_plan([one]).encode(leaves))
        there = make_file_plan([other]).decode(file)
        for key, value in dict(make_file_plan([other]).encode(there)).items():
            np.testing.assert_allclose(value, file[key], rtol=3e-7)  # twice rounded

        def effective(bound, leaves, w, config=config):
            params = {p.rpartition(".")[2]: v for p, v in leaves.items()}
            return AppliedMethod(methods.get_method(config), bound.hparams, params, bound.axes).weight(w)

        np.testing.assert_allclose(effective(other, there, w * f), effective(one, leaves, w) * f, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(256, 256), (192, 256), (768, 128), (128, 512)])
@pytest.mark.parametrize("outs_first", [True, False])
def test_a_merge_of_large_weights_in_either_layout(shape, outs_first):
    """Against numpy: XLA on CPU (jaxlib 0.10.2) summed other rows than it was asked for, in sizes like these."""
    rng = np.random.default_rng(0)
    out, inputs = shape if outs_first else shape[::-1]
    a, b = rng.standard_normal((8, inputs), "f4"), rng.standard_normal((out, 8), "f4")
    axes = Axes(in_axes=(1,), out_axes=(0,)) if outs_first else Axes(in_axes=(0,), out_axes=(1,))
    made = jax.jit(lambda w: products.add_product(axes, w, 2.0, a, b))(np.zeros(shape, "f4"))
    want = 2 * b @ a
    np.testing.assert_allclose(made, want if outs_first else want.T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("inputs", "out"), [((1,), (0, 2)), ((0, 2), (1,))])
def test_a_merge_where_inputs_lie_between_outputs(inputs, out):
    rng = np.random.default_rng(0)
    for shape in ((12, 256, 256), (4, 256, 256)):
        a = rng.standard_normal((8, *(shape[i] for i in inputs)), "f4")
        b = rng.standard_normal((*(shape[i] for i in out), 8), "f4")
        made = jax.jit(lambda w, a=a, b=b: products.add_product(Axes(in_axes=inputs, out_axes=out), w, 2.0, a, b))(
            np.zeros(shape, "f4")
        )
        letters = ["".join("xyz"[i] for i in axes) for axes in (inputs, out)]
        want = 2 * np.einsum(f"r{letters[0]},{letters[1]}r->xyz", a, b)
        np.testing.assert_allclose(made, want, rtol=1e-5, atol=1e-5)
