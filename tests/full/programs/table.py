"""Measure the exported adapters in the programs and write the tables into docs/files.md.

python -m tests.full.programs.table FOLDER              # FOLDER: made by environments.py
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from tests.full.programs import measure

DOCS = Path(__file__).resolve().parents[3] / "docs" / "files.md"
PROGRAMS = {"llama": "llama.cpp", "mlx": "mlx-lm", "transformers": "transformers", "vllm": "vLLM"}
MERGED = ["DoRA", "IA3", "copies of norms", "a copy of the embedding"]


def cell(value: float | str) -> str:
    """Show a difference, or that the export is refused."""
    return f"{value:.0e}".replace("e-0", "e-") if isinstance(value, float) else "refused"


def rows(results: measure.Results, columns: list[str]) -> list[str]:
    lines = [f"| adapter | {' | '.join(PROGRAMS.get(c, c) for c in columns)} |", f"|---|{'---|' * len(columns)}"]
    for name, found in results.items():
        values = [f"{found[c]:.2g}" if c == "effect" else cell(found[c]) for c in columns]
        lines.append(f"| {name} | {' | '.join(values)} |")
    return lines


def replace(text: str, name: str, lines: list[str]) -> str:
    """Replace the table between the two comments of this name."""
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->\n"
    head, _, rest = text.partition(begin)
    assert rest, f"{DOCS}: no line {begin}"
    return head + begin + "\n".join(lines) + "\n" + end + rest.partition(end)[2]


def main() -> None:
    programs = Path(sys.argv[1])
    chosen = [name for name in ("llama", "mlx", "vllm") if (programs / name).exists()]
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        base = measure.smollm2(work)
        results = measure.measure(base, programs, work, list(measure.CASES), chosen)
        merged = measure.measure_merged(base, programs, work, MERGED)
    print(json.dumps({"adapters": results, "merged": merged}, indent=1))
    text = DOCS.read_text(encoding="utf-8")
    text = replace(text, "exported adapters", rows(results, ["effect", "transformers", *chosen]))
    text = replace(text, "merged models", rows(merged, ["folder", "float32", "bfloat16", "float16", "q8_0"]))
    DOCS.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
