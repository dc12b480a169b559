"""LoRA's options together, on one weight: beside PEFT's formulas, written out in numpy."""

from __future__ import annotations

import ast
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxadapt import AttachError, ConfigError, IA3Config, KeyMapError, LoraConfig, Weight
from jaxadapt.adapters import initial_values, selection
from jaxadapt.adapters.adapter import make_file_plan
from jaxadapt.arrays import products
from jaxadapt.arrays.layout import Axes
from jaxadapt.arrays.products import LAYER, Operation, Use, needs_layer_number
from jaxadapt.keymaps.keymap import KeyMap
from jaxadapt.methods import METHODS, AppliedMethod, lora

LINEAR = Weight("w", "a.q.weight", "i o -> o i")
TABLE = Weight("w", "a.q.weight", "v d -> v d", kind="embedding")


def site_of(config, weight=LINEAR, shape=(4, 6)):
    (site,) = selection.select_sites(config, KeyMap("t", (weight,)), {"w": shape})
    return site


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype("float32")


@pytest.mark.parametrize(("weight", "rate"), [(LINEAR, 0.5), (TABLE, 0.0)], ids=["linear", "embedding"])
def test_an_embedding_has_no_dropout(weight, rate):
    """PEFT's embedding layer never calls `lora_dropout`."""
    site = site_of(LoraConfig(r=2, target_modules=["q"], lora_dropout=0.5), weight)
    assert site.method.dropout(site.hparams) == rate


def test_dora_with_dropout_scales_the_product_of_what_is_left():
    """PEFT computes the base's product anew from the dropped input; the layer's own output stays as it was."""
    site = site_of(LoraConfig(r=2, lora_alpha=3, target_modules=["q"], use_dora=True, lora_dropout=0.5))
    w, x = numbers(4, 6), numbers(5, 4, seed=1)
    params = {"lora_A": numbers(2, 4, seed=2), "lora_B": numbers(6, 2, seed=3), "lora_magnitude_vector": numbers(6)}
    keep = np.array([[2, 0, 2, 0]], "float32")
    hook = AppliedMethod(
        site.method, site.hparams, {k: jnp.asarray(v) for k, v in params.items()}, site.axes, lambda x: x * keep
    )
    y = hook.output(Use("bd", "di", "bi", site.axes), jnp.asarray(x), jnp.asarray(x @ w), jnp.asarray(w))
    change = 1.5 * (params["lora_B"] @ params["lora_A"]).T
    scale = params["lora_magnitude_vector"] / np.linalg.norm(w + change, axis=0)
    expected = x @ w + (scale - 1) * ((x * keep) @ w) + scale * ((x * keep) @ change)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)  # float32 sums in another order


def test_inputs_are_cast_to_the_dtype_of_a():
    """As PEFT's `_cast_input_dtype` does: 1 + 2^-10 is 1 in bfloat16."""
    axes = Axes(in_axes=(0,), out_axes=(1,))
    one = jnp.ones((1, 1), "bfloat16")
    x = jnp.full((1, 1), 1 + 2**-10, "float32")
    delta = products.low_rank_delta(Use("bd", "di", "bi", axes), 1.0, 1, one, one, x, x)
    assert float(delta[0, 0]) == 1


@pytest.mark.parametrize("ones", [True, False])
def test_ia3_starts_with_ones_or_at_random(ones):
    config = IA3Config(target_modules=["q"], feedforward_modules=[], init_ia3_weights=ones)
    (values,) = initial_values.init_values(config, [site_of(config)], jax.random.key(0)).values()
    assert bool((values == 1).all()) is ones
    assert bool(jnp.std(values) > 0.1) is not ones


