"""Every notebook runs, cell by cell, offline; what its cells print is kept in the file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).resolve().parent.parent / "notebooks").glob("*.ipynb"))


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_notebook_runs(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    space: dict[str, object] = {"__name__": "__main__"}
    for number, cell in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"]):
        source = "".join(cell["source"])
        if cell["cell_type"] != "code" or source.startswith("%pip"):
            continue
        exec(compile(source, f"{path.name}, cell {number}", "exec"), space)
        printed = capsys.readouterr().out
        kept = "".join("".join(out.get("text", "")) for out in cell["outputs"])
        # Numbers differ between machines; the words before them do not.
        assert [line.split()[:2] for line in printed.splitlines()] == [line.split()[:2] for line in kept.splitlines()]
