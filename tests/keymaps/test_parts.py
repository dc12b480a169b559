"""Parts of file tensors: cut, found and joined as numpy splits and concatenates."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from jaxadapt.keymaps import plan

W = np.arange(24, dtype="float32").reshape(4, 6)


def keys_of(axis, count, how="/"):
    return [plan.part_key("w", axis, f"{i}{how}{count}") for i in range(count)]


@pytest.mark.parametrize("xp", [np, jnp])
@pytest.mark.parametrize(("axis", "count"), [(0, 2), (1, 3), (1, 2), (0, 4)])
def test_parts_behind_one_another(axis, count, xp):
    keys = keys_of(axis, count)
    cut = plan.cut_parts({"w": W, "other": W}, ["other", *keys])
    for key, expected in zip(keys, np.split(W, count, axis), strict=True):
        np.testing.assert_array_equal(cut[key], expected)
        assert np.shares_memory(cut[key], W)
    assert set(cut) == {*keys, "other"} == set(plan.cut_parts({"w": W, "other": W}, [*keys, *keys]))
    np.testing.assert_array_equal(plan.join_parts([xp.asarray(cut[key]) for key in keys], keys, xp), W)
    assert plan.joined_shape(keys, cut[keys[0]].shape) == W.shape
    assert plan.group_by_file_key([*keys[::-1], "b"]) == {"w": keys, "b": ["b"]}


@pytest.mark.parametrize(("axis", "count"), [(0, 2), (1, 3)])
def test_parts_in_turns(axis, count):
    keys = keys_of(axis, count, "::")
    cut = plan.cut_parts({"w": W}, keys)
    for i, key in enumerate(keys):
        np.testing.assert_array_equal(cut[key], W.take(range(i, W.shape[axis], count), axis))
    np.testing.assert_array_equal(plan.join_parts([cut[key] for key in keys], keys, np), W)


def test_a_shared_tensor_is_each_part():
    keys = keys_of(None, 2)
    cut = plan.cut_parts({"w": W}, keys)
    assert all(cut[key] is W for key in keys)
    assert plan.join_parts([W, W], keys, np) is W
    assert plan.joined_shape(keys, (4, 6)) == (4, 6)
    assert plan.joined_shape(["w"], (4, 6)) == (4, 6)


@pytest.mark.parametrize(("axis", "count"), [(0, 3), (1, 4), (2, 2)])
def test_what_cannot_be_split_keeps_its_name(axis, count):
    keys = keys_of(axis, count)
    assert list(plan.cut_parts({"w": W}, keys)) == ["w"]
    assert plan.locate_parts({"w": W.shape}, keys) == {}


def test_parts_are_located_in_their_tensors():
    keys = [*keys_of(1, 2), *keys_of(1, 3, "::"), *keys_of(None, 2), "w", "v[0/2]"]
    found = plan.locate_parts({"w": W.shape, "u": (2,)}, keys)
    cut = plan.cut_parts({"w": W}, keys)
    assert set(found) == {*keys_of(1, 2), *keys_of(1, 3, "::")}
    for key, (name, index) in found.items():
        assert name == "w"
        np.testing.assert_array_equal(W[index], cut[key])


def test_keys_say_whether_they_are_parts():
    assert plan.has_parts(["a", "w[0/2]"])
    assert not plan.has_parts(["a", "b.weight"])
    assert plan.parse_part_key("b.weight") == plan.Part("b.weight")
    assert plan.parse_part_key("a.weight[=1/3]") == plan.Part("a.weight", None, 1, 3, False)
    assert plan.parse_part_key("a.weight[2:1::3]") == plan.Part("a.weight", 2, 1, 3, True)
    assert plan.file_key("a.weight[2:1::3]") == "a.weight"