@pytest.mark.parametrize(("name", "shape", "ambiguous"), [("cube", (2, 3, 4), True), ("bias", (3, 4), False)])
def test_all_linear_asks_about_weights_of_three_axes_only(name, shape, ambiguous):
    """A stacked bias has two axes as well, and is no matrix."""
    shapes = {"q.kernel": (4, 6), f"other.{name}": shape}
    table = KeyMap("t", (Weight("q.kernel", "q.weight", "i o -> o i"),))
    config = LoraConfig(r=2, target_modules="all-linear")
    if ambiguous:
        with pytest.raises(KeyMapError, match=r"ambiguous.*\n.*other\.cube \(2, 3, 4\)"):
            selection.resolve_config(config, table, shapes)
    else:
        assert selection.resolve_config(config, table, shapes).target_modules == ("q",)


def test_a_bias_of_two_axes_has_no_name_of_its_own():
    """`target_modules` names a matrix by its own path; a bias, stacked or not, belongs to its module."""
    table = KeyMap("t", (Weight("q.kernel", "q.weight", "i o -> o i"),))
    shapes = {"q.kernel": (4, 6), "q.bias": (2, 6)}
    (site,) = selection.select_sites(LoraConfig(r=2, target_modules=r".*(q|bias)"), table, shapes)
    assert site.leaf == "q.kernel"


# ---- aLoRA and KaSA ----------------------------------------------------------------------------------------


def by_hand(sequence, row):
    """The mask of one row: from the last occurrence of the sequence to the end."""
    starts = [i for i in range(len(row) - len(sequence) + 1) if row[i : i + len(sequence)] == sequence]
    return [bool(starts) and i >= starts[-1] for i in range(len(row))]


@pytest.mark.parametrize("sequence", [[7], [7, 8], [7, 8, 7], [1, 2, 3, 4, 5, 6]])
def test_alora_adapts_from_the_last_invocation_on(sequence):
    rows = [[1, 7, 8, 7, 2], [7, 8, 7, 8, 7], [1, 2, 3, 4, 5], [7, 7, 7, 8, 8]]
    mask = lora.invocation_mask(sequence, jnp.array(rows))
    assert mask.tolist() == [by_hand(sequence, row) for row in rows]


@pytest.mark.peft
def test_the_tokens_are_those_that_peft_finds():
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    from peft.tuners.lora.variants import calculate_alora_offsets

    rng = np.random.RandomState(1)
    for size in (1, 2, 3):
        sequence = [1, 0, 1][:size]
        ids = rng.randint(0, 2, (40, 7))
        config = peft.LoraConfig(task_type="CAUSAL_LM", alora_invocation_tokens=sequence)
        offsets = calculate_alora_offsets({"default": config}, "default", torch.from_numpy(ids))
        wanted = np.arange(7)[None] >= 7 - np.array([n or 0 for n in offsets])[:, None]
        np.testing.assert_array_equal(lora.invocation_mask(sequence, jnp.asarray(ids)), wanted)
        assert not lora.invocation_mask(sequence, jnp.zeros((2, size - 1), int)).any()


def test_alora_adds_its_output_to_those_tokens_only():
    mask = jnp.array([[True, False, True]])
    delta, y = jnp.ones((1, 3, 2)), jnp.zeros((1, 3, 2))
    np.testing.assert_array_equal(lora.mask_delta({"tokens": mask}, delta, y)[..., 0], [[1, 0, 1]])
    with pytest.raises(AttachError, match="needs the token ids"):
        lora.mask_delta({}, delta, y)
    with pytest.raises(AttachError, match=r"shape \[1, 3\] \(batch, time\).*shape \[3, 1, 2\]"):
        lora.mask_delta({"tokens": mask}, delta, y.reshape(3, 1, 2))


def test_kasa_scales_the_rows_of_a():
    site = site_of(LoraConfig(r=2, lora_alpha=2, target_modules=["q"], kasa_config={}))
    w = numbers(4, 6)
    params = {"lora_A": numbers(2, 4, seed=2), "lora_B": numbers(6, 2, seed=3), "lora_diag": numbers(2, seed=4)}
    hook = AppliedMethod(site.method, site.hparams, {k: jnp.asarray(v) for k, v in params.items()}, site.axes)
    expected = w + (params["lora_B"] @ np.diag(params["lora_diag"]) @ params["lora_A"]).T
    np.testing.assert_allclose(hook.weight(jnp.asarray(w)), expected, rtol=1e-5, atol=1e-6)


