"""The files of a release agree: versions, dependencies, and actions that are pinned."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

import jaxadapt


@pytest.fixture(scope="module")
def project(root: Path) -> dict[str, Any]:
    return tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_one_version_everywhere(root: Path, project: dict[str, Any]):
    version = project["version"]
    assert jaxadapt.__version__ == version
    for name, pattern in {
        "CITATION.cff": r"^version: (.+)$",
        "conda/recipe.yaml": r"^  version: ([\d.]+)$",
        "CHANGELOG.md": r"^## \[([\d.]+)\]",
    }.items():
        found = re.search(pattern, (root / name).read_text(encoding="utf-8"), re.M)
        assert found is not None, name
        assert found[1] == version, name
    assert (root / "tests/files" / version).is_dir()


def test_the_conda_package_has_the_same_dependencies(root: Path, project: dict[str, Any]):
    run = (root / "conda/recipe.yaml").read_text(encoding="utf-8").partition("  run:\n")[2].partition("\n\n")[0]
    found = {line.strip("- ").replace(" ", "") for line in run.splitlines()}
    assert found == {*project["dependencies"], f"python{project['requires-python']}"}


def test_actions_are_pinned(root: Path):
    for path in sorted((root / ".github/workflows").glob("*.yml")):
        for line in re.findall(r"uses: (.+)", path.read_text(encoding="utf-8")):
            assert re.fullmatch(r"[\w./-]+@[0-9a-f]{40} # v[\d.]+", line), line
