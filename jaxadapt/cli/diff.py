"""`jaxadapt diff`."""

from __future__ import annotations

import contextlib
import json
import re
import sys
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

import click

from jaxadapt.cli import output
from jaxadapt.cli.inspect import check_png

if TYPE_CHECKING:
    from jaxadapt.adapters.peft_tensors import PeftTensors
    from jaxadapt.analysis.differences import Difference

_STEP = re.compile(r"step-(\d+)\.safetensors")
_MAX_NAMES = 8


@click.command("diff", short_help="Compare two adapters, or two steps of a training run.")
@click.argument("first", type=click.Path())
@click.argument("second", type=click.Path())
@output.as_json
@click.option("--modules", is_flag=True, help="Also list every module with its norms, cosine, ranks and angles.")
@click.option(
    "--plot", type=click.Path(), metavar="FILE.png", callback=check_png, help="Write heat maps (needs matplotlib)."
)
def command(first: str, second: str, as_json: bool, modules: bool, plot: str | None) -> None:
    """Compare the adapters FIRST and SECOND: their settings, their modules, and what they change in each weight.

    FIRST and SECOND are adapters' folders or addresses, or checkpoints of a run (run/step-000000100.safetensors). No
    model is needed. LoRA is compared by the changes ΔW = s·B·A, so that equal changes with other factors have the
    distance 0:

    \b
      distance   ‖ΔW₁ − ΔW₂‖ ÷ ‖ΔW₁‖: 0 for equal changes, 1.41 for unrelated ones of equal size
      cosine     1 for the same direction, 0 for unrelated changes, −1 for opposite ones
      angles     between the spaces of outputs (of B) and of inputs (of A): smallest and largest, in degrees

    The exit status is 0 if the adapters are equal, 1 if they differ, and 2 after an error.

    \b
    Example:
      jaxadapt diff out/ hf://org/name
      jaxadapt diff run/step-000000100.safetensors run/step-000000200.safetensors --plot diff.png
      jaxadapt diff a/ b/ --json | jq .totals
    """
    from jaxadapt.analysis.differences import diff

    with _open(first) as one, _open(second) as two:
        found = diff(one, two, progress=True)
    if plot is not None:
        from jaxadapt.analysis import heat_map
        from jaxadapt.storage import atomic

        atomic.write_bytes(plot, heat_map.difference_png(found, (first, second)))
    if as_json:
        output.print_json({"first": first, "second": second, **found.to_dict()})
    else:
        _print_difference(found, modules)
    if not found.is_equal:
        sys.exit(1)


@contextlib.contextmanager
def _open(path: str) -> Generator[PeftTensors]:
    """Open an adapter, or the only adapter of a run's step."""
    from jaxadapt.persistence import folder
    from jaxadapt.storage import location

    place = location.to_location(path)
    step = _STEP.fullmatch(place.name)
    if step is None:
        with folder.open_adapter(path) as tensors:
            yield tensors
        return
    import dataclasses

    from jaxadapt.persistence.peft import to_peft
    from jaxadapt.training.checkpoint.manager import CheckpointManager  # imports JAX, which folders do not need

    adapter = CheckpointManager(place.parent).adapter(int(step[1]))
    yield dataclasses.replace(to_peft(adapter), source=path)


def _print_difference(found: Difference, modules: bool) -> None:
    from jaxadapt.analysis.differences import difference_grid

    if found.is_equal:
        output.print_line("equal: the same settings, modules and values")
        return
    if found.settings:
        rows = [(name, _json(x), _json(y)) for name, (x, y) in found.settings.items()]
        output.print_table(("setting", "first", "second"), rows)
        click.echo()
    for kind in dict.fromkeys(m.kind for m in found.modules):
        total = found.total(kind)
        if total is not None:
            members = [m for m in found.modules if m.kind == kind]
            changed = sum(m.distance > 0 for m in members)
            output.print_pairs(
                [
                    ("compared", f"{len(members)} {_NAMES[kind]}; {changed or 'none'} of them differ"),
                    ("norms", f"{total.norms[0]:.4g} and {total.norms[1]:.4g}"),
                    ("distance", f"{total.relative:.4g} × the norm of the first"),
                    ("cosine", f"{total.cosine:.4g}"),
                ]
            )
    grid = difference_grid(found)
    if grid is not None and any(v for row in grid.relative for v in row):
        for title, values in (("distance ÷ norm of the first", grid.relative), ("cosine", grid.cosine)):
            click.echo()
            output.print_heat(title, grid.rows, grid.columns, values)
    if modules:
        click.echo()
        _print_modules(found)
    for title, names in (
        ("only in the first", found.only[0]),
        ("only in the second", found.only[1]),
        ("of other sizes", found.other_shapes),
    ):
        if names:
            output.print_list(title, names, _MAX_NAMES)


_NAMES = {"LoRA": "modules with LoRA", "IA3": "modules with IA3", "tensor": "other tensors"}


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _print_modules(found: Difference) -> None:
    def angles(pair: tuple[float, float] | None) -> str:
        return "" if pair is None else f"{pair[0]:.1f}–{pair[1]:.1f}°"

    columns = ("module", "norms", "distance", "cosine", "ranks", "angles out", "angles in")
    rows = [
        (
            m.module,
            f"{m.norms[0]:.4g}, {m.norms[1]:.4g}",
            f"{m.relative:.4g}",
            f"{m.cosine:.4g}",
            "" if m.ranks is None else f"{m.ranks[0]}, {m.ranks[1]}",
            angles(m.output_angles),
            angles(m.input_angles),
        )
        for m in found.modules
    ]
    output.print_table(columns, rows, numbers=("distance", "cosine"))
