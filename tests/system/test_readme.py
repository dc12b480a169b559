"""Every ```python block of README.md and docs/ runs, in a fresh namespace and a temporary folder; no link is dead.

A block after the line `<!-- no-run -->` is left out.
"""

from __future__ import annotations

import ast
import inspect
import operator
import re
from pathlib import Path

import pytest

import jaxadapt
from jaxadapt.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
PAGES = {str(path.relative_to(ROOT)): path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
BLOCK = re.compile(r"(?P<left_out><!-- *no-run *-->\s*\n)?```python\n(?P<code>.*?)^```", re.M | re.S)
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]*))?\)")
# release.yml runs these tests on the wheel, with the extra `core-test` alone; .ci/run has all libraries.
OF_THE_EXTRA_TEST = ("equinox", "haiku", "qwix")
TEXT = {name: path.read_text(encoding="utf-8") for name, path in PAGES.items()}
BLOCKS = {
    (name, text.count("\n", 0, m.start("code"))): m["code"]
    for name, text in TEXT.items()
    for m in BLOCK.finditer(text)
    if not m["left_out"]
}


@pytest.mark.parametrize(("page", "line"), [pytest.param(*at, id=f"{at[0]}:{at[1] + 1}") for at in BLOCKS])
def test_block_runs(page: str, line: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for library in OF_THE_EXTRA_TEST:
        if re.search(rf"^import .*\b{library}\b", BLOCKS[page, line], re.M):
            pytest.importorskip(library)
    monkeypatch.chdir(tmp_path)
    # Blank lines in front, so that a traceback points into the page.
    exec(compile("\n" * line + BLOCKS[page, line], str(PAGES[page]), "exec"), {"__name__": "__main__"})


def test_it_begins_with_nnx_and_linen():
    nnx, linen, *_ = BLOCKS.values()
    assert "from flax import nnx" in nnx
    assert "import flax.linen as nn" in linen


def anchors(text: str) -> set[str]:
    """What GitHub calls the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str):
    found = list(LINK.finditer(TEXT[page]))
    for m in found:
        there = (PAGES[page].parent / m[1]).resolve() if m[1] else PAGES[page]
        assert there.exists(), m[0]
        assert not m[2] or m[2] in anchors(there.read_text(encoding="utf-8")), m[0]
    assert found or page != "README.md"


def test_the_row_of_the_command_line_lists_every_command():
    (row,) = re.findall(r"^\| command line \| (.+) \|$", TEXT["README.md"], re.M)
    assert set(re.findall(r"`(?:jaxadapt )?([a-z][a-z-]+)`", row.partition("|")[0])) == set(COMMANDS)


@pytest.mark.peft
def test_the_calls_of_the_page_for_users_of_peft():
    """Each name of PEFT exists; each call has a function of jaxadapt and arguments that it takes."""
    import peft

    rows = re.findall(r"^\| (`[\w.`, ]+`) \| (.+) \| (.+) \|$", TEXT["docs/from_peft.md"], re.M)
    rows = [row for row in rows if re.search(r"`[A-Z]?\w*[._]\w+`", row[0]) and "(" in row[1]]
    assert len(rows) > 15
    for theirs, *cells in rows:
        for name in re.findall(r"[\w.]+", theirs):
            operator.attrgetter(name)(peft)
        for cell in cells:
            found = [code for code in re.findall(r"`([^`]+)`", cell) if "(" in code]
            assert found or cell == "the same" or cell.startswith("the same with"), cell
            for code in found:
                code = re.sub(r"^with (.*?)(?: as \w+)?:$", r"\1", code).replace("…", "x")
                for call in [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]:
                    function = operator.attrgetter(ast.unparse(call.func))(jaxadapt)
                    keywords = {word.arg: None for word in call.keywords if word.arg is not None}
                    inspect.signature(function).bind(*call.args, **keywords)


@pytest.mark.peft
def test_the_number_of_methods():
    import peft

    from jaxadapt.methods import METHODS

    prompts = sum(method.scope == "model" for method in METHODS.values())
    text = (
        f"{len(METHODS)} of the {len(peft.PeftType)} methods of PEFT {peft.__version__}"
        f" ({len(METHODS) - prompts} change weights, {prompts} add virtual tokens)"
    )
    assert text in TEXT["README.md"]
