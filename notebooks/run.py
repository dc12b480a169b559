"""Run the notebooks as a newcomer does: in a new environment, from the first cell, which installs, to the last.

    python notebooks/run.py                  both, and what they show is thrown away
    python notebooks/run.py --fast           a few steps only
    python notebooks/run.py --keep NAME      what it shows is kept in NAME.ipynb

What the first cell asks for is found as pip is configured, but jaxadapt itself is this checkout, built as a wheel.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent
NAMES = [path.stem for path in sorted(HERE.glob("*.ipynb"))]

# In the new environment, where nbclient is; the notebook, where its outputs go, the working folder, whether it is fast.
INSIDE = """
import copy, sys, time
import nbformat
from nbclient import NotebookClient

source, out, folder, fast = sys.argv[1:]
book = nbformat.read(source, as_version=4)
metadata = copy.deepcopy(book.metadata)
for cell in book.cells:
    if fast and "parameters" in cell.metadata.get("tags", []):
        cell.source = cell.source.replace("FAST = False", "FAST = True")
began = time.monotonic()

def told(cell, cell_index, **_):
    print(f"{time.monotonic() - began:5.0f} s  cell {cell_index} of {len(book.cells)}", flush=True)

where = {"metadata": {"path": folder}}
NotebookClient(book, timeout=3600, kernel_name="python3", resources=where, on_cell_executed=told).execute()
for cell in book.cells:
    cell.metadata.pop("execution", None)
    if cell.cell_type == "code":
        cell.execution_count = None
        kept = [] if "install" in cell.metadata.get("tags", []) else cell.outputs
        cell.outputs = []
        for output in kept:
            if output.get("name") == "stderr" or "widget" in str(output.get("data", {}).keys()):
                continue
            if "execution_count" in output:
                output.execution_count = None
            if cell.outputs and output.output_type == cell.outputs[-1].output_type == "stream":
                cell.outputs[-1].text += output.text
            else:
                cell.outputs.append(output)
book.metadata = metadata
nbformat.write(book, out)
"""


def run(name: str, wheels: Path, fast: bool, keep: bool) -> None:
    with tempfile.TemporaryDirectory(prefix="jaxadapt-notebook-") as made:
        place = Path(made)
        venv.create(place / "env", with_pip=True)
        (place / "work").mkdir()
        python = place / "env" / "bin" / "python"
        env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "MPLBACKEND")}
        env |= {
            "PATH": f"{python.parent}{os.pathsep}{env['PATH']}",
            "PIP_FIND_LINKS": f"{env.get('PIP_FIND_LINKS', '')} {wheels}".strip(),
        }
        subprocess.run([python, "-m", "pip", "install", "-q", "ipykernel", "nbclient"], env=env, check=True)
        source = HERE / f"{name}.ipynb"
        out = source if keep else place / "out.ipynb"
        command = [python, "-c", INSIDE, source, out, place / "work", "fast" if fast else ""]
        subprocess.run(command, env=env, cwd=place, check=True)
        print(f"{name}: every cell runs", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="run the notebooks as a newcomer does, in a new environment")
    parser.add_argument("names", nargs="*", metavar="NAME", help=" or ".join(NAMES))
    parser.add_argument("--fast", action="store_true", help="a few steps only")
    parser.add_argument("--keep", action="store_true", help="keep what is shown, in the notebook")
    options = parser.parse_args()
    if options.fast and options.keep:
        parser.error("what a fast run shows is not worth keeping")
    if unknown := set(options.names) - set(NAMES):
        parser.error(f"no notebook is called {', '.join(unknown)}; there are {', '.join(NAMES)}")
    with tempfile.TemporaryDirectory(prefix="jaxadapt-wheel-") as wheels:
        command = [sys.executable, "-m", "build", "-q", "--wheel", "--outdir", wheels, str(HERE.parent)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        for name in options.names or NAMES:
            run(name, Path(wheels), options.fast, options.keep)


if __name__ == "__main__":
    main()
