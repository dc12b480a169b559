"""The plan: a bijection between leaves and keys, against a reference that moves one element at a time."""

from __future__ import annotations

import itertools
import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from jaxadapt import IA3Config, KeyMap, KeyMapError, LoraConfig, MismatchError
from jaxadapt.adapters import selection, sites
from jaxadapt.adapters.adapter import make_file_plan
from jaxadapt.arrays.layout import Axes
from jaxadapt.arrays.tensor_source import cast
from jaxadapt.keymaps import keymap, plan
from jaxadapt.keymaps.weight import MethodTensor, Weight

FAST = settings(max_examples=150, deadline=None)
NAMES = ["i", "o", "h", "r", "in", "out", "batch", "d2", "n_heads", "l", "lora_A"]


# ---- an independent reference ------------------------------------------------------------------------------


def axes_of(pattern):
    """Left axis names and right groups, by splitting on blanks alone."""
    left, right = pattern.split("->")
    groups = []
    for piece in right.replace("(", " ( ").replace(")", " ) ").split():
        if piece == "(":
            groups.append([])
            groups[-1].append("(")
        elif piece == ")":
            groups[-1].remove("(")
            groups[-1] = tuple(groups[-1])
        elif groups and isinstance(groups[-1], list):
            groups[-1].append(piece)
        else:
            groups.append((piece,))
    return left.split(), groups


def reference(pattern, key, leaf, entries, parts=None):
    """`{key: array}`, every element carried to its place by its index alone.

    `entries` names the entries of named braced axes; `parts` lists which of them the leaf holds.
    """
    left, groups = axes_of(pattern)
    size = dict(zip(left, leaf.shape, strict=True))
    out = {}
    for index in np.ndindex(*leaf.shape):
        at = dict(zip(left, index, strict=True))
        text = {}
        for name, i in at.items():
            if name.startswith("{"):
                bare = name[1:-1]
                which = i if parts is None or bare not in entries else parts[i]
                text[bare] = entries[bare][which] if bare in entries else str(i)
        where = tuple(
            sum(at[n] * math.prod(size[m] for m in group[k + 1 :]) for k, n in enumerate(group)) for group in groups
        )
        shape = tuple(math.prod(size[n] for n in group) for group in groups)
        tensor = out.setdefault(key.format(**text), np.zeros(shape, leaf.dtype))
        tensor[where] = leaf[index]
    return out


# ---- random lines ------------------------------------------------------------------------------------------


@st.composite
def lines(draw, groups=(1, 4), empty=True):
    """A line, the shape of its leaf, and the names of its fused axis' entries."""
    plain = draw(st.lists(st.sampled_from(NAMES), min_size=groups[0], max_size=4, unique=True))
    count = draw(st.integers(groups[0], min(groups[1], len(plain))))
    stacked = [f"{{s{i}}}" for i in range(draw(st.integers(0, 2)))]
    fused = draw(st.lists(st.sampled_from(["k", "v", "q"]), max_size=3, unique=True))
    braced = stacked + (["{p}"] if fused else [])
    left = draw(st.permutations(plain + braced))
    flat = draw(st.permutations(plain))
    cuts = sorted(draw(st.permutations(range(1, len(plain))))[: count - 1])
    right = [tuple(flat[a:b]) for a, b in itertools.pairwise([0, *cuts, len(flat)])]
    if empty and draw(st.booleans()):
        right.insert(draw(st.integers(0, len(right))), ())
    pattern = f"{' '.join(left)} -> {' '.join('(' + ' '.join(g) + ')' for g in right)}"
    key = ".".join(["blk", *stacked, *(["{p}_proj"] if fused else ["proj"]), "weight"])
    size = {n: draw(st.integers(1, 3)) for n in plain + stacked} | {"{p}": len(fused)}
    over = {"p": tuple(fused)} if fused else {}
    return Weight("blk.w", key, pattern, **over), tuple(size[n] for n in left), over


