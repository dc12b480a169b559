"""Options of several commands, and the printing of JSON, tables and lists on standard output."""

from __future__ import annotations

import json
import math
import os
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import click

from jaxadapt.cli import changes
from jaxadapt.core.errors import escape_text

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

as_json: Callable[[Any], Any] = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
dtype: Callable[[Any], Any] = click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"]),
    help="Dtype of the result's tensors. Default: the adapter's.",
)


class Integer(click.IntRange):
    """An integer in a range. For a text without a number, click's own class says "not a valid integer range"."""

    name = "integer"


def completed(values: Callable[[], Iterable[str]]) -> Callable[..., list[str]]:
    """Return a callback of click that completes a text to one of `values()`, which is called for this alone."""
    return lambda ctx, param, start: [value for value in values() if value.startswith(start)]


def named_values(form: str, convert: Callable[[str], Any], value: str = "(?s:.*)") -> Callable[..., dict[str, Any]]:
    """Return a callback of click that reads the texts NAME=VALUE of an option as `{name: convert(value)}`.

    Args:
        form: what to expect, for errors.
        value: a regular expression that each VALUE matches.
    """

    def parse(ctx: click.Context, param: click.Parameter, texts: tuple[str, ...]) -> dict[str, Any]:
        matches = {text: re.fullmatch(f"([^=]+)=({value})", text) for text in texts}
        if wrong := [text for text, match in matches.items() if match is None]:
            raise click.BadParameter(f"expected {form}, found {wrong[0]!r}")
        return {match[1]: convert(match[2]) for match in matches.values() if match}

    return parse


_PIPE_WIDTH = 4096
"""Width without a terminal, unless COLUMNS is set: lines are not folded, so that grep finds whole lines."""


def _console() -> Console:
    from rich.console import Console

    has_width = sys.stdout.isatty() or os.environ.get("COLUMNS", "").isdecimal()
    return Console(width=None if has_width else _PIPE_WIDTH, markup=False, emoji=False, highlight=False)


def _print(console: Console, *renderables: Any) -> None:
    """Print rich objects without the spaces that rich appends to each line."""
    with console.capture() as capture:
        for renderable in renderables:
            console.print(renderable)
    click.echo("\n".join(line.rstrip() for line in capture.get().splitlines()))


def print_json(value: Any) -> None:
    """Print a value as JSON, with control characters escaped."""
    finite = json.loads(json.dumps(value), parse_constant=lambda _: None)  # JSON has no NaN and no infinity
    text = json.dumps(finite, indent=2, ensure_ascii=False)
    # JSON allows some control characters that a terminal would obey.
    click.echo("".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text))


def print_result(as_json: bool, value: Any, shown: Iterable[tuple[str, str | None]] | Callable[[], object]) -> None:
    """Print the result of a command: the value as JSON, or names and values, or what `shown` prints."""
    if as_json:
        print_json(value)
    elif callable(shown):
        shown()
    else:
        print_pairs(shown)


def print_lines(*lines: str) -> None:
    """Print lines without folding them, so that they can be copied."""
    for line in lines:
        click.echo(escape_text(line))


def print_indented(text: str) -> None:
    """Print text folded to the terminal's width, with each line indented."""
    click.echo(_indent(text))


def _table(gap: int, **options: Any) -> Table:
    """Return an empty table without lines, with a gap between its columns."""
    from rich.table import Table

    return Table(box=None, padding=(0, gap, 0, 0), header_style="bold", **options)


def print_pairs(rows: Iterable[tuple[str, str | None]]) -> None:
    """Print names and values, folded to the terminal's width; a value of None leaves its row out."""
    table = _table(2, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        if value is not None:
            table.add_row(escape_text(name), escape_text(value))
    _print(_console(), table)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[str] = ()) -> None:
    """Print a table folded to the terminal's width, names at their dots; align the columns in `numbers` right."""
    console = _console()
    numbers = [escape_text(name) for name in numbers]
    columns, *rows = [tuple(map(escape_text, row)) for row in (columns, *rows)]
    natural = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
    widths = _fit_widths(natural, console.width - 2 * (len(columns) - 1))
    table = _table(2, pad_edge=False)
    for column, width in zip(columns, widths, strict=True):
        table.add_column(column, overflow="fold", width=width, justify="right" if column in numbers else "left")
    for row in rows:
        table.add_row(*map(_fold, row, widths))
    _print(console, table)


