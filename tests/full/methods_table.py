"""Write the table of docs/methods.md from the results of the conformance suites: `python -m tests.full.methods_table`.

It runs the suites that compare every registered method with PEFT, or reads the JUnit files of such runs (`--junit FILE
…`). A cell is "yes" if all tests of its kind passed for all of the method's examples, "no" if one failed, empty if none
ran, and "–" if the column does not apply; with `--keep` the cells without results keep what the page has. "PEFT's
layers" are those that PEFT itself adapts, tried. It knows no method by name: a test belongs to the type in its
parameters, in the form of the file or of the configuration's class, or in the name of its file.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import subprocess
import sys
import tempfile
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxadapt.configs import matching
from jaxadapt.methods import METHODS, describe_methods
from tests.support.configs import class_of

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "methods.md"
SUITES = (
    "tests/methods/test_conformance.py",
    "tests/methods/test_conformance_model.py",
    "tests/methods/test_conformance_peft.py",
    "tests/reference/test_prompts.py",
    "tests/reference/test_adaption_prompt.py",
)
BEGIN, END = "<!-- table of methods: python -m tests.full.methods_table -->\n", "<!-- end of the table -->"
# {column: the tests that prove it, by the part of their names after "test_"}
COLUMNS: Mapping[str, tuple[str, ...]] = {
    "NNX, Linen, merge": (
        "nnx_and_linen_agree_and_merging_equals_applying",
        "training_in_nnx_changes",
        "pefts_adapter_gives",
        "peft_and_jaxadapt_open",
    ),
    "layouts, fused": ("every_layout_", "parts_of_a_fused_weight"),
    "scanned": ("stacked_layers_are", "scanned_layers_give", "pefts_adapter_gives", "peft_and_jaxadapt_open"),
    "8 devices": ("eight_devices",),
    "opens PEFT's files": (
        "pefts_file_gives",
        "pefts_adapter_gives",
        "gradients_are_pefts",
        "peft_and_jaxadapt_open",
    ),
    "PEFT opens ours": ("peft_opens_our_files", "files", "peft_and_jaxadapt_open"),
}
# {scope of a method: the columns that do not apply to it}
NEVER: Mapping[str, tuple[str, ...]] = {"model": ("layouts, fused",)}
CASE = re.compile(r"test_(?P<test>\w+)(\[(?P<params>[^\]]+)\])?")
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
    by_name = {cls.__name__.removesuffix("Config"): name for name in METHODS if (cls := class_of(name)) is not None}
    by_name |= {name: name for name in METHODS}
    for file in files:
        for case in ET.parse(file).getroot().iter("testcase"):
            match = CASE.fullmatch(case.get("name", ""))
            if match is None:
                continue
            names = [by_name[part] for part in (match["params"] or "").split("-") if part in by_name]
            own = case.get("classname", "").rpartition(".test_")[2].upper()
            names = names or [name for name in METHODS if name == own]
            columns = [c for c, tests in COLUMNS.items() if match["test"].startswith(tests)]
            if len(names) != 1 or not columns:
                continue
            tags = {child.tag for child in case}
            outcome = "failed" if tags & {"failure", "error"} else "skipped" if "skipped" in tags else "passed"
            for column in columns:
                results.setdefault(names[0], {}).setdefault(column, []).append(outcome)
    return results


def cell(outcomes: Sequence[str]) -> str:
    """Return the text of a cell."""
    if "failed" in outcomes:
        return "no"
    return "yes" if "passed" in outcomes else ""


def peft_layers(peft_type: str) -> str:
    """Return the kinds of layers that PEFT adapts with the method's first example."""
    import peft
    import torch
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    x = torch.ones(2, 16)
    layers: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "attention": (torch.nn.MultiheadAttention(16, 2), (x, x, x)),
        "conv": (torch.nn.Conv2d(16, 16, 3, padding=1), (torch.ones(1, 16, 4, 4),)),
        "embedding": (torch.nn.Embedding(16, 16), (torch.arange(4),)),
        "linear": (torch.nn.Linear(16, 16), (x,)),
    }
    made: Any = PEFT_TYPE_TO_CONFIG_MAPPING[peft_type]
    fields = {k: v for k, v in METHODS[peft_type].examples[0].items() if k in made.__dataclass_fields__}
    found: list[str] = []
    for kind, (layer, inputs) in layers.items():
        with contextlib.suppress(Exception), warnings.catch_warnings():  # each method refuses in its own way
            warnings.simplefilter("ignore")
            model: Any = peft.get_peft_model(torch.nn.ModuleDict({"q": layer}), made(target_modules=["q"], **fields))
            model.base_model.model["q"](*inputs)
            if any(p.requires_grad for p in model.parameters()):  # some methods silently leave a layer alone
                found.append(kind)
    return ", ".join(found)


def read_cells(page: str) -> dict[str, dict[str, str]]:
    """Return `{type: {column: cell}}` of the table on the page."""
    lines = [line for line in page.partition(BEGIN)[2].partition(END)[0].split("\n") if line.startswith("|")]
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0].strip("[").partition("]")[0]: dict(zip(head, row, strict=True)) for row in rows}


def table(results: Results, kept: Mapping[str, Mapping[str, str]], layers: Mapping[str, str]) -> str:
    """Return the Markdown table of all methods, and the list of the types that pass through."""
    head = ["method", "kinds of layers", "PEFT's", *COLUMNS, "merges", "own rows"]
    head += ["PEFT: accuracy", "PEFT: time ÷ LoRA's"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for info in describe_methods():
        name = f"[{info.peft_type}]({info.paper})" if info.paper else info.peft_type
        method = METHODS[info.peft_type]
        kinds = {"model": "the model", "copies": "any module"}.get(method.scope, ", ".join(sorted(method.kinds)))
        figures = ["" if x is None else f"{x:.2f}" for x in (info.facts.accuracy, info.facts.time)]
        old = kept.get(info.peft_type, {})
        found = results.get(info.peft_type, {})
        cells = [cell(found.get(column, ())) or old.get(column, "") for column in COLUMNS]
        never = NEVER.get(method.scope, ())
        cells = ["–" if column in never else text for column, text in zip(COLUMNS, cells, strict=True)]
        rows = {"call": "yes", "put": "prepared", "no": "no"}[info.facts.rows]
        cells = [layers.get(info.peft_type, "–"), *cells, "yes" if info.facts.merges else "no", rows, *figures]
        lines.append(f"| {' | '.join([name, kinds, *cells])} |")
    passing = matching.passing_types().items()
    reasons = [f"{name} ({reason})" for name, reason in passing if reason != matching.NOT_YET]
    others = [name for name, reason in passing if reason == matching.NOT_YET]
    text = [f"Files of these types are read and written unchanged, but not applied: {', '.join(reasons)}."]
    text += [f"Not implemented, with the same effect: {', '.join(others)}."] if others else []
    return "\n".join([*lines, "", *text, ""])


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--junit", nargs="*", type=Path, help="JUnit files of runs of the suites, instead of new runs")
    options.add_argument("--keep", action="store_true", help="cells without results keep what the page has")
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = read_results(run_suites(Path(folder)) if given.junit is None else given.junit)
    page = PAGE.read_text()
    kept = read_cells(page) if given.keep else {}
    layers = {name: peft_layers(name) for name, method in METHODS.items() if method.scope == "site"}
    before, rest = page.split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{table(results, kept, layers)}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
