"""`jaxadapt repair`."""

from __future__ import annotations

import sys

import click

from jaxadapt.cli import output
from jaxadapt.cli.verify import print_finding


@click.command("repair", short_help="Write a repaired copy of an adapter.")
@click.argument("path", type=click.Path())
@click.option("--out", type=click.Path(), help="Folder to write to. Default: PATH with -repaired added.")
@click.option("--in-place", is_flag=True, help="Replace the adapter in PATH instead.")
@output.as_json
def command(path: str, out: str | None, in_place: bool, as_json: bool) -> None:
    """Repair the adapter in PATH where only one original is possible, and say what was done.

    Keys are renamed to PEFT's (_orig_mod., module. and .default. removed, base_model.model. added or written once),
    tensors that are stored twice with equal values are kept once, values of the configuration that PEFT refuses
    although they have one meaning are corrected, and a lost adapter_config.json is written again from the copy in the
    weights' header. The values of tensors never change. PATH is left as it is, unless --in-place is given.

    What cannot be repaired with certainty is listed, as by `jaxadapt verify`; the exit status is then 1 if it is an
    error.

    \b
    Example:
      jaxadapt repair out/                     writes out-repaired/
      jaxadapt repair out/ --out mended/
      jaxadapt repair out/ --in-place
    """
    from jaxadapt.persistence.repair_folder import repair

    if in_place and out is not None:
        raise click.UsageError("--in-place replaces PATH, and --out names another folder; give one of them")
    result = repair(path, path if in_place else out, progress=True)
    if as_json:
        output.print_json(result.to_dict())
    else:
        for line in result.done:
            output.print_line(f"repaired  {line}")
        for found in result.remaining:
            print_finding(found)
        text = "nothing to repair; no file written" if result.path is None else f"written to {result.path}"
        output.print_line(text)
    if any(found.severity == "error" for found in result.remaining):
        sys.exit(1)
