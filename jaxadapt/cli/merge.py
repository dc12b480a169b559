"""`jaxadapt merge`."""

from __future__ import annotations

import click

from jaxadapt.cli import output


@click.command("merge", short_help="Write a model with an adapter merged into it.")
@click.argument("base", type=click.Path())
@click.argument("adapter", type=click.Path())
@click.option("--out", required=True, type=click.Path(), help="Folder for the merged model.")
@click.option(
    "--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="Of the result; by default as the base."
)
@click.option("--allow-nan", is_flag=True, help="Merge also where a tensor holds a NaN or an infinity.")
@output.as_json
def command(base: str, adapter: str, out: str, dtype: str | None, allow_nan: bool, as_json: bool) -> None:
    """Write a model with an ADAPTER merged into its weights.

    BASE is the folder of a Hugging Face model (config.json, model.safetensors, …), ADAPTER the folder of an adapter for
    it, or its address. The result is a folder like BASE, tokenizer included, for programs that know no adapters. One
    tensor is held in memory at a time. A head that is the table of tokens itself gets a tensor of its own where ADAPTER
    changes one of them alone.

    \b
    Example:
      jaxadapt merge SmolLM2-135M/ out/ --out merged/
      jaxadapt merge SmolLM2-135M/ hf://org/name --out merged/ --dtype bfloat16
    """
    from jaxadapt.export import merge_files

    count = merge_files.merge_folder(base, adapter, out, dtype=dtype, allow_nan=allow_nan, progress=True)
    if as_json:
        output.print_json({"folder": out, "changed": count})
    else:
        output.print_pairs([("folder", out), ("changed", f"{count} weights")])
