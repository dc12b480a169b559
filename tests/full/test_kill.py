"""Invariant 6 at length: 300 kills of a process that saves; CI has 50 (test_invariants.py, test_checkpoint.py)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


def test_300_kills_leave_the_old_adapter_or_the_new(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.kill_save", str(tmp_path / "out"), "300"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize(("kind", "count"), [("manager", 300), ("orbax", 300), ("race", 50), ("pair", 200)])
def test_300_kills_of_checkpoints(kind: str, count: int, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.kill_checkpoints", kind, str(tmp_path / "out"), str(count)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
