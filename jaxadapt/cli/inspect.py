"""`jaxadapt inspect`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from jaxadapt.cli import output

if TYPE_CHECKING:
    from jaxadapt.analysis.norms import Norms
    from jaxadapt.persistence.inspect_folder import Info


def _png(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    if value is not None and not value.lower().endswith(".png"):
        raise click.BadParameter(f"expected a name that ends in .png, found {value!r}")
    return value


@click.command("inspect", short_help="Show what an adapter is.")
@click.argument("folder", type=click.Path())
@output.as_json
@click.option("--tensors", is_flag=True, help="List every tensor too, with its dtype and shape.")
@click.option("--norms", is_flag=True, help="Also how much each weight is changed, layer by module.")
@click.option(
    "--plot", type=click.Path(), metavar="FILE.png", callback=_png, help="The same as a heat map (needs matplotlib)."
)
def command(folder: str, as_json: bool, tensors: bool, norms: bool, plot: str | None) -> None:
    """Show what the adapter in FOLDER is: method, base model, targets, size, and who cannot read it.

    Reads the configuration and the header of the weights; --norms and --plot read the weights as well. Works on PEFT's
    adapters as on ours, and needs no model. FOLDER may be an address: hf://org/name@revision/subfolder, s3://…, gs://….

    A weight's change is ΔW = s·B·A for LoRA. Its norm says how much, its effective rank in how many directions: 1 if
    all is along one, r if all r count alike.

    \b
    Example:
      jaxadapt inspect out/
      jaxadapt inspect out/ --json | jq .config.r
      jaxadapt inspect out/ --plot norms.png
    """
    from jaxadapt.persistence.folder import read
    from jaxadapt.persistence.inspect_folder import inspect

    info = inspect(folder, progress=True)
    measured = None
    if norms or plot is not None:
        from jaxadapt.analysis.norms import measure_norms

        measured = measure_norms(read(folder, progress=True))
    if plot is not None and measured is not None:
        from jaxadapt.analysis import norms_plot
        from jaxadapt.storage import atomic

        atomic.write_bytes(plot, norms_plot.norms_png(measured, info.config))
    if as_json:
        from jaxadapt.persistence import consumers

        more = {} if measured is None else {"norms": measured.to_dict()}
        output.print_json(info.to_dict() | {"refused_by": consumers.refusals(info.config, info.tensors)} | more)
        return
    _show(info, tensors)
    if measured is not None:
        _show_norms(measured)


def _show(info: Info, tensors: bool) -> None:
    from jaxadapt.persistence import card, consumers

    config = info.config
    rows = [("method", config.peft_type + (f", {config.task_type}" if config.task_type else ""))]
    rows.append(("base model", config.base_model_name_or_path or "not said"))
    targets = config.get("target_modules")
    if targets is not None:
        rows.append(("targets", _text(targets)))
    values = config.to_dict()
    rows += [(k, _text(values[k])) for k, plain in card.FIELDS.items() if k in values and values[k] not in (plain, [])]
    if info.modules:
        rows.append(("adapted", ", ".join(info.modules)))
    dtypes, size = "/".join(info.dtypes), card.size_text(info.file_bytes)
    rows.append(("size", f"{info.parameters:,} parameters in {len(info.tensors)} tensors, {dtypes}, {size}"))
    if config.peft_version:
        rows.append(("peft version", config.peft_version))
    reasons: dict[str, list[str]] = {}
    for reader, why in consumers.refusals(config, info.tensors).items():
        if why:
            reasons.setdefault("; ".join(why), []).append(reader)
    rows += [("" if n else "not for", f"{', '.join(r)}: {why}") for n, (why, r) in enumerate(reasons.items())]
    output.print_pairs(rows)
    if tensors:
        click.echo()
        listed = [(k, d, " × ".join(map(str, s)) or "scalar") for k, (d, s) in info.tensors.items()]
        output.print_table(("tensor", "dtype", "shape"), listed)


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _show_norms(norms: Norms) -> None:
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
        click.echo(f"\nrank {rank:g} and scale {scale:.4g} everywhere")
    if norms.not_finite:
        output.print_list("these modules hold a NaN or an infinity", norms.not_finite, 8)
    if norms.left_out:
        output.print_list("left out", norms.left_out, 8)
