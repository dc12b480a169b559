"""Run the notebooks as a new user does: in a new environment, from the first cell, which installs, to the last.

    python notebooks/run.py                  all of them; the outputs are not kept
    python notebooks/run.py --fast           a few steps only
    python notebooks/run.py --keep NAME      store the outputs in NAME.ipynb
    python notebooks/run.py --here NAME      in this environment, without the first cell
    python notebooks/run.py --jax 0.10.1     in an environment that has this JAX, which must stay

pip finds the packages of the first cell as it is configured, but jaxadapt itself is this checkout, built as a wheel.
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

# Runs in the environment of the notebook, which has nbclient. Arguments: the notebook, the file for its outputs, the
# working folder, the tag of cells to leave out, and whether it is fast.
INSIDE = """
import copy, sys, time
import nbformat
from nbclient import NotebookClient

source, out, folder, without, fast = sys.argv[1:]
book = nbformat.read(source, as_version=4)
kept = copy.deepcopy(book)
for cell in book.cells:
    if fast and "parameters" in cell.metadata.get("tags", []):
        cell.source = cell.source.replace("FAST = False", "FAST = True")
    if without in cell.metadata.get("tags", []):
        cell.source = ""
began = time.monotonic()

def report(cell, cell_index, **_):
    print(f"{time.monotonic() - began:5.0f} s  cell {cell_index} of {len(book.cells)}", flush=True)

where = {"metadata": {"path": folder}}
NotebookClient(book, timeout=3600, kernel_name="python3", resources=where, on_cell_executed=report).execute()
for cell, ran in zip(kept.cells, book.cells, strict=True):
    cell.metadata.pop("execution", None)
    if cell.cell_type == "code":
        cell.execution_count = None
        cell.outputs = []
        for output in [] if "install" in cell.metadata.get("tags", []) else ran.outputs:
            if output.get("name") == "stderr" or "widget" in str(output.get("data", {}).keys()):
                continue
            if "execution_count" in output:
                output.execution_count = None
            if cell.outputs and output.output_type == cell.outputs[-1].output_type == "stream":
                cell.outputs[-1].text += output.text
            else:
                cell.outputs.append(output)
nbformat.write(kept, out)
"""


def environment(python: Path, wheels: Path | None) -> dict[str, str]:
    """Return the variables of a process that installs from `wheels`, or that uses the packages of this environment."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "MPLBACKEND")}
    env["COLUMNS"] = "80"  # of the tables that commands print, as in the tests
    env["PATH"] = f"{python.parent}{os.pathsep}{env['PATH']}"
    if wheels is None:
        env["PYTHONPATH"] = str(HERE.parent)
    else:
        env["PIP_FIND_LINKS"] = f"{env.get('PIP_FIND_LINKS', '')} {wheels}".strip()
    return env


def run(name: str, wheels: Path | None, options: argparse.Namespace) -> None:
    """Run a notebook in a new environment, or in this one if there are no wheels."""
    with tempfile.TemporaryDirectory(prefix="jaxadapt-notebook-") as made:
        place = Path(made)
        (place / "work").mkdir()
        python = Path(sys.executable)
        if wheels is not None:
            venv.create(place / "env", with_pip=True)
            python = place / "env" / "bin" / "python"
        env = environment(python, wheels)
        if wheels is not None:
            first = ["ipykernel", "nbclient", *([f"jax=={options.jax}"] if options.jax else [])]
            subprocess.run([python, "-m", "pip", "install", "-q", *first], env=env, check=True)
        source = HERE / f"{name}.ipynb"
        out = source if options.keep else place / "out.ipynb"
        without = "" if wheels is not None else "install"
        command = [python, "-c", INSIDE, source, out, place / "work", without, "fast" if options.fast else ""]
        subprocess.run(command, env=env, cwd=place, check=True)
        if options.jax:
            show = [python, "-c", "import jax; print(jax.__version__)"]
            found = subprocess.run(show, env=env, cwd=place, check=True, capture_output=True, text=True).stdout.strip()
            if found != options.jax:
                sys.exit(f"{name}: the first cell replaced JAX {options.jax} by {found}")
        print(f"{name}: every cell runs", flush=True)


def main() -> None:
    """Run the notebooks that the command line names."""
    parser = argparse.ArgumentParser(description="run the notebooks as a new user does, in a new environment")
    parser.add_argument("names", nargs="*", metavar="NAME", help=" or ".join(NAMES))
    parser.add_argument("--fast", action="store_true", help="a few steps only")
    parser.add_argument("--keep", action="store_true", help="store the outputs in the notebook")
    parser.add_argument("--here", action="store_true", help="run in this environment, without the first cell")
    parser.add_argument("--jax", metavar="VERSION", help="install this JAX first; the notebook must keep it")
    options = parser.parse_args()
    if options.fast and options.keep:
        parser.error("a fast run's outputs cannot be kept: they are those of a few steps; leave out --fast or --keep")
    if options.here and options.jax:
        parser.error("--jax needs a new environment; leave out --here")
    if unknown := set(options.names) - set(NAMES):
        parser.error(f"no notebook is called {', '.join(unknown)}; there are {', '.join(NAMES)}")
    with tempfile.TemporaryDirectory(prefix="jaxadapt-wheel-") as wheels:
        if not options.here:
            command = [sys.executable, "-m", "build", "-q", "--wheel", "--outdir", wheels, str(HERE.parent)]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        for name in options.names or NAMES:
            run(name, None if options.here else Path(wheels), options)


if __name__ == "__main__":
    main()
