"""One entry of a keymap: names, roles and what contradicts itself."""

from __future__ import annotations

import numpy as np
import pytest

from jaxadapt import KeyMap, KeyMapError, Weight
from jaxadapt.keymaps import plan
from jaxadapt.keymaps.keymap import Match, from_data, shape_problem, to_data


def test_an_attention_layer_has_eight_entries():
    entries = {w.leaf: w for w in Weight.attention("h.{l}.attn", "h.{l}.self")}
    assert list(entries) == [
        f"h.{{l}}.attn.{name}.{leaf}" for name in ("query", "key", "value", "out") for leaf in ("kernel", "bias")
    ]
    for i, name in enumerate(("query", "key", "value")):
        kernel, bias = entries[f"h.{{l}}.attn.{name}.kernel"], entries[f"h.{{l}}.attn.{name}.bias"]
        assert (kernel.key, kernel.pattern) == (f"h.{{l}}.self.in_proj_weight[{i}/3]", "d n h -> (n h) d")
        assert (bias.key, bias.pattern, bias.kind) == (f"h.{{l}}.self.in_proj_bias[{i}/3]", "n h -> (n h)", "vector")
        assert (kernel.part, kernel.part_axis, kernel.file_key) == (f"{i}/3", ("n", "h"), "h.{l}.self.in_proj_weight")
        assert kernel.adaptable
        assert not bias.adaptable
    out = entries["h.{l}.attn.out.kernel"]
    assert (out.key, out.pattern, out.part) == ("h.{l}.self.out_proj.weight", "n h d -> d (n h)", "")
    assert entries["h.{l}.attn.out.bias"].key == "h.{l}.self.out_proj.bias"
    kernels = [w for w in entries.values() if w.leaf.endswith("kernel")]
    assert {w.kind for w in kernels} == {"attention"}
    assert {w.module for w in kernels} == {"h.{l}.self"}


@pytest.mark.parametrize(
    ("key", "pattern", "kind"),
    [
        ("q.weight", "i o -> o i", "linear"), ("q.weight", "i n h -> (n h) i", "linear"),
        ("q.weight", "d -> d", "vector"),
        ("q.weight", "x y i o -> o i x y", "other"), ("q.weight", "-> ()", "vector"),
    ],
)  # fmt: skip
def test_the_kind_follows_from_pytorchs_axes(key, pattern, kind):
    assert Weight("q", key, pattern).kind == kind
    assert Weight("q", key, pattern, kind="embedding").kind == "embedding"


@pytest.mark.parametrize(
    ("key", "part", "axis", "file_key"),
    [
        ("q.weight", "", ("o",), "q.weight"),
        ("q.weight[0/2]", "0/2", ("o",), "q.weight"),
        ("q.weight[i 1/2]", "1/2", ("i",), "q.weight"),
        ("q.weight[o 0::2]", "0::2", ("o",), "q.weight"),
    ],
)
def test_a_bracket_names_the_part_and_its_axis(key, part, axis, file_key):
    weight = Weight("q", key, "i o -> o i")
    assert (weight.part, weight.part_axis, weight.file_key) == (part, axis, file_key)


def test_several_entries_for_one_leaf_are_refused():
    one, other = Weight("{path}.w", "{path}.weight", "i o -> o i"), Weight("h.{l}.w", "g.{l}.weight", "i o -> o i")
    table = KeyMap("t", (one, other))
    assert isinstance(table.match("c.w"), Match)
    assert table.match("c.v") is None
    with pytest.raises(KeyMapError, match=r"h\.0\.w"):
        table.match("h.0.w")
    assert repr(table) == "<KeyMap 't', 2 entries>"


