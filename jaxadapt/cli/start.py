"""`jaxadapt start`."""

from __future__ import annotations

import click

from jaxadapt.cli import output


@click.command("start", short_help="Undo the change of the base by PiSSA, OLoRA and others.")
@click.argument("adapter", type=click.Path())
@click.option("--undo", "first", required=True, type=click.Path(), help="The adapter as it was before the training.")
@click.option("--out", required=True, type=click.Path(), help="Folder to write.")
@output.as_json
def command(adapter: str, first: str, out: str, as_json: bool) -> None:
    """Write the trained ADAPTER as a plain LoRA for the original base.

    PiSSA, OLoRA, CorDA and others move a part of each base weight into the adapter, and train it beside the changed
    base. Programs that serve adapters know only the original base. The result is exact and has twice the rank: its
    product B·A is the trained product minus the initial one. `jaxadapt resize` reduces the rank.

    \b
    Example:
      jaxadapt start out/ --undo before-training/ --out plain/
    """
    from jaxadapt.export import adapter_files

    result = adapter_files.undo_start(adapter, first, out, progress=True)
    rank = result.config.get("r")
    output.print_result(
        as_json,
        {"path": out, "rank": rank, "lora_alpha": result.config.get("lora_alpha")},
        [("written", out), ("rank", str(rank))],
    )
