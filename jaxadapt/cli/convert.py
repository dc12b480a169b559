"""`jaxadapt convert`."""

from __future__ import annotations

import click

from jaxadapt.cli import output
from jaxadapt.core.errors import AdapterError

_AS_OPTIONS = (
    ("jaxadapt.convert(source, target, lora_alpha=16)", "jaxadapt convert SOURCE TARGET --lora-alpha 16"),
    ('on_shared="concat" to convert(source, target', "--concat"),
    ('on_shared="concat" to save or to_peft', "--concat"),
    ('on_shared="concat"', "--concat"),
    ("is keymap= another", "is --to another"),
    (", or give a KeyMap with a line for each base weight", ""),
    ("keymap=", "--from "),
    ("lora_alpha=", "--lora-alpha "),
)
"""What errors that Python's users see too say of arguments, and the options that these are here."""


def _sizes(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> dict[str, int]:
    found: dict[str, int] = {}
    for text in values:
        name, equals, value = text.partition("=")
        if not equals or not name or not value.isdecimal() or int(value) < 1:
            raise click.BadParameter(f"expected NAME=SIZE, found {text!r}")
        found[name] = int(value)
    return found


@click.command("convert", short_help="Re-lay an adapter for another JAX library, or for PEFT.")
@click.argument("source", type=click.Path())
@click.argument("target", type=click.Path())
@click.option("--from", "from_keymap", metavar="FAMILY", help="Family of SOURCE, if it is a tree; else recognised.")
@click.option("--to", "to_keymap", metavar="FAMILY", help="Family of TARGET, if it is a tree: see `jaxadapt families`.")
@click.option(
    "--dialect",
    help="How TARGET's library lays out LoRA, if not as the family's does: qwix, qwix/flat, gemma, nnx.LoRA, …",
)
@click.option("--lora-alpha", type=float, help="Alpha that SOURCE was trained with, if it is a tree.")
@click.option("--like", type=click.Path(), help="A .safetensors file with the model's shapes, where they are needed.")
@click.option("--axis", "sizes", multiple=True, metavar="NAME=SIZE", callback=_sizes, help="Instead: one axis' size.")
@click.option("--concat", is_flag=True, help="Where TARGET has one A for several modules: a larger one of all.")
@click.option("--format", "form", type=click.Choice(["safetensors", "orbax"]), default="safetensors",
              help="Of a folder that is written: orbax for an Orbax checkpoint instead.")  # fmt: skip
@output.as_json
def command(
    source: str,
    target: str,
    from_keymap: str | None,
    to_keymap: str | None,
    dialect: str | None,
    lora_alpha: float | None,
    like: str | None,
    sizes: dict[str, int],
    concat: bool,
    form: str,
    as_json: bool,
) -> None:
    """Re-lay a LoRA adapter between PEFT and JAX libraries, from SOURCE to TARGET, with files alone.

    Each of the two is the folder of a PEFT adapter, or (if it ends in .safetensors) a file of another library's tree:
    its leaves under their dotted paths, as `save_file({".".join(path): leaf, …})` writes them. No model is needed. Some
    layouts depend on sizes that the adapter does not tell, such as that of a head: --like or --axis say them.
    The source may also be an Orbax checkpoint that jaxadapt.save wrote.

    \b
    Example:
      jaxadapt convert lora.safetensors out/ --from tunix:qwen3 --lora-alpha 16
      jaxadapt convert out/ lora.safetensors --to maxtext:qwen3
      jaxadapt convert out/ lora.safetensors --to tunix:qwen3 --axis h=128
      jaxadapt convert out/ lora.safetensors --to gemma:gemma3 --like base.safetensors --concat
      jaxadapt convert out/ checkpoint/ --format orbax
    """
    from jaxadapt.export.conversion import convert

    try:
        done = convert(
            source, target, from_keymap=from_keymap, to_keymap=to_keymap, dialect=dialect, lora_alpha=lora_alpha,
            like=like, sizes=sizes, on_shared="concat" if concat else None, progress=True, format=form,
        )  # fmt: skip
    except AdapterError as error:
        text = str(error)
        for argument, option in _AS_OPTIONS:
            text = text.replace(argument, option)
        raise type(error)(text) from error
    if as_json:
        output.print_json(done.to_dict())
        return
    output.print_line(f"{done.path}: {done.tensors} tensors, rank {done.rank}, alpha {done.lora_alpha:g}")
    if done.dialect is not None:
        output.print_line(f"a tree of {done.dialect}; build its model with that rank and alpha")