@st.composite
def layouts(draw, array):
    """The same values in another memory layout."""
    how = draw(st.sampled_from(["C", "F", "transposed", "strided", "reversed"]))
    if how == "F":
        return np.asfortranarray(array)
    if how == "transposed":
        order = draw(st.permutations(range(array.ndim)))
        return np.ascontiguousarray(array.transpose(order)).transpose(np.argsort(order))
    if how == "strided":
        wide = np.zeros((*array.shape, 2), array.dtype)
        wide[..., 0] = array
        return wide[..., 0]
    if how == "reversed":
        return array[::-1].copy()[::-1]
    return array


def numbered(shape, dtype="int32"):
    return np.arange(1, math.prod(shape) + 1, dtype=dtype).reshape(shape)


@FAST
@given(st.data())
def test_a_base_weight_goes_out_and_comes_back_bit_for_bit(data):
    weight, shape, over = data.draw(lines())
    leaf = data.draw(layouts(numbered(shape)))
    made = plan.base_plan(KeyMap("t", (weight,)), {"blk.w": shape})
    encoded = dict(made.encode({"blk.w": leaf}))
    expected = reference(weight.pattern, weight.key, leaf, over)
    assert set(encoded) == set(expected)
    assert len(made.entries[0].keys) == len(set(made.entries[0].keys))
    assert made.shapes == {k: v.shape for k, v in expected.items()}
    for key, value in expected.items():
        np.testing.assert_array_equal(encoded[key], value)
    contiguous = {k: data.draw(layouts(np.ascontiguousarray(v))) for k, v in encoded.items()}
    for tensors in (encoded, contiguous):
        back = made.decode(tensors)["blk.w"]
        assert back.dtype == leaf.dtype
        np.testing.assert_array_equal(back, leaf)


def roles_pattern(weight, axes, groups):
    """The pattern of an adapter tensor: the base weight's stacked axes at their own positions."""
    left = list(axes)
    for position, name in enumerate(weight.left):
        if name.startswith("{s"):
            left.insert(position, name)
    return f"{' '.join(left)} -> {' '.join('(' + ' '.join(g) + ')' for g in groups)}"


@FAST
@given(st.data())
@pytest.mark.parametrize("method", ["LORA", "IA3"])
def test_adapter_tensors_agree_with_the_reference(method, data):
    """`select` (from a model) and `recover` (from an adapter) give the same plan, and it is right."""
    weight, shape, over = data.draw(lines(groups=(2, 2), empty=False))
    table = KeyMap("t", (weight,))
    fused = over.get("p", ())
    chosen = data.draw(st.lists(st.sampled_from(fused), min_size=1, unique=True)) if fused else ["proj"]
    targets = [f"{c}_proj" for c in chosen] if fused else ["proj"]
    feedforward = method == "IA3" and data.draw(st.booleans())
    if method == "LORA":
        r = data.draw(st.integers(1, 3))
        config = LoraConfig(r=r, target_modules=targets)
    else:
        config = IA3Config(target_modules=targets, feedforward_modules=targets if feedforward else [])
    try:
        bounds = selection.select_sites(config, table, {"blk.w": shape})
    except KeyMapError as error:
        assume("stacks its layers on axis" not in str(error))
        raise
    (bound,) = bounds
    out, inputs = weight.right
    batch = ["{p}"] if fused else []
    size = dict(zip(weight.left, shape, strict=True))
    if fused:
        parts = sorted(fused.index(c) for c in chosen)
        size["{p}"] = len(parts)
    else:
        parts = None
    expected_tensors = (
        {
            "lora_A": ([*batch, "RANK", *inputs], [("RANK",), inputs], ".lora_A.weight"),
            "lora_B": ([*batch, *out, "RANK"], [out, ("RANK",)], ".lora_B.weight"),
        }
        if method == "LORA"
        else {"ia3_l": ([*batch, *inputs], [(), inputs], ".ia3_l")}
        if feedforward
        else {"ia3_l": ([*batch, *out], [out, ()], ".ia3_l")}
    )
    size["RANK"] = getattr(config, "r", 0)
    leaves, expected = {}, {}
    for name, (axes, groups, suffix) in expected_tensors.items():
        pattern = roles_pattern(weight, axes, groups)
        leaf = numbered([size[n] for n in axes_of(pattern)[0]], "float32")
        leaves[f"blk.w.{name}"] = data.draw(layouts(leaf))
        key = "base_model.model." + weight.key.removesuffix(".weight") + suffix
        expected |= reference(pattern, key, leaf, over, parts)
    assert bound.shapes == {p.rpartition(".")[2]: x.shape for p, x in leaves.items()}
    made = make_file_plan(bounds)
    encoded = made.encode(leaves)
    assert set(encoded) == set(expected)
    for key, value in expected.items():
        np.testing.assert_array_equal(encoded[key], value)
        assert encoded.specs[key] == (value.shape, value.dtype)
    back = made.decode(dict(encoded))
    for path, leaf in leaves.items():
        np.testing.assert_array_equal(back[path], leaf)
    recovered = sites.sites_from_shapes(config, table, {"blk.w": {k: tuple(v) for k, v in bound.shapes.items()}})
    assert [b.entries for b in recovered] == [b.entries for b in bounds]
    assert [(b.modules, b.hparams, b.axes) for b in recovered] == [(b.modules, b.hparams, b.axes) for b in bounds]


