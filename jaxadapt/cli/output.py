"""What the commands share: JSON and tables on standard output, bars on standard error."""

from __future__ import annotations

import json
import math
import os
import sys
import textwrap
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, cast

import click

from jaxadapt.core.terminal import escape_text

if TYPE_CHECKING:
    from rich.console import Console

as_json = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")


_PIPE = 4096
"""Columns where no terminal is: a line is a line, for grep and files. COLUMNS says otherwise."""


def _console() -> Console:
    from rich.console import Console

    seen = sys.stdout.isatty() or os.environ.get("COLUMNS", "").isdecimal()
    return Console() if seen else Console(width=_PIPE)


def _print(console: Console, *what: Any) -> None:
    """Without the blanks that rich fills lines up with."""
    with console.capture() as made:
        for one in what:
            console.print(one)
    click.echo("\n".join(line.rstrip() for line in made.get().splitlines()))


def print_json(value: Any) -> None:
    text = json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False)
    if not text.isprintable():  # what JSON lets stand and a terminal obeys is written as JSON escapes
        text = "".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text)
    click.echo(text)


def print_line(text: str) -> None:
    """A line, never folded: it is copied."""
    click.echo(escape_text(text))


def _finite(value: Any) -> Any:
    """The value with null for numbers that JSON does not have: the loss of a run that went astray, say."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in cast("dict[str, Any]", value).items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in cast("list[Any]", value)]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_pairs(rows: Iterable[tuple[str, str]]) -> None:
    """Names and values, folded to the terminal."""
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(Text(escape_text(name)), Text(escape_text(value)))
    _print(_console(), table)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[str] = ()) -> None:
    """A table, folded to the terminal, names at their dots; the columns called `numbers` are set to the right."""
    from rich.table import Table
    from rich.text import Text

    console = _console()
    numbers = [escape_text(name) for name in numbers]
    columns, *rows = [tuple(map(escape_text, row)) for row in (columns, *rows)]
    natural = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
    widths = _widths(natural, console.width - 2 * (len(columns) - 1))
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    for column, width in zip(columns, widths, strict=True):
        table.add_column(Text(column), overflow="fold", width=width, justify="right" if column in numbers else "left")
    for row in rows:
        table.add_row(*(Text(_folded(cell, width)) for cell, width in zip(row, widths, strict=True)))
    _print(console, table)


def _widths(natural: Sequence[int], room: int) -> list[int]:
    """What each column gets: the narrow ones all they want, the others alike."""
    out = list(natural)
    open_ = sorted(range(len(out)), key=lambda i: natural[i])
    while open_:
        i, share = open_.pop(0), max(1, room // (len(open_) + 1))
        out[i] = min(natural[i], share)
        room -= out[i]
    return out


def _folded(text: str, width: int) -> str:
    """
    >>> _folded("model.layers.{l}.q_proj.weight", 24)
    'model.layers.{l}.q_proj.\\nweight'
    """
    lines: list[str] = []
    while len(text) > width and (at := text.rfind(".", 1, width)) > 0 and " " not in text[:width]:
        lines.append(text[: at + 1])
        text = text[at + 1 :]
    return "\n".join([*lines, text])


def print_list(title: str, items: Sequence[str], most: int | None = None) -> None:
    """A title with their number, and the first items, each on a line of its own."""
    _print_title(f"{title}: {len(items)}")
    for item in items[:most]:
        click.echo(_indented(item))
    if most is not None and len(items) > most:
        click.echo(_indented(f"… and {len(items) - most} more (--json lists all)"))


def print_words(title: str, words: Iterable[str]) -> None:
    """A title, and words as running text."""
    _print_title(title)
    click.echo(_indented(", ".join(words)))


def _print_title(text: str) -> None:
    click.echo()
    click.secho(_indented(text, ""), bold=True)


def _indented(text: str, by: str = "  ") -> str:
    return textwrap.fill(
        escape_text(text), _console().width, initial_indent=by, subsequent_indent=by, break_on_hyphens=False
    )


def print_heat(
    title: str, rows: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[float | None]]
) -> None:
    """Numbers on shades of grey that follow them; as many columns side by side as fit."""
    from rich.table import Table
    from rich.text import Text

    from jaxadapt.analysis.norms import number_text

    console = _console()
    title, rows, columns = escape_text(title), [*map(escape_text, rows)], [*map(escape_text, columns)]
    high = max((v for row in values for v in row if v is not None and math.isfinite(v)), default=0.0) or 1.0
    first = max(len("layer"), *map(len, rows)) + 1
    for begin, end in _portions([max(len(c), 6) + 1 for c in columns], console.width - first):
        table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold")
        table.add_column("layer", justify="right", no_wrap=True)
        for column in columns[begin:end]:
            table.add_column(Text(column), justify="right", overflow="fold")
        for name, row in zip(rows, values, strict=True):
            cells = [Text(number_text(v), style=_shade(v, high)) for v in row[begin:end]]
            table.add_row(Text(name), *cells)
        _print(console, Text(title if begin == 0 else f"{title}, continued", style="bold"), table)


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
    """From nearly white to dark blue, with ink that is read on it (a terminal's own "white" is grey)."""
    if value is None or not math.isfinite(value):
        return ""
    share = max(0.0, min(1.0, value / high))
    red, green, blue = (round(a + share * (b - a)) for a, b in ((235, 8), (242, 48), (250, 107)))
    ink = "rgb(255,255,255)" if share > 0.65 else "rgb(0,0,0)"
    return f"{ink} on rgb({red},{green},{blue})"
