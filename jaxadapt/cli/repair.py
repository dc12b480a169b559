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

    \b
    The command
      - renames keys to PEFT's: removes _orig_mod., module. and .default., and writes base_model.model. once;
      - keeps one of two tensors with equal values under one name;
      - corrects what PEFT refuses in the configuration (a value, a trailing comma, a byte order mark), if it has only
        one meaning;
      - writes a lost adapter_config.json from the copy in the weights' header.

    The values of tensors never change. The files in PATH do not change either, unless --in-place is given.

    The command lists all other problems, as `jaxadapt verify` does. The exit status is 1 if one of them is an error.

    \b
    Example:
      jaxadapt repair out/                     writes out-repaired/
      jaxadapt repair out/ --out repaired/
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
