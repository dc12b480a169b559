"""`FileLayout`: what one leaf holds of the file, beside numpy written out."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxadapt.arrays import layout
from jaxadapt.arrays.layout import RANK, FileLayout, TorchLayout, to_file_scale, to_model_scale
from jaxadapt.core.errors import repeated


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

    assert repeated([Axis(f"a{n}") for n in range(1000)]) == []
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


def test_rows_of_activations_keep_an_explicit_sharding():
    """MaxText's rotated queries split an axis, and experts may be fused: neither may be merged with sharded axes."""
    mesh = jax.make_mesh((2, 4), ("dp", "tp"), axis_types=(AxisType.Explicit,) * 2)
    queries = TorchLayout(("d", "(n p)"), (("p", "n"), ("d",)), (), ("d",), ("p", "n"), (("p", 2),))
    experts = TorchLayout(("{p}", "{e}", "d", "o"), (("o",), ("d",)), ("{p}", "{e}"), ("d",), ("o",))
    for form, over, shape, spec, rows_spec in (
        (queries, "bsn", (4, 3, 8), ("dp", None, None), ("dp", None, None)),
        (experts, "bpeo", (4, 2, 8, 6), ("dp", None, "tp", None), (None, "tp", "dp", None)),
    ):
        letters = {axis: axis.strip("{}()")[0] for axis in form.left}
        x = np.arange(np.prod(shape), dtype="float32").reshape(shape)
        with jax.set_mesh(mesh):
            placed = jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
            rows = form.rows_to_torch("out", letters, placed, over)
            back = form.rows_from_torch("out", letters, placed, over, rows)
        assert (rows.sharding.spec, back.sharding.spec) == (PartitionSpec(*rows_spec), PartitionSpec(*spec))
        np.testing.assert_array_equal(back, x)
        np.testing.assert_array_equal(rows, form.rows_to_torch("out", letters, x, over))


def test_the_only_tensor_of_an_array_may_have_a_smaller_rank():
    form = FileLayout((4, 2), ("~r", "i"), (("~r",), ("i",)), (), ranks=(3,))
    np.testing.assert_array_equal(form.encode(np.arange(8).reshape(4, 2), 0), [[0, 1], [2, 3], [4, 5]])
