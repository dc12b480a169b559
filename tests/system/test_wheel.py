"""A wheel builds, holds what it should and nothing else, and works outside the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    # From a copy: setuptools leaves `build/` and egg-info where it builds.
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, source)
    shutil.copytree(root / "jaxadapt", source / "jaxadapt", ignore=shutil.ignore_patterns("__pycache__"))
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(command, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (built,) = out.glob("*.whl")
    return built


def test_wheel_holds_the_package(wheel: Path, root: Path):
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        str(path.relative_to(root))
        for path in (root / "jaxadapt").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert "jaxadapt/py.typed" in names
    assert {name for name in names if ".dist-info/" not in name} == expected
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_wheel_works_outside_the_checkout(wheel: Path, tmp_path: Path):
    """Unpacked elsewhere and imported from elsewhere: every module loads and the script entry exists."""
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target"]
    done = subprocess.run([*install, str(site), str(wheel)], text=True, capture_output=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    env = {**os.environ, "PYTHONPATH": str(site)}
    code = """
import importlib, importlib.metadata, pathlib, pkgutil, sys, jaxadapt
assert pathlib.Path(jaxadapt.__file__).is_relative_to(sys.argv[1]), jaxadapt.__file__
for module in pkgutil.walk_packages(jaxadapt.__path__, "jaxadapt."):
    if not module.name.startswith(("jaxadapt.demo", "jaxadapt.__main__")):  # the demo needs its own extra
        importlib.import_module(module.name)
(script,) = importlib.metadata.distribution("jaxadapt").entry_points.select(group="console_scripts")
assert script.name == "jaxadapt" and callable(script.load())
print(jaxadapt.__version__, jaxadapt.LoraConfig(r=2).r)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(site)], env=env, cwd=tmp_path, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["0.1.0", "2"]