def _fit_widths(natural: Sequence[int], room: int) -> list[int]:
    """Return the width of each column: narrow columns keep their natural width, the others share the rest equally."""
    widths = list(natural)
    waiting = sorted(range(len(widths)), key=lambda i: natural[i])
    while waiting:
        i, share = waiting.pop(0), max(1, room // (len(waiting) + 1))
        widths[i] = min(natural[i], share)
        room -= widths[i]
    return widths


def _fold(text: str, width: int) -> str:
    """Fold a dotted name after its dots; return text with spaces unchanged.

    >>> _fold("model.layers.{l}.q_proj.weight", 24)
    'model.layers.{l}.q_proj.\\nweight'
    """
    lines: list[str] = []
    while len(text) > width and (dot := text.rfind(".", 1, width)) > 0 and " " not in text[:width]:
        lines.append(text[: dot + 1])
        text = text[dot + 1 :]
    return "\n".join([*lines, text])


def print_list(title: str, items: Sequence[str], limit: int) -> None:
    """Print a title with the number of items, and the first `limit` items, one a line; nothing without items."""
    if not items:
        return
    _print_title(f"{title}: {len(items)}")
    for item in shorten(items, limit):
        click.echo(_indent(item))


def shorten(items: Sequence[str], limit: int = 6) -> list[str]:
    """Return the first `limit` items, and the number of the others."""
    rest = len(items) - limit
    return [*items[:limit], f"… and {rest} more (--json lists all)"] if rest > 0 else [*items]


def print_words(title: str, words: Iterable[str]) -> None:
    """Print a title, and words separated by commas."""
    _print_title(title)
    click.echo(_indent(", ".join(words)))


def _print_title(text: str) -> None:
    click.echo()
    click.secho(_indent(text, ""), bold=True)


def _indent(text: str, prefix: str = "  ") -> str:
    """Escape text and wrap it to the terminal's width, with `prefix` before each line."""
    return textwrap.fill(
        escape_text(text), _console().width, initial_indent=prefix, subsequent_indent=prefix, break_on_hyphens=False
    )


def print_heat(
    title: str, rows: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[float | None]]
) -> None:
    """Print an empty line and a heat map: a table of numbers on shades of blue, or several if it is too wide."""
    from rich.text import Text

    console = _console()
    click.echo()
    title, rows, columns = escape_text(title), [*map(escape_text, rows)], [*map(escape_text, columns)]
    high = max((v for row in values for v in row if v is not None and math.isfinite(v)), default=0.0) or 1.0
    label_width = max(len("layer"), *map(len, rows)) + 1
    for begin, end in _split_columns([max(len(c), 6) + 1 for c in columns], console.width - label_width):
        table = _table(1)
        table.add_column("layer", justify="right", no_wrap=True)
        for column in columns[begin:end]:
            table.add_column(column, justify="right", overflow="fold")
        for name, row in zip(rows, values, strict=True):
            table.add_row(name, *(Text(changes.number_text(v), style=_shade(v, high)) for v in row[begin:end]))
        _print(console, Text(title if begin == 0 else f"{title}, continued", style="bold"), table)


def _split_columns(widths: Sequence[int], room: int) -> Iterable[tuple[int, int]]:
    """Yield (begin, end) of runs of columns that fit into `room`, each of at least one column."""
    begin, used = 0, 0
    for i, width in enumerate(widths):
        if i > begin and used + width > room:
            yield begin, i
            begin, used = i, 0
        used += width
    yield begin, len(widths)


def _shade(value: float | None, high: float) -> str:
    """Return a style from nearly white to dark blue, with text that is legible on it."""
    if value is None or not math.isfinite(value):
        return ""
    share = max(0.0, min(1.0, value / high))
    red, green, blue = (round(a + share * (b - a)) for a, b in ((235, 8), (242, 48), (250, 107)))
    # RGB values, because a terminal's own "white" is grey.
    return f"{'rgb(255,255,255)' if share > 0.65 else 'rgb(0,0,0)'} on rgb({red},{green},{blue})"