def test_a_fused_weight_partly_targeted_keeps_the_parts_order():
    weight = Weight("kv", "{p}_proj.weight", "{p} i o -> o i", p=("k", "v", "q"))
    (bound,) = selection.select_sites(
        LoraConfig(r=1, target_modules=["q_proj", "k_proj"]), KeyMap("t", (weight,)), {"kv": (3, 2, 2)}
    )
    assert bound.axes == Axes((1,), (2,), (0,), parts=(0, 2))
    assert bound.shapes == {"lora_A": (2, 1, 2), "lora_B": (2, 2, 1)}
    assert bound.modules == ("k_proj", "q_proj")


# ---- what is refused ---------------------------------------------------------------------------------------

TABLE = KeyMap(
    "t",
    (
        Weight("h.{l}.{path}.w", "h.{l}.{path}.weight", "i o -> o i"),
        Weight("kv", "{p}.weight", "{p} i o -> o i", p=("k", "v")),
    ),
)


def test_check_lists_missing_unexpected_and_misshaped_together():
    config = LoraConfig(r=2, target_modules=["q"])
    made = make_file_plan(selection.select_sites(config, TABLE, {f"h.{l}.q.w": (3, 4) for l in range(3)}))
    found = dict(made.shapes)
    found.pop("base_model.model.h.0.q.lora_A.weight")
    found["base_model.model.h.1.q.lora_B.weight"] = (4, 8)
    found["base_model.model.h.9.q.lora_B.weight"] = (4, 2)
    with pytest.raises(MismatchError) as caught:
        made.check(found, "out/", ["x: int8, expected floats"])
    text = str(caught.value)
    for part in (
        "out/ does not fit the model: of 6 tensors",
        "1 missing from out/ (the model expects them):\n  base_model.model.h.0.q.lora_A.weight",
        "1 unexpected (no parameter of the model uses them):\n  base_model.model.h.9.q.lora_B.weight",
        "base_model.model.h.1.q.lora_B.weight: expected [4, 2], found [4, 8]",
        "x: int8, expected floats",
        "for this base model",
    ):
        assert part in text
    made.check(made.shapes)


def test_an_adapter_that_contradicts_itself_lists_every_tensor():
    config = LoraConfig(r=2, target_modules=["q"])
    shapes = {"h.0.q.w": {"lora_A": (4, 3), "lora_C": (1,)}}
    with pytest.raises(MismatchError) as caught:
        sites.sites_from_shapes(config, TABLE, shapes)
    text = str(caught.value)
    assert "h.0.q.w.lora_A: axis 'r' has size 4, expected 2" in text
    assert "h.0.q.w.lora_B: missing" in text
    assert "h.0.q.w.lora_C: the method has no such tensor" in text
    with pytest.raises(MismatchError, match=r"expected axes \(r i\), found shape \(3,\)"):
        sites.sites_from_shapes(config, TABLE, {"h.0.q.w": {"lora_A": (3,), "lora_B": (3, 2)}})


