"""Invariant 6 at length: 300 kills of a process that saves; CI has 50 (test_invariants.py, test_checkpoint.py).

A kill waits for the process to have begun a save, and hits it at any moment of the time that one has just taken; the
limits here are for what hangs.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support import stores, train_small

ROOT = Path(__file__).resolve().parent.parent.parent


def test_300_kills_leave_the_old_adapter_or_the_new(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.support.kill_save", str(tmp_path / "out"), "300"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=2400, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize(("kind", "count"), [("manager", 300), ("orbax", 300), ("race", 50), ("pair", 200)])
def test_300_kills_of_checkpoints(kind: str, count: int, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.support.kill_checkpoints", kind, str(tmp_path / "out"), str(count)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=2400, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize("what", ["folder", "manager"])
@pytest.mark.parametrize("kind", ["s3", "gs"])
def test_kills_of_saves_into_stores(kind: str, what: str) -> None:
    with stores.start(kind) as bucket:
        command = [sys.executable, "-m", "tests.support.kill_store", what, f"{bucket}/{what}", "50"]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=2400, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize("api", ["nnx", "linen"])
def test_a_training_that_is_killed_again_and_again_is_the_same_training(api: str, tmp_path: Path) -> None:
    """Killed at random moments, resumed each time: whatever it computed of any step is what one go computes of it."""
    kills, rng = 8, random.Random(0)
    log = tmp_path / "log"
    command = [sys.executable, "-m", "tests.support.train_small", api, str(tmp_path / "run")]
    env = {**os.environ, "JAX_DEFAULT_MATMUL_PRECISION": "highest"}
    took = 0.01  # seconds a step, as it was just seen: a slow machine is given time for as many
    for number in range(kills):
        before = log.stat().st_size if log.exists() else 0
        child = subprocess.Popen([*command, str(10**6), str(log)], cwd=ROOT, env=env)
        while child.poll() is None and (log.stat().st_size if log.exists() else 0) == before:
            time.sleep(0.002)
        began, there = time.perf_counter(), log.read_text().count("\n")
        time.sleep(rng.uniform(0, 20) * took if number else 0.5)
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
        took = (time.perf_counter() - began) / max(1, log.read_text().count("\n") - there)
    ended = max(int(line.split(" ")[0]) for line in log.read_text().splitlines()) + 5
    subprocess.run([*command, str(ended), str(log)], cwd=ROOT, env=env, check=True)
    whole = train_small.APIS[api]()
    expected = {str(step): whole.step().hex() for step in range(1, ended + 1)}
    done = [line.split(" ") for line in log.read_text().splitlines()]
    assert all(expected[step] == loss for step, loss in done)
    assert {step for step, _ in done} == expected.keys()
    assert len(done) > len(expected), "no step was lost and done again: the test tests little"
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [
        f"step-{step:09d}.safetensors" for step in (ended - 1, ended)
    ]
