"""Each notebook in a new environment, from the first cell, which installs, to the last. It needs a package index."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "notebooks" / "run.py"


@pytest.mark.network
@pytest.mark.parametrize("name", ["finetune_and_share", "from_pytorch_and_back"])
def test_every_cell_runs_in_a_new_environment(name: str) -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), "--fast", name], text=True, capture_output=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert f"{name}: every cell runs" in done.stdout
