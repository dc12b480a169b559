"""`jaxadapt convert`."""

from __future__ import annotations

import click

from jaxadapt.cli import output


def _parse_sizes(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for text in values:
        name, equals, value = text.partition("=")
        if not equals or not name or not value.isdecimal() or int(value) < 1:
            raise click.BadParameter(f"expected NAME=SIZE with a positive integer, found {text!r}")
        sizes[name] = int(value)
    return sizes


@click.command("convert", short_help="Convert an adapter for another JAX library, or for PEFT.")
@click.argument("source", type=click.Path())
@click.argument("target", type=click.Path())
@click.option("--from", "from_keymap", metavar="FAMILY", help="Family (keymap) of a SOURCE tree. Default: recognized.")
@click.option("--to", "to_keymap", metavar="FAMILY", help="Family (keymap) of a TARGET tree; see `jaxadapt families`.")
@click.option(
    "--dialect",
    help="LoRA layout of a TARGET tree: qwix, qwix/flat, gemma, nnx.LoRA, … Default: the one of the family's library.",
)
@click.option("--lora-alpha", type=float, help="Alpha that a SOURCE tree was trained with.")
@click.option("--like", type=click.Path(), help="A .safetensors file to read the model's shapes from.")
@click.option("--axis", "sizes", multiple=True, metavar="NAME=SIZE", callback=_parse_sizes,
              help="Size of one axis of the model, instead of --like.")  # fmt: skip
@click.option("--on-shared", type=click.Choice(["concat"]),
              help="If modules share one A in TARGET, concatenate theirs.")  # fmt: skip
@click.option("--format", "form", type=click.Choice(["safetensors", "bin", "orbax"]), default="safetensors",
              help="Format of a TARGET folder: PEFT's safetensors, PyTorch's .bin or an Orbax checkpoint.")  # fmt: skip
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
    on_shared: str | None,
    form: str,
    as_json: bool,
) -> None:
    """Convert the LoRA adapter SOURCE to TARGET, between PEFT and other JAX libraries. No model is needed.

    SOURCE and TARGET are each the folder of a PEFT adapter or, if the name ends in .safetensors, a tree: a file with
    the LoRA leaves of a JAX library under their dotted paths, as `save_file({".".join(path): leaf, …})` writes it.
    SOURCE may also be an Orbax checkpoint written by jaxadapt.save. If a layout depends on a size that the adapter does
    not contain, such as the size of an attention head, give it with --like or --axis.

    \b
    Example:
      jaxadapt convert lora.safetensors out/ --from tunix:qwen3 --lora-alpha 16
      jaxadapt convert out/ lora.safetensors --to maxtext:qwen3
      jaxadapt convert out/ lora.safetensors --to tunix:qwen3 --axis h=128
      jaxadapt convert out/ lora.safetensors --to gemma:gemma3 --like base.safetensors --on-shared concat
      jaxadapt convert out/ old/ --format bin
      jaxadapt convert out/ checkpoint/ --format orbax
    """
    from jaxadapt.export.conversion import convert

    result = convert(
        source, target, from_keymap=from_keymap, to_keymap=to_keymap, dialect=dialect, lora_alpha=lora_alpha,
        like=like, sizes=sizes, on_shared=on_shared, progress=True, format=form,
    )  # fmt: skip
    if as_json:
        output.print_json(result.to_dict())
        return
    output.print_line(f"{result.path}: {result.tensors} tensors, rank {result.rank}, alpha {result.lora_alpha:g}")
    if result.dialect is not None:
        output.print_line(f"a {result.dialect} tree; build its model with this rank and alpha")
