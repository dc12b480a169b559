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


def print_heat(
    title: str, rows: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[float | None]]
) -> None:
    """Numbers on shades of grey that follow them; as many columns side by side as fit."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from jaxadapt.norms import number_text

    console = Console()
    high = max((v for row in values for v in row if v is not None), default=0.0) or 1.0
    first = max(len("layer"), *map(len, rows)) + 1
    for begin, end in _portions([max(len(c), 6) + 1 for c in columns], console.width - first):
        table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold")
        table.add_column("layer", justify="right", no_wrap=True)
        for column in columns[begin:end]:
            table.add_column(column, justify="right", overflow="fold")
        for name, row in zip(rows, values, strict=True):
            cells = [Text(number_text(v), style=_shade(v, high)) for v in row[begin:end]]
            table.add_row(name, *cells)
        console.print(Text(title if begin == 0 else f"{title}, continued", style="bold"))
        console.print(table)


def _portions(widths: Sequence[int], room: int) -> Iterable[tuple[int, int]]:
    """Runs of columns that fit, at least one each."""
    begin, used = 0, 0
    for i, width in enumerate(widths):
        if i > begin and used + width > room:
            yield begin, i
            begin, used = i, 0
        used += width
    yield begin, len(widths)


def _shade(value: float | None, high: float) -> str:
    """From the colour of nothing (as the terminal is) to dark blue on which white is read."""
    if value is None:
        return ""
    share = max(0.0, min(1.0, value / high))
    red, green, blue = (round(a + share * (b - a)) for a, b in ((235, 8), (242, 48), (250, 107)))
    return f"{'white' if share > 0.5 else 'black'} on rgb({red},{green},{blue})"
