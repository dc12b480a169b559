"""Every ```python block of README.md runs, in a fresh namespace and a temporary folder.

A block after the line `<!-- no-run -->` is left out.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).resolve().parent.parent / "README.md"
TEXT = README.read_text(encoding="utf-8")
BLOCK = re.compile(r"(?P<left_out><!-- *no-run *-->\s*\n)?```python\n(?P<code>.*?)^```", re.M | re.S)
BLOCKS = {TEXT.count("\n", 0, m.start("code")): m["code"] for m in BLOCK.finditer(TEXT) if not m["left_out"]}


@pytest.mark.parametrize("line", [pytest.param(line, id=f"README.md:{line + 1}") for line in BLOCKS])
def test_block_runs(line: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    # Blank lines in front, so that a traceback points into README.md.
    exec(compile("\n" * line + BLOCKS[line], str(README), "exec"), {"__name__": "__main__"})


def test_it_begins_with_nnx_and_linen():
    nnx, linen, *_ = BLOCKS.values()
    assert "from flax import nnx" in nnx
    assert "import flax.linen as nn" in linen
