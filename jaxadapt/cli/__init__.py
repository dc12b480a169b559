"""The command line. A command is a file here, called as it is, that holds `command`; it imports what it needs when it
runs, so that those which need no JAX start without it.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import logging
import os
import sys
import warnings
from collections.abc import Generator
from typing import Any

import click

from jaxadapt import __version__
from jaxadapt.core.errors import AdapterError
from jaxadapt.core.terminal import escape_text

COMMANDS = (
    "demo",
    "inspect",
    "merge",
    "combine",
    "convert",
    "check-keymap",
    "push",
    "pull",
    "checkpoints",
    "families",
    "completion",
)
"""In the order of the help page."""

INTERRUPTED = 130


class _Commands(click.Group):
    """Errors the library raises on purpose become one readable message and exit status 1; Ctrl-C is 130."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        found: click.Command = importlib.import_module(f"{__name__}.{cmd_name.replace('-', '_')}").command
        return found

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        near = difflib.get_close_matches(args[0], COMMANDS, n=1)
        if near and args[0] not in COMMANDS:
            ctx.fail(f"No such command {args[0]!r}. Did you mean {near[0]!r}?")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        if os.environ.get("NO_COLOR"):
            ctx.color = False
        try:
            with warnings.catch_warnings(), _escaped_logs():
                warnings.showwarning = _warn
                return super().invoke(ctx)
        except AdapterError as error:
            click.secho(f"{type(error).__name__}: ", fg="red", bold=True, nl=False, err=True)
            click.echo(escape_text(str(error), keep="\n"), err=True)
            sys.exit(1)
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            sys.exit(INTERRUPTED)


def _warn(message: Warning | str, *where: Any) -> None:
    """A warning as a person reads it: not the line of source that it comes from."""
    click.secho("Warning: ", fg="yellow", bold=True, nl=False, err=True)
    click.echo(escape_text(str(message), keep="\n"), err=True)


class _Record(logging.LogRecord):
    """What is logged, as a terminal may show it, whoever logs it: huggingface_hub logs what a server says."""

    def getMessage(self) -> str:
        return escape_text(super().getMessage(), keep="\n")


@contextlib.contextmanager
def _escaped_logs() -> Generator[None]:
    before = logging.getLogRecordFactory()
    logging.setLogRecordFactory(_Record)
    try:
        yield
    finally:
        logging.setLogRecordFactory(before)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__)
@click.option("-v", "--verbose", is_flag=True, help="Say on standard error what is done (the logger `jaxadapt`).")
def main(verbose: bool) -> None:
    """Parameter-efficient fine-tuning for Flax whose adapters are PEFT's own files.

    \b
    Example:
      jaxadapt demo                      fine-tune a real language model here, now
      jaxadapt inspect out/              what an adapter is
      jaxadapt push out/ org/name        share it
      jaxadapt inspect hf://org/name     look at one of the Hub

    Wherever an adapter is read, a folder, hf://org/name@revision/subfolder (the Hugging Face Hub) and s3://… or gs://…
    (object stores) will do. `jaxadapt COMMAND --help` shows an example of each command.

    With --json a command prints its result as JSON on standard output, and nothing else there. The exit status is 0, or
    1 for an error that is explained on standard error, 2 for wrong usage, 130 after Ctrl-C.
    """
    if verbose:
        logging.basicConfig(format="%(message)s")
        logging.getLogger("jaxadapt").setLevel(logging.INFO)
