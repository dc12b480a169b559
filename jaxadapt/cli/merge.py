"""`jaxadapt merge`."""

from __future__ import annotations

import click

from jaxadapt.cli import shown


@click.command("merge")
@click.argument("base", type=click.Path())
@click.argument("adapter", type=click.Path())
@click.option("--out", required=True, type=click.Path(), help="Folder for the merged model.")
@click.option(
    "--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="Of the tensors; the base's by default."
)
@shown.as_json
def command(base: str, adapter: str, out: str, dtype: str | None, as_json: bool) -> None:
    """Write a model with an ADAPTER merged into its weights.

    BASE is the folder of a Hugging Face model, ADAPTER one of an adapter or an address of the Hub. The
    result is a model like the base, for programs that know no adapters.

    \b
    Example:
      jaxadapt merge SmolLM2-135M/ out/ --out merged/
      jaxadapt merge SmolLM2-135M/ hf://org/name --out merged/ --dtype bfloat16
    """
    from jaxadapt import on_disk

    count = on_disk.merge(base, adapter, out, dtype=dtype, progress=True)
    if as_json:
        shown.print_json({"folder": out, "changed": count})
    else:
        shown.print_pairs([("folder", out), ("changed", f"{count} weights")])
