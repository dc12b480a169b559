"""Build the wheel and the source distribution once, and test this wheel in new environments.

python tests/full/wheels.py [--record]          # every Python found, with the lowest and the newest dependencies
python tests/full/wheels.py --dist dist --python 3.14 --dependencies lowest --tests     # release.yml

Needs uv, which finds the lowest dependencies: `pip install uv build cyclonedx-python-lib[json-validation]`.
`--readme` also runs README's two commands from the wheel and from the source distribution (of the tests of the second,
only those of `README_TESTS`), `--tests` some of the tests.
"""

from __future__ import annotations

import argparse
import datetime
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TABLE = re.compile(r"(?<=\| date \| Python \| dependencies \| outcome \|\n\|---\|---\|---\|---\|\n)")
RESOLUTIONS = {"lowest": "lowest-direct", "newest": "highest"}
# Beside the smoke test, with --tests: what depends on the releases of Python, JAX and Flax.
TESTS = ("tests/files", "tests/system/test_readme.py", "tests/models", "tests/persistence", "tests/training")
# Of README's second command, with --readme: README's programs, files of earlier releases, storage, and PEFT both ways.
README_TESTS = ("tests/system/test_readme.py", "tests/files", "tests/storage", "tests/reference/test_interchange.py")
# Beside a wheel there is no checkout that a notebook's first cell could install.
OF_A_CHECKOUT = (
    "--deselect=tests/storage/hub/test_notebooks.py::test_the_first_cell_installs_the_checkout_that_it_is_in"
)


def run(*command: str | Path, cwd: Path = ROOT) -> str:
    """Run a command; return its output, and stop with it if the command fails."""
    shown = " ".join(map(str, command))
    print(f"$ {shown}", flush=True)
    # No PYTHONPATH: the environments have the wheel alone.
    env = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=env, text=True, capture_output=True)
    if done.returncode:
        raise SystemExit(f"{shown}: exit status {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")
    return done.stdout


def build(out: Path) -> None:
    """Build both from the tracked files alone, the wheel from the source distribution."""
    source = out.parent / "source"
    source.mkdir()
    for name in run("git", "ls-files", "-z").split("\0"):
        if name:
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    run(sys.executable, "-m", "build", "--outdir", out, source)


def check_sbom(wheel: Path) -> None:
    """The list of dependencies in the wheel is valid CycloneDX, by the schema of its own library."""
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if ".dist-info/sboms/" in name)
        problem = JsonStrictValidator(SchemaVersion.V1_6).validate_str(archive.read(name).decode())
    if problem is not None:
        raise SystemExit(f"{wheel.name}: {name}: {problem}")


def new_environment(python: str, folder: Path) -> Path:
    """Make an empty environment; return its interpreter."""
    run(shutil.which(f"python{python}") or python, "-m", "venv", folder)
    return folder / "bin" / "python"


def install(python: Path, wheel: Path, resolution: str, extra: str) -> None:
    """Install the wheel with its lowest or newest dependencies, all of them as wheels."""
    uv = [sys.executable, "-m", "uv", "pip"]
    choice = ["--resolution", RESOLUTIONS[resolution], "--only-binary", ":all:", "--python", python]
    # The requirements of a wheel that is named are no direct ones to uv, so they are listed first, by pyproject.toml.
    pins = python.parents[1] / "pins.txt"
    run(*uv, "compile", *choice, "--extra", extra, ROOT / "pyproject.toml", "-o", pins)
    run(*uv, "install", "--python", python, "--only-binary", ":all:", "-r", pins)
    run(*uv, "install", "--python", python, "--no-deps", wheel)
    run(*uv, "check", "--python", python)


def try_wheel(python: str, dependencies: str, wheel: Path, tests: bool) -> tuple[str, str, str]:
    """Test the wheel in one new environment; return the cells of its row."""
    with tempfile.TemporaryDirectory() as made:
        place = Path(made)
        interpreter = new_environment(python, place / "environment")
        install(interpreter, wheel, dependencies, "core-test")
        empty = place / "empty"
        empty.mkdir()
        for name in ("README.md", "tests/full/wheel_smoke.py"):
            shutil.copy(ROOT / name, place)
        versions = run(interpreter, "-P", place / "wheel_smoke.py", place / "README.md", cwd=empty).strip()
        outcome = "the smoke test passed"
        if tests:
            copy = place / "copy"
            copy.mkdir()
            for path in ROOT.iterdir():
                if path.name not in ("jaxadapt", ".git", "dist", "build") and not path.name.endswith(".egg-info"):
                    (shutil.copytree if path.is_dir() else shutil.copy)(path, copy / path.name)
            pytest = (interpreter, "-P", "-m", "pytest", "-q", "-n", "2", "-m", "not peft and not slow")
            outcome = run(*pytest, *TESTS, cwd=copy).strip().splitlines()[-1].strip("= ")
        exact = run(interpreter, "-c", "import platform; print(platform.python_version())").strip()
        return exact, f"{dependencies}: {versions}", outcome