CONV = Weight("w", "a.q.weight", "x y i o -> o i x y", kind="conv")
GROUPED = Weight("w", "a.q.weight", "x y i o -> o i x y", kind="conv", groups=2)
TURNED = Weight("w", "a.q.weight", "i o -> i o", fan_in_fan_out=True)


@pytest.mark.parametrize(
    ("fields", "weight", "says"),
    [
        ({"kasa_config": {}, "use_dora": True}, LINEAR, "kasa_config with use_dora=True"),
        ({"kasa_config": {}, "init_lora_weights": "pissa"}, LINEAR, "kasa_config with init_lora_weights='pissa'"),
        ({"kasa_config": {}}, TURNED, "kasa_config with a layer that is not a plain linear"),
        ({"kasa_config": {}}, TABLE, "kasa_config with a layer that is not a plain linear"),
        ({"alora_invocation_tokens": [1], "use_dora": True}, LINEAR, "alora_invocation_tokens with use_dora"),
        ({"alora_invocation_tokens": [1], "kasa_config": {}}, LINEAR, "alora_invocation_tokens with kasa_config"),
        ({"alora_invocation_tokens": [1], "init_lora_weights": "mica"}, LINEAR, "with init_lora_weights='mica'"),
        ({"init_lora_weights": "mica", "use_dora": True}, LINEAR, "init_lora_weights='mica' with use_dora=True"),
        ({"alora_invocation_tokens": []}, LINEAR, "with an empty list of tokens"),
        ({"alora_invocation_tokens": [1]}, TABLE, "with a layer that is not linear"),
        ({"lora_bias": True}, TABLE, "lora_bias=True is not supported on an embedding"),
        ({"r": 3}, GROUPED, "the rank 3 must be a multiple of the convolution's 2 groups"),
        ({"use_dora": True}, GROUPED, "use_dora is not supported on a grouped convolution"),
    ],
)
def test_settings_that_peft_does_not_combine_are_refused(fields, weight, says):
    shape = (3, 3, 2, 4) if weight.kind == "conv" else (4, 6)
    with pytest.raises(ConfigError, match=re.escape(says)):
        site_of(LoraConfig(**{"r": 2, "target_modules": ["q"], **fields}), weight, shape)


@pytest.mark.parametrize(
    "fields",
    [{"kasa_config": {}, "init_lora_weights": "gaussian"}, {"kasa_config": {}}, {"alora_invocation_tokens": [1]}],
)
def test_what_peft_combines_is_accepted(fields):
    assert site_of(LoraConfig(r=2, target_modules=["q"], **fields)).leaf == "w"


PARAMETER = Weight("w", "a.q", "e i o -> e o i", kind="experts")


@pytest.mark.parametrize("field", ["lora_dropout=0.5", "lora_bias=True", "use_dora=True", "init_lora_weights='mica'"])
def test_a_parameter_takes_no_setting_of_modules(field):
    name, _, value = field.partition("=")
    config = LoraConfig(r=2, target_parameters=["a.q"], **{name: ast.literal_eval(value)})
    with pytest.raises(ConfigError, match=f"{field} cannot be combined with target_parameters"):
        site_of(config, PARAMETER, (2, 4, 6))


def test_a_parameter_takes_the_defaults():
    assert site_of(LoraConfig(r=2, target_parameters=["a.q"]), PARAMETER, (2, 4, 6)).leaf == "w"


