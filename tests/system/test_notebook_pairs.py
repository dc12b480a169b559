"""Each notebook equals its Markdown, opens in Colab where the repository's address is known, and shows on any page."""

from __future__ import annotations

import base64
import importlib.util
import io
import re
import types
from pathlib import Path
from typing import Any

import jupytext
import matplotlib.image
import pytest

FOLDER = Path(__file__).parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
ADDRESS = "https://github.com/owner/name"


@pytest.fixture(scope="module")
def pairs() -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("pairs", FOLDER / "pairs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def opened(path: Path) -> Any:
    return jupytext.read(path)


def test_each_has_its_markdown():
    assert [path.stem for path in NOTEBOOKS] == sorted(path.stem for path in FOLDER.glob("*.md"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_the_pair_is_equal(pairs: types.ModuleType, path: Path):
    """jupytext itself reads and writes both. A difference: run `python notebooks/pairs.py`."""
    book, text = opened(path), path.with_suffix(".md").read_text(encoding="utf-8")
    assert pairs.markdown(book) == text
    found = [(cell.cell_type, cell.source, cell.metadata) for cell in jupytext.reads(text, fmt="md:myst").cells]
    assert found == [(cell.cell_type, cell.source, cell.metadata) for cell in book.cells]
    ids = [cell.id for cell in book.cells]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_the_badge_follows_the_address(pairs: types.ModuleType, path: Path):
    """No address, no badge: a link to a place that does not exist misleads. The release states the address."""
    text = path.with_suffix(".md").read_text(encoding="utf-8")
    assert pairs.with_badge(text, path.stem, pairs.repository()) == text, "run `python notebooks/pairs.py`"
    assert ("colab.research.google.com" in text) is (pairs.repository() is not None)
    badged = pairs.with_badge(text, path.stem, ADDRESS)
    target = f"https://colab.research.google.com/github/owner/name/blob/main/notebooks/{path.name}"
    assert badged.count(f"]({target})\n") == 1
    first = jupytext.reads(badged, fmt="md:myst").cells[0].source
    assert re.match(rf"# .+\n\n\[!\[Open in Colab\]\(\S+\)\]\({target}\)\n\n\w", first)
    assert pairs.with_badge(badged, path.stem, f"{ADDRESS}.git") == badged
    assert pairs.with_badge(badged, path.stem, None) == pairs.with_badge(text, path.stem, None)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_links_lead_somewhere(path: Path):
    """The site's build checks that the headings exist."""
    found = re.findall(r"\]\((?!https?:)([^)#\s]+)", path.with_suffix(".md").read_text(encoding="utf-8"))
    assert found
    assert [link for link in found if not (FOLDER / link).is_file()] == []


def test_a_changed_cell_loses_its_output(pairs: types.ModuleType):
    book = opened(NOTEBOOKS[0])
    shown = [cell for cell in book.cells if cell.cell_type == "code" and cell.outputs]
    one, other = shown[0].source, shown[1]
    again = pairs.paired(pairs.markdown(book).replace(one, f"{one}\nprint('more')"), book)
    by_source = {cell.source: cell for cell in again.cells}
    assert by_source[f"{one}\nprint('more')"].outputs == []
    assert by_source[other.source].outputs == other.outputs
    assert by_source[other.source].id == other.id


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_pictures_are_readable_in_the_dark(path: Path):
    """The text of a picture is black, so the background must not be transparent."""
    kept = [
        out.data for cell in opened(path).cells if cell.cell_type == "code" for out in cell.outputs if "data" in out
    ]
    pictures = [base64.b64decode(data["image/png"]) for data in kept if "image/png" in data]
    assert len(pictures) >= 2
    for picture in pictures:
        pixels = matplotlib.image.imread(io.BytesIO(picture))
        assert pixels.shape[2] == 3 or pixels[..., 3].min() == 1
        assert pixels[0, 0, :3].min() > 0.9
