"""One entry of a keymap: names, roles and what contradicts itself."""

from __future__ import annotations

import pytest

from jaxadapt import KeyMap, KeyMapError, Weight
from jaxadapt.keymaps.keymap import Match


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
