"""Commands that look at an adapter: `inspect`, `verify`, `diff`."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Generator, Iterable
from typing import TYPE_CHECKING, Any

import click

import jaxadapt
from jaxadapt.cli import output

if TYPE_CHECKING:
    from jaxadapt.analysis.differences import Difference
    from jaxadapt.analysis.norms import Norms
    from jaxadapt.persistence.folder import Info
    from jaxadapt.persistence.formats import Finding


# ---------------------------------------------------------------- inspect


_TITLES = {"wrong": "misread by", "refused": "refused by", "unknown": "not known"}
"""{verdict about a program: title of its row}."""


def check_png(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """Check that the value of an option names a PNG file."""
    if value is not None and not value.lower().endswith(".png"):
        raise click.BadParameter(f"expected a file name ending in .png, found {value!r}")
    return value


@click.command("inspect", short_help="Show the settings, targets and size of an adapter.")
@click.argument("folder", type=click.Path())
@output.as_json
@click.option("--tensors", is_flag=True, help="Also list every tensor with its dtype and shape.")
@click.option("--norms", is_flag=True, help="Also show how much each weight changes, by layer and module.")
@click.option(
    "--plot",
    type=click.Path(),
    metavar="FILE.png",
    callback=check_png,
    help="Write these changes as a heat map (needs matplotlib).",
)
def inspect_command(folder: str, as_json: bool, tensors: bool, norms: bool, plot: str | None) -> None:
    """Show the method, base model, targets and size of the adapter in FOLDER, and which programs read it.

    FOLDER is an adapter of jaxadapt, PEFT or mlx-lm, or an address: hf://org/name@revision/subfolder, s3://…, gs://….
    No model is needed. Only the configuration and the header of the weights are read, unless --norms or --plot is
    given.

    "misread by" lists programs that load the adapter without a message and compute something else than PEFT, with the
    setting that they ignore and what helps. --json names the version of each program.

    For LoRA, the change of a weight is ΔW = s·B·A. Its norm measures the size of the change. Its effective rank
    measures the number of directions: 1 for a single direction, r if all r directions contribute equally.

    \b
    Example:
      jaxadapt inspect out/
      jaxadapt inspect out/ --json | jq .config.r
      jaxadapt inspect out/ --plot norms.png
    """
    info = jaxadapt.inspect(folder, progress=True)
    changes = None
    if norms or plot is not None:
        from jaxadapt.storage import atomic

        changes = jaxadapt.analysis.measure_norms(jaxadapt.read(folder, progress=True))
        if plot is not None:
            atomic.write_bytes(plot, jaxadapt.analysis.norms_png(changes, info.config))
    if as_json:
        from jaxadapt.persistence import consumers

        document = info.to_dict() | {
            "readers": [reader.to_dict() for reader in consumers.judge_readers(info.config, info.tensors)]
        }
        output.print_json(document if changes is None else document | {"norms": changes.to_dict()})
        return
    _print_info(info, tensors)
    if changes is not None:
        _print_norms(changes)


def _print_info(info: Info, tensors: bool) -> None:
    from jaxadapt.persistence import consumers

    config, targets = info.config, info.config.get("target_modules")
    dtypes, size = "/".join(info.dtypes), consumers.size_text(info.file_bytes)
    rows = [  # None leaves a row out
        ("method", config.peft_type + (f", {config.task_type}" if config.task_type else "")),
        ("format", None if info.form == "PEFT" else f"{info.form}; the programs below read it after jaxadapt convert"),
        ("base model", config.base_model_name_or_path or "not recorded"),
        ("targets", None if targets is None else _value_text(targets)),
        *((name, _value_text(value)) for name, value in config.shown_fields().items()),
        ("adapted", ", ".join(info.modules) or None),
        ("size", f"{info.parameters:,} parameters in {len(info.tensors)} tensors, {dtypes}, {size}"),
        ("peft version", config.peft_version or None),
    ]
    shown = [(name, text) for name, text in rows if text is not None]
    output.print_pairs([*shown, *reader_rows(config, info.tensors)])
    if tensors:
        click.echo()
        rows = [(key, dtype, " × ".join(map(str, shape)) or "scalar") for key, (dtype, shape) in info.tensors.items()]
        output.print_table(("tensor", "dtype", "shape"), rows)


def reader_rows(config: jaxadapt.Config, keys: Iterable[str]) -> list[tuple[str, str]]:
    """Return rows of (title, text): the programs that read an adapter, and the others with reasons and what helps."""
    from jaxadapt.persistence import consumers

    readers = consumers.judge_readers(config, keys)
    right = [reader.name for reader in readers if reader.verdict == consumers.RIGHT]
    rows = [("read by", ", ".join(right) or "no known program as it is")]
    last = ""
    for verdict, names, reasons, remedy in consumers.grouped(readers):
        way_out = f". What helps: {remedy}" if remedy else ""
        rows.append(("" if verdict == last else _TITLES[verdict], f"{names}: {'; '.join(reasons)}{way_out}"))
        last = verdict
    return rows


def _value_text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _print_norms(norms: Norms) -> None:
    from jaxadapt.analysis.norms import norms_grid

    cells = norms_grid(norms.modules)
    scale, rank = cells.constant("scale"), cells.constant("rank")
    for name, title in (("norm", norms.what), ("effective_rank", "effective rank"), ("scale", "scale s")):
        values = cells.values(name)
        if all(v is None for row in values for v in row) or (name == "scale" and scale is not None):
            continue
        click.echo()
        output.print_heat(title, cells.rows, cells.columns, values)
    if scale is not None and rank is not None:
        click.echo(f"\nrank {rank:g} and scale {scale:.4g} in all modules")
    output.print_list("modules with a NaN or an infinity", norms.not_finite, 8)
    output.print_list("left out", norms.left_out, 8)


# ---------------------------------------------------------------- verify


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
def verify_command(path: str, base: str | None, as_json: bool) -> None:
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
    findings = jaxadapt.verify(path, base, progress=True)
    counts = {kind: sum(f.severity == kind for f in findings) for kind in _COLORS}
    if as_json:
        output.print_json({"path": path, **counts, "findings": [found.to_dict() for found in findings]})
    else:
        for found in findings:
            print_finding(found)
        words = [f"{n} {kind}{'s' if n != 1 else ''}" for kind, n in counts.items() if n and kind != "note"]
        click.echo()
        output.print_line(f"{path}: {', '.join(words) if words else 'no problem found'}")
        if codes := dict.fromkeys(found.code for found in findings if found.repairable):
            output.print_line(f"jaxadapt repair {path} repairs {', '.join(codes)}")
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


# ---------------------------------------------------------------- diff


_STEP = re.compile(r"step-(\d+)\.safetensors")
_MAX_DIFFERENCES = 8


@click.command("diff", short_help="Compare two adapters, or two steps of a training run.")
@click.argument("first", type=click.Path())
@click.argument("second", type=click.Path())
@output.as_json
@click.option("--modules", is_flag=True, help="Also list every module with its norms, cosine, ranks and angles.")
@click.option(
    "--plot", type=click.Path(), metavar="FILE.png", callback=check_png, help="Write heat maps (needs matplotlib)."
)
def diff_command(first: str, second: str, as_json: bool, modules: bool, plot: str | None) -> None:
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
    from jaxadapt.analysis.differences import diff, difference_png

    with _open(first) as one, _open(second) as two:
        found = diff(one, two, progress=True)
    if plot is not None:
        from jaxadapt.storage import atomic

        atomic.write_bytes(plot, difference_png(found, (first, second)))
    document = {"first": first, "second": second, **found.to_dict()}
    output.print_result(as_json, document, lambda: _print_difference(found, modules))
    if not found.is_equal:
        sys.exit(1)


@contextlib.contextmanager
def _open(path: str) -> Generator[jaxadapt.PeftTensors]:
    """Open an adapter, or the only adapter of a run's step."""
    from jaxadapt.persistence import folder
    from jaxadapt.storage import location

    place = location.to_location(path)
    step = _STEP.fullmatch(place.name)
    if step is None:
        with folder.open_adapter(path) as tensors:
            yield tensors
        return
    adapter = jaxadapt.CheckpointManager(place.parent).adapter(int(step[1]))
    yield dataclasses.replace(jaxadapt.to_peft(adapter), source=path)


