"""`jaxadapt pull`."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from jaxadapt.cli import output
from jaxadapt.core.errors import FileError
from jaxadapt.core.progress import escape_text
from jaxadapt.storage import location
from jaxadapt.storage.location import Location


@click.command("pull", short_help="Download an adapter from the Hugging Face Hub.")
@click.argument("repo")
@click.option("--out", type=click.Path(), help="Folder to copy the adapter into.")
@output.as_json
def command(repo: str, out: str | None, as_json: bool) -> None:
    """Download the adapter REPO (org/name[@revision][/subfolder]) from the Hugging Face Hub, without the other files of
    its repository.

    The command prints the adapter's folder: one in the Hub's cache, or the one given with --out. Files in the cache are
    not downloaded again; with HF_HUB_OFFLINE=1 they are used without a connection. A private repository needs a token,
    as for `jaxadapt push`.

    \b
    Example:
      jaxadapt pull org/name
      jaxadapt pull org/name@v1/fr --out fr/
      vllm serve BASE --enable-lora --lora-modules fr=$(jaxadapt pull org/name/fr)
    """
    from jaxadapt.storage.hub import pull

    folder: Location = pull(repo, progress=True)
    if out is not None:
        folder = _copy_adapter(folder, out)
    if as_json:
        output.print_json({"folder": str(folder)})
    else:
        # A program that reads the output needs the exact name of the folder.
        click.echo(escape_text(str(folder)) if sys.stdout.isatty() else folder)


def _copy_adapter(source: Path, target: str) -> Location:
    """Copy the adapter's files from `source` to `target`, all or none."""
    from jaxadapt.storage import atomic
    from jaxadapt.storage.hub import CARD, CONFIG, WEIGHTS

    out = location.to_location(target)
    weights = next(name for name in WEIGHTS if location.exists(source / name))
    stale = [name for name in WEIGHTS if name != weights and location.exists(out / name)]
    if stale:
        raise FileError(
            f"{out}: cannot write {weights} here, because the folder already contains {stale[0]} and a reader could "
            "load that file instead; choose another folder"
        )
    atomic.make_folder(out)
    # Replace the configuration right after the weights, as `folder.write` does.
    names = [name for name in (weights, CONFIG, CARD) if location.exists(source / name)]
    with atomic.lock_directory(out), atomic.replacing_all([out / name for name in names]) as writers:
        for name, writer in zip(names, writers, strict=True):
            writer.write(memoryview((source / name).read_bytes()))
    return out
