"""Give each notebook the cells of its Markdown: people edit NAME.md, and NAME.ipynb has the outputs beside the cells.

    python notebooks/pairs.py                # after a change of NAME.md
    python notebooks/run.py --keep NAME      # then: run it, and store its outputs

An output stays as long as its cell is the same. The badge that opens a notebook in Colab follows from `Repository` in
pyproject.toml's `[project.urls]`. Without this address there is no badge.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import jupytext
from jupytext.combine import combine_inputs_with_outputs

HERE = Path(__file__).resolve().parent
FORMAT = "md:myst"
BADGE = re.compile(r"(?m)^\[!\[Open in Colab\].*\n\n")
METADATA = {
    "accelerator": "GPU",
    "colab": {"provenance": [], "toc_visible": True},
    "jupytext": {
        "formats": f"ipynb,{FORMAT}",
        "notebook_metadata_filter": "-jupytext.text_representation.jupytext_version",
    },
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def repository() -> str | None:
    """Return the address of the repository on GitHub, or None if pyproject.toml does not state it."""
    project = tomllib.loads((HERE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return project.get("urls", {}).get("Repository")


def with_badge(text: str, name: str, address: str | None) -> str:
    """Return a notebook's Markdown with the badge under its title, or without a badge if there is no address."""
    text = BADGE.sub("", text)
    if address is None:
        return text
    place = address.rstrip("/").removesuffix(".git").replace("https://github.com/", "")
    colab = "https://colab.research.google.com"
    badge = (
        f"[![Open in Colab]({colab}/assets/colab-badge.svg)]({colab}/github/{place}/blob/main/notebooks/{name}.ipynb)"
    )
    return re.sub(r"(?m)^# .+\n\n", lambda title: f"{title[0]}{badge}\n\n", text, count=1)


def markdown(book: Any) -> str:
    """Return the Markdown of a notebook."""
    return jupytext.writes(book, fmt=FORMAT)


def paired(text: str, old: Any | None) -> Any:
    """Return the notebook of a Markdown text. Cells that did not change since `old` keep their outputs."""
    book = jupytext.reads(text, fmt=FORMAT)
    if old is not None:
        kept = {cell.source for cell in old.cells}
        book = combine_inputs_with_outputs(book, old, fmt=FORMAT)
        for cell in book.cells:
            if cell.cell_type == "code" and cell.source not in kept:
                cell.outputs = []
    book.metadata = METADATA
    book.nbformat, book.nbformat_minor = 4, 5
    return book


def main() -> None:
    """Write every notebook and its badge."""
    for path in sorted(HERE.glob("*.md")):
        text = with_badge(path.read_text(encoding="utf-8"), path.stem, repository())
        notebook = path.with_suffix(".ipynb")
        book = paired(text, jupytext.read(notebook) if notebook.exists() else None)
        jupytext.write(book, notebook, fmt="ipynb")
        path.write_text(markdown(book), encoding="utf-8")
        print(f"{path.stem}: {len(book.cells)} cells")


if __name__ == "__main__":
    main()
