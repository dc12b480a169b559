"""`jaxadapt extract`."""

from __future__ import annotations

import click

from jaxadapt.cli import output


@click.command("extract", short_help="Take one adapter out of a checkpoint.")
@click.argument("checkpoint", type=click.Path())
@click.option("--out", required=True, type=click.Path(), help="Folder to write.")
@click.option("--name", default="default", show_default=True, help="The adapter's name in the checkpoint.")
@click.option("--config", type=click.Path(), help="An adapter_config.json, or the folder of one.")
@click.option("--keymap", metavar="FAMILY", help="Family of an Orbax checkpoint's model. Default: recognized.")
@click.option("--lora-alpha", type=float, help="Alpha of another library's LoRA, instead of --config.")
@output.as_json
def command(
    checkpoint: str, out: str, name: str, config: str | None, keymap: str | None, lora_alpha: float | None,
    as_json: bool,
) -> None:  # fmt: skip
    """Write one adapter of CHECKPOINT as PEFT's folder.

    CHECKPOINT is a file (.safetensors or .bin) with the state dict of a complete PEFT model, which may hold several
    adapters; or an Orbax checkpoint of a training run, of a model that jaxadapt adapted or that trains the LoRA of
    another library (Qwix, MaxText, …). For the checkpoints of jaxadapt.CheckpointManager use `jaxadapt checkpoints`.

    \b
    Example:
      jaxadapt extract pytorch_model.bin --name french --config french/ --out french-only/
      jaxadapt extract run/1000/ --config adapter_config.json --out out/
      jaxadapt extract qwix-run/1000/ --lora-alpha 16 --keymap tunix:qwen3 --out out/
    """
    from jaxadapt.export import adapter_files

    result = adapter_files.extract_files(
        checkpoint, out, name=name, config=config, keymap=keymap, lora_alpha=lora_alpha, progress=True
    )
    method, tensors = result.config.peft_type, len(result.tensors)
    output.print_result(
        as_json,
        {"path": out, "method": method, "tensors": tensors},
        [("written", out), ("method", method), ("tensors", str(tensors))],
    )