def run_readme(dist: Sequence[Path]) -> list[tuple[str, str, str]]:
    """README's two commands, with the wheel and the source distribution in place of the checkout."""
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    demo, tests = (
        next(line for line in page.splitlines() if line.startswith("pip install") and word in line)
        for word in ("jaxadapt demo", "pytest")
    )
    rows: list[tuple[str, str, str]] = []
    for path in dist:
        for name, command in (("first", demo), ("second", tests)):
            with tempfile.TemporaryDirectory() as made:
                place = Path(made)
                activate = new_environment("3.11", place / "environment").with_name("activate")
                if name == "first":
                    there, folder = command.replace("'.[", f"'{path}["), place
                    assert there != command
                else:
                    folder, there = _unpack(dist, place), f"{command} {' '.join(README_TESTS)}"
                    if path.suffix == ".whl":  # the tests of the source distribution, and the package of the wheel
                        shutil.move(folder / "jaxadapt", place / "not_used")
                        there = there.replace("-e '.[", f"'{path}[").replace(
                            "&& pytest", f"&& python -P -m pytest {OF_A_CHECKOUT}"
                        )
                shown = run("bash", "-c", f". {activate} && {there}", cwd=folder).strip().splitlines()
                outcome = next((line for line in shown if line.startswith("held-out loss")), shown[-1].strip("= "))
                rows.append(("3.11", f"README's {name} command with `{path.name}`", outcome))
                print(" | ".join(rows[-1]), flush=True)
    return rows


def _unpack(dist: Sequence[Path], place: Path) -> Path:
    """Unpack the source distribution; return its folder."""
    (sdist,) = (path for path in dist if path.suffix == ".gz")
    shutil.unpack_archive(sdist, place, filter="data")
    return place / sdist.name.removesuffix(".tar.gz")


def main() -> None:
    """Run what the command line asks for."""
    found = [version for version in _pythons() if _is_there(version)]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dist", type=Path, help="a folder with the wheel and the source distribution to test")
    parser.add_argument("--python", nargs="*", default=found, help="versions, or paths of interpreters")
    parser.add_argument("--dependencies", nargs="*", choices=RESOLUTIONS, default=list(RESOLUTIONS))
    parser.add_argument("--tests", action="store_true")
    parser.add_argument("--readme", action="store_true")
    parser.add_argument("--record", action="store_true", help="add the rows to README.md beside this program")
    options = parser.parse_args()
    rows: list[tuple[str, str, str]] = []
    with tempfile.TemporaryDirectory() as made:
        dist = options.dist or Path(made, "dist")
        if options.dist is None:
            build(dist)
        (wheel,), (sdist,) = (sorted(dist.resolve().glob(end)) for end in ("*.whl", "*.tar.gz"))
        check_sbom(wheel)
        for python in options.python:
            for dependencies in options.dependencies:
                rows.append(try_wheel(python, dependencies, wheel, options.tests))
                print(" | ".join(rows[-1]), flush=True)
        if options.readme:
            rows += run_readme([wheel, sdist])
    missing = [version for version in _pythons() if version not in found]
    print(f"not found here: Python {', '.join(missing)}" if missing else "every supported Python was found")
    if options.record:
        page = ROOT / "tests/full/README.md"
        today = datetime.date.today().isoformat()
        text = "".join(f"| {today} | {' | '.join(row)} |\n" for row in rows)
        changed, count = TABLE.subn(lambda _: text, page.read_text(encoding="utf-8"), count=1)
        assert count == 1, "tests/full/README.md has no table of the wheel"
        page.write_text(changed, encoding="utf-8")


def _is_there(version: str) -> bool:
    """True if the command runs; pyenv has commands that do not."""
    path = shutil.which(f"python{version}")
    return path is not None and subprocess.run([path, "-c", ""], capture_output=True).returncode == 0


def _pythons() -> list[str]:
    """The versions that pyproject.toml's classifiers name."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    classifiers = tomllib.loads(text)["project"]["classifiers"]
    return [version for line in classifiers if (version := line.rpartition("Python :: ")[2]).startswith("3.")]


if __name__ == "__main__":
    main()
