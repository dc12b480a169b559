"""The matrices that CI shortens are tests that are there."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import matrices


@pytest.mark.parametrize("name", matrices.CI)
def test_the_test_is_there(name: str, root: Path) -> None:
    path, _, function = name.partition("::")
    assert f"def {function}(" in (root / path).read_text()


def test_one_example_of_a_method_runs_in_ci() -> None:
    name = "tests/methods/test_conformance_peft.py::test_peft_opens_our_files"
    assert not matrices.is_long(f"{name}[LORA-0]")
    assert matrices.is_long(f"{name}[LORA-1]")
    assert not matrices.is_long("tests/configs/test_configs.py::test_anything[x]")
