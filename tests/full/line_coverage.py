"""Measure line coverage by package: `python tests/full/line_coverage.py [--missing TEXT] [pytest arguments]`.

Runs pytest under coverage, child processes and workers included, and prints the share of executed lines of each
package. Without arguments the whole suite runs, in two workers (half an hour on two cores). `--missing TEXT` also lists
the lines that no test executes, of the files whose path contains the text. `--keep` adds to the data of earlier runs,
so that a run can be made folder by folder.
"""

from __future__ import annotations

import argparse
import collections
import io
import os
import subprocess
import sys
from pathlib import Path

import coverage

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "coverage"
SETTINGS = f"""[run]
source = {ROOT / "jaxadapt"}
data_file = {BUILD / "data"}
parallel = true
patch = subprocess
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--missing", action="append", default=[], help="list the lines of files with this in their path"
    )
    parser.add_argument("--keep", action="store_true", help="add to the data of earlier runs")
    options, arguments = parser.parse_known_args()
    BUILD.mkdir(parents=True, exist_ok=True)
    settings = BUILD / "settings"
    settings.write_text(SETTINGS)
    if not options.keep:
        for old in BUILD.glob("data*"):
            old.unlink()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    tests = arguments or ["-n", "2", "tests", "jaxadapt"]
    command = [sys.executable, "-m", "coverage", "run", f"--rcfile={settings}", "-m", "pytest", "-q", *tests]
    code = subprocess.run(command, cwd=ROOT, env=environment).returncode
    report(coverage.Coverage(config_file=str(settings)), options.missing)
    return code


def report(recorded: coverage.Coverage, missing: list[str]) -> None:
    """Print the lines of each package and how many are executed."""
    recorded.combine(keep=True)
    lines: collections.Counter[str] = collections.Counter()
    executed: collections.Counter[str] = collections.Counter()
    text = io.StringIO()
    for path in sorted((ROOT / "jaxadapt").rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        _, statements, _, absent, ranges = recorded.analysis2(str(path))
        package = name.split("/")[1] if name.count("/") > 1 else "(root)"
        for key in (package, "all"):
            lines[key] += len(statements)
            executed[key] += len(statements) - len(absent)
        if absent and any(part in name for part in missing):
            print(f"{name}: {ranges}", file=text)
    for package in [*sorted(lines.keys() - {"all"}), "all"]:
        share = executed[package] / max(1, lines[package])
        print(f"{package:14} {executed[package]:6} of {lines[package]:6} lines  {share:7.1%}")
    print(text.getvalue(), end="")


if __name__ == "__main__":
    sys.exit(main())
