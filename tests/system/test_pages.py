"""Each page of docs/ begins with a short block that prints what its comments say, and ends with the next two pages."""

from __future__ import annotations

import contextlib
import io
import json
import re
import signal
from pathlib import Path

import pytest
from click.testing import CliRunner
from fsspec.implementations.memory import MemoryFileSystem

import jaxadapt
from benchmarks.methods import file_size, trained_size
from jaxadapt.cli import main
from jaxadapt.methods import METHODS

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
    MemoryFileSystem.store.clear()  # of another test that ran this block
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compile(code, page, "exec"), {"__name__": "__main__"})
    MemoryFileSystem.store.clear()
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


@pytest.mark.parametrize("api", ["NNX", "Linen"])
def test_sigterm_stops_each_loop_of_checkpoints_md_after_a_saved_step(
    api: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    code = BLOCK.search(
        PAGES["checkpoints"].partition("## A loop that resumes")[2].partition(f":::{{tab-item}} {api}")[2]
    )
    assert code is not None
    head = re.search(r"^    for step in range.*$", code["code"], re.M)
    assert head is not None
    preempted = f"{head[0]}\n        if step == 3:\n            signal.raise_signal(signal.SIGTERM)"
    monkeypatch.chdir(tmp_path)
    before = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a loop that does not ask would end the tests
    try:
        with pytest.raises(SystemExit) as caught:
            exec(compile(code["code"].replace(head[0], preempted), "checkpoints", "exec"), {"signal": signal})
    finally:
        signal.signal(signal.SIGTERM, before)
    assert caught.value.code == 143
    assert jaxadapt.CheckpointManager(next(tmp_path.glob("run*"))).steps == [3]


def test_every_page_is_in_the_list_of_pages():
    listed = re.findall(r"^([\w/]+)$", (DOCS / "index.md").read_text("utf-8"), re.M)
    assert sorted({*PAGES} - {*listed}) == []


def rows_between(page: str, begin: str, end: str) -> list[list[str]]:
    """The rows of the table between two comments of a page, without those of the head and of captions."""
    text = PAGES[page].partition(f"<!-- {begin} -->")[2].partition(f"<!-- {end} -->")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.strip().splitlines()[2:]]
    return [row for row in rows if row[1]]


def test_the_trees_of_models_md_are_those_of_the_keymaps():
    rows = rows_between("models", "trees", "end of trees")
    assert len(rows) > 10
    for name, *entry in rows:
        printed = CliRunner().invoke(main, ["families", name.strip("`"), "--json"])
        entries = [[found["leaf"], found["key"], found["pattern"]] for found in json.loads(printed.output)]
        assert [cell.strip("`") for cell in entry] in entries, name


SIZES = rows_between("choosing", "sizes of methods", "end of sizes")


def test_choosing_md_has_the_figures_of_the_benchmark_for_every_method():
    pattern = r"^\| (\w+) \| ([\d,]+) \| ([\d.]+) \| ([\d.]+) \| [\d.]* \| [\d.]+ \| ([\d.]+) \|$"
    _, _, bench = (DOCS.parent / "benchmarks" / "README.md").read_text("utf-8").partition("\n## methods.py\n")
    measured = {m[1].upper(): (m[2], m[4], m[3], m[5]) for m in re.finditer(pattern, bench, re.M)}
    assert {row[0]: (row[1], *row[3:6]) for row in SIZES} == measured
    assert sorted(measured) == sorted(METHODS)


@pytest.mark.parametrize(
    ("method", "trained", "size"),
    [
        pytest.param(*row[:3], id=row[0], marks=() if row[0] in {"LORA", "VERA", "PREFIX_TUNING"} else pytest.mark.full)
        for row in SIZES
    ],
)
def test_choosing_md_has_the_sizes_counted_from_the_shapes(method: str, trained: str, size: str):
    assert trained_size(method.lower()) == int(trained.replace(",", ""))
    assert float(size.replace(",", "")) == pytest.approx(file_size(method.lower()) / 1e6, rel=0.05)
