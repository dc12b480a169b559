"""Write the table of docs/methods.md from the results of the conformance suites: `python -m tests.full.methods_table`.

It runs `tests/methods/test_conformance.py` and `test_conformance_peft.py` for every registered method, or reads the
JUnit files of such runs (`--junit FILE …`). A cell is "yes" if all tests of its kind passed for all of the method's
examples, "no" if one failed, and empty if none ran. It knows no method by name.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from pathlib import Path

from jaxadapt.configs import listing
from jaxadapt.methods import METHODS

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "methods.md"
SUITES = ("tests/methods/test_conformance.py", "tests/methods/test_conformance_peft.py")
BEGIN, END = "<!-- table of methods: python -m tests.full.methods_table -->\n", "<!-- end of the table -->"
# {column: the tests that prove it, by the part of their names after "test_"}
COLUMNS: Mapping[str, tuple[str, ...]] = {
    "NNX, Linen, merge": ("nnx_and_linen_agree_and_merging_equals_applying", "training_in_nnx_changes"),
    "layouts, fused": ("every_layout_", "parts_of_a_fused_weight"),
    "scanned": ("stacked_layers_are", "scanned_layers_give"),
    "8 devices": ("eight_devices",),
    "opens PEFT's files": ("pefts_file_gives",),
    "PEFT opens ours": ("peft_opens_our_files",),
}
CASE = re.compile(r"test_(?P<test>\w+)\[(?P<params>[^\]]+)\]")
Results = dict[str, dict[str, list[str]]]


def run_suites(folder: Path) -> list[Path]:
    """Run both suites and return their JUnit files."""
    written: list[Path] = []
    for number, suite in enumerate(SUITES):
        written.append(folder / f"{number}.xml")
        command = [sys.executable, "-m", "pytest", "-q", suite, f"--junitxml={written[-1]}"]
        subprocess.run(command, cwd=ROOT, check=False)
    return written


def read_results(files: Sequence[Path]) -> Results:
    """Return `{type: {column: outcomes}}` of JUnit files; an outcome is "passed", "failed" or "skipped"."""
    results: Results = {}
    for file in files:
        for case in ET.parse(file).getroot().iter("testcase"):
            match = CASE.fullmatch(case.get("name", ""))
            if match is None:
                continue
            names = [part for part in match["params"].split("-") if part in METHODS]
            column = next((c for c, tests in COLUMNS.items() if match["test"].startswith(tests)), None)
            if len(names) != 1 or column is None:
                continue
            tags = {child.tag for child in case}
            outcome = "failed" if tags & {"failure", "error"} else "skipped" if "skipped" in tags else "passed"
            results.setdefault(names[0], {}).setdefault(column, []).append(outcome)
    return results


def cell(outcomes: Sequence[str]) -> str:
    """Return the text of a cell."""
    if "failed" in outcomes:
        return "no"
    return "yes" if "passed" in outcomes else ""


def table(results: Results) -> str:
    """Return the Markdown table of all methods, and the list of the types that pass through."""
    head = ["method", "kinds of layers", *COLUMNS, "merges", "own rows", "PEFT: accuracy", "PEFT: time ÷ LoRA's"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for info in listing.describe_methods():
        name = f"[{info.peft_type}]({info.paper})" if info.paper else info.peft_type
        method = METHODS[info.peft_type]
        kinds = {"model": "the model", "copies": "any module"}.get(method.scope, ", ".join(sorted(method.kinds)))
        found = results.get(info.peft_type, {})
        figures = ["" if x is None else f"{x:.2f}" for x in (info.facts.accuracy, info.facts.time)]
        cells = [cell(found.get(column, ())) for column in COLUMNS]
        rows = {"call": "yes", "put": "prepared", "no": "no"}[info.facts.rows]
        lines.append(f"| {' | '.join([name, kinds, *cells, 'yes' if info.facts.merges else 'no', rows, *figures])} |")
    passing = listing.passing_types().items()
    reasons = [f"{name} ({reason})" for name, reason in passing if reason != listing.NOT_YET]
    others = [name for name, reason in passing if reason == listing.NOT_YET]
    text = [f"Files of these types are read and written unchanged, but not applied: {', '.join(reasons)}."]
    text += [f"Not implemented, with the same effect: {', '.join(others)}."] if others else []
    return "\n".join([*lines, "", *text, ""])


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--junit", nargs="*", type=Path, help="JUnit files of runs of the suites, instead of new runs")
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = read_results(run_suites(Path(folder)) if given.junit is None else given.junit)
    page = PAGE.read_text()
    before, rest = page.split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{table(results)}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
