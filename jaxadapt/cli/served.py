"""The command about an adapter in a server: `compare-logprobs`."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any, cast

import click

import jaxadapt
from jaxadapt.cli import output
from jaxadapt.storage import location

if TYPE_CHECKING:
    from jaxadapt.analysis.logprobs import Table

_MAX_BYTES = 1 << 30


@click.command("compare-logprobs", short_help="Tell whether a server applies its adapters.")
@click.argument("served", type=click.Path())
@click.argument("expected", type=click.Path())
@click.option("--base", default="base", show_default=True, help="The name of the tables without an adapter.")
@output.as_json
def compare_logprobs_command(served: str, expected: str, base: str, as_json: bool) -> None:
    """Compare the log-probabilities of a server, in the JSON file SERVED, with those of another program, in EXPECTED.

    Both files have a table for each adapter, and one for the model without an adapter. A table has a list for each
    text, with the natural logarithm of each token's probability. The texts and tokens are the same in all tables:

    \b
      {"base": [[-1.2, -0.3], [-2.0]], "NAME": [[-0.9, -0.3], [-1.7]]}

    An adapter is "applied" if it changes the server's answers, if they are not those of another adapter, and if their
    distance from the expected ones is at most twice the distance without an adapter.

    The exit status is 0 if every adapter is applied, 1 if one is not, and 2 after an error.

    \b
    Example:
      jaxadapt compare-logprobs vllm.json peft.json
      jaxadapt compare-logprobs vllm.json peft.json --json | jq .fr.verdict
    """
    found = jaxadapt.analysis.compare_logprobs(_read(served), _read(expected), base=base)
    document = {each.name: each.to_dict() for each in found}
    output.print_result(as_json, document, lambda: output.print_lines(*map(str, found)))
    if any(each.verdict != "applied" for each in found):
        sys.exit(1)


def _read(path: str) -> dict[str, Table]:
    from jaxadapt.configs.base import unique_keys

    place = location.to_location(path)
    try:
        document: Any = json.loads(location.read_text_bytes(place, _MAX_BYTES), object_pairs_hook=unique_keys)
    except (ValueError, RecursionError, jaxadapt.ConfigError) as error:
        raise jaxadapt.FormatError(f"{path}: expected a JSON object of tables, found: {error}") from error
    tables = cast("dict[str, Any]", document) if isinstance(document, dict) else {}
    if not tables or not all(
        isinstance(table, list) and all(isinstance(row, list) for row in cast("list[Any]", table))
        for table in tables.values()
    ):
        raise jaxadapt.FormatError(f'{path}: expected tables such as {{"base": [[-1.2, -0.3], [-2.0]]}}')
    return tables
