"""Measure the exported adapters in the programs and write the tables of docs/exports.md from the results.

    python -m tests.full.programs.table FOLDER                    # FOLDER: made by environments.py
    python -m tests.full.programs.table FOLDER vllm               # one program; the others' results stay
    python -m tests.full.programs.table FOLDER merged             # the merged models

The results are in results.json beside this file. Each program's are written as soon as they are there. The adapters are
the same in every run, because their random values come from a seed.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from tests.full.programs import measure

RESULTS = Path(__file__).with_name("results.json")
DOCS = Path(__file__).resolve().parents[3] / "docs" / "exports.md"
PROGRAMS = {"llama": "llama.cpp", "mlx": "mlx-lm", "vllm": "vLLM"}
MERGED = ["no adapter", "DoRA", "IA3", "copies of norms", "a copy of the embedding"]


def cell(value: float | str | None) -> str:
    """Show a difference, or that the export is refused, or that it was not run."""
    if value is None:
        return "not run"
    if not isinstance(value, float):
        return "refused"
    return f"{value:.2g}" if value == 0 or value >= 0.01 else f"{value:.0e}".replace("e-0", "e-")


def rows(results: measure.Results, columns: list[str]) -> list[str]:
    """Return the lines of a table."""
    lines = [f"| adapter | {' | '.join(PROGRAMS.get(c, c) for c in columns)} |", f"|---|{'---|' * len(columns)}"]
    for name, found in results.items():
        values = [f"{found[c]:.2g}" if c == "effect" else cell(found.get(c)) for c in columns]
        lines.append(f"| {name} | {' | '.join(values)} |")
    return lines


def replace(text: str, name: str, lines: list[str]) -> str:
    """Replace the table between the two comments of this name."""
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->\n"
    head, _, rest = text.partition(begin)
    assert rest, f"{DOCS}: no line {begin}"
    return head + begin + "\n".join(lines) + "\n" + end + rest.partition(end)[2]


def write() -> None:
    """Write the tables from the results."""
    found = json.loads(RESULTS.read_text())
    columns = [name for name in ("transformers", *PROGRAMS) if name in found["adapters"]["no adapter"]]
    text = DOCS.read_text(encoding="utf-8")
    text = replace(text, "exported adapters", rows(found["adapters"], ["effect", *columns]))
    text = replace(text, "merged models", rows(found["merged"], ["folder", "float32", "bfloat16", "float16", "q8_0"]))
    DOCS.write_text(text, encoding="utf-8")


def record(adapters: measure.Results, merged: measure.Results) -> None:
    """Add results to results.json, in place of older ones of the same case and program, and write the tables."""
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"adapters": {}, "merged": {}}
    for name, values in adapters.items():
        found["adapters"].setdefault(name, {}).update(values)
    found["merged"].update(merged)
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    write()


def main() -> None:
    programs, chosen = Path(sys.argv[1]), sys.argv[2:] or ["transformers", *PROGRAMS, "merged"]
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        base = measure.smollm2(work)
        wanted = measure.train(base, work, list(measure.CASES)) if chosen != ["merged"] else {}
        record(measure.effects(wanted), {})
        for program in chosen:
            if program == "merged":
                record({}, measure.measure_merged(base, programs, work, MERGED))
            else:
                found = measure.measure(base, programs, work, wanted, program)
                record({name: {program: value} for name, value in found.items()}, {})


if __name__ == "__main__":
    main()
