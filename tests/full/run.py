"""The tests that are too long for CI: `python tests/full/run.py [--matrices] [--record] [pytest options]`.

At most 30 minutes on two cores. With `--matrices` it runs the cases that CI leaves out of its long matrices, instead of
this folder. With `--record` date, versions and outcome go into README.md beside it, as a first row.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROW = re.compile(r"(?<=\|---\|---\|---\|\n)")  # the first below the table's head


def main() -> int:
    arguments = sys.argv[1:]
    record = "--record" in arguments
    matrices = "--matrices" in arguments
    what = [str(HERE.parent), "-m", "full"] if matrices else [str(HERE)]
    arguments = [a for a in arguments if a not in ("--record", "--matrices")]
    # Three at a time on two cores: those of several processes mostly wait, for each other and for JAX to miss one.
    parallel = ["-n", "3", "--dist", "worksteal"]
    command = [sys.executable, "-m", "pytest", *what, *parallel, "--durations=20", *arguments]
    run = subprocess.Popen(command, cwd=HERE.parent.parent, text=True, stdout=subprocess.PIPE)
    assert run.stdout is not None
    closing = "no closing line"
    for line in run.stdout:
        print(line, end="", flush=True)
        if re.search(r"\d+ (passed|failed|error)|no tests ran", line):
            closing = line.strip("= \n")
    code = run.wait()
    if record:
        named = [*(["--matrices"] if matrices else []), *arguments]
        names = ("jax", "flax", "peft", "torch")
        found = [f"{d.name} {d.version}" for d in map(_distribution, names) if d]
        row = " | ".join(
            [
                datetime.date.today().isoformat(),
                ", ".join([f"Python {platform.python_version()}", *found]),
                f"`{' '.join(named)}`: {closing}" if named else closing,
            ]
        )
        page = HERE / "README.md"
        page.write_text(ROW.sub(lambda _: f"| {row} |\n", page.read_text(), count=1))
    return code


def _distribution(name: str) -> importlib.metadata.Distribution | None:
    try:
        return importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(main())
