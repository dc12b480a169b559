"""`check_keymap` on shapes alone: what is claimed, missing, claimed twice or of another shape."""

from __future__ import annotations

import pytest

from jaxadapt import KeyMap, Weight
from jaxadapt.keymaps import families
from jaxadapt.keymaps.check import check_keymap, is_buffer

Q = Weight("h.{l}.q.kernel", "h.{l}.q.weight", "i o -> o i")
KV = Weight("h.{l}.kv.w", "h.{l}.{p}.weight", "{p} i o -> o i", p=("k", "v"))
POS = Weight("h.{l}.pos.w", "h.{l}.pos.weight", "a b -> a b")
HEAD = Weight("head.kernel", "head.weight", "i o -> o i")
EMBED = Weight("embed.w", "embed.weight", "v d -> v d", kind="embedding")


def keys(*layers, names=("q",), shape=(3, 2)):
    return {f"h.{l}.{name}.weight": shape for l in layers for name in names}


def test_a_model_and_its_checkpoint():
    keymap = KeyMap("t", (Q, KV, HEAD))
    leaves = {"h.0.q.kernel": (2, 3), "h.0.kv.w": (2, 2, 3), "head.kernel": (2, 9)}
    tensors = keys(0, names="qkv") | {"head.weight": (9, 2)}
    report = check_keymap(keymap, leaves, tensors)
    assert report.fits
    assert report.claims["h.0.kv.w"] == ("h.0.k.weight", "h.0.v.weight")
    assert report.counts == {Q: 1, KV: 1, HEAD: 1}
    assert report.wrong == ()
    report = check_keymap(keymap, leaves, {**tensors, "h.0.q.weight": (2, 3), "extra": (1,)})
    assert report.problems["unclaimed"] == ("extra",)
    assert "h.0.q.weight: the model's weight has shape 3×2" in report.problems["misshapen"][0]
    assert "but the checkpoint's has 2×3" in report.problems["misshapen"][0]
    assert report.wrong == (Q,)
    assert report.to_dict()["wrong"] == [{"leaf": Q.leaf, "key": Q.file_key, "pattern": Q.pattern}]
    assert report.to_dict()["unused"] == []
    del tensors["h.0.v.weight"]
    assert check_keymap(keymap, leaves, tensors).problems == {"missing": ("h.0.v.weight",)}


def test_a_leaf_of_two_entries_and_a_key_of_two_leaves_are_claimed_twice():
    other = Weight("{path}.kernel", "{path}.weight", "i o -> o i")
    report = check_keymap(KeyMap("t", (Q, other)), {"h.0.q.kernel": (2, 3), "x.kernel": (2, 3)})
    assert report.problems == {"twice": ("h.0.q.kernel: 2 entries",)}
    assert report.claims == {"x.kernel": ("x.weight",)}
    one, same = Weight("a.w", "q.weight", "i o -> o i"), Weight("b.w", "q.weight", "i o -> o i")
    report = check_keymap(KeyMap("t", (one, same)), {"a.w": (2, 3), "b.w": (2, 3)})
    assert report.problems == {"twice": ("q.weight: a.w, b.w",)}


def test_a_leaf_whose_shape_contradicts_its_entry():
    report = check_keymap(KeyMap("t", (Q, HEAD)), {"h.0.q.kernel": (2, 3, 4), "h.1.q.kernel": (2, 3), "x": (1,)})
    assert set(report.problems) == {"unclaimed", "misshapen"}
    assert report.wrong == ()  # one of its leaves fits
    report = check_keymap(KeyMap("t", (Q, HEAD)), {"h.0.q.kernel": (2, 3, 4)})
    assert report.wrong == (Q,)
    assert report.to_dict()["unused"] == ["head.kernel"]


def test_a_head_may_be_tied_in_a_checkpoint():
    keymap = KeyMap("t", (HEAD, EMBED), tied=(("head.weight", "embed.weight"),))
    leaves = {"head.kernel": (2, 9), "embed.w": (9, 2)}
    assert check_keymap(keymap, leaves, {"embed.weight": (9, 2)}).fits
    assert check_keymap(keymap, leaves, {"embed.weight": (9, 2), "head.weight": (9, 2)}).fits
    assert check_keymap(keymap, {"embed.w": (9, 2)}, {"embed.weight": (9, 2), "head.weight": (9, 2)}).fits
    assert not check_keymap(keymap, leaves, {"head.weight": (9, 2)}).fits
    assert check_keymap(keymap, tensors={"embed.weight": (9, 2), "head.weight": (9, 2)}).fits


