"""Each notebook in a new environment, from the first cell, which installs, to the last. It needs a package index."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "notebooks" / "run.py"


def run(name: str, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), "--fast", name, *options], text=True, capture_output=True)


@pytest.mark.network
@pytest.mark.parametrize("name", sorted(path.stem for path in SCRIPT.parent.glob("*.ipynb")))
def test_every_cell_runs_in_a_new_environment(name: str) -> None:
    done = run(name)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert f"{name}: every cell runs" in done.stdout


@pytest.mark.network
def test_the_first_cell_leaves_the_jax_of_the_environment() -> None:
    """As on Colab, whose JAX belongs to its accelerator."""
    done = run("serve_many_adapters", "--jax", "0.10.1")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
