"""Whatever the disk refuses, the save before it is there, whole, and nothing beside it; see full_disk.py."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import full_disk

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
SAID = {"disk": "No space left on device; ", "kernel": "No space left on device; ", "permission": "Permission denied; "}


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """One that any user can look into, which pytest's own are not."""
    with tempfile.TemporaryDirectory(prefix="jaxadapt-test-") as made:
        Path(made).chmod(0o755)
        yield Path(made)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with full_disk.small_file_system(tmp_path, "6m", instead="kernel"):
        yield tmp_path


def refused(kind: str, fault: str, folder: Path) -> None:
    (folder / "run").mkdir()
    command = [sys.executable, "-m", "tests.support.full_disk", kind, fault, str(folder / "run")]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    name = {"adapter": "adapter_model.safetensors", "orbax": "1", "manager": "step-000000001.safetensors"}[kind]
    assert run.stdout.startswith(f"{folder}/run/{name}: cannot write: {SAID[fault]}"), run.stdout
    # the next run finds nothing in its way
    (folder / "run").chmod(0o755)
    if fault != "disk":  # where it went on itself
        full_disk.save(kind, folder / "run", 1)
    full_disk.check(kind, folder / "run", 1)


@pytest.mark.parametrize("fault", ["kernel", "permission"])
@pytest.mark.parametrize("kind", ["adapter", "orbax", "manager"])
def test_what_the_kernel_refuses(kind: str, fault: str, open_folder: Path) -> None:
    refused(kind, fault, open_folder)


@pytest.mark.parametrize("kind", ["adapter", "orbax", "manager"])
def test_a_small_file_system_that_is_full(kind: str, small_disk: Path) -> None:
    refused(kind, "disk", small_disk)
