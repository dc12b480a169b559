"""A wheel and a source distribution hold what they should and nothing else, and work outside the checkout."""

from __future__ import annotations

import compileall
import email
import fnmatch
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import jaxadapt

pytestmark = pytest.mark.slow


def own_files(root: Path) -> set[str]:
    """The names of the repository's files: what git does not ignore, or what a source distribution has."""
    if (root / ".git").exists():
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(command, cwd=root, check=True, text=True, capture_output=True).stdout.split("\0")
        return {name for name in listed if name and (root / name).exists()}
    ignored = (root / ".gitignore").read_text(encoding="utf-8").split()
    return {
        str(path.relative_to(root))
        for path in root.rglob("*")
        if path.is_file()
        and not any(
            fnmatch.fnmatch(part, pattern.strip("/")) for part in path.relative_to(root).parts for pattern in ignored
        )
    } - {"PKG-INFO", "setup.cfg"}


@pytest.fixture(scope="module")
def files(root: Path) -> set[str]:
    return own_files(root)


@pytest.fixture(scope="module")
def dist(root: Path, files: set[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both, the wheel built from the source distribution; from a copy, because setuptools writes where it builds."""
    source = tmp_path_factory.mktemp("source")
    for name in files:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / name, source / name)
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(command, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return out


@pytest.fixture(scope="module")
def wheel(dist: Path) -> zipfile.ZipFile:
    (built,) = dist.glob("*.whl")
    return zipfile.ZipFile(built)


def test_wheel_holds_the_package(wheel: zipfile.ZipFile, files: set[str]):
    names = set(wheel.namelist())
    expected = {name for name in files if name.startswith("jaxadapt/")}
    assert "jaxadapt/py.typed" in expected
    assert {name for name in names if ".dist-info/" not in name} == expected
    described = {name.partition(".dist-info/")[2] for name in names - expected}
    assert described == {
        "METADATA", "RECORD", "WHEEL", "entry_points.txt", "top_level.txt",
        "licenses/LICENSE", "sboms/jaxadapt.cdx.json",
    }  # fmt: skip


def test_source_distribution_holds_the_repository(dist: Path, files: set[str]):
    (built,) = dist.glob("*.tar.gz")
    with tarfile.open(built) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    egg = {name for name in names if name.startswith("jaxadapt.egg-info/")}
    assert names - egg - {"PKG-INFO", "setup.cfg"} == files


def test_wheel_lists_its_dependencies_in_cyclonedx(wheel: zipfile.ZipFile):
    """The same requirements as METADATA, which setuptools wrote; tests/full/wheels.py checks the schema."""
    read = {name.partition(".dist-info/")[2]: wheel.read(name).decode() for name in wheel.namelist()}
    metadata = email.message_from_string(read["METADATA"])
    bom = json.loads(read["sboms/jaxadapt.cdx.json"])
    assert (bom["bomFormat"], bom["specVersion"]) == ("CycloneDX", "1.6")
    own = bom["metadata"]["component"]
    assert own["purl"] == f"pkg:pypi/jaxadapt@{metadata['Version']}" == own["bom-ref"]
    assert own["licenses"] == [{"expression": metadata["License-Expression"]}]
    required = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert len(required) > 5
    assert sorted(part["properties"][0]["value"] for part in bom["components"]) == sorted(required)
    for part in bom["components"]:
        assert re.fullmatch(r"[a-z0-9-]+", part["name"])
        assert part["purl"] == f"pkg:pypi/{part['name']}"
    (direct,) = (entry["dependsOn"] for entry in bom["dependencies"] if entry["ref"] == own["bom-ref"])
    assert direct == [part["bom-ref"] for part in bom["components"]]


@pytest.mark.parametrize("compiled", [False, True], ids=["sources", "compiled"])
def test_wheel_works_outside_the_checkout(wheel: zipfile.ZipFile, compiled: bool, tmp_path: Path):
    """Unpacked elsewhere and imported from elsewhere, also without sources: all modules load, the script exists."""
    site = tmp_path / "site"
    wheel.extractall(site)
    if compiled:
        assert compileall.compile_dir(site / "jaxadapt", legacy=True, quiet=1)
        for path in (site / "jaxadapt").rglob("*.py"):
            path.unlink()
    env = {**os.environ, "PYTHONPATH": str(site)}
    code = """
import importlib, importlib.metadata, pathlib, pkgutil, sys, jax, jaxadapt, jax.numpy as jnp
assert pathlib.Path(jaxadapt.__file__).is_relative_to(sys.argv[1]), jaxadapt.__file__
for module in pkgutil.walk_packages(jaxadapt.__path__, "jaxadapt."):
    if not module.name.startswith(("jaxadapt.demo", "jaxadapt.__main__")):  # the demo needs its own extra
        importlib.import_module(module.name)
(script,) = importlib.metadata.distribution("jaxadapt").entry_points.select(group="console_scripts")
assert script.name == "jaxadapt" and callable(script.load())
base = {"up": {"kernel": jnp.ones((4, 6))}}
adapter = jaxadapt.init(base, jaxadapt.LoraConfig(r=2, target_modules=["up"]), key=jax.random.key(0))
jaxadapt.save(adapter, "out")
again = jaxadapt.from_peft(jaxadapt.read("out"), base)
print(jaxadapt.__version__, len(jaxadapt.methods.METHODS), list(again.params["up"]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(site)], env=env, cwd=tmp_path, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == [jaxadapt.__version__, str(len(jaxadapt.methods.METHODS)), "['kernel']"]