def _print_difference(found: Difference, modules: bool) -> None:
    from jaxadapt.analysis.differences import difference_grid

    if found.is_equal:
        output.print_line("equal: the same settings, modules and values")
        return
    if found.settings:
        rows = [
            (name, *(json.dumps(value, ensure_ascii=False) for value in pair)) for name, pair in found.settings.items()
        ]
        output.print_table(("setting", "first", "second"), rows)
        click.echo()
    _print_totals(found)
    grid = difference_grid(found)
    if grid is not None and any(v for row in grid.values("relative") for v in row):
        for title, name in (("distance ÷ norm of the first", "relative"), ("cosine", "cosine")):
            click.echo()
            output.print_heat(title, grid.rows, grid.columns, grid.values(name))
    if modules:
        click.echo()
        _print_modules(found)
    output.print_list("only in the first", found.only[0], _MAX_DIFFERENCES)
    output.print_list("only in the second", found.only[1], _MAX_DIFFERENCES)
    output.print_list("of other sizes", found.other_shapes, _MAX_DIFFERENCES)


_NAMES = {"LoRA": "modules with LoRA", "IA3": "modules with IA3", "tensor": "other tensors"}


def _print_totals(found: Difference) -> None:
    for kind in dict.fromkeys(m.kind for m in found.modules):
        total, distances = found.total(kind), [m.distance for m in found.modules if m.kind == kind]
        if total is None:
            continue
        changed = sum(distance != 0 for distance in distances)
        unknown = sum(not math.isfinite(distance) for distance in distances)
        output.print_pairs(
            [
                (
                    "compared",
                    f"{len(distances)} {_NAMES[kind]}; {changed or 'none'} of them differ"
                    + (f", {unknown} with a NaN or an infinity" if unknown else ""),
                ),
                ("norms", f"{total.norms[0]:.4g} and {total.norms[1]:.4g}"),
                ("distance", f"{total.relative:.4g} × the norm of the first"),
                ("cosine", f"{total.cosine:.4g}"),
            ]
        )


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
