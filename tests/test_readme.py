"""Every ```python block of README.md runs, in a fresh namespace and a temporary folder.

A block after the line `<!-- no-run -->` is left out; one after `<!-- continues -->` runs in the namespace of
the block before it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

README = Path(__file__).resolve().parent.parent / "README.md"
BLOCK = re.compile(
    r"(?P<mark><!-- *(?P<word>no-run|continues) *-->\s*\n)?```python\n(?P<code>.*?)^```", re.M | re.S
)


def chains() -> list[tuple[int, list[tuple[int, str]]]]:
    """Groups of (line, code) that share one namespace, each with the line of its first block."""
    text = README.read_text(encoding="utf-8")
    groups: list[tuple[int, list[tuple[int, str]]]] = []
    for match in BLOCK.finditer(text):
        if match["word"] == "no-run":
            continue
        line = text.count("\n", 0, match.start("code")) + 1
        if match["word"] == "continues":
            groups[-1][1].append((line, match["code"]))
        else:
            groups.append((line, [(line, match["code"])]))
    return groups


@pytest.mark.parametrize("blocks", [pytest.param(b, id=f"README.md:{line}") for line, b in chains()])
def test_block_runs(blocks: list[tuple[int, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "__main__"}
    for line, code in blocks:
        # Blank lines in front, so that a traceback points into README.md.
        exec(compile("\n" * (line - 1) + code, str(README), "exec"), names)


def test_there_are_blocks():
    """Ten lines of NNX and ten of Linen at least."""
    assert len(chains()) >= 2
