"""The rows of SGLang in docs/experts.md say what its own code did (`tests/full/programs/sglang_experts.json`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

MODELS = ("mixtral", "qwen3_moe", "gpt_oss", "llama4_text", "deepseek_v3")  # the table's columns
ROWS = {
    "routed experts": ("routed experts", "gate and up only", "down only"),
    "router": ("router",),
    "shared experts": ("shared experts",),
}


def outcome(results: dict[str, Any], cases: tuple[str, ...], form: str) -> str:
    """The cell of a model: "–" if it has no such adapter."""
    found = [results[case][form] for case in cases if case in results]
    if not found:
        return "–"
    if all(isinstance(each, str) for each in found):
        return "refused"
    assert all(max(each.values()) < 1e-6 for each in found), found  # of PEFT's change
    return "right"


@pytest.mark.parametrize(("form", "title"), [("peft's file", "as it is"), ("for vllm", "after `export --for vllm`")])
def test_the_cells_are_what_was_measured(root: Path, form: str, title: str):
    measured = json.loads((root / "tests/full/programs/sglang_experts.json").read_text())
    assert set(measured) == set(MODELS)
    lines = (root / "docs/experts.md").read_text(encoding="utf-8").splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("| **SGLang") and title in line) + 1
    for line, (name, cases) in zip(lines[first:], ROWS.items(), strict=False):
        written, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        assert written.startswith(name)
        assert cells == [outcome(measured[model], cases, form) for model in MODELS]
