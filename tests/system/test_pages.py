"""Each page of docs/ begins with a short block that prints what its comments say, and ends with the next two pages."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs"
# The home page has the list of pages; commands.md is made from the commands.
OTHERS = {"index", "commands"}
PAGES = {p.stem: p.read_text("utf-8") for p in sorted(DOCS.glob("*.md")) if p.stem not in OTHERS}
PAGES = {name: text for name, text in PAGES.items() if "```{include}" not in text}
BLOCK = re.compile(r"(?P<left_out><!-- *no-run *-->\s*\n)?^```python\n(?P<code>.*?)^```$", re.M | re.S)
SECTION = re.compile(r"^## ", re.M)
PRINTS = re.compile(r"^ *print\(.*\)  # (.*)$", re.M)


def first_block(text: str) -> str:
    found = BLOCK.search(text)
    section = SECTION.search(re.sub(r"^```.*?^```$", lambda m: " " * len(m[0]), text, flags=re.M | re.S))
    assert found is not None, "no block of Python"
    assert found["left_out"] is None, "the first block does not run"
    assert section is None or found.start() < section.start(), "the first block comes after a heading"
    return found["code"]


@pytest.mark.parametrize("page", PAGES)
def test_the_first_block_prints_what_its_comments_say(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    code = first_block(PAGES[page])
    assert len(code.splitlines()) <= 20
    said = PRINTS.findall(code)
    assert said, "nothing is printed"
    assert len(said) == len(re.findall(r"\bprint\(", code)), "a print has no comment"
    monkeypatch.chdir(tmp_path)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compile(code, page, "exec"), {"__name__": "__main__"})
    printed = out.getvalue().splitlines()
    assert len(printed) == len(said)
    # A remark may follow what is printed, after a colon or in parentheses.
    wrong = [
        (line, text)
        for line, text in zip(printed, said, strict=True)
        if not re.match(re.escape(line) + r"($|: | \()", text)
    ]
    assert wrong == []


@pytest.mark.parametrize("page", PAGES)
def test_the_last_line_names_the_next_two_pages(page: str):
    last = PAGES[page].rstrip().rpartition("\n\n")[2].replace("\n", " ")
    found = re.fullmatch(r"Next: \[[^\]]+\]\(([\w/]+)\.md\), \[[^\]]+\]\(([\w/]+)\.md\)\.", last)
    assert found, last
    assert len({page, found[1], found[2]}) == 3


def test_every_page_is_in_the_list_of_pages():
    listed = re.findall(r"^([\w/]+)$", (DOCS / "index.md").read_text("utf-8"), re.M)
    assert sorted({*PAGES} - {*listed}) == []