@pytest.mark.parametrize("groups", [1, 2])
def test_lora_on_a_convolution_is_the_convolution_with_a_and_then_b(groups):
    """In numpy over a window of one: each group has its own B, and A sees the channels of one group."""
    weight = Weight("w", "a.q.weight", "x i o -> o i x", kind="conv", groups=groups)
    site = site_of(LoraConfig(r=2, lora_alpha=6, target_modules=["q"]), weight, (1, 4 // groups, 6))
    shapes = site.shapes
    params = {name: jnp.asarray(numbers(*shape, seed=len(name))) for name, shape in shapes.items()}

    def run(x, w):  # A sees all channels
        return jax.lax.conv_general_dilated(
            x, w, (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC"), feature_group_count=4 // w.shape[1]
        )

    x, w = jnp.asarray(numbers(1, 3, 4)), jnp.asarray(numbers(1, 4 // groups, 6))
    hook = AppliedMethod(site.method, site.hparams, params, site.axes)
    y = hook.output(Operation(run, 2, site.axes), x, run(x, w), w)
    file = {key.rpartition(".lora_")[2][0]: np.asarray(v) for key, v in make_file_plan([site]).encode(
        {f"w.{name}": value for name, value in params.items()}).items()}  # fmt: skip
    a, b = file["A"][:, :, 0], file["B"][:, :, 0]  # (r, in) of all channels, (out, r / groups)
    expected = np.array(run(x, w))
    for g in range(groups):
        outs, ranks = slice(g * 6 // groups, (g + 1) * 6 // groups), slice(g * 2 // groups, (g + 1) * 2 // groups)
        expected[..., outs] += 3 * np.asarray(x) @ a[ranks].T @ b[outs].T
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    if groups > 1:
        with pytest.raises(AttachError, match="no effective weight"):
            hook.weight(w)


def hparams_of(weight=LINEAR, shape=(4, 6), **fields):
    return site_of(LoraConfig(r=2, target_modules=["q"], **fields), weight, shape).hparams


@pytest.mark.parametrize(
    ("weight", "shape", "fields", "follows"),
    [
        (LINEAR, (4, 6), {}, {"ragged_dot_general"}),
        (LINEAR, (4, 6), {"use_dora": True}, set()),
        (LINEAR, (4, 6), {"lora_bias": True}, set()),
        (TABLE, (4, 6), {}, {"gather"}),
        (CONV, (3, 3, 4, 6), {}, {"conv_general_dilated"}),
    ],
)
def test_each_kind_follows_its_own_primitive(weight, shape, fields, follows):
    hparams, every = hparams_of(weight, shape, **fields), ("ragged_dot_general", "conv_general_dilated", "gather")
    assert {name for name in every if METHODS["LORA"].follows(hparams, name)} == follows
    assert METHODS["LORA"].forward(hparams) is (weight is LINEAR)
    effects = METHODS["LORA"].effects(hparams)
    assert effects.sees == ("product" if fields.get("use_dora") else "layer")
    assert effects.bias == ("adds" if fields.get("lora_bias") else None)


@pytest.mark.parametrize("init", ["mica", "MiCA", True])
def test_mica_trains_a_alone(init):
    """PEFT freezes B, which starts from the base's smallest singular vectors."""
    frozen = init is not True
    hparams = hparams_of(init_lora_weights=init)
    assert (METHODS["LORA"].role(hparams, "lora_B") == "frozen") is frozen
    assert METHODS["LORA"].role(hparams, "lora_A") != "frozen"
    axes = Axes((0,), (1,))
    a, b = jnp.ones((2, 4)), jnp.ones((6, 2))

    def total(params):
        return AppliedMethod(METHODS["LORA"], hparams, params, axes).weight(jnp.zeros((4, 6))).sum()

    gradients = jax.grad(total)({"lora_A": a, "lora_B": b})
    assert bool(gradients["lora_A"].any())
    assert bool(gradients["lora_B"].any()) is not frozen


def test_a_bias_of_lora_is_scaled_and_merged_once():
    site = site_of(LoraConfig(r=2, lora_alpha=6, target_modules=["q"], lora_bias=True))
    params = {"lora_A": numbers(2, 4), "lora_B": numbers(6, 2, seed=1), "lora_B_bias": numbers(6, seed=2)}
    hook = AppliedMethod(site.method, site.hparams, {k: jnp.asarray(v) for k, v in params.items()}, site.axes)
    w, x, bias = numbers(4, 6, seed=3), numbers(5, 4, seed=4), numbers(6, seed=5)
    y = hook.output(Use("bd", "di", "bi", site.axes), jnp.asarray(x), jnp.asarray(x @ w), jnp.asarray(w))
    expected = x @ w + 3 * (x @ params["lora_A"].T @ params["lora_B"].T + params["lora_B_bias"])
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(hook.merged_bias(jnp.asarray(bias), 1), bias + 3 * params["lora_B_bias"], rtol=1e-6)
    np.testing.assert_allclose(hook.merged_bias(hook.merged_bias(jnp.asarray(bias), 1), -1), bias, atol=1e-6)
    with pytest.raises(AttachError, match="cannot apply the bias of the adapter"):
        hook.weight(jnp.asarray(w))


def test_dora_cannot_be_undone():
    site = site_of(LoraConfig(r=2, target_modules=["q"], use_dora=True))
    params = {n: jnp.ones(s) for n, s in site.shapes.items()}
    with pytest.raises(AttachError, match="cannot unmerge DoRA"):
        AppliedMethod(site.method, site.hparams, params, site.axes).unweight(jnp.ones((4, 6)))


@pytest.mark.parametrize(
    ("version", "newer"),
    [("0.21.2", False), ("0.21.3", True), ("v0.22.0", True), ("1.0.0", True), ("0.20.9", False), (None, False)],
)
def test_a_file_of_a_newer_peft(version, newer):
    known = lora.PEFT_VERSION
    if version and version.startswith("0.21"):
        base, last = known.rsplit(".", 1)
        version = f"{base}.{int(last) + (version == '0.21.3')}"
    config = LoraConfig(target_modules=["attn"], peft_version=version)
    assert lora.is_newer_lora_file(config) is newer
    ia3 = IA3Config(target_modules=["attn"], feedforward_modules=[], peft_version=version)
    assert not lora.is_newer_lora_file(ia3)


def test_the_output_projection_of_an_attention_is_added_twice():
    """As PEFT 0.21 computes it; queries, keys and values once."""
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["attn"], lora_dropout=0.5)
    shapes = {f"attn.{n}.kernel": (4, 2, 2) for n in ("query", "key", "value")} | {"attn.out.kernel": (2, 2, 4)}
    found = selection.select_sites(config, KeyMap("t", Weight.attention("attn", "attn")), shapes)
    scales = {site.leaf.split(".")[1]: site.hparams.scale for site in found}
    assert scales == {"query": 3, "key": 3, "value": 3, "out": 6}
    assert {site.hparams.dropout for site in found} == {0.0}


@pytest.mark.parametrize("fields", [{"kasa_config": {}}, {"init_lora_weights": "pissa"}, {"init_lora_weights": "eva"}])
def test_starts_that_need_the_base_are_not_drawn(fields):
    config = LoraConfig(r=2, target_modules=["q"], **fields)
    name = "kasa_config" if "kasa_config" in fields else f"init_lora_weights={fields['init_lora_weights']!r}"
    with pytest.raises(ConfigError, match=f"cannot initialize with {name} from random numbers"):
        initial_values.init_values(config, [site_of(config)], jax.random.key(0))


@pytest.mark.parametrize(("alphas", "needed"), [({}, False), ({"h.1.q": 5}, True)])
def test_layers_that_differ_look_up_their_own_number(alphas, needed):
    """From two layers on; the parts of one layer need none."""
    config = LoraConfig(r=2, lora_alpha=2, target_modules=["q"], alpha_pattern=alphas)
    site = site_of(config, Weight("w", "h.{l}.q.weight", "{l} i o -> o i"), (2, 4, 6))
    assert needs_layer_number(site.hparams) is needed
    assert list(site.data) == ([LAYER] if needed else [])
    parts = Weight("w", "h.1.{p}.weight", "{p} i o -> o i", p=("q", "k"))
    both = config.replace(target_modules=["q", "k"])
    assert not needs_layer_number(site_of(both, parts, (2, 4, 6)).hparams)
