"""`jaxadapt verify`."""

from __future__ import annotations

import re
import sys
from collections import Counter
from typing import TYPE_CHECKING

import click

from jaxadapt.cli import output

if TYPE_CHECKING:
    from jaxadapt.persistence.verification.finding import Finding

_COLORS = {"error": "red", "warning": "yellow", "note": "green"}
_MAX_NAMES = 6


@click.command("verify", short_help="Find the problems of an adapter's files.")
@click.argument("path", type=click.Path())
@click.option(
    "--base",
    metavar="BASE",
    help="The base model: its Hugging Face folder, a file of its weights, shapes as .json, or a family's name.",
)
@output.as_json
def command(path: str, base: str | None, as_json: bool) -> None:
    """Check the adapter in PATH, and print each problem with its remedy.

    PATH is an adapter's folder, one of its files, or an address: hf://org/name, s3://…, gs://…. It may also be a
    damaged file or a file of another program. The command checks:

    \b
      - the configuration: valid, of a known method and version of PEFT, equal to the copy in the weights' header;
      - the keys: PEFT's names, without the names of wrappers (_orig_mod., module.) or of adapters (.default.);
      - the tensors: none missing, unexpected, empty (DeepSpeed ZeRO-3) or stored twice, with the stated ranks;
      - the values: no NaN or infinity, not untrained, no huge changes;
      - with --base: every module is in the base, with fitting sizes; no target is left out; the base has the values
        of the base that the adapter was trained on, if the file has a fingerprint.

    Files of MLX, kohya-ss and diffusers, whole models and the folder of a training run are recognized. PATH may be the
    one file of an image adapter (kohya-ss, LyCORIS, diffusers). mlx-lm's folder is an error, because PEFT does not read
    it; its content is checked too, and "jaxadapt convert" writes PEFT's folder.

    The command reads only names, sizes and a few values of BASE. A .json file of shapes is an object {key: shape} of
    PyTorch's parameters. `jaxadapt families` lists the families.

    "jaxadapt repair" repairs the findings that are marked with it. The exit status is 1 if there is an error; warnings
    and notes leave it at 0.

    \b
    Example:
      jaxadapt verify out/
      jaxadapt verify out/ --base SmolLM2-135M/
      jaxadapt verify hf://org/name --base llama
      jaxadapt verify out/ --json | jq '.findings[] | select(.severity == "error")'
    """
    from jaxadapt.persistence.verify_folder import verify

    findings = verify(path, base, progress=True)
    counts = {kind: sum(f.severity == kind for f in findings) for kind in _COLORS}
    if as_json:
        output.print_json({"path": path, **counts, "findings": [found.to_dict() for found in findings]})
    else:
        for found in findings:
            print_finding(found)
        _print_summary(counts, [f for f in findings if f.repairable], path)
    if counts["error"]:
        sys.exit(1)


def print_finding(found: Finding) -> None:
    """Print a finding: what was found, and below it what was expected, what to do, and the names concerned."""
    click.secho(f"{found.severity}", fg=_COLORS[found.severity], bold=True, nl=False)
    if found.severity == "note":
        output.print_line(f"  {found.found}")
        return
    output.print_line(f"  {found.code}")
    output.print_indented(found.found)
    if found.expected:
        output.print_indented(f"expected: {found.expected}")
    if found.remedy:
        output.print_indented(f"to do: {found.remedy}")
    if any(subject not in found.found for subject in found.subjects):
        groups = Counter(re.sub(r"(?<=\.)\d+(?=\.)", "*", subject) for subject in found.subjects)
        names = [f"{name} ({n})" if n > 1 else name for name, n in groups.items()]
        rest = f", … and {len(names) - _MAX_NAMES} more (--json lists all)" if len(names) > _MAX_NAMES else ""
        output.print_indented(f"names: {', '.join(names[:_MAX_NAMES])}{rest}")


def _print_summary(counts: dict[str, int], repairable: list[Finding], path: str) -> None:
    click.echo()
    words = [f"{n} {kind}{'s' if n != 1 else ''}" for kind, n in counts.items() if n and kind != "note"]
    output.print_line(f"{path}: {', '.join(words) if words else 'no problem found'}")
    if repairable:
        output.print_line(f"jaxadapt repair {path} repairs {', '.join(dict.fromkeys(f.code for f in repairable))}")