@pytest.mark.parametrize("scan", [None, 0, 1])
def test_layers_in_blocks_have_the_numbers_of_pytorchs_layers(scan):
    """Blocks of six: five layers in one leaf with two stacked axes, or with two holes, and the last in another."""
    options = {"layers": (6, 1), "place": 5}
    entries = (
        Weight("blocks_{l}.local_{place}.q", "h.{l}.q.weight", "d n h -> (n h) d", **options),
        Weight("blocks_{l}.last.q", "h.{l}.q.weight", "d n h -> (n h) d", layers=(6, 6)),
    )
    keymap, sizes = KeyMap("blocks", entries), (3, 2, 4)
    if scan is None:
        places = (*(f"local_{place}" for place in range(5)), "last")
        shapes = {f"blocks_{block}.{place}.q": sizes for block in (0, 1) for place in places}
    else:
        keymap = keymap.scanned(scan)
        assert from_data(to_data(keymap)).weights == keymap.weights
        shapes = {
            "blocks.local.q": (*sizes[:scan], 2, 5, *sizes[scan:]), "blocks.last.q": (*sizes[:scan], 2, *sizes[scan:])
        }  # fmt: skip
    made = plan.base_plan(keymap, shapes)
    layers = [f"h.{number}.q.weight" for number in range(1, 13)]
    assert made.shapes == dict.fromkeys(layers, (8, 3))
    tensors = {key: np.full((8, 3), number) for number, key in enumerate(layers)}
    back = made.encode(made.decode(tensors))
    assert all((back[key] == tensors[key]).all() for key in layers)
    for key in layers:  # and from the key back to the leaf
        entry, texts = next((w, texts) for w in keymap.weights if (texts := w.match_key(key)) is not None)
        leaf = made.keys[key][0].path
        assert entry.fill_leaf(texts) == leaf
        at = [entry.model_number(axis, texts) for axis in entry.roles["stack"]]
        assert scan is None or (made.decode(tensors)[leaf].take(at[0], scan) == layers.index(key)).any()
    assert [w.match_key("h.0.q.weight") for w in keymap.weights] == [None, None]


def test_a_block_of_another_size_is_no_fit():
    entry = Weight("blocks.local.q", "h.{l}.q.weight", "{l} {place} d f -> f d", layers=(6, 0), place=5)
    found = shape_problem(Match("blocks.local.q", entry), (2, 4, 3, 3))
    assert found == "parameter 'blocks.local.q' has size 4 on its axis {place}, but its entry names [0, 1, 2, 3, 4]"


@pytest.mark.parametrize(
    ("leaf", "key", "pattern"),
    [
        ("a_{l}.x", "m.{l}.w", "{place} d f -> f d"),
        ("a.x", "m.w", "{place} d f -> f d"),
        ("a_{l}.b_{place}.x", "m.{l}.{place}.w", "d f -> f d"),
    ],
)
def test_the_places_of_a_block_stand_beside_its_number(leaf, key, pattern):
    with pytest.raises(KeyMapError, match="l and place must both be holes of the leaf, or both be braced axes"):
        Weight(leaf, key, pattern, layers=(6, 0), place=5)


@pytest.mark.parametrize(("leaf", "pattern"), [("a_{l}.b_{place}.x", "d f -> f d"), ("a.x", "{l} {place} d f -> f d")])
def test_a_block_without_the_number_of_its_places_names_the_option(leaf, pattern):
    with pytest.raises(KeyMapError, match=r"\{place\} must appear in the key.*pass their number, as in place=5$"):
        Weight(leaf, "m.{l}.weight", pattern, layers=(6, 0))
    named = Weight("a_{place}.x", "m.{place}.weight", "d f -> f d")  # a hole as any other
    assert named.match_key("m.3.weight") == {"place": "3"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"place": 5}, r"layers=\(1, 0\) must be .*, and place=5 must be at least 1 and at most step"),
        ({"layers": (6, 0), "place": 7}, "place=7 must be"),
        ({"layers": (6, 0), "place": 0}, "place=0 must be"),
        ({"layers": (0, 0), "place": 1}, "a step of at least 1, and"),
        ({"layers": (6,), "place": 5}, r"layers=\(6,\) must be \(step, first\)"),
    ],
)
def test_a_block_has_a_step_and_no_more_places(options, words):
    with pytest.raises(KeyMapError, match=words):
        Weight("a.q", "h.{l}.q.weight", "{l} {place} d f -> f d", **options)


def test_a_step_is_at_least_one():
    with pytest.raises(KeyMapError, match=r"layers=\(0, 3\) must be \(step, first\) with a step of at least 1$"):
        Weight("a_{l}.q", "h.{l}.q.weight", "d f -> f d", layers=(0, 3))


def test_a_place_beyond_those_of_the_entry_is_another_leaf():
    entry = Weight("a_{l}.b_{place}.q", "h.{l}.q.weight", "d f -> f d", layers=(6, 0), place=5)
    keymap = KeyMap("blocks", (entry,))
    found = keymap.match("a_1.b_4.q")
    assert found is not None
    assert found.module({}) == "h.10.q"
    assert keymap.match("a_1.b_5.q") is None
    with pytest.raises(KeyMapError, match=r"a_1\.b_5\.q \(2, 3\): no entry"):
        plan.base_plan(keymap, {"a_1.b_5.q": (2, 3)})


def test_a_number_has_no_inputs_and_no_outputs():
    """Such as the temperature of CLIP, `logit_scale`."""
    weight = Weight("scale", "logit_scale", "->")
    assert weight.torch_roles == dict.fromkeys(("fused", "batch", "experts", "in", "out", "channels"), ())