def test_unmapped_adapter_leaves_are_all_named():
    leaves = {name: {"lora_A": (2, 3), "lora_B": (3, 2)} for name in ("x.w", "y.w")}
    with pytest.raises(KeyMapError, match="keymap=") as caught:
        sites.sites_from_shapes(LoraConfig(r=2, target_modules=["x"]), TABLE, leaves)
    assert "x.w" in str(caught.value)
    assert "y.w" in str(caught.value)


def test_a_stacked_axis_behind_the_tensors_own_axes_is_refused():
    table = KeyMap("t", (Weight("w", "h.{l}.q.weight", "i o {l} -> o i"),))
    with pytest.raises(KeyMapError, match=r"'w' stacks its layers on axis 2, but its ia3_l has only 1 axes"):
        selection.select_sites(IA3Config(target_modules=["q"], feedforward_modules=[]), table, {"w": (2, 3, 4)})


def test_two_sites_of_one_module_are_refused():
    table = KeyMap("t", (Weight("{path}.w", "{path}.weight", "i o -> o i"), Weight("a.u", "a.weight", "i o -> o i")))
    bounds = selection.select_sites(LoraConfig(r=1, target_modules=["a"]), table, {"a.w": (2, 2), "a.u": (2, 2)})
    with pytest.raises(MismatchError, match="several parameters claim the same tensor") as caught:
        make_file_plan(bounds)
    assert "a.u.lora_A, a.w.lora_A" in str(caught.value)


# ---- encoding ----------------------------------------------------------------------------------------------


def stacked_plan():
    table = KeyMap("t", (Weight("h.{l}.q.w", "h.{l}.q.weight", "i o -> o i"),)).scanned(0)
    return make_file_plan(selection.select_sites(LoraConfig(r=2, target_modules=["q"]), table, {"h.q.w": (3, 4, 5)}))


def test_encoding_is_lazy_and_views_where_it_can_be():
    made = stacked_plan()
    leaves = {"h.q.w.lora_A": np.zeros((3, 2, 4)), "h.q.w.lora_B": np.zeros((3, 5, 2))}
    encoded = made.encode(leaves)
    for key, value in encoded.items():
        assert np.shares_memory(value, leaves["h.q.w.lora_A" if "lora_A" in key else "h.q.w.lora_B"])
    assert "nothing" not in encoded
    assert len(encoded) == 6


def test_encoding_converts_one_tensor_at_a_time():
    leaves = {"h.q.w.lora_A": np.full((3, 2, 4), 1 / 3), "h.q.w.lora_B": np.zeros((3, 5, 2), "float16")}
    encoded = cast(stacked_plan().encode(leaves), np.dtype("bfloat16"))
    assert {s.dtype for s in encoded.specs.values()} == {np.dtype("bfloat16")}
    assert {v.dtype for v in encoded.values()} == {np.dtype("bfloat16")}


def test_layers_of_several_dtypes_join_in_one_that_holds_them():
    made = stacked_plan()
    tensors = {k: np.full(shape, 1 / 3, "float32") for k, shape in made.shapes.items()}
    key = "base_model.model.h.1.q.lora_A.weight"
    tensors[key] = tensors[key].astype(ml_dtypes.bfloat16)
    leaf = made.decode(tensors)["h.q.w.lora_A"]
    assert leaf.dtype == np.float32
    np.testing.assert_array_equal(leaf[1], tensors[key].astype("float32"))
    # No float of 16 bits represents both; versions of ml_dtypes before 0.7 cannot promote the two.
    tensors["base_model.model.h.0.q.lora_A.weight"] = np.full((2, 4), 1 / 3, "float16")
    tensors["base_model.model.h.2.q.lora_A.weight"] = np.full((2, 4), 2.0**-100, ml_dtypes.bfloat16)
    leaf = made.decode(tensors)["h.q.w.lora_A"]
    assert leaf.dtype == np.float32
    for i in range(3):
        np.testing.assert_array_equal(leaf[i], tensors[f"base_model.model.h.{i}.q.lora_A.weight"].astype("float32"))


