"""The files of a release agree: versions, dependencies, addresses, and actions that are pinned."""

from __future__ import annotations

import json
import re
import runpy
import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

import jaxadapt


@pytest.fixture(scope="module")
def project(root: Path) -> dict[str, Any]:
    return tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(scope="module")
def release(root: Path) -> dict[str, Any]:
    """The functions of `.ci/release.py`."""
    return runpy.run_path(str(root / ".ci/release.py"))


@pytest.fixture(scope="module")
def workflow(root: Path) -> dict[str, Any]:
    return yaml.safe_load((root / ".github/workflows/release.yml").read_text(encoding="utf-8"))["jobs"]


@pytest.fixture
def copy(root: Path, tmp_path: Path) -> Path:
    """The files that `.ci/release.py` reads and writes, as they are on the day of a release."""
    for name in ("pyproject.toml", "CHANGELOG.md", "CITATION.cff", "conda/recipe.yaml", "README.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(root / name, tmp_path / name)
    (tmp_path / "tests/files" / jaxadapt.__version__).mkdir(parents=True)
    changes = (tmp_path / "CHANGELOG.md").read_text(encoding="utf-8")
    (tmp_path / "CHANGELOG.md").write_text(changes.replace("- unreleased", "- 2027-01-31", 1), encoding="utf-8")
    return tmp_path


def test_one_version_everywhere(root: Path, project: dict[str, Any], release: dict[str, Any]):
    version = project["version"]
    assert jaxadapt.__version__ == version
    problems = release["find_problems"](root, f"v{version}")
    # Only the day is missing while a version is not released.
    assert [text for text in problems if "- unreleased" not in text] == []


def test_a_tag_that_does_not_match_stops_a_release(copy: Path, release: dict[str, Any]):
    tag = f"v{jaxadapt.__version__}"
    assert release["find_problems"](copy, tag) == []
    assert len(release["find_problems"](copy, "v9.9.9")) == 1
    for name in ("CHANGELOG.md", "CITATION.cff", "conda/recipe.yaml"):
        before = (copy / name).read_text(encoding="utf-8")
        (copy / name).write_text(before.replace(jaxadapt.__version__, "0.0.9"), encoding="utf-8")
        assert [text.partition(":")[0] for text in release["find_problems"](copy, tag)] == [name]
        (copy / name).write_text(before, encoding="utf-8")
    (copy / "tests/files" / jaxadapt.__version__).rmdir()
    assert "tests.files.record" in "".join(release["find_problems"](copy, tag))


def test_a_release_fills_in_the_address(copy: Path, release: dict[str, Any], project: dict[str, Any]):
    """Its workflow knows the address, and nothing else states one."""
    address = "https://example.org/somebody/jaxadapt"
    release["fill_address"](copy, address + "/")
    filled = tomllib.loads((copy / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    urls = filled.pop("urls")
    assert filled == project
    assert set(urls) == {"Repository", "Documentation", "Changelog", "Issues"}
    assert all(url == address or url.startswith(f"{address}/") for url in urls.values())
    assert yaml.safe_load((copy / "CITATION.cff").read_text(encoding="utf-8"))["repository-code"] == address
    readme = (copy / "README.md").read_text(encoding="utf-8")
    assert f"]({address}/blob/v{jaxadapt.__version__}/docs/methods.md)" in readme
    assert not re.search(r"\]\((?!https://|#)", readme)
    with pytest.raises(SystemExit, match="already"):
        release["fill_address"](copy, address)


def test_no_other_file_states_an_address(root: Path, project: dict[str, Any]):
    assert "urls" not in project
    own = re.compile(r"(?:github|gitlab|codeberg|readthedocs)[\w.]*[/:][\w./-]*jaxadapt", re.I)
    pages = [root / name for name in ("pyproject.toml", "CITATION.cff", "conda/recipe.yaml", "docs/conf.py")]
    pages += [
        *root.glob("*.md"),
        *root.glob("docs/**/*.md"),
        *root.glob("jaxadapt/**/*.py"),
        *root.glob(".github/**/*"),
    ]
    found = {page.name: own.findall(page.read_text(encoding="utf-8")) for page in pages if page.is_file()}
    assert {name: hits for name, hits in found.items() if hits} == {}


def test_the_pages_name_each_python(root: Path, project: dict[str, Any]):
    named = [line.rpartition(":: ")[2] for line in project["classifiers"] if re.search(r"Python :: 3\.\d+$", line)]
    assert len(named) > 3
    versions = (root / "docs/versions.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| (3\.\d+) \|", versions, re.M) == named
    install = (root / "docs/install.md").read_text(encoding="utf-8")
    (row,) = re.findall(r"^\| Python 3.*$", install, re.M)
    assert re.findall(r"3\.\d+", row) == [named[0], *named]
    for requirement in project["dependencies"]:
        name, _, lowest = requirement.partition(">=")
        assert name in ("click", "rich") or f"{name} {lowest}" in install, requirement


def test_contributing_has_a_reason_for_each_dependency(root: Path, project: dict[str, Any]):
    text = (root / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = text.partition("\n## Dependencies\n")[2].partition("\n## ")[0]
    asked = [*project["dependencies"], *(each for extra in project["optional-dependencies"].values() for each in extra)]
    names = {re.split(r"[\[><]", each)[0].removeprefix("google-") for each in asked} - {"jaxadapt"}
    assert len(names) > 40
    assert sorted(name for name in names if not re.search(rf"(?<![\w-]){name}(?![\w-])", section)) == []


def test_a_site_lists_its_versions(tmp_path: Path, release: dict[str, Any]):
    for name in ("0.9.0", "0.10.0", "0.2.1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "objects.inv").touch()
    (tmp_path / "other").mkdir()
    assert release["list_versions"](tmp_path) == ["0.10.0", "0.9.0", "0.2.1"]
    assert json.loads((tmp_path / "versions.json").read_text()) == ["0.10.0", "0.9.0", "0.2.1"]


def conda_dependencies(text: str) -> set[str]:
    run = text.partition("  run:\n")[2].partition("\n\n")[0]
    return {line.strip("- ").replace(" ", "") for line in run.splitlines()}


def test_the_conda_package_has_the_same_dependencies(root: Path, project: dict[str, Any]):
    text = (root / "conda/recipe.yaml").read_text(encoding="utf-8")
    expected = {*project["dependencies"], f"python{project['requires-python']}"}
    assert conda_dependencies(text) == expected
    for changed in (text.replace("jax >=0.10", "jax >=0.9"), text.replace("    - rich >=13.0\n", "")):
        assert conda_dependencies(changed) != expected
    recipe = yaml.safe_load(re.sub(r"\$\{\{ (\w+) \}\}", r"\1", text))
    assert {line.replace(" ", "") for line in recipe["requirements"]["run"]} == expected
    assert recipe["build"]["python"]["entry_points"] == [f"{k} = {v}" for k, v in project["scripts"].items()]
    assert recipe["about"]["summary"] == project["description"]
    assert recipe["about"]["license"] == project["license"]


def test_actions_are_pinned(root: Path):
    lines = [
        line
        for path in sorted((root / ".github/workflows").glob("*.yml"))
        for line in re.findall(r"uses: (.+)", path.read_text(encoding="utf-8"))
    ]
    assert len(lines) > 5
    pins: dict[str, set[str]] = {}
    for line in lines:
        assert re.fullmatch(r"[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", line), line
        pins.setdefault(line.partition("@")[0], set()).add(line)
    assert all(len(found) == 1 for found in pins.values()), pins
    assert "github-actions" in (root / ".github/dependabot.yml").read_text(encoding="utf-8")


def test_a_release_is_tested_before_it_is_published(workflow: dict[str, Any], project: dict[str, Any], root: Path):
    """Built once, tested on each Python with both ends of the dependencies, published by whom reviewers allow."""
    matrix = workflow["test"]["strategy"]["matrix"]
    named = [line.rpartition(":: ")[2] for line in project["classifiers"] if re.search(r"Python :: 3\.\d+$", line)]
    assert matrix == {"python": named, "dependencies": ["lowest", "newest"]}
    assert project["requires-python"] == f">={named[0]}"
    assert (workflow["test"]["needs"], workflow["publish"]["needs"]) == ("build", "test")
    steps = {name: "\n".join(step.get("run", "") for step in job["steps"]) for name, job in workflow.items()}
    assert 'release.py check "$GITHUB_REF_NAME"' in steps["build"]
    assert [name for name, text in steps.items() if "python -m build" in text] == ["build"]
    assert "tests/full/wheels.py --dist dist" in steps["test"]
    assert not steps["publish"].strip(), "what publishes runs no code of the repository"
    assert workflow["publish"]["environment"] == "release"
    rights = {name: job["permissions"] for name, job in workflow.items()}
    assert rights == {"build": {"contents": "read"}, "test": {"contents": "read"}, "publish": {"id-token": "write"}}
    assert workflow["publish"]["steps"][-1]["with"] == {"attestations": True}
    assert "secrets." not in (root / ".github/workflows/release.yml").read_text(encoding="utf-8")


def test_pull_requests_run_what_ci_runs(root: Path):
    """With each Python whose environment `.ci/run` makes, more time than it may take, and no rights."""
    workflow = yaml.safe_load((root / ".github/workflows/tests.yml").read_text(encoding="utf-8"))
    assert set(workflow[True]) == {"push", "pull_request"}  # YAML reads the key `on` as a truth value
    (job,) = workflow["jobs"].values()
    assert (workflow["permissions"], job["permissions"]) == ({}, {"contents": "read"})
    script = (root / ".ci/run").read_text(encoding="utf-8")
    installed = next(step["with"]["python-version"] for step in job["steps"] if "setup-python" in step.get("uses", ""))
    assert set(installed.split()) == set(re.findall(r"python(3\.\d+) -m venv", script))
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    (budget,) = re.findall(r"^budget=(\d+)", script, re.M)
    assert job["timeout-minutes"] * 60 > int(budget)


def test_the_host_of_the_site_builds_it_as_the_tests_do(root: Path, project: dict[str, Any]):
    host = yaml.safe_load((root / ".readthedocs.yaml").read_text(encoding="utf-8"))
    assert host["sphinx"] == {"configuration": "docs/conf.py", "fail_on_warning": True}
    (install,) = host["python"]["install"]
    assert set(install["extra_requirements"]) <= set(project["optional-dependencies"])
    python = host["build"]["tools"]["python"]
    assert f"Programming Language :: Python :: {python}" in project["classifiers"]
