"""What the commands share: JSON and tables on standard output, bars on standard error."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import click

as_json = click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")


def print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))


def print_pairs(rows: Iterable[tuple[str, str]]) -> None:
    """Names and values, folded to the terminal."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, Text(value))
    Console().print(table)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[str] = ()) -> None:
    """A table, folded to the terminal; the columns called `numbers` are set to the right."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold", justify="right" if column in numbers else "left")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    Console().print(table)