def test_buffers_are_no_weights():
    keymap = KeyMap("t", (Q,), buffers=("h.{l}.mask",))
    assert [is_buffer(keymap, key) for key in ("h.0.mask", "h.12.mask", "h.x.mask", "h.0.mask2")] == [
        True, True, False, False,
    ]  # fmt: skip
    assert check_keymap(keymap, {"h.0.q.kernel": (2, 3)}, keys(0) | {"h.0.mask": (4,)}).fits
    assert check_keymap(keymap, tensors=keys(0) | {"h.0.mask": (4,)}).fits


@pytest.mark.parametrize("family", ["gpt2", "keras:gpt2", "maxtext:gpt3"])
def test_the_masks_in_older_files_of_gpt2_are_no_weights(family):
    keymap = families.get_family(family)
    names = ("attn.bias", "attn.masked_bias", "attn.c_attn.bias")
    assert [is_buffer(keymap, f"transformer.h.1.{name}") for name in names] == [True, True, False]


def test_a_checkpoint_alone_shows_its_gaps():
    keymap = KeyMap("t", (Q, KV))
    assert check_keymap(keymap, tensors=keys(0, 1, names="qkv")).fits
    gap = {k: s for k, s in keys(0, 1, 2, names="qkv").items() if k not in ("h.1.q.weight", "h.2.v.weight")}
    assert set(check_keymap(keymap, tensors=gap).problems["missing"]) == {"h.1.q.weight", "h.2.v.weight"}
    report = check_keymap(keymap, tensors=keys(0, 1) | {"h.1.q.weight": (3,), "other": (1,)})
    assert report.problems["unclaimed"] == ("other",)
    assert report.problems["misshapen"][0].startswith("h.1.q.weight: its shape is 3, but")
    assert report.wrong == ()
    assert check_keymap(keymap, tensors=keys(0, shape=(3,))).wrong == (Q,)
    assert "its shape is a scalar" in check_keymap(keymap, tensors=keys(0, shape=())).misshapen[0]


def test_what_only_the_first_of_many_layers_has_is_no_gap():
    keymap = KeyMap("t", (Q, POS))
    assert check_keymap(keymap, tensors=keys(0, 1, 2) | keys(0, names=["pos"])).fits
    two = check_keymap(keymap, tensors=keys(0, 1) | keys(0, names=["pos"]))
    assert two.problems == {"missing": ("h.1.pos.weight",)}
    second = check_keymap(keymap, tensors=keys(0, 1, 2) | keys(1, names=["pos"]))
    assert second.problems == {"missing": ("h.0.pos.weight", "h.2.pos.weight")}


def test_layers_are_compared_with_others_of_their_kind():
    """Sparse or dense, and with attention or a recurrence: two weights that exclude another one tell the kind."""

    def entries(block: str, *names: str) -> tuple[Weight, ...]:
        return tuple(Weight(f"h.{{l}}.{block}.{n}.w", f"h.{{l}}.{block}.{n}.weight", "i o -> o i") for n in names)

    keymap = KeyMap(
        "t", (Q, *entries("mlp", "up", "down", "each", "gate"), *entries("attn", "k", "v"), *entries("ssm", "a", "b"))
    )
    sparse = {f"h.{l}.mlp.{n}.weight": (3, 2) for l in (1, 3) for n in ("each", "gate")}
    dense = {f"h.{l}.mlp.{n}.weight": (3, 2) for l in (0, 2) for n in ("up", "down")}
    attention = {f"h.{l}.attn.{n}.weight": (3, 2) for l in (0, 1) for n in "kv"}
    recurrent = {f"h.{l}.ssm.{n}.weight": (3, 2) for l in (2, 3) for n in "ab"}
    tensors = keys(0, 1, 2, 3) | sparse | dense | attention | recurrent
    assert check_keymap(keymap, tensors=tensors).fits
    for key in tensors:
        less = {k: shape for k, shape in tensors.items() if k != key}
        assert key in check_keymap(keymap, tensors=less).problems["missing"]


def test_a_part_that_is_a_leaf_of_its_own_is_no_gap():
    """Where k serves as v, k is claimed by its own entry."""
    keymap = KeyMap("t", (KV, Weight("h.{l}.k.w", "h.{l}.k.weight", "i o -> o i"), Q))
    tensors = keys(0, 1, names="qk")
    assert check_keymap(keymap, tensors=tensors).fits
    report = check_keymap(KeyMap("t", (KV, Q)), tensors=tensors)
    assert set(report.problems["missing"]) == {"h.0.v.weight", "h.1.v.weight"}


def test_what_a_family_always_has_is_missed():
    keymap = KeyMap("t", (Q, HEAD), needs=("head.kernel",))
    expected = {"missing": ("head.weight, which t always has",)}
    assert check_keymap(keymap, {"h.0.q.kernel": (2, 3)}).problems == expected
    assert check_keymap(keymap, tensors=keys(0)).problems == expected
