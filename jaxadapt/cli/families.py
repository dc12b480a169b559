"""`jaxadapt families`."""

from __future__ import annotations

import click

from jaxadapt.cli import shown


@click.command("families")
@click.argument("name", required=False)
@shown.as_json
def command(name: str | None, as_json: bool) -> None:
    """List the model families whose weights have known names, or the lines of one.

    \b
    Example:
      jaxadapt families
      jaxadapt families llama
    """
    from jaxadapt.families import FAMILIES, named

    if name is None:
        tables = list(FAMILIES.values())
        if as_json:
            shown.print_json([{"name": t.name, "lines": len(t.weights), "proved": t.proved} for t in tables])
        else:
            rows = [(t.name, str(len(t.weights)), "yes" if t.proved else "no") for t in tables]
            shown.print_table(("family", "lines", "proved"), rows, numbers=("lines",))
        return
    table = named(name)
    if as_json:
        shown.print_json([{"leaf": w.leaf, "key": w.key, "pattern": w.pattern} for w in table.weights])
    else:
        shown.print_table(("leaf", "PyTorch's key", "pattern"), [(w.leaf, w.key, w.pattern) for w in table.weights])
