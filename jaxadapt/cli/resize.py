"""`jaxadapt resize`."""

from __future__ import annotations

import click

from jaxadapt.cli import output


@click.command("resize", short_help="Change the rank of a LoRA adapter.")
@click.argument("adapter", type=click.Path())
@click.option("--rank", required=True, type=click.IntRange(1), help="The new rank of every module.")
@click.option("--out", required=True, type=click.Path(), help="Folder to write, or a file for an image adapter.")
@output.dtype
@output.as_json
def command(adapter: str, rank: int, out: str, dtype: str | None, as_json: bool) -> None:
    """Write the LoRA adapter ADAPTER with another rank.

    A smaller rank keeps the best approximation of each change ΔW, and the command prints the largest error: the norm of
    the lost part, divided by the norm of ΔW. A larger rank changes nothing. The scale is multiplied into B, so that
    lora_alpha equals the rank, without patterns and rsLoRA. ADAPTER is a folder or an address, or the one file of an
    image adapter, which keeps its names if --out ends in .safetensors. An adapter at --out is not replaced.

    \b
    Example:
      jaxadapt resize out/ --rank 8 --out small/
      jaxadapt resize style.safetensors --rank 16 --out style-16.safetensors --dtype float16
    """
    from jaxadapt.export import adapter_files

    error = adapter_files.resize_files(adapter, rank, out, dtype=dtype, progress=True)
    worst = max(error, key=lambda name: error[name])
    output.print_result(
        as_json,
        {"path": out, "rank": rank, "error": error},
        [("written", out), ("rank", str(rank)), ("largest error", f"{error[worst]:.3g} in {worst}")],
    )
