"""The table: lines that contradict themselves, what a line says of axes and names, families, recognition."""

from __future__ import annotations

import dataclasses
import json
import re
import sys

import numpy as np
import pytest

from jaxadapt import KeyMapError, MismatchError, Weight
from jaxadapt.arrays.layout import Axes
from jaxadapt.keymaps import families, keymap, plan
from jaxadapt.keymaps.families import FAMILIES
from jaxadapt.keymaps.keymap import GENERIC, KeyMap, Match, entry_from_axes, from_data, to_data


def llama_shapes(layers=3, d=8, inner=12, vocab=16, tied=True, scan=None):
    """The shapes of a small Llama under Hugging Face's names, unrolled or stacked on the axis `scan`."""
    layer = {
        **{f"self_attn.{m}.kernel": (d, d) for m in ("q_proj", "o_proj")},
        **{f"self_attn.{m}.kernel": (d, d // 2) for m in ("k_proj", "v_proj")},
        **{f"mlp.{m}.kernel": (d, inner) for m in ("gate_proj", "up_proj")},
        "mlp.down_proj.kernel": (inner, d),
        "input_layernorm.weight": (d,),
        "post_attention_layernorm.weight": (d,),
    }
    shapes = {"model.embed_tokens.embedding": (vocab, d), "model.norm.weight": (d,)}
    if not tied:
        shapes["lm_head.kernel"] = (d, vocab)
    for name, shape in layer.items():
        if scan is None:
            shapes |= {f"model.layers.{i}.{name}": shape for i in range(layers)}
        else:
            at = min(scan, len(shape))
            shapes[f"model.layers.{name}"] = (*shape[:at], layers, *shape[at:])
    return shapes


# ---- lines -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("leaf", "key", "pattern", "over", "says"),
    [
        ("a", "a.weight", "i o", {}, "one '->'"),
        ("a", "a.weight", "i o -> o -> i", {}, "one '->'"),
        ("a", "a.weight", "i i -> i", {}, "axis 'i' occurs twice on the left"),
        ("a", "a.weight", "i o -> o (i i)", {}, "axis 'i' occurs twice on the right"),
        ("a", "a.weight", "i o -> i", {}, "axis 'o' is only on the left"),
        ("a", "a.weight", "i -> i o", {}, "axis 'o' is only on the right"),
        ("a", "a.weight", "i o -> (o i", {}, "'(' is no axis name"),
        ("a", "a.weight", "i, o -> o i", {}, "',' is no axis name"),
        ("a", "a.{l}.weight", "i o -> o i", {}, "hole {l} of the key is neither a hole of the leaf nor"),
        ("a", "a.weight", "{l} i o -> o i", {}, "axis {l} must appear in the key"),
        ("a", "a.weight", "i o -> o i", {"p": ("k",)}, "'p' has names but is not a braced axis"),
        ("a", "{p}.weight", "{p} i o -> o i", {"p": ()}, "'p' must have at least one name"),
        ("a", "{p}.weight", "{p} i o -> o i", {"p": ("k", "k")}, "and no name twice"),
        ("a.{l}", "a.{l}.weight", "{l} i o -> o i", {}, "{l} is both a hole of the leaf and an axis"),
        ("a.{l", "a.weight", "i o -> o i", {}, "'a.{l' has a brace that is not part of a hole"),
        ("a", "a.{}.weight", "i o -> o i", {}, "'a.{}.weight' has a brace"),
        ("a", "a.weight", "i o {l} -> o {l} i", {}, "axis '{l}' is only on the right"),
        ("a", "a.weight", "i (c p) -> (p c) i", {}, "(c p): all axes except one must have a size"),
        ("a", "a.weight", "i (c p) -> (p c) i", {"p": 2, "c": 3}, "(c p): all axes except one must have a size"),
        ("a", "a.weight", "(c p) -> p c", {"p": 2}, "(c p): its axes must be in the same PyTorch axis"),
        ("a", "{l}.weight", "i ({l} p) -> p i", {"p": 2}, "none may have braces"),
        ("a", "a.weight", "i () -> i", {}, "(): all axes except one must have a size"),
        ("a", "a.weight", "i o -> o i", {"o": 2}, "'o' has a size, but is not in parentheses"),
        ("a", "a.weight", "i o -> o i", {"scale": ("h", 1)}, "the axis 'h' of the scale is not in the pattern"),
    ],
)
def test_a_line_that_contradicts_itself_is_refused(leaf, key, pattern, over, says):
    with pytest.raises(KeyMapError) as caught:
        Weight(leaf, key, pattern, **over)
    assert says in str(caught.value)
    assert repr(leaf) in str(caught.value)


def test_all_problems_of_a_line_stand_in_one_error():
    with pytest.raises(KeyMapError, match="only on the left") as caught:
        Weight("a", "a.{x}.weight", "i o {l} -> o")
    assert "{x}" in str(caught.value)
    assert "must appear in the key" in str(caught.value)


def test_what_a_line_says_of_its_axes():
    w = Weight("{path}.kv.w", "{path}.{l}.{p}.weight", "d {l} {p} n h -> (n h) d", p=("k", "v"))
    site = Match("a.kv.w", w, (("path", "a"),))
    assert site.stack == (1,)
    assert site.roles == {
        "stack": ("{l}",), "fused": ("{p}",), "experts": (), "batch": ("{p}",), "in": ("d",), "out": ("n", "h"),
        "channels": ("d",),
    }  # fmt: skip
    assert site.axes == Axes(in_axes=(0,), out_axes=(2, 3), batch_axes=(1,))
    assert Match("a.kv.w", w, (), parts=(1,)).axes == Axes((0,), (2, 3), (1,), parts=(1,))
    modules = site.modules({"d": 4, "{l}": 2, "{p}": 2, "n": 1, "h": 3})
    assert modules == {(0, 0): "a.0.k", (0, 1): "a.0.v", (1, 0): "a.1.k", (1, 1): "a.1.v"}


def test_experts_are_batch_axes_however_pytorch_holds_them():
    one = Weight("w", "e.{e}.up.weight", "{e} d f -> f d")
    assert (one.roles["stack"], one.roles["batch"], one.roles["experts"]) == ((), ("{e}",), ())
    all_ = Weight("w", "experts.up", "x d f -> x f d", kind="experts")
    assert (all_.roles["batch"], all_.roles["experts"], all_.axes) == (("x",), ("x",), Axes((1,), (2,), (0,)))
    turned = Weight("w", "experts.up", "x d f -> x d f", kind="experts", fan_in_fan_out=True)
    assert turned.axes == all_.axes
    assert Weight("w", "experts.up", "x d f -> x d f", kind="experts").axes == Axes((2,), (1,), (0,))


def test_kinds_follow_from_the_axes_unless_given():
    assert Weight("a", "a.weight", "i o -> o i").kind == "linear"
    assert Weight("a", "a.bias", "o -> o").kind == "vector"
    assert Weight("a", "a.weight", "t i o -> o i t").kind == "other"
    table = Weight("a", "a.weight", "v d -> v d", kind="embedding")
    assert Match("a", table).roles["in"] == ("v",)  # PEFT: a lookup maps vocabulary to features
    assert Match("a", Weight("a", "a.weight", "o i -> i o", fan_in_fan_out=True)).roles["out"] == ("o",)


def test_a_hole_used_twice_holds_the_same_text():
    table = KeyMap("t", (Weight("h.{l}.at{l}.w", "h.{l}.weight", "i o -> o i"),))
    assert table.match("h.3.at3.w") is not None
    assert table.match("h.3.at4.w") is None


def test_holes_hold_digits_and_paths():
    table = KeyMap("t", (Weight("h.{l}.w", "h.{l}.weight", "i o -> o i"),))
    assert table.match("h.x.w") is None
    site = table.match("h.12.w")
    assert site is not None
    assert site.modules({}) == {(): "h.12"}
    assert GENERIC.match("a.b.c.kernel").modules({}) == {(): "a.b.c"}  # type: ignore[union-attr]
    assert GENERIC.match("kernel").modules({}) == {(): ""}  # type: ignore[union-attr]


# ---- tables ------------------------------------------------------------------------------------------------


def test_two_matching_lines_name_the_leaf_and_both_lines():
    lines = (
        Weight("{path}.q.w", "{path}.q.weight", "i o -> o i"),
        Weight("a.{path}.w", "a.{path}.weight", "i o -> o i"),
    )
    with pytest.raises(KeyMapError) as caught:
        KeyMap("mine", lines).match("a.q.w")
    for part in ("'a.q.w'", "'mine'", "{path}.q.w", "a.{path}.w"):
        assert part in str(caught.value)


def test_a_literal_line_wins_over_a_template_and_is_there_once():
    template = Weight("{path}.w", "{path}.weight", "i o -> o i")
    literal = Weight("a.w", "special.weight", "i o -> o i")
    table = KeyMap("t", (template,)).with_entries([literal])
    assert table.match("a.w").weight == literal  # type: ignore[union-attr]
    assert table.match("b.w").weight == template  # type: ignore[union-attr]
    assert table.with_entries([literal]) == table
    with pytest.raises(KeyMapError, match=r"two entries for the parameter 'a\.w'"):
        KeyMap("t", (literal, literal)).match("a.w")


def test_tables_are_equal_and_hashable_by_content():
    again = dataclasses.replace(FAMILIES["llama"], weights=tuple(FAMILIES["llama"].weights))
    assert again is not FAMILIES["llama"]
    assert again == FAMILIES["llama"]
    assert hash(again) == hash(FAMILIES["llama"])
    assert again != FAMILIES["gpt2"]


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_scanned_lines_agree_with_stacked_arrays(axis):
    """A scanned table maps the stacked leaf to the very tensors the plain table makes of the layers."""
    table = KeyMap("t", (Weight("h.{l}.q.w", "h.{l}.q.weight", "i n o -> (n o) i"),))
    layers = {f"h.{l}.q.w": np.arange(24).reshape(2, 3, 4) + 100 * l for l in range(3)}
    stacked = {"h.q.w": np.stack(list(layers.values()), axis)}
    one = plan.base_plan(table, {k: v.shape for k, v in layers.items()}).encode(layers)
    other = plan.base_plan(table.scanned(axis), {k: v.shape for k, v in stacked.items()}).encode(stacked)
    assert sorted(one) == sorted(other)
    for key in one:
        np.testing.assert_array_equal(one[key], other[key])


def test_scanned_leaves_lines_without_layers_alone():
    line = Weight("norm.weight", "norm.weight", "d -> d")
    assert line.scanned(0) == line
    assert Weight("h.{l}.b", "h.{l}.bias", "o -> o").scanned(0).pattern == "{l} o -> o"


def test_base_plan_lists_every_problem_and_names_the_leaves():
    lines = (
        Weight("{path}.q.w", "{path}.q.weight", "i o -> o i"),
        Weight("a.{path}.w", "a.{path}.weight", "i o -> o i"),
        Weight("kv", "{p}.weight", "{p} i o -> o i", p=("k", "v")),
        Weight("r", "r.weight", "i o -> o i"),
    )
    shapes = {"a.q.w": (2, 3), "kv": (3, 2, 2), "r": (2, 2, 2), "lost": (4,)}
    with pytest.raises(KeyMapError) as caught:
        plan.base_plan(KeyMap("mine", lines), shapes)
    text = str(caught.value)
    assert "'a.q.w' matches 2 entries" in text
    assert "'kv' has size 3 on its axis {p}, but its entry names ['k', 'v']" in text
    assert "'r' has shape (2, 2, 2)" in text
    assert "lost (4,): no entry" in text


def test_keys_claimed_twice_name_both_leaves():
    lines = (Weight("a.{l}", "x.weight", "i o -> o i"),)
    with pytest.raises(MismatchError) as caught:
        plan.base_plan(KeyMap("t", lines), {"a.0": (1, 2), "a.1": (1, 2)})
    assert "x.weight: a.0, a.1" in str(caught.value)


def test_lines_from_a_layers_own_roles():
    line = entry_from_axes("blk.attn.kernel", (3, 2, 8, 2, 4), Axes((1,), (2, 3), (0,)), stack=(0,))
    assert line.pattern == "{s0} {b0} i0 o0 o1 -> (o0 o1) (i0)"
    assert line.key == "blk.{s0}.{b0}.attn.weight"
    site = Match("blk.attn.kernel", line)
    assert site.axes == Axes((1,), (2, 3), (0,))
    # A leaf with a name of its own is part of the module's name.
    assert entry_from_axes("ff.linear1", (2, 3), Axes((0,), (1,))).key == "ff.linear1.weight"


@pytest.mark.parametrize("axis", [None, 0, 1])
def test_a_layer_here_may_be_several_there(axis):
    """Layer l is PyTorch's 2·l and 2·l + 1; unrolled and stacked, forwards and backwards."""
    lines = [Weight(f"h_{{l}}.{n}", "h.{l}.weight", "i o -> o i", layers=(2, at)) for at, n in enumerate("ab")]
    table = KeyMap("two", tuple(lines))
    shapes = {f"h_{l}.{n}": (2, 3) for l in range(3) for n in "ab"}
    if axis is not None:
        table, shapes = table.scanned(axis), {f"h.{n}": (3, 2, 3) if axis == 0 else (2, 3, 3) for n in "ab"}
    made = plan.base_plan(table, shapes)
    torch = {f"h.{l}.weight": np.full((3, 2), l) for l in range(6)}
    assert set(made.keys) == set(torch)
    leaves = made.decode(torch)
    for n, first in (("a", 0), ("b", 1)):
        for l in range(3):
            found = leaves[f"h_{l}.{n}"] if axis is None else np.take(leaves[f"h.{n}"], l, axis)
            np.testing.assert_array_equal(found, 2 * l + first)
    for key, x in made.encode(leaves).items():
        np.testing.assert_array_equal(x, torch[key])
    a, b = table.weights
    assert (a.match_key("h.3.weight"), b.match_key("h.4.weight")) == (None, None)
    assert b.fill_leaf(b.match_key("h.5.weight")) == ("h_2.b" if axis is None else "h.b")
    assert from_data(json.loads(json.dumps(to_data(table)))) == table


def test_a_table_travels_as_text():
    lines = (
        Weight("n.{l}", "n.{l}.weight", "d -> d", shift=1.0, layers=(6, 2)),
        Weight("q.{l}", "q.{l}.weight", "i n (c p) -> (n p c) i", p=2, scale=("c p", -0.5)),
        Weight("kv", "{p}.weight", "{p} i o -> i o", p=("k", "v"), fan_in_fan_out=True),
        Weight("e", "e.weight", "v d -> v d", kind="embedding"),
    )
    table = KeyMap(
        "t",
        lines,
        output="head",
        prefix="pre.",
        proved=False,
        complete=True,
        needs=("kv",),
        same=("d",),
        tied=(("a", "b"),),
        buffers=("b.{l}",),
        spellings=(("vl", (("q.", "x.q."),)),),
    )
    assert from_data(json.loads(json.dumps(to_data(table)))) == table
    rest = ({"needs": ()}, {"same": ()}, {"buffers": ()})
    for change in ({"proved": True}, {"complete": False}, {"tied": ()}, {"spellings": ()}, {"output": None}, *rest):
        assert dataclasses.replace(table, **change) != table


def test_a_spelling_renames_keys_and_the_output_layer():
    lines = (
        Weight("q.{l}.kernel", "model.layers.{l}.q.weight", "i o -> o i"),
        Weight("head.kernel", "lm_head.weight", "i o -> o i"),
    )
    renames = (("model.", "language_model.model."), ("lm_head.", "language_model.lm_head."))
    table = KeyMap("t", lines, "lm_head", tied=(("lm_head.weight", "model.e.weight"),), spellings=(("vl", renames),))
    other = table.with_spelling("vl")
    assert other.name == "t/vl"
    assert [w.key for w in other.weights] == [
        "language_model.model.layers.{l}.q.weight",
        "language_model.lm_head.weight",
    ]
    assert other.output == "language_model.lm_head"
    assert other.tied == (("language_model.lm_head.weight", "language_model.model.e.weight"),)
    with pytest.raises(KeyMapError, match="no naming variant 'x'; use one of vl"):
        table.with_spelling("x")
    leaves = ["q.0.kernel", "q.1.kernel"]
    assert table.spelling_for(["language_model.model.layers.3.q.weight"], leaves) == other
    assert table.spelling_for(["model.layers.3.q.weight"], leaves) is table
    assert table.spelling_for(["whatever"], leaves) is table
    # A line that speaks of the other spelling counts only in a model that has its leaf.
    other_line = Weight("o", "language_model.model.layers.o.weight", "i o -> o i")
    both = dataclasses.replace(table, weights=(*lines, other_line))
    assert both.spelling_for(["language_model.model.layers.3.q.weight"], leaves).name == "t/vl"


# ---- families ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("scan", "name"), [(None, "llama"), (0, "llama/scan0"), (1, "llama/scan1")])
def test_llama_is_recognized(scan, name, tied):
    shapes = llama_shapes(scan=scan, tied=tied)
    assert families.resolve_keymap("auto", shapes).name == name
    assert families.resolve_keymap(None, shapes) == families.get_family(name)


def test_what_no_table_accounts_for_gets_the_generic_map():
    assert families.resolve_keymap("auto", {}) is GENERIC
    assert families.resolve_keymap("auto", {"kernel": (2, 2)}) is GENERIC
    # A leaf of the family's name in another layout: another model.
    assert families.resolve_keymap("auto", {**llama_shapes(), "model.norm.weight": (2, 2)}) is GENERIC


def test_stacked_axes_must_agree_in_size():
    shapes = llama_shapes(scan=0)
    assert families.resolve_keymap("auto", shapes).name == "llama/scan0"
    assert families.resolve_keymap("auto", {**shapes, "model.layers.mlp.up_proj.kernel": (4, 8, 12)}) is GENERIC


def with_other(table, without=""):
    """The families and one more."""
    return {name: known for name, known in FAMILIES.items() if name != without} | {table.name: table}


def test_an_ambiguous_model_names_both_tables():
    twin = KeyMap("llama-twin", FAMILIES["llama"].weights)
    with pytest.raises(KeyMapError) as caught:
        families.resolve_keymap("auto", llama_shapes(), with_other(twin))
    assert "llama, llama-twin" in str(caught.value)
    assert "keymap=" in str(caught.value)


def test_a_table_with_fewer_lines_to_spare_is_the_better_one():
    more = (*FAMILIES["llama"].weights, Weight("model.layers.{l}.extra", "model.layers.{l}.extra.weight", "d -> d"))
    known = with_other(KeyMap("llama-more", more))
    assert families.resolve_keymap("auto", llama_shapes(), known).name == "llama"
    shapes = {**llama_shapes(), "model.layers.0.extra": (8,)}
    assert families.resolve_keymap("auto", shapes, known).name == "llama-more"


def other_llama(name, **options):
    """Llama's leaves with another meaning: one kernel is turned."""
    lines = [w for w in FAMILIES["llama"].weights if "q_proj.kernel" not in w.leaf]
    q = Weight("model.layers.{l}.self_attn.q_proj.kernel", "model.layers.{l}.q.weight", "o i -> o i")
    return KeyMap(name, (*lines, q), **options)


def test_tables_that_disagree_are_rivals_even_where_one_has_lines_to_spare():
    spare = (*other_llama("x").weights, Weight("more.{l}", "more.{l}.weight", "d -> d"))
    known = with_other(KeyMap("other", spare, proved=False))
    with pytest.raises(KeyMapError, match=r"several keymaps: llama, other \(not verified\); select one with keymap="):
        families.resolve_keymap("auto", llama_shapes(), known)


def test_a_table_that_is_not_proved_is_never_recognized():
    known = with_other(other_llama("other", proved=False), without="llama")
    with pytest.raises(KeyMapError, match="looks like 'other', but that keymap has not been verified.*keymap='other'"):
        families.resolve_keymap("auto", llama_shapes(), known)
    assert families.resolve_keymap("other", llama_shapes(), known).name == "other"


def test_a_table_for_whole_models_takes_no_part_of_one():
    known = with_other(other_llama("other", complete=True), without="llama")
    part = {**llama_shapes(), "model.layers.0.self_attn.extra": (3,)}
    assert families.resolve_keymap("auto", llama_shapes(), known).name == "other"
    assert families.resolve_keymap("auto", part, known) is GENERIC
    assert families.resolve_keymap("auto", {**llama_shapes(), "tower.0.extra": (3,)}, known).name == "other"


def test_a_table_is_not_recognized_without_what_it_needs():
    extra = Weight("model.layers.{l}.extra", "model.layers.{l}.extra.weight", "d -> d")
    lines = (*other_llama("x").weights, extra)
    other = KeyMap("other", lines, needs=(extra.leaf,))
    assert families.resolve_keymap("auto", llama_shapes(), with_other(other)).name == "llama"
    scanned = other.scanned(1)
    assert scanned.needs == ("model.layers.extra",)
    assert keymap.coverage(scanned, {**llama_shapes(scan=1), "model.layers.extra": (8, 3)}) == 12


def test_axes_that_have_one_size_tell_a_kernel_from_its_transpose():
    norm = Weight("norm.scale", "norm.weight", "d -> d")
    ups = [Weight("up.{l}", "up.{l}.weight", f"{axes} -> f d") for axes in ("d f", "f d")]
    tables = [KeyMap("x", (norm, up), same=("d",)) for up in ups]
    assert [keymap.coverage(t, {"norm.scale": (3,), "up.0": (3, 5)}) for t in tables] == [2, 0]
    assert [keymap.coverage(t, {"norm.scale": (5,), "up.0": (3, 5)}) for t in tables] == [0, 2]


@pytest.mark.parametrize("head", ["lm_head", "classifier", "pooler.dense", "proj_out", "qa_outputs", "text_projection"])
def test_a_head_alone_makes_no_family(head):
    """Models of nobody's library call their heads as everybody does; their layers are what they are known by."""
    assert any(table.match(f"{head}.kernel") for table in FAMILIES.values())
    mine = {f"{head}.kernel": (8, 32), f"{head}.bias": (32,), "blocks.0.up.kernel": (8, 16), "embed.embedding": (32, 8)}
    assert families.resolve_keymap(None, mine) is GENERIC


def gpt2_shapes(dense):
    """GPT-2 under Hugging Face's names: the kernels as transformers' Flax classes hold them, or as nn.Dense does."""
    kernels = {"attn.c_attn": (48, 16), "attn.c_proj": (16, 16), "mlp.c_fc": (64, 16), "mlp.c_proj": (16, 64)}
    layer = {f"{m}.kernel": shape[::-1] if dense else shape for m, shape in kernels.items()}
    layer |= {f"{m}.bias": (shape[0],) for m, shape in kernels.items()} | {"ln_1.scale": (16,), "ln_1.bias": (16,)}
    out = {f"transformer.h.{l}.{leaf}": shape for l in range(2) for leaf, shape in layer.items()}
    return {**out, "transformer.wte.embedding": (50, 16), "lm_head.kernel": (16, 50)}


def test_a_gpt2_of_dense_layers_is_not_taken_for_one_of_transposed_kernels():
    assert families.resolve_keymap(None, gpt2_shapes(dense=False)).name == "gpt2"
    assert families.resolve_keymap(None, gpt2_shapes(dense=True)).name == "gpt2-dense"


def test_a_keymap_is_a_table_or_a_name():
    with pytest.raises(KeyMapError, match="expected a KeyMap or the name of a family, found list"):
        families.resolve_keymap([Weight("a", "a.weight", "i o -> o i")], {})


def test_the_leaves_of_an_adapter_alone():
    leaf = "model.layers.3.self_attn.q_proj.kernel"
    assert families.family_of_leaves([leaf]).name == "llama"
    assert families.family_of_leaves(["a.kernel"]) is GENERIC
    with pytest.raises(KeyMapError, match=r"fit several keymaps: .*\bllama\b.*other"):
        families.family_of_leaves([leaf], with_other(other_llama("other")))


def test_the_nearest_family_of_a_large_model_is_named_without_matching_each_leaf_with_each_family():
    calls, shapes = [], llama_shapes(layers=120)
    sys.setprofile(lambda frame, event, _: frame.f_code is KeyMap.match.__code__ and calls.append(event == "call"))
    text = families.describe_nearest_family(shapes)
    sys.setprofile(None)
    assert f"'llama', with entries for {len(shapes)} of {len(shapes)} weights. It fits: pass keymap='llama'" in text
    assert sum(calls) < 10 * len(shapes)  # of 45 families, each in four forms
    text = families.describe_nearest_family({**shapes, "model.layers.77.self_attn.q_proj.kernel": (2, 3, 4)})
    assert re.search(r"'llama'.*does not fit because of\n  parameter 'model.layers.77.self_attn.q_proj.kernel'", text)
    assert "No keymap of a known family is similar" in families.describe_nearest_family({"a.b": (3,)})


def test_a_model_as_wide_as_it_is_deep_does_not_tell_the_stacked_axis():
    cube = llama_shapes(layers=8, d=8, inner=8, scan=0)
    cube |= {k: (8, 8, 8) for k in cube if "proj" in k}
    with pytest.raises(KeyMapError, match="llama/scan0, llama/scan1"):
        families.resolve_keymap("auto", cube)
    assert families.resolve_keymap("llama/scan1", cube).name == "llama/scan1"


@pytest.mark.parametrize("name", ["mistral", ""])
def test_an_unknown_family_says_what_lists_the_known_ones(name):
    with pytest.raises(KeyMapError) as caught:
        families.resolve_keymap(name, {})
    assert "`jaxadapt families` lists them" in str(caught.value)
    assert "gpt_neox" not in str(caught.value)  # all of them were a wall of text
    assert repr(name) in str(caught.value)


@pytest.mark.parametrize("change", ["scan", "scanx", "1", "per-expert"])
def test_an_unknown_change_of_a_table_lists_the_known_ones(change):
    with pytest.raises(KeyMapError, match=rf"'llama' has no naming variant '{change}'; use one of vl, vl4"):
        families.resolve_keymap(f"llama/{change}", {})


def test_every_family_has_lines_that_never_meet():
    for table in FAMILIES.values():
        for line in table.weights:
            leaf = re.sub(r"\{\w+\}", "2", line.leaf.replace("{path}", "x.y"))
            assert table.match(leaf).weight == line  # type: ignore[union-attr]
