"""`jaxadapt families`."""

from __future__ import annotations

import click

from jaxadapt.cli import output


@click.command("families", short_help="List the known model families.")
@click.argument("name", required=False)
@output.as_json
def command(name: str | None, as_json: bool) -> None:
    """List the known model families, or the keymap of the family NAME.

    A keymap has one entry for each kind of weight: the parameter's path in JAX, its key in PyTorch, and a pattern that
    relates their axes. It is "proved" if a test maps the weights of a real model in both directions, bit for bit.

    A family's name is the value of keymap= in Python, of `jaxadapt convert --to` and of `jaxadapt check-keymap`. Append
    /scan0, /scan1, … if the model stacks its layers along that axis.

    \b
    Example:
      jaxadapt families
      jaxadapt families llama
      jaxadapt families llama/scan0 --json
    """
    from jaxadapt.keymaps.families import FAMILIES, get_family

    if name is None:
        keymaps = list(FAMILIES.values())
        if as_json:
            output.print_json([{"name": k.name, "lines": len(k.weights), "proved": k.proved} for k in keymaps])
        else:
            rows = [(k.name, str(len(k.weights)), "yes" if k.proved else "no") for k in keymaps]
            output.print_table(("family", "entries", "proved"), rows, numbers=("entries",))
        return
    keymap = get_family(name)
    if as_json:
        output.print_json([{"leaf": w.leaf, "key": w.key, "pattern": w.pattern} for w in keymap.weights])
    else:
        output.print_table(("leaf", "PyTorch key", "pattern"), [(w.leaf, w.key, w.pattern) for w in keymap.weights])
