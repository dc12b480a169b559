"""The command line.

Each file of this package holds the commands of one purpose: the command "check-keymap" is `check_keymap_command`. The
names of `jaxadapt` load on first use, and so do the other modules that commands use, which are listed here: a command
without JAX starts fast.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import logging
import os
import sys
import warnings
from typing import TYPE_CHECKING, Any

import click

import jaxadapt
from jaxadapt.core.errors import escape_text
from jaxadapt.core.lazy import LazyModule

# pyright: reportUnusedImport=false
# ruff: noqa: F401 (the files of commands import these)
if TYPE_CHECKING:
    from jaxadapt.analysis import changes, heat_maps
    from jaxadapt.configs import matching
    from jaxadapt.export import adapter_files, conversion, merge_files
    from jaxadapt.keymaps import check, families
    from jaxadapt.models import foreign, summary_table
    from jaxadapt.persistence import consumers, folder, run_folder
    from jaxadapt.storage import atomic, hf_model, orbax
else:  # Imported from here by the files of commands.
    globals().update(
        {
            name: LazyModule(f"jaxadapt.{package}.{name}")
            for package, names in (
                ("analysis", ("changes", "heat_maps")),
                ("configs", ("matching",)),
                ("export", ("adapter_files", "conversion", "merge_files")),
                ("keymaps", ("check", "families")),
                ("models", ("foreign", "summary_table")),
                ("persistence", ("consumers", "folder", "run_folder")),
                ("storage", ("atomic", "hf_model", "orbax")),
            )
            for name in names
        }
    )

GROUPS: dict[str, tuple[str, tuple[str, ...]]] = {
    "Look at an adapter": ("reports", ("inspect", "verify", "diff")),
    "Repair and change one": ("adapter_changes", ("repair", "resize", "rename", "undo-start", "convert", "extract")),
    "Merge and combine": ("adapter_changes", ("merge", "combine")),
    "Share": ("runs", ("export", "push", "pull")),
    "Train and serve": ("runs", ("demo", "checkpoints", "serve")),
    "Check a server": ("served", ("compare-logprobs",)),
    "Families and methods": ("reports", ("families", "check-keymap", "methods")),
    "The shell": ("reports", ("completion",)),
}
"""`{purpose: (file, its commands)}`, in the order of the help page."""
_FILES = {name: file for file, names in GROUPS.values() for name in names}
COMMANDS: tuple[str, ...] = tuple(_FILES)

INTERRUPTED = 130
_ERROR_STATUS = {"diff": 2, "compare-logprobs": 2}
"""{command: exit status after an error}, 1 by default. With 1 these two answer "no"."""


class _Commands(click.Group):
    """The command group: an `AdapterError` is printed as one message, with its exit status; Ctrl-C exits with 130."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        return vars(importlib.import_module(f"{__name__}.{_FILES[cmd_name]}"))[f"{cmd_name.replace('-', '_')}_command"]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands under the headings of their groups."""
        width = max(map(len, COMMANDS)) + 2
        for title, (_, names) in GROUPS.items():
            commands = [(name, self.get_command(ctx, name)) for name in names]
            rows = [
                (name.ljust(width - 2), command.get_short_help_str(formatter.width - width - 4))
                for name, command in commands
                if command is not None
            ]
            with formatter.section(title):
                formatter.write_dl(rows)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        matches = difflib.get_close_matches(args[0], COMMANDS, n=1)
        if matches and args[0] not in COMMANDS:
            ctx.fail(f"No such command {args[0]!r}. Did you mean {matches[0]!r}?")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        if os.environ.get("NO_COLOR"):
            ctx.color = False
        try:
            with warnings.catch_warnings(), contextlib.ExitStack() as stack:
                warnings.showwarning = _print_warning
                stack.callback(logging.setLogRecordFactory, logging.getLogRecordFactory())
                logging.setLogRecordFactory(_EscapedRecord)
                return super().invoke(ctx)
        except jaxadapt.AdapterError as error:
            click.secho(f"{type(error).__name__}: ", fg="red", bold=True, nl=False, err=True)
            click.echo(escape_text(str(error), keep="\n"), err=True)
            sys.exit(_ERROR_STATUS.get(ctx.invoked_subcommand or "", 1))
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            sys.exit(INTERRUPTED)


def _print_warning(message: Warning | str, *location: Any) -> None:
    """Print a warning without the line of source code that raised it."""
    click.secho("Warning: ", fg="yellow", bold=True, nl=False, err=True)
    click.echo(escape_text(str(message), keep="\n"), err=True)


class _EscapedRecord(logging.LogRecord):
    """A log record with control characters escaped: huggingface_hub logs text that a server sent."""

    def getMessage(self) -> str:
        return escape_text(super().getMessage(), keep="\n")


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(jaxadapt.__version__)
@click.option(
    "-v", "--verbose", is_flag=True, help="Print progress messages (the logger `jaxadapt`) to standard error."
)
def main(verbose: bool) -> None:
    """Parameter-efficient fine-tuning for Flax, with adapters stored in PEFT's file format.

    \b
    Example:
      jaxadapt demo                      fine-tune a real language model on this machine
      jaxadapt inspect out/              show an adapter's settings, targets and size
      jaxadapt verify out/               find the problems of an adapter
      jaxadapt push out/ org/name        upload it to the Hugging Face Hub
      jaxadapt inspect hf://org/name     show an adapter of the Hub

    An adapter to read is a local folder, an address of the Hugging Face Hub (hf://org/name@revision/subfolder) or one
    of an object store (s3://…, gs://…). `jaxadapt COMMAND --help` explains a command and gives an example.

    With --json, a command prints its result as JSON to standard output and nothing else. The exit status is 0 on
    success, 1 for an error (2 of `diff` and `compare-logprobs`), which standard error explains, 2 for wrong usage, and
    130 after Ctrl-C.
    """
    # It logs the traceback of an error that the command then tells.
    logging.getLogger("gcsfs").setLevel(logging.NOTSET if verbose else logging.CRITICAL)
    client = logging.getLogger("huggingface_hub.utils._http")
    if verbose:
        client.removeFilter(_is_no_retry)
        logging.basicConfig(format="%(message)s")
        logging.getLogger("jaxadapt").setLevel(logging.INFO)
    else:
        client.addFilter(_is_no_retry)


def _is_no_retry(record: logging.LogRecord) -> bool:
    """Return False for the Hub client's messages about each of its attempts: the error at the end says what failed."""
    return not any(words in record.getMessage() for words in ("Retrying in", "thrown while requesting"))
