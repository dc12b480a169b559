"""Every layer and variant of LoRA beside PEFT, in all four twins: CI takes two of each."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.peft
def test_every_case_in_every_twin() -> None:
    files = ["tests/reference/test_lora_matrix.py", "tests/reference/test_lora_bf16.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "peft", *files]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "JAXADAPT_EVERY_TWIN": "1"}, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
