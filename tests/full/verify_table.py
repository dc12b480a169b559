"""Write the table of docs/verify.md: the outcome of `verify` for every published file of the folder of real adapters.

    JAXADAPT_REAL_ADAPTERS=FOLDER python tests/full/verify_table.py

This is no test; tests/persistence/test_verify.py holds the outcomes fixed.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import jaxadapt  # noqa: E402
from tests.persistence.test_verify import REAL_FOLDERS  # noqa: E402

PAGE, START, END = ROOT / "docs" / "verify.md", "<!-- outcomes -->\n", "<!-- end of outcomes -->\n"


def outcome(path: Path) -> tuple[str, str]:
    """Return the codes of errors and warnings, and the method, from the findings for one path."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = jaxadapt.verify(path)
    codes = ", ".join(dict.fromkeys(f.code for f in found if f.severity != "note")) or "no problem"
    method = next((f.subjects[0] for f in found if f.code == "method"), "")
    return codes, method


def configurations(files: Iterable[Path]) -> list[str]:
    """Return the rows of the configurations, by outcome and method."""
    groups: dict[tuple[str, str], list[str]] = {}
    for file in sorted(files):
        groups.setdefault(outcome(file), []).append(file.stem)
    rows = ["| outcome | method | files |", "|---|---|---|"]
    for (codes, method), names in sorted(groups.items(), key=lambda item: (item[0][0] != "no problem", item[0])):
        rows.append(f"| {codes} | {method or 'none that can be read'} | {len(names)}: {' '.join(names)} |")
    return rows


def weights(folder: Path) -> list[str]:
    """Return the rows of the weights, with their configuration and alone."""
    rows = ["| weights | with configuration | outcome | method | the file alone |", "|---|---|---|---|---|"]
    for name, config, _ in REAL_FOLDERS:
        file = next((folder / "weights").glob(f"{name}_*"))
        with tempfile.TemporaryDirectory() as tmp:
            shutil.copy(file, Path(tmp) / file.name.partition("_")[2])
            shutil.copy(folder / "configs" / f"{config}.json", Path(tmp) / "adapter_config.json")
            codes, method = outcome(Path(tmp))
        rows.append(f"| {file.name} | {config}.json | {codes} | {method or '–'} | {outcome(file)[0]} |")
    return rows


def main() -> None:
    folder = Path(os.environ["JAXADAPT_REAL_ADAPTERS"])
    files = list((folder / "configs").glob("*.json"))
    table = "\n".join(
        [f"{len(files)} configurations:", "", *configurations(files), "", "12 files of weights:", "", *weights(folder)]
    )
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(START)
    PAGE.write_text(f"{before}{START}\n{table}\n\n{END}{rest.partition(END)[2]}", encoding="utf-8")


if __name__ == "__main__":
    main()
