"""Every prompt method of PEFT in both APIs, unrolled and scanned, with every padding; see `tests/support/prompts`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

from tests.support import prompts
from tests.support.prompts import CASES, MASKS, Case
from tests.support.prompts import folders as folders

pytestmark = pytest.mark.peft

APIS = [("nnx", False), ("nnx", True), ("linen", False), ("linen", True)]
every = pytest.mark.parametrize("case", CASES, ids=str)


@every
@pytest.mark.parametrize(("api", "scan"), APIS, ids=str)
@pytest.mark.parametrize("padding", MASKS)
def test_pefts_adapter_gives_pefts_logits(case: Case, api: str, scan: bool, padding: str, folders: Any) -> None:
    prompts.check_logits(case, api, scan, padding, folders)


@every
@pytest.mark.parametrize("api", ["nnx", "linen"])
def test_peft_opens_ours(case: Case, api: str, tmp_path: Path) -> None:
    prompts.check_that_peft_opens_ours(case, api, tmp_path)


@every
def test_files(case: Case, tmp_path: Path, folders: Any) -> None:
    prompts.check_files(case, tmp_path / "new", folders)
    prompts.check_round_trip(case, tmp_path / "again", folders)


@every
@pytest.mark.parametrize("api", ["nnx", "linen"])
def test_gradients_are_pefts(case: Case, api: str) -> None:
    prompts.check_gradients(case, api)
