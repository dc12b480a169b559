"""A box of an array is written where numpy's own indexing would put it, and nowhere else, in as few runs as exist."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxadapt.storage import local_files


@st.composite
def boxes(draw: st.DrawFn) -> tuple[tuple[int, ...], list[tuple[int, int]], list[int]]:
    shape = tuple(draw(st.lists(st.integers(1, 6), max_size=4)))
    box = [tuple(sorted((draw(st.integers(0, n)), draw(st.integers(0, n))))) for n in shape]
    return shape, box, draw(st.permutations(range(len(shape))))


@given(boxes(), st.sampled_from(["u1", "u2", "u4", "u8"]))
@settings(max_examples=300, deadline=None)
def test_like_numpy(case: tuple[tuple[int, ...], list[tuple[int, int]], list[int]], kind: str) -> None:
    shape, box, order = case
    where = tuple(slice(*part) for part in box)
    sizes = [stop - start for start, stop in box]
    rng = np.random.default_rng(0)
    # the same box in every memory layout
    laid = rng.integers(1, 255, [sizes[axis] for axis in order]).astype(kind)
    array = laid.transpose(np.argsort(order)) if shape else laid
    whole = np.zeros(shape, kind)
    flat = whole.reshape(-1).view("u1")
    calls: list[tuple[int, int]] = []

    def write_at(data: memoryview, offset: int) -> None:
        assert not flat[offset : offset + len(data)].any()
        flat[offset : offset + len(data)] = data
        calls.append((offset, offset + len(data)))

    local_files.write_region(write_at, shape, array, box)
    want = np.zeros(shape, kind)
    want[where] = array
    np.testing.assert_array_equal(whole, want)
    assert all(a[1] < b[0] for a, b in itertools.pairwise(calls))  # no two neighbors that could have been one


@given(boxes(), st.sampled_from([1, 7, 1 << 20]))
@settings(max_examples=100, deadline=None)
def test_contiguous_parts(case: tuple[tuple[int, ...], list[tuple[int, int]], list[int]], size: int) -> None:
    shape, _, order = case
    array = np.arange(np.prod(shape, dtype=int), dtype="u2").reshape(shape).transpose(order)
    parts = list(local_files.contiguous_parts(array, size))
    assert b"".join(parts) == array.tobytes()
    copies = [part for part in parts if not np.shares_memory(np.frombuffer(part, "u1"), array)]
    assert all(len(part) <= max(size, array.itemsize) for part in copies)
