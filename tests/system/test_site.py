"""The site builds without a warning and without a network, and every public name has its entry."""

from __future__ import annotations

import importlib
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from sphinx.util.inventory import InventoryFile

import jaxadapt
from tests.system.test_public import PACKAGES

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    nowhere = "http://127.0.0.1:9"  # a proxy that answers nothing
    env = os.environ | {"http_proxy": nowhere, "https_proxy": nowhere, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-n", "-q", "docs", str(out)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-8000:]
    return out


def test_every_public_name_has_an_entry(site: Path):
    with (site / "objects.inv").open("rb") as file:
        found = InventoryFile.load(file, "", lambda *parts: "".join(parts))
    entries = {name for role, names in found.items() if role.startswith("py:") for name in names}
    names = {f"jaxadapt.{name}" for name in jaxadapt.__all__ if not inspect.ismodule(getattr(jaxadapt, name))}
    for package in PACKAGES:
        module = importlib.import_module(f"jaxadapt.{package}")
        names |= {f"{module.__name__}.{name}" for name in module.__all__}
    assert sorted(names - entries) == []


def test_a_page_loads_nothing_from_elsewhere(site: Path):
    loaded = re.compile(
        r"<(?:script|img|iframe|source)\b[^>]*\bsrc=[\"'](?:https?:)?//|<link\b[^>]*stylesheet[^>]*https?://"
    )
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 20
    found = {page.name: loaded.findall(page.read_text(encoding="utf-8")) for page in pages}
    assert {name: hits for name, hits in found.items() if hits} == {}


def test_each_page_has_a_twin_in_markdown(site: Path):
    listed = (site / "llms.txt").read_text(encoding="utf-8")
    for page in sorted((ROOT / "docs").glob("*.md")):
        assert f"{page.stem}" in listed
        assert (site / f"{page.stem}.html.md").stat().st_size > 100


def test_the_twins_have_no_empty_links_and_keep_the_tabs(site: Path):
    twins = {path.name: path.read_text(encoding="utf-8") for path in site.glob("*.html.md")}
    assert {name: found for name, text in twins.items() if (found := re.findall(r"\[[^\]]*\]\(\)", text))} == {}
    for page in sorted((ROOT / "docs").glob("*.md")):
        tabs = re.findall(r"^:::\{tab-item\} (.+)$", page.read_text(encoding="utf-8"), re.M)
        assert re.findall(r"^###+ (NNX|Linen)$", twins[f"{page.stem}.html.md"], re.M)[: len(tabs)] == tabs
    pictures = re.findall(r"!\[[^\]]*\]\((\w[^)]*)\)", twins["concepts.html.md"])
    assert pictures
    assert all((site / picture).exists() for picture in pictures)
