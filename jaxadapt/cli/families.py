"""`jaxadapt families`."""

from __future__ import annotations

import click

from jaxadapt.cli import output


@click.command("families", short_help="List the model families that are known.")
@click.argument("name", required=False)
@output.as_json
def command(name: str | None, as_json: bool) -> None:
    """List the model families whose weights have known names, or the table of the one called NAME.

    The names are what keymap=, `jaxadapt convert` and `jaxadapt check-keymap` take; /scan0, /scan1, … behind one is for
    layers stacked on that axis. A table has a line for each kind of weight, and is proved if it maps the weights
    of the real model both ways, bit for bit.

    \b
    Example:
      jaxadapt families
      jaxadapt families llama
    """
    from jaxadapt.keymaps.families import FAMILIES, get_family

    if name is None:
        tables = list(FAMILIES.values())
        if as_json:
            output.print_json([{"name": t.name, "lines": len(t.weights), "proved": t.proved} for t in tables])
        else:
            rows = [(t.name, str(len(t.weights)), "yes" if t.proved else "no") for t in tables]
            output.print_table(("family", "lines", "proved"), rows, numbers=("lines",))
        return
    table = get_family(name)
    if as_json:
        output.print_json([{"leaf": w.leaf, "key": w.key, "pattern": w.pattern} for w in table.weights])
    else:
        output.print_table(("leaf", "PyTorch's key", "pattern"), [(w.leaf, w.key, w.pattern) for w in table.weights])
