"""What tests/serving shows in seconds, for a minute over many more mixtures, and in every implementation."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.serving.test_bank import WAYS, adapters
from tests.serving.test_pool import exercise, folders
from tests.serving.test_selection import KINDS, PAIRS, ROW_IDS, TOKEN_IDS, check, make
from tests.support.banked import ROWS, TIME, check_rows, served

__all__ = ["folders"]


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_threads_for_a_minute(folders):
    """`exercise` checks every row, the number of compiled programs, and the bytes on the devices."""
    exercise(folders, 5, threads=6)
    before = resident_bytes()
    assert exercise(folders, 60, threads=6) > 500
    assert resident_bytes() - before < 64e6


WHOLE = [None, "layer", "mask", jax.lax.ragged_dot]


@pytest.mark.parametrize(("api", "scanned"), WAYS)
@pytest.mark.parametrize("mixed", [False, True])
def test_every_implementation(api, scanned, mixed):
    served, adapters = make(api, scanned, mixed), KINDS if mixed else PAIRS
    for implementation in WHOLE[: 3 if mixed else 4]:
        check(served, adapters, ROW_IDS, implementation)
        if implementation != "layer":
            check(served, adapters, TOKEN_IDS, implementation)


@pytest.mark.parametrize(("api", "scanned"), WAYS)
@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(-2, 5), min_size=TIME, max_size=TIME), min_size=ROWS, max_size=ROWS))
def test_any_ids_of_tokens(api, scanned, ids):
    check(_cached(api, scanned), KINDS, np.array(ids), None)


@functools.cache
def _cached(api, scanned):
    return make(api, scanned, True)


@pytest.mark.parametrize(("api", "scanned"), WAYS)
@settings(max_examples=150, deadline=None)
@given(st.lists(adapters(), min_size=1, max_size=5), st.lists(st.integers(-2, 7), min_size=ROWS, max_size=ROWS))
def test_many_mixtures(api, scanned, mixture, ids):
    model = served(api, scanned)
    for slot in range(1, model.slots):
        model.put(slot, None)
    check_rows(model, mixture, ids)