def test_size_one_axes_that_only_pytorch_has():
    tensor = MethodTensor("v", ".v", ("out",), ((), ("out",), ()))
    weight = Weight("a", "a.weight", "i n h -> (n h) i")
    table = KeyMap("t", (weight,))
    e = plan.plan_entry(table, table.match("a"), tensor, {"i": 2, "n": 3, "h": 4})
    assert e.form.file_shape == (1, 12, 1)
    x = numbered((3, 4))
    assert e.form.encode(x, 0).shape == (1, 12, 1)
    np.testing.assert_array_equal(e.form.decode(e.form.encode(x, 0)), x)


# ---- axes in parentheses, and factors ----------------------------------------------------------------------


def interleaved(x):
    """Each head's first and second halves as pairs, by indexing alone: what MaxText does to llama's queries."""
    half = x.shape[-1] // 2
    out = np.empty_like(x)
    out[..., 0::2], out[..., 1::2] = x[..., :half], x[..., half:]
    return out


@pytest.mark.parametrize("xp", ["numpy", "jax"])
def test_a_split_axis_undoes_an_interleaving(xp):
    import jax.numpy as jnp

    heads = numbered((2, 3, 4), "float32")  # torch's rows are (n h) = 6·…, here (d=2, n=3, h=4)
    line = Weight("q", "q.weight", "d n (c p) -> (n p c) d", p=2)
    made = plan.base_plan(KeyMap("t", (line,)), {"q": (2, 3, 4)})
    torch = heads.reshape(2, 12).T
    leaf = made.decode({"q.weight": torch if xp == "numpy" else jnp.asarray(torch)})["q"]
    np.testing.assert_array_equal(leaf, interleaved(heads))
    np.testing.assert_array_equal(made.encode({"q": leaf})["q.weight"], torch)


def test_a_split_axis_reaches_every_tensor_of_an_adapter():
    """B and an IA3 vector are interleaved as their weight is, A is not; stacked layers make no difference."""
    line = Weight("h.{l}.q", "h.{l}.q.weight", "d n (c p) -> (n p c) d", p=2)
    shapes = {f"h.{l}.q": (5, 3, 4) for l in range(2)}
    a, b, v = numbered((2, 5), "float32"), numbered((12, 2), "float32"), numbered((12, 1), "float32")
    lora = {f"base_model.model.h.{l}.q.lora_{x}.weight": y + l for l in range(2) for x, y in (("A", a), ("B", b))}
    for axis in (None, 0, 1):
        table = KeyMap("t", (line,)) if axis is None else KeyMap("t", (line,)).scanned(axis)
        leaf = shapes if axis is None else {"h.q": (2, 5, 3, 4) if axis == 0 else (5, 2, 3, 4)}
        made = make_file_plan(selection.select_sites(LoraConfig(r=2, target_modules=["q"]), table, leaf))
        leaves = made.decode(lora)
        for l in range(2):
            found = {n: leaves[f"h.{l}.q.{n}"] if axis is None else np.take(leaves[f"h.q.{n}"], l, axis) for n in AB}
            np.testing.assert_array_equal(found["lora_A"], a + l)
            np.testing.assert_array_equal(found["lora_B"], np.moveaxis(interleaved((b + l).T.reshape(2, 3, 4)), 0, -1))
        for key, value in made.encode(leaves).items():
            np.testing.assert_array_equal(value, lora[key])
    config = IA3Config(target_modules=["q"], feedforward_modules=[])
    (bound,) = selection.select_sites(config, KeyMap("t", (line,)), {"h.0.q": (5, 3, 4)})
    (leaf,) = make_file_plan([bound]).decode({"base_model.model.h.0.q.ia3_l": v}).values()
    np.testing.assert_array_equal(leaf, interleaved(v.reshape(3, 4)))


