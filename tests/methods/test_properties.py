"""Random entries × LoRA and IA3 × random shardings, beside PEFT's formulas in numpy (tests/support/entries.py).

Few examples here; tests/full/test_properties.py runs the same with many.
"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxadapt.methods import METHODS
from tests.support import properties
from tests.support.properties import examples


def test_the_cases_are_of_methods():
    assert set(properties.entries.CASES) <= set(METHODS)


@pytest.mark.parametrize("peft_type", sorted(properties.entries.CASES))
@pytest.mark.parametrize("check", properties.CHECKS, ids=lambda check: check.__name__)
def test_property(check, peft_type):
    examples(properties.CHECKS[check])(given(st.data())(lambda data: check(peft_type, data)))()
