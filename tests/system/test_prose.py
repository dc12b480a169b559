"""Plain English in docstrings, comments, messages and docs: imperative first lines, and none of some phrases."""

from __future__ import annotations

import ast
import io
import json
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CODE = sorted((ROOT / "jaxadapt").rglob("*.py"))
PAGES = [
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "benchmarks/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "notebooks").glob("*.ipynb")),
]

# A function's docstring begins with a verb: "Return the sites", not "The sites" and not "Whether it has sites".
NO_VERBS = {
    "a", "all", "an", "and", "any", "as", "each", "for", "from", "how", "if", "in", "inside", "instead", "is", "it",
    "its", "like", "no", "none", "of", "on", "one", "some", "the", "this", "those", "to", "what", "when", "where",
    "whether", "which", "who", "whose", "with", "within",
}  # fmt: skip

# Phrases of a translation. Each has a plain form: say what does what.
BANNED = re.compile(
    r"\bto be had\b|\bno more so\b|\b(?:is|are|was|were) told\b|\b(?:is|are|was) meant\b|\bnobody\b|\bsomebody\b"
    r"|\bof which\b|\bthat which\b|\bso that nothing\b|\bwhat(?:ever)? (?:is|are|has|have|lies|goes) (?!the\b)"
    r"|\bas PEFT has (?:it|them)\b|\bof one's own\b|\bdo(?:es)? for (?:it|them|whatever)\b|\ball the same\b"
    r"|\bthe other way round\b|\bnone of (?:it|them) is\b|\bis (?:it|there) none\b",
    re.IGNORECASE,
)


# American spelling, as JAX, Flax and PEFT have it.
BRITISH = re.compile(
    r"\b\w*(?:recogni|initiali|quanti|optimi|normali|seriali|summari|materiali|generali|speciali|vectori|randomi|minimi)"
    r"s(?:e|ed|es|ing|ation|ations)\b|\bcolour|\bbehaviour|neighbour|\blabelled",
    re.IGNORECASE,
)


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            decorators = {ast.unparse(d).split("(")[0].rpartition(".")[2] for d in node.decorator_list}
            if not decorators & {"property", "cached_property"}:
                yield node


def texts(path: Path) -> Iterator[tuple[int, str]]:
    """Every string and comment of a Python file, with its line."""
    for token in tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline):
        if token.type in (tokenize.STRING, tokenize.COMMENT):
            yield token.start[0], token.string


def prose(page: Path) -> list[str]:
    """The lines of a page; of a notebook, those of its Markdown cells."""
    text = page.read_text(encoding="utf-8")
    if page.suffix == ".md":
        return text.splitlines()
    return [x for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown" for x in cell["source"]]


@pytest.mark.parametrize("path", CODE, ids=lambda p: p.relative_to(ROOT / "jaxadapt").as_posix())
def test_docstrings_begin_with_a_verb(path: Path):
    wrong = []
    for node in functions(ast.parse(path.read_text(encoding="utf-8"))):
        first = (ast.get_docstring(node) or "").partition("\n")[0]
        word = re.match(r"[A-Za-z]+", first)
        if first and (word is None or word[0].lower() in NO_VERBS):
            wrong.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: {first}")
    assert not wrong, "begin with an imperative verb:\n" + "\n".join(wrong)


@pytest.mark.parametrize("path", [*CODE, *PAGES], ids=lambda p: p.relative_to(ROOT).as_posix())
def test_phrases(path: Path):
    lines = texts(path) if path.suffix == ".py" else enumerate(prose(path), 1)
    wrong = [
        f"{path.relative_to(ROOT)}:{n} {found[0]!r}"
        for n, text in lines
        for found in (*BANNED.finditer(text), *BRITISH.finditer(text))
    ]
    assert not wrong, "say it plainly (what does what):\n" + "\n".join(wrong)
