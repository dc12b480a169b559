"""Every benchmark runs, in a process of its own with the smallest sizes; what it measures then says nothing."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted(
    path.stem
    for path in (ROOT / "benchmarks").glob("*.py")
    if "\ndef main()" in path.read_text() and path.stem != "attached"  # a part of io.py
)
NEEDS = {"lora": "peft", "server": "starlette"}  # the others leave out what is not installed
SECONDS = {"codec", "paper"}
# The peers of a benchmark: a row of each, and the packages that it needs. Without them, one line says so.
PEERS = {
    "io": {
        "PEFT": ("PEFT from_pretrained", ("peft",)),
        "fastsafetensors": ("fastsafetensors into torch, page cache", ("fastsafetensors", "torch")),
        "Orbax's harness": ("jaxadapt, in Orbax's harness", ("clu", "psutil", "tensorflow", "tensorboard")),
    },
    "sharded": {"PyTorch's DCP": ("PyTorch DCP, one safetensors file", ("torch",))},
}


def of(name: str) -> object:
    marks = [*([pytest.mark.peft] if name in NEEDS else []), *([] if name in SECONDS else [pytest.mark.slow])]
    return pytest.param(name, marks=marks)


@pytest.mark.parametrize("name", map(of, SCRIPTS))
def test_it_runs(name: str, tmp_path: Path) -> None:
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    env.pop("XLA_FLAGS", None)  # one device, as a benchmark has that asks for no more
    command = [sys.executable, "-m", f"benchmarks.{name}", "--smoke"]
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=900, check=False)
    assert run.returncode == 0, run.stdout + run.stderr[-4000:]
    assert "median" in run.stdout or "MB" in run.stdout  # its tables
    for peer, (row, packages) in PEERS.get(name, {}).items():
        missing = [package for package in packages if importlib.util.find_spec(package) is None]
        assert (f"| {row} " in run.stdout) == (not missing), peer
        word = f"{' and '.join(missing)} not installed: the rows of {peer} are left out"
        assert (word in run.stdout) == bool(missing), peer
    left = [path.name for path in tmp_path.iterdir() if not path.name.startswith("torch")]  # a cache of its own
    assert left == []  # a benchmark clears away what it has written


def test_each_is_listed() -> None:
    listed = (ROOT / "benchmarks" / "README.md").read_text()
    listed += (ROOT / "docs" / "meshes.md").read_text()  # the one that counts on paper
    assert SCRIPTS
    assert all(f"`{name}.py`" in listed or f"benchmarks.{name}`" in listed for name in SCRIPTS)
