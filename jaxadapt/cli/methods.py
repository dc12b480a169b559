"""`jaxadapt methods`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from jaxadapt.cli import output


@click.command("methods", short_help="List the methods, with PEFT's figures.")
@click.option(
    "--model", type=click.Path(), help="Shapes of a JAX model, as for check-keymap: adds each adapter's size."
)
@output.as_json
def command(model: str | None, as_json: bool) -> None:
    """List the methods that jaxadapt computes, and the types whose files only pass through.

    "rows" tells if the rows of a batch may each have their own adapter: "call" if they are chosen in the call, "put" if
    a server must prepare the adapter. "accuracy" and "time" are those of PEFT's own benchmark (Llama 3.2 3B on
    MetaMathQA); the time is divided by LoRA's. With --model, "size" counts the trained parameters of the default
    configuration on that model.

    \b
    Example:
      jaxadapt methods
      jaxadapt methods --model shapes.json --json
    """
    from jaxadapt.configs import listing

    found, passing = listing.describe_methods(), listing.passing_types()
    sizes = None if model is None else _sizes(Path(model))
    if as_json:
        values: list[dict[str, Any]] = [
            {**info.to_dict(), **({} if sizes is None else _size_value(sizes.get(info.peft_type)))} for info in found
        ]
        output.print_json({"methods": values, "passing": passing})
        return
    columns = ["method", "what it does", "merges", "rows", "accuracy", "time"]
    rows = [
        [
            info.peft_type,
            info.summary,
            "yes" if info.facts.merges else "no",
            info.facts.rows,
            _number(info.facts.accuracy),
            _number(info.facts.time),
            *([] if sizes is None else [_size_text(sizes.get(info.peft_type))]),
        ]
        for info in found
    ]
    columns += [] if sizes is None else ["size"]
    output.print_table(columns, rows, numbers=("accuracy", "time", "size"))
    click.echo()
    click.echo("Trained tensors:")
    output.print_pairs([(info.peft_type, info.facts.trains) for info in found if info.facts.trains])
    click.echo()
    click.echo("Papers and PEFT's code:")
    output.print_pairs([(info.peft_type, ", ".join(filter(None, (info.paper, info.source)))) for info in found])
    click.echo()
    click.echo("Files of these types can be read and written, but not applied:")
    output.print_pairs(list(passing.items()))


def _sizes(path: Path) -> dict[str, int | str]:
    from jaxadapt.analysis import method_sizes
    from jaxadapt.cli import check_keymap

    return method_sizes.method_sizes(check_keymap.read_model_shapes(path))


def _size_value(size: int | str | None) -> dict[str, Any]:
    return {"size": size if isinstance(size, int) else None, **({"reason": size} if isinstance(size, str) else {})}


def _size_text(size: int | str | None) -> str:
    return f"{size:,}" if isinstance(size, int) else "–"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
