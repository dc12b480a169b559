"""The properties of tests/methods/test_properties.py with many examples."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support import entries, properties


@pytest.mark.parametrize("peft_type", sorted(entries.CASES))
@pytest.mark.parametrize("check", properties.CHECKS, ids=lambda check: check.__name__)
def test_property(check, peft_type):
    count = 20 * properties.CHECKS[check]
    properties.examples(count)(given(st.data())(lambda data: check(peft_type, data)))()
