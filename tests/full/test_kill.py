"""Invariant 6 at length: 300 kills of a process that saves; CI has 50 (test_invariants.py, test_checkpoint.py)."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import train_small

ROOT = Path(__file__).resolve().parent.parent.parent


def test_300_kills_leave_the_old_adapter_or_the_new(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.kill_save", str(tmp_path / "out"), "300"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize(("kind", "count"), [("manager", 300), ("orbax", 300), ("race", 50), ("pair", 200)])
def test_300_kills_of_checkpoints(kind: str, count: int, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.kill_checkpoints", kind, str(tmp_path / "out"), str(count)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=2400, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize("api", ["nnx", "linen"])
def test_a_training_that_is_killed_again_and_again_is_the_same_training(api: str, tmp_path: Path) -> None:
    """Killed at random moments, resumed each time: whatever it computed of any step is what one go computes of it."""
    stop, rng = 150, random.Random(0)
    log = tmp_path / "log"
    command = [sys.executable, "-m", "tests.train_small", api, str(tmp_path / "run"), str(stop), str(log)]
    env = {**os.environ, "JAX_DEFAULT_MATMUL_PRECISION": "highest"}
    kills = 0
    while True:
        before = log.stat().st_size if log.exists() else 0
        child = subprocess.Popen(command, cwd=ROOT, env=env)
        while child.poll() is None and (log.stat().st_size if log.exists() else 0) == before:
            time.sleep(0.01)
        try:
            child.wait(rng.uniform(0, 0.5))
        except subprocess.TimeoutExpired:
            child.send_signal(signal.SIGKILL)
        if child.wait() == 0:
            break
        assert child.returncode == -signal.SIGKILL
        kills += 1
    whole = train_small.APIS[api]()
    expected = {str(step): whole.step().hex() for step in range(1, stop + 1)}
    lines = [line.split(" ") for line in log.read_text().splitlines()]
    assert all(expected[step] == loss for step, loss in lines)
    assert {step for step, _ in lines} == expected.keys()
    assert kills >= 3, "it was hardly killed: the test tests little"
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [
        f"step-{step:09d}.safetensors" for step in (stop - 1, stop)
    ]
