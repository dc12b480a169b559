"""`jaxadapt inspect`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from jaxadapt.cli import shown

if TYPE_CHECKING:
    from jaxadapt.folder import Info


@click.command("inspect")
@click.argument("folder", type=click.Path())
@shown.as_json
@click.option("--tensors", is_flag=True, help="List every tensor with its dtype and shape.")
def command(folder: str, as_json: bool, tensors: bool) -> None:
    """Show what an adapter is, from its configuration and header alone.

    FOLDER may be an address of the Hub, hf://org/name@revision/subfolder. Needs no model; works on
    PEFT's adapters as on ours.

    \b
    Example:
      jaxadapt inspect out/
      jaxadapt inspect out/ --json | jq .config.r
    """
    from jaxadapt.folder import inspect

    info = inspect(folder)
    if as_json:
        from jaxadapt import consumers

        shown.print_json(info.to_dict() | {"refused_by": consumers.refusals(info.config, info.tensors)})
    else:
        _show(info, tensors)


def _show(info: Info, tensors: bool) -> None:
    from jaxadapt import card, consumers

    config = info.config
    rows = [("method", config.peft_type + (f", {config.task_type}" if config.task_type else ""))]
    rows.append(("base model", config.base_model_name_or_path or "not said"))
    targets = config.get("target_modules")
    if targets is not None:
        rows.append(("targets", targets if isinstance(targets, str) else ", ".join(targets)))
    values = config.to_dict()
    rows += [(k, str(values[k])) for k, plain in card.FIELDS.items() if k in values and values[k] != plain]
    rows.append(("adapted", ", ".join(info.modules)))
    dtypes, size = "/".join(info.dtypes), card.size_text(info.file_bytes)
    rows.append(("size", f"{info.parameters:,} parameters in {len(info.tensors)} tensors, {dtypes}, {size}"))
    if config.peft_version:
        rows.append(("peft version", config.peft_version))
    refused = {reader: why for reader, why in consumers.refusals(config, info.tensors).items() if why}
    rows += [("not for" if n == 0 else "", f"{r}: {'; '.join(w)}") for n, (r, w) in enumerate(refused.items())]
    shown.print_pairs(rows)
    if tensors:
        listed = [(k, d, " × ".join(map(str, s)) or "scalar") for k, (d, s) in info.tensors.items()]
        shown.print_table(("tensor", "dtype", "shape"), listed)
