"""`jaxadapt pull`."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from jaxadapt.cli import output
from jaxadapt.core.errors import FileError
from jaxadapt.core.terminal import escape_text
from jaxadapt.storage import location
from jaxadapt.storage.location import Place


@click.command("pull", short_help="Fetch an adapter from the Hugging Face Hub.")
@click.argument("repo")
@click.option("--revision", help="Branch, tag or commit; by default main.")
@click.option("--subfolder", help="Folder in the repository, where several adapters share one.")
@click.option("--out", type=click.Path(), help="Folder to copy the adapter into.")
@output.as_json
def command(repo: str, revision: str | None, subfolder: str | None, out: str | None, as_json: bool) -> None:
    """Fetch the adapter REPO (org/name) from the Hugging Face Hub, and nothing else of its repository.

    Prints the folder it is in: that of the cache, or the one given with --out. What is in the cache is not fetched
    again, and HF_HUB_OFFLINE=1 takes it from there without asking. Private repositories need a token, as with push.

    \b
    Example:
      jaxadapt pull org/name
      jaxadapt pull org/name@v1/fr --out fr/
      vllm serve BASE --enable-lora --lora-modules fr=$(jaxadapt pull org/name/fr)
    """
    from jaxadapt.storage.hub import pull

    folder: Place = pull(repo, revision=revision, subfolder=subfolder, progress=True)
    if out is not None:
        folder = _copied(folder, out)
    if as_json:
        output.print_json({"folder": str(folder)})
    else:
        # A program that asks for the folder gets its exact name.
        click.echo(escape_text(str(folder)) if sys.stdout.isatty() else folder)


def _copied(source: Path, target: str) -> Place:
    from jaxadapt.persistence import folder
    from jaxadapt.storage import atomic
    from jaxadapt.storage.hub import CARD, CONFIG, WEIGHTS

    out = location.to_location(target)
    weights = next(name for name in WEIGHTS if location.exists(source / name))
    other = [name for name in WEIGHTS if name != weights and location.exists(out / name)]
    if other:
        raise FileError(f"{out}: holds {other[0]}, which readers could take for what is pulled; choose another folder")
    folder.make_folder(out)
    # The configuration takes its place right after the weights, as in `folder.write`.
    names = [name for name in (weights, CONFIG, CARD) if location.exists(source / name)]
    with atomic.lock_directory(out), atomic.replacing_all([out / name for name in names]) as writers:
        for name, writer in zip(names, writers, strict=True):
            writer.write(memoryview((source / name).read_bytes()))
    return out
