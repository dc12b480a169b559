"""`FileLayout`: what one leaf holds of the file, beside numpy written out."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from jaxadapt.arrays import layout
from jaxadapt.arrays.layout import RANK, FileLayout, to_file_scale, to_model_scale


@pytest.mark.parametrize("xp", [np, jnp])
def test_factor_and_shift_are_applied_once_in_each_direction(xp):
    x = xp.asarray(np.arange(6, dtype="float32").reshape(2, 3))
    for factor, shift in ((1, 0.0), (4.0, 0.0), (1, 1.0), (4.0, 1.0)):
        np.testing.assert_array_equal(to_model_scale(x, factor, shift), np.asarray(x) * factor + shift)
        np.testing.assert_array_equal(to_file_scale(to_model_scale(x, factor, shift), factor, shift), x)


def test_a_factor_is_exact_if_it_is_a_power_of_two_without_shift():
    exact = {(1.0, 0.0): True, (0.25, 0.0): True, (3.0, 0.0): False, (1.0, 1.0): False}
    for (factor, shift), expected in exact.items():
        layout = FileLayout((4, 6), ("o", "i"), (("o",), ("i",)), (), factor, shift=shift)
        assert layout.is_exact is expected


@pytest.mark.parametrize("xp", [np, jnp])
def test_rows_of_a_partial_leaf_and_back(xp):
    """Layers 0 and 2 of three, of ranks 4 and 3: the rest of the leaf is zero."""
    layout = FileLayout((3, 4, 2), ("{l}", RANK, "i"), ((RANK,), ("i",)), (0,), file_entries=(0, 2), ranks=(4, 3))
    leaf = np.arange(1, 25, dtype="float32").reshape(3, 4, 2)
    leaf[1] = 0
    leaf[2, 3] = 0
    rows = layout.to_rows(xp.asarray(leaf))
    np.testing.assert_array_equal(rows, leaf[[0, 2]])
    np.testing.assert_array_equal(layout.from_rows(rows), leaf)
    np.testing.assert_array_equal(layout.from_rows(xp.ones_like(rows)), (leaf != 0).astype("float32"))
    assert [layout.encode(leaf, i).shape for i in range(layout.count)] == [(4, 2), (3, 2)]
    factors = np.broadcast_to(layout.expand_by_tensor([5, 7]), leaf.shape)
    np.testing.assert_array_equal(factors, np.array([5, 0, 7])[:, None, None] * (leaf != 0))


def test_the_axes_of_a_pattern():
    """Counted, not sought for one by one (in C, where nothing here counts)."""
    asked = 0

    class Axis(str):
        __slots__ = ()

        def __eq__(self, other: object) -> bool:
            nonlocal asked
            asked += 1
            return str.__eq__(self, other)

        __hash__ = str.__hash__

    assert layout.repeated_names([Axis(f"a{n}") for n in range(1000)]) == []
    assert asked < 10_000
    assert layout.parse_pattern("a b -> a b a").problems == ("axis 'a' occurs twice on the right",)


def test_tensors_of_several_ranks_take_a_time_that_grows_with_their_number():
    """No step for one tensor reads the ranks of all."""

    class Ranks(tuple[int, ...]):
        def __hash__(self) -> int:
            raise AssertionError("reads all ranks")

    form = FileLayout((3, 4, 2), ("{l}", "~r", "i"), (("~r",), ("i",)), (0,), ranks=Ranks([4, 3, 4]))
    leaf = np.arange(24.0).reshape(3, 4, 2)
    assert [form.shape_of(i) for i in range(3)] == [(4, 2), (3, 2), (4, 2)]
    assert np.array_equal(form.encode(leaf, 1), leaf[1, :3])
