"""`examples/gemma_vllm.py` with the gemma package, which CI has on Python 3.13. tests/full compares it with PEFT."""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

import jaxadapt

pytest.importorskip("gemma")
pytest.importorskip("gguf")


@pytest.mark.filterwarnings("ignore")  # gemma's own
def test_the_program(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, foreign_model: None):
    monkeypatch.setattr(sys, "argv", ["gemma_vllm", str(tmp_path)])
    runpy.run_path(str(root / "examples" / "gemma_vllm.py"), run_name="__main__")
    said = capsys.readouterr().out
    first, last = map(float, re.findall(r"loss ([\d.]+) -> ([\d.]+)", said)[0])
    assert last < 0.8 * first
    assert not re.search("^(error|warning)", said, re.M)
    assert len(jaxadapt.read(tmp_path / "vllm").tensors) == 2 * 7 * 2
    assert json.loads((tmp_path / "vllm/adapter_config.json").read_text())["lora_alpha"] == 4
    assert (tmp_path / "adapter.gguf").read_bytes()[:4] == b"GGUF"
