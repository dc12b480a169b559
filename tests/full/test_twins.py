"""Every layer and variant of LoRA beside PEFT, in all four twins: CI takes two of each.

And every decoder under Hugging Face's names that CI knows by its recorded weights and logits.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run_tests(*arguments: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "JAXADAPT_EVERY_TWIN": "1"}, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.mark.peft
def test_every_case_in_every_twin() -> None:
    run_tests("-m", "peft", "tests/reference/test_lora_matrix.py", "tests/reference/test_lora_bf16.py")


@pytest.mark.peft
def test_every_recorded_decoder() -> None:
    names = "olmo3 or phi3 or gpt_neox or falcon or stablelm or glm4_moe or minimax_m2 or qwen3_next"
    run_tests("tests/keymaps/families/test_proof.py", "-k", f"({names}) and (logits or recorded)")
