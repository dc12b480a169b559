"""Entries made from a layer's axes, and keymaps of models of no known family."""

from __future__ import annotations

import pytest

from jaxadapt import IA3Config, KeyMap, LoraConfig, Weight
from jaxadapt.arrays.layout import Axes
from jaxadapt.keymaps.keymap import (
    GENERIC,
    entry_for_copy,
    entry_from_axes,
    is_guess,
    is_square,
    keymap_from_paths,
    with_layout,
)


@pytest.mark.parametrize(
    ("leaf", "shape", "axes", "options", "key", "pattern"),
    [
        ("blk.q.kernel", (4, 6), Axes((0,), (1,)), {}, "blk.q.weight", "i0 o0 -> (o0) (i0)"),
        ("q.other", (4, 6), Axes((1,), (0,)), {}, "q.other.weight", "o0 i0 -> (o0) (i0)"),
        (
            "blk.q.w", (3, 4, 2, 6), Axes((0,), (1, 2)), {"stack": (0,)}, "blk.{s0}.q.weight",
            "{s0} i0 o0 o1 -> (o0 o1) (i0)",
        ),
        (
            "e.w", (4, 3, 2, 6), Axes((0,), (2,), (1,)), {"stack": (1,)}, "{s0}.{b0}.e.weight",
            "i0 {s0} {b0} o0 -> (o0) (i0)",
        ),
        ("t.embedding", (9, 4), Axes((0,), (1,)), {"kind": "embedding"}, "t.weight", "i0 o0 -> (i0) (o0)"),
        (
            "c.kernel", (2, 2, 3, 8), Axes((2, 0, 1), (3,)), {"kind": "conv", "groups": 2}, "c.weight",
            "i1 i2 i0 o0 -> (o0) i0 i1 i2",
        ),
    ],
)  # fmt: skip
def test_entries_from_axes(leaf, shape, axes, options, key, pattern):
    entry = entry_from_axes(leaf, shape, axes, **options)
    assert (entry.key, entry.pattern, entry.groups) == (key, pattern, options.get("groups", 1))
    assert entry.kind == options.get("kind", "linear")
    if "{b0}" in key:
        assert entry.index_names("{b0}") == ("0", "1")


def test_a_model_whose_paths_are_pytorchs_names():
    shapes = {
        "q.kernel": (4, 6), "sq.kernel": (4, 4), "own.kernel": (4, 4), "w.weight": (4, 4), "x.w": (3, 3),
        "cube.kernel": (2, 3, 4), "cube.w": (2, 3, 4), "known.kernel": (2, 3, 4), "attn.bias": (2, 3),
        "bias": (2, 3), "norm.scale": (4,), "t.embedding": (9, 4), "wide.weight": (4, 6), "flat.w": (2, 3),
    }  # fmt: skip
    known = Weight("known.kernel", "known.weight", "d n h -> (n h) d")
    keymap, unsure = keymap_from_paths(shapes, [known], custom=["own.kernel"])
    assert unsure == ["own.kernel", "w.weight", "x.w"]
    found = {leaf: (match.weight.key, match.weight.pattern) for leaf in shapes if (match := keymap.match(leaf))}
    assert found == {
        "q.kernel": ("q.weight", "i o -> o i"), "sq.kernel": ("sq.weight", "i o -> o i"),
        "own.kernel": ("own.weight", "i o -> o i"), "w.weight": ("w.weight", "a0 a1 -> a0 a1"),
        "x.w": ("x.w", "a0 a1 -> a0 a1"), "known.kernel": ("known.weight", "d n h -> (n h) d"),
        "attn.bias": ("attn.bias", "a0 a1 -> (a0 a1)"), "bias": ("bias", "a0 a1 -> (a0 a1)"),
        "norm.scale": ("norm.weight", "a0 -> a0"), "t.embedding": ("t.weight", "a0 a1 -> a0 a1"),
        "wide.weight": ("wide.weight", "a0 a1 -> a0 a1"), "flat.w": ("flat.w", "a0 a1 -> a0 a1"),
    }  # fmt: skip


def test_a_guess_is_an_entry_of_no_family():
    family = KeyMap("f", (Weight("q.kernel", "q.weight", "o i -> o i"), Weight("b.kernel", "b.weight", "i o -> o i")))
    assert not is_guess(family, "q.kernel", (4, 6))
    assert is_guess(family, "q.kernel", (4, 6, 2))
    assert is_guess(family, "other.kernel", (4, 6))
    assert is_guess(GENERIC, "q.kernel", (4, 6))
    derived = entry_from_axes("d.kernel", (4, 6), Axes((0,), (1,)))
    assert is_guess(family.with_entries([derived]), "d.kernel", (4, 6))


@pytest.mark.parametrize(("shape", "square"), [((4, 2, 2), True), ((4, 2, 3), False), ((6, 2, 2), False)])
def test_square_weights(shape, square):
    keymap = KeyMap(
        "f", (Weight("q", "q.weight", "d n h -> (n h) d"), Weight("t", "t.weight", "v d -> v d", kind="embedding"))
    )
    assert is_square(keymap.match("q"), shape) is square
    assert not is_square(keymap.match("t"), (4, 4))


def test_fan_in_fan_out_is_that_of_the_last_linear_weight():
    """As PEFT sets it: a custom head comes after the family's modules."""
    conv1d = Weight("a", "a.weight", "i o -> i o", fan_in_fan_out=True)
    linear, table = Weight("b", "b.weight", "i o -> o i"), Weight("t", "t.weight", "v d -> v d", kind="embedding")
    head = entry_from_axes("head.kernel", (4, 6), Axes((0,), (1,)))
    config = LoraConfig(target_modules=["q"])
    for order, chosen, expected in (
        ((conv1d, linear, table), (linear, conv1d), False),
        ((linear, conv1d, table), (linear, conv1d), True),
        ((conv1d, linear, table), (conv1d, table), True),
        ((conv1d, linear, table), (table,), False),
        ((head, linear, conv1d), (conv1d, head), False),
        ((linear, head), (linear, head), False),
    ):
        keymap = KeyMap("f", order)
        matches = [keymap.match(w.leaf) for w in chosen]
        found = with_layout(config, keymap, matches)
        assert found.fan_in_fan_out is expected
        assert (found is config) == (not expected)
    turned = config.replace(fan_in_fan_out=True)
    keymap = KeyMap("f", (conv1d, linear))
    assert with_layout(turned, keymap, [keymap.match("b")]).fan_in_fan_out is False
    assert with_layout(turned, keymap, [keymap.match("a")]) is turned
    ia3 = IA3Config(target_modules=["q"], feedforward_modules=[])
    assert with_layout(ia3, keymap, [keymap.match("a")]).get("fan_in_fan_out") is True


@pytest.mark.parametrize(
    ("leaf", "shape", "key", "pattern", "kind"),
    [
        ("score.kernel", (4, 2), "score.weight", "i o -> o i", "linear"),
        ("kernel", (4, 2), "weight", "i o -> o i", "linear"),
        ("c.kernel", (2, 3, 4), "c.weight", "a0 a1 a2 -> a0 a1 a2", "other"),
        ("n.scale", (4,), "n.weight", "a0 -> a0", "vector"),
        ("x.other", (4, 2), "x.other", "a0 a1 -> a0 a1", "other"),
    ],
)
def test_copies_keep_their_layout_but_for_kernels(leaf, shape, key, pattern, kind):
    entry = entry_for_copy(leaf, shape)
    assert (entry.key, entry.pattern, entry.kind) == (key, pattern, kind)
