"""What tests/serving shows in seconds, for a minute and over many more mixtures."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.serving.test_bank import WAYS, adapters
from tests.serving.test_pool import exercise, folders
from tests.support.banked import ROWS, check_rows, served

__all__ = ["folders"]


def test_threads_for_a_minute(folders):
    assert exercise(folders, 60, threads=6) > 100


@pytest.mark.parametrize(("api", "scanned"), WAYS)
@settings(max_examples=150, deadline=None)
@given(st.lists(adapters(), min_size=1, max_size=5), st.lists(st.integers(-2, 7), min_size=ROWS, max_size=ROWS))
def test_many_mixtures(api, scanned, mixture, ids):
    model = served(api, scanned)
    for slot in range(1, model.slots):
        model.put(slot, None)
    check_rows(model, mixture, ids)
