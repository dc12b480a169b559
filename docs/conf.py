"""Sphinx's settings: `python -m sphinx -W -n docs out/site` builds the site, without a network.

The API pages are the docstrings of the public names (`api/`), `inventories.py` has the addresses of other libraries'
names, and the tutorials are the notebooks with their stored outputs.
"""

import re
import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.ext.napoleon import Config, GoogleDocstring

import jaxadapt

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
import inventories  # noqa: E402

project, author = "jaxadapt", "The jaxadapt authors"
project_copyright = author
version = release = jaxadapt.__version__
extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "myst_nb",
    "sphinx_copybutton",
    "sphinx_click",
    "sphinx_design",
    "sphinx_llm.txt",
]
llms_txt_description = (
    "jaxadapt fine-tunes JAX models (Flax, Equinox, any pytree) with adapters whose files are those of PyTorch's PEFT."
)
html_extra_path = ["concepts.svg"]  # where the Markdown twin of the page looks for it
html_theme, html_title, html_favicon = "furo", f"jaxadapt {version}", "icon.svg"
templates_path, html_static_path = ["_templates"], ["_static"]
html_css_files, html_js_files = ["site.css", "versions.css"], [("versions.js", {"defer": "defer"})]
html_sidebars = {
    "**": [
        f"sidebar/{part}.html"
        for part in ("brand", "versions", "search", "scroll-start", "navigation", "scroll-end", "variant-selector")
    ]
}
smartquotes = False
nb_execution_mode = "off"  # the tests run them
(HERE / "tutorials").mkdir(exist_ok=True)
for notebook in (HERE.parent / "notebooks").glob("*.ipynb"):
    text = notebook.read_bytes().replace(b"../docs/", b"../")
    text = re.sub(rb"!\[Open in Colab\]\(\S+?\)", b"Open in Colab", text)  # a page loads no picture from elsewhere
    inventories.write_file(HERE / "tutorials" / notebook.name, text)
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
intersphinx_mapping = inventories.write(HERE / "tutorials" / "inventories")
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
SECTIONS = Config()
# Names in annotations that have no page: the package's inner ones, type variables, and pieces of a nested type.
nitpick_ignore_regex = [
    ("py:.*", r"jaxadapt\.(adapters|arrays|configs|core|keymaps|persistence|storage|models\.\w+)\..*"),
    ("py:class", r"(.*\.)?(factors\.Plain|_Cell)|.*\[str"),
]


def _convert_docstring(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Convert a docstring to reStructuredText: Markdown's code and tables, and Google's sections."""
    text = re.sub(r"(?<![`:])`([^`]+)`(?!`)(\w?)", _convert_code, "\n".join(lines))
    text = re.sub(r"(?m)(?:^ *\|.*\|$\n?)+", _convert_table, text)
    text = re.sub(r"(?m)^Attributes:$", "Args:", text)
    # Several names before one text: Sphinx takes all but the last for a type, unless no space separates them.
    text = re.sub(r"(?m)^    [a-z]\w*(?:,\s+\w+)+(?=: )", lambda m: re.sub(r",\s+", ",\u200b", m[0]), text)
    # The first line of a property is no "type: text".
    own = what in ("attribute", "property")
    lines[:] = text.split("\n") if own else str(GoogleDocstring(text, SECTIONS, app, what, name, obj)).split("\n")


def _convert_code(found: re.Match[str]) -> str:
    code, follows = found.groups()
    return f"``{' '.join(code.split())}``" + (f"\\ {follows}" if follows else "")


def _convert_table(found: re.Match[str]) -> str:
    head, _, *rows = (line.strip()[1:-1].split("|") for line in found[0].rstrip().splitlines())
    cells = "".join(
        f"   {'- ' if n else '* - '}{cell.strip()}\n" for row in (head, *rows) for n, cell in enumerate(row)
    )
    return f"\n.. list-table::\n   :header-rows: 1\n\n{cells.replace('   - ', '     - ')}\n"


def _convert_help(app: Any, context: Any, lines: list[str]) -> None:
    """Make the examples of a command's help literal, and names that end with an underscore no references."""
    text = re.sub(r"(?<=\w)_(?!\w)", r"\\_", "\n".join(lines))
    block = r"(?m)(?:^\|.*$\n?)+"
    lines[:] = re.sub(
        block, lambda m: ".. code-block:: text\n\n" + re.sub(r"(?m)^\| ?", "   ", m[0]) + "\n", text
    ).split("\n")


def setup(app: Any) -> None:
    """Connect the conversion of docstrings."""
    app.connect("autodoc-process-docstring", _convert_docstring)
    for part in ("description", "options"):
        app.connect(f"sphinx-click-process-{part}", _convert_help)
    # The star before keyword-only parameters, which the Markdown twins' builder does not know.
    app.add_node(nodes.abbreviation, override=True, markdown=(lambda *_: None, lambda *_: None))
