"""Regions of arrays, beside numpy's own indexing; who writes what of an array that several processes hold."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxadapt.arrays import regions
from jaxadapt.arrays.layout import FileLayout

SHAPE = (4, 3, 2)
NUMBERS = np.arange(24).reshape(SHAPE)


def every_region(shape):
    spans = [[(a, b) for a in range(n) for b in range(a + 1, n + 1)] for n in shape]
    return list(itertools.product(*spans))


@pytest.mark.parametrize("shape", [SHAPE, (3, 1, 4)])
def test_a_region_is_contiguous_if_its_numbers_are(shape):
    numbers = np.arange(math.prod(shape)).reshape(shape)
    for region in every_region(shape):
        part = numbers[regions.to_slices(region)]
        expected = bool((np.diff(part.ravel()) == 1).all())
        assert regions.is_contiguous(shape, region) is expected, region
        assert regions.region_shape(region) == part.shape
        assert regions.region_size(region) == part.size
        assert regions.region_from_slices(regions.to_slices(region), shape) == region


def test_intersections_are_those_of_sets():
    some = every_region((3, 2))
    cells = {region: set(itertools.product(*(range(*span) for span in region))) for region in some}
    for a, b in itertools.product(some, some):
        both = regions.intersection(a, b)
        assert (cells[a] & cells[b]) == (cells[both] if both else set())
        if both:
            outer = NUMBERS[:3, :2, 0][regions.to_slices(a)]
            inner = NUMBERS[:3, :2, 0][regions.to_slices(both)]
            np.testing.assert_array_equal(outer[regions.relative_slices(both, a)], inner)


@pytest.mark.parametrize("seed", range(6))
def test_merged_neighbors_are_the_same_cells(seed):
    rng = np.random.default_rng(seed)
    cuts = [sorted({0, n, *rng.integers(0, n, 2).tolist()}) for n in (6, 5)]
    grid = list(itertools.product(*(list(itertools.pairwise(c)) for c in cuts)))
    kept = [region for region in grid if rng.random() < 0.8]
    merged = regions.merge_neighbors(kept)
    assert sorted(part for parts in merged.values() for part in parts) == sorted(kept)
    for region, parts in merged.items():
        found = np.zeros((6, 5), int)
        for part in parts:
            found[regions.to_slices(part)] += 1
        expected = np.zeros((6, 5), int)
        expected[regions.to_slices(region)] = 1
        np.testing.assert_array_equal(found, expected)


def test_all_of_a_grid_is_one_region():
    grid = list(itertools.product([(0, 2), (2, 3)], [(0, 1), (1, 4)]))
    assert list(regions.merge_neighbors(grid[::-1])) == [((0, 3), (0, 4))]
    assert regions.merge_neighbors([]) == {}


@pytest.mark.parametrize(("spec", "runs"), [(("x", None), True), ((None, "x"), False), ((), True)])
def test_the_regions_of_devices_cover_an_array_once(spec, runs):
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    shape = (8, 12) if spec[:1] == (None,) else (8, 6)
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    found = regions.addressable_regions(sharding, shape)
    assert len(found) == (4 if spec else 1)
    array = np.arange(math.prod(shape)).reshape(shape)
    covered = np.zeros(shape, int)
    for region, device in found.items():
        index = regions.to_slices(region)
        covered[index] += 1
        np.testing.assert_array_equal(array[sharding.devices_indices_map(shape)[device]], array[index])
        numbers = array[index].reshape(-1)
        assert regions.is_contiguous(shape, region) is runs is bool((np.diff(numbers) == 1).all())
    assert (covered == 1).all()
    assert regions.addressable_size(sharding, shape) == math.prod(shape)


def test_the_process_with_the_fewest_bytes_writes(monkeypatch):
    """Process 0 writes what every process has for itself; what several hold goes to the one with the least so far."""

    class Array(SimpleNamespace):
        is_fully_addressable = False

    whole = regions.full_region
    held = {
        "a": [((0, 1), [whole((4,))], 4)],  # both hold it
        "b": [((0, 1), [((0, 1),), ((1, 2),)], 2)],
        "c": [((0,), [((0, 2),)], 2), ((1,), [((2, 4),)], 2)],
        "d": [((0, 1, 2), [whole((1,))], 1)],
        "f": [((0, 1), [whole((1,))], 1)],
    }
    monkeypatch.setattr(regions, "jax", SimpleNamespace(Array=Array))
    monkeypatch.setattr(regions, "_holders", lambda name, shape: held[name])
    leaves = {
        name: Array(shape=(4,), sharding=name, dtype=np.dtype("f4"), nbytes=16) for name in held
    } | {"e": np.zeros(3, "f4")}  # fmt: skip
    owners = regions.assign_owners(dict(reversed(leaves.items())))
    assert owners == {
        "a": {((0, 4),): 0},  # 16 bytes
        "b": {((0, 1),): 1, ((1, 2),): 1},  # 8
        "c": {((0, 2),): 0, ((2, 4),): 1},  # 24 and 16
        "d": {((0, 1),): 2},  # 4
        "e": {((0, 3),): 0},  # 36
        "f": {((0, 1),): 1},
    }
    assert list(owners) == sorted(leaves)


FORMS = [
    FileLayout((3, 4, 6), ("{l}", "i", "o"), (("o",), ("i",)), (0,)),
    FileLayout((4, 6), ("i", "(c p)"), (("p", "c"), ("i",)), (), sizes=(("p", 2),)),
    FileLayout((4, 6), ("i", "o"), (("o", "i"),), (), factor=0.5, shift=1.0),
    FileLayout((3, 4, 5), ("{l}", "~r", "i"), (("~r",), ("i",)), (0,), file_entries=(0, 2), ranks=(4, 2)),
    FileLayout((3, 4, 5), ("{l}", "a", "i"), (("a",), ("i",)), (0,), file_entries=(1,)),
]


@pytest.mark.parametrize("form", FORMS, ids=range(len(FORMS)))
def test_regions_of_a_leaf_are_regions_of_its_tensors(form):
    """Each tensor is put together from the pieces of a leaf that is cut anywhere, and the leaf from its tensors."""
    rng = np.random.default_rng(0)
    leaf = form.clear_gaps(rng.integers(1, 99, form.shape).astype("float32"))
    tensors = [np.asarray(form.encode(leaf, i)) for i in range(form.count)]
    cuts = [[0, *sorted({1, n // 2, n - 1} - {0, n}), n] for n in form.shape]
    made = [np.full(t.shape, np.nan, "float32") for t in tensors]
    back = np.zeros(form.shape, "float32")
    for region in itertools.product(*(list(itertools.pairwise(c)) for c in cuts)):
        for piece in regions.file_regions(form, region):
            assert piece.is_exact is (form.factor == 1 and not form.shift)
            assert regions.intersection(piece.region, region) == piece.region
            tile = np.asarray(piece.encode(leaf[regions.to_slices(piece.region)]))
            made[piece.number].reshape(piece.shape)[regions.to_slices(piece.tensor_region)] = tile
            back[regions.to_slices(piece.region)] = piece.decode(tile)
    for found, expected in zip(made, tensors, strict=True):
        np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(back, leaf)