AB = ("lora_A", "lora_B")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("size", [16, 12])
def test_a_factor_is_exact_where_it_is_a_power_of_two_and_one_rounding_elsewhere(dtype, size):
    kind = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    table = KeyMap("t", (Weight("q", "q.weight", "d h -> h d", scale=("h", -0.5)),))
    made = plan.base_plan(table, {"q": (3, size)})
    torch = np.random.default_rng(0).standard_normal((size, 3)).astype(kind)
    leaf = made.decode({"q.weight": torch})["q"]
    assert leaf.dtype == kind
    expected = (torch.T.astype("float64") * size**-0.5).astype(kind)
    ulp = np.abs(np.spacing(expected.astype("float32"))) * (1 if dtype == "float32" else 0)
    assert (np.abs(leaf.astype("float64") - expected.astype("float64")) <= ulp).all()
    back = made.encode({"q": leaf})["q.weight"]
    assert made.entries[0].form.is_exact == (size == 16)
    if size == 16:
        np.testing.assert_array_equal(back, torch)
    else:
        eps = float(ml_dtypes.finfo(kind).eps)
        np.testing.assert_allclose(back.astype("float64"), torch.astype("float64"), rtol=eps)
        assert made.entries[0].form.factor == pytest.approx(12**-0.5)


def test_a_shift_is_of_whole_weights_and_of_nothing_else():
    """A norm that holds 1 + w: its base and a copy of it are moved, LoRA's factors of such a weight are not."""
    lines = (
        Weight("n.scale", "n.weight", "d -> d", shift=1.0),
        Weight("q", "q.weight", "i o -> o i", shift=1.0, scale=("i", 0.5)),
    )
    table, shapes = KeyMap("t", lines), {"n.scale": (4,), "q": (4, 6)}
    torch = {"n.weight": numbered((4,), "float32") / 8, "q.weight": numbered((6, 4), "float32") / 8}
    made = plan.base_plan(table, shapes)
    leaves = made.decode(torch)
    np.testing.assert_array_equal(leaves["n.scale"], 1 + torch["n.weight"])
    np.testing.assert_array_equal(leaves["q"], 1 + 2 * torch["q.weight"].T)
    for key, x in made.encode(leaves).items():
        np.testing.assert_array_equal(x, torch[key])
    assert not any(entry.form.is_exact for entry in made.entries)
    rows = made.entries[1].form.to_rows(leaves["q"])
    np.testing.assert_array_equal(rows[0], torch["q.weight"])
    np.testing.assert_array_equal(made.entries[1].form.from_rows(rows), leaves["q"])
    config = LoraConfig(r=2, target_modules=["q"], modules_to_save=["n"])
    own = make_file_plan(selection.select_sites(config, table, shapes))
    file = {key: numbered(shape, "float32") / 8 for key, shape in own.shapes.items()}
    found = own.decode(file)
    np.testing.assert_array_equal(found["n.scale.copy"], 1 + file["base_model.model.n.weight"])
    b = file["base_model.model.q.lora_B.weight"]
    np.testing.assert_array_equal(np.sort(found["q.lora_B"], axis=None), np.sort(2 * b, axis=None))
    for key, x in own.encode(found).items():
        np.testing.assert_array_equal(x, file[key])


def test_a_method_that_says_nothing_of_factors_is_refused_there():
    table = KeyMap("t", (Weight("q", "q.weight", "d h -> h d", scale=("h", -0.5)),))
    site = table.match("q")
    tensor = MethodTensor("x", ".x", ("in", "out"), (("in",), ("out",)))
    with pytest.raises(KeyMapError, match=r"parameter 'q': the keymap 't' defines it as PyTorch's weight times"):
        plan.plan_entry(table, site, tensor, {"d": 2, "h": 4})


def test_what_does_not_divide_is_named():
    table = KeyMap("t", (Weight("q", "q.weight", "d (c p) -> (p c) d", p=2),))
    with pytest.raises(KeyMapError, match=r"an axis of size 5 cannot be split as \(c p\)"):
        plan.base_plan(table, {"q": (2, 5)})
    with pytest.raises(MismatchError, match=r"q\.lora_B: an axis of size 5 cannot be split"):
        sites.sites_from_shapes(
            LoraConfig(r=2, target_modules=["q"]), table, {"q": {"lora_A": (2, 3), "lora_B": (5, 2)}}
        )
    table = KeyMap("t", (Weight("h.{l}.q", "h.{l}.q.weight", "d (c p) -> (p c) d", p=2),))
    assert keymap.coverage(table, {"h.0.q": (2, 5)}) == 0
    assert keymap.coverage(table, {"h.0.q": (2, 6)}) == 1
