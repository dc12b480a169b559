"""`jaxadapt inspect`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from jaxadapt.cli import output

if TYPE_CHECKING:
    from collections.abc import Iterable

    from jaxadapt.analysis.norms import Norms
    from jaxadapt.configs import Config
    from jaxadapt.persistence.inspect_folder import Info


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
def command(folder: str, as_json: bool, tensors: bool, norms: bool, plot: str | None) -> None:
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
    from jaxadapt.persistence.folder import read
    from jaxadapt.persistence.inspect_folder import inspect

    info = inspect(folder, progress=True)
    changes = None
    if norms or plot is not None:
        from jaxadapt.analysis.norms import measure_norms

        changes = measure_norms(read(folder, progress=True))
    if plot is not None and changes is not None:
        from jaxadapt.analysis import heat_map
        from jaxadapt.storage import atomic

        atomic.write_bytes(plot, heat_map.norms_png(changes, info.config))
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
    from jaxadapt.persistence import card

    config = info.config
    rows = [("method", config.peft_type + (f", {config.task_type}" if config.task_type else ""))]
    if info.form != "PEFT":
        rows.append(("format", f"{info.form}; the programs below read it after jaxadapt convert"))
    rows.append(("base model", config.base_model_name_or_path or "not recorded"))
    targets = config.get("target_modules")
    if targets is not None:
        rows.append(("targets", _value_text(targets)))
    rows += [(name, _value_text(value)) for name, value in config.shown_fields().items()]
    if info.modules:
        rows.append(("adapted", ", ".join(info.modules)))
    dtypes, size = "/".join(info.dtypes), card.size_text(info.file_bytes)
    rows.append(("size", f"{info.parameters:,} parameters in {len(info.tensors)} tensors, {dtypes}, {size}"))
    if config.peft_version:
        rows.append(("peft version", config.peft_version))
    output.print_pairs([*rows, *reader_rows(config, info.tensors)])
    if tensors:
        click.echo()
        rows = [(key, dtype, " × ".join(map(str, shape)) or "scalar") for key, (dtype, shape) in info.tensors.items()]
        output.print_table(("tensor", "dtype", "shape"), rows)


def reader_rows(config: Config, keys: Iterable[str]) -> list[tuple[str, str]]:
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
    if norms.not_finite:
        output.print_list("modules with a NaN or an infinity", norms.not_finite, 8)
    if norms.left_out:
        output.print_list("left out", norms.left_out, 8)
