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


@click.command("convert", short_help="Change the file format, dtype or library of an adapter.")
@click.argument("sources", metavar="SOURCE…", nargs=-1, required=True, type=click.Path())
@click.argument("target", type=click.Path())
@click.option("--from", "from_keymap", metavar="FAMILY", help="Family (keymap) of a SOURCE tree. Default: recognized.")
@click.option("--to", "to_keymap", metavar="FAMILY", help="Family (keymap) of a TARGET tree; see `jaxadapt families`.")
@click.option(
    "--dialect",
    help="LoRA layout of a TARGET tree: qwix, qwix/flat, gemma, nnx.LoRA, … Default: that of the family's library.",
)
@click.option("--lora-alpha", type=float, help="Alpha that a SOURCE tree was trained with.")
@click.option("--like", type=click.Path(), help="A .safetensors file to read the model's shapes from.")
@click.option("--axis", "sizes", multiple=True, metavar="NAME=SIZE", callback=_parse_sizes,
              help="Size of one axis of the model, instead of --like.")  # fmt: skip
@click.option("--on-shared", type=click.Choice(["concat"]),
              help="If modules share one A in TARGET, concatenate their As.")  # fmt: skip
@click.option("--format", "form", type=click.Choice(["safetensors", "bin", "orbax", "kohya-ss", "diffusers"]),
              help="Format of TARGET: a folder of PEFT's safetensors (the default), PyTorch's .bin or Orbax; or the one"
              " file of an image adapter.")  # fmt: skip
@output.dtype
@output.as_json
def command(
    sources: tuple[str, ...],
    target: str,
    from_keymap: str | None,
    to_keymap: str | None,
    dialect: str | None,
    lora_alpha: float | None,
    like: str | None,
    sizes: dict[str, int],
    on_shared: str | None,
    form: str | None,
    dtype: str | None,
    as_json: bool,
) -> None:
    """Convert the adapter SOURCE to TARGET: to another file format or dtype, or between PEFT and other JAX libraries.
    No model is needed.

    SOURCE is the folder or address of an adapter, a folder of such folders, an Orbax checkpoint of jaxadapt.save,
    mlx-lm's folder, or one file: an image adapter of kohya-ss, LyCORIS or diffusers, or a tree. TARGET is a folder or,
    if its name ends in .safetensors, such a file. Several SOURCEs become subfolders of TARGET.

    An image adapter becomes one PEFT folder for each model of the pipeline (unet/, text_encoder/), and such a folder
    becomes one file with --format kohya-ss or diffusers. If SOURCE and TARGET are both files, the names stay.

    mlx-lm's folder (adapters.safetensors and its own adapter_config.json, LoRA or DoRA) becomes PEFT's with the same
    outputs: lora_alpha is mlx-lm's scale times the rank. `jaxadapt export --for mlx` writes such a folder.

    A tree has the LoRA leaves of a JAX library under their dotted paths, as `save_file({".".join(path): leaf, …})`
    writes it; it holds LoRA only. If a layout depends on a size that the adapter does not contain, such as the size of
    an attention head, give it with --like or --axis.

    \b
    Example:
      jaxadapt convert out/ old/ --format bin
      jaxadapt convert out/ small/ --dtype bfloat16
      jaxadapt convert fr/ de/ it/ checkpoints/ --format orbax
      jaxadapt convert adapters-mlx/ out/
      jaxadapt convert style.safetensors style/
      jaxadapt convert style/ style.safetensors --format kohya-ss
      jaxadapt convert lora.safetensors out/ --from tunix:qwen3 --lora-alpha 16
      jaxadapt convert out/ lora.safetensors --to tunix:qwen3 --axis h=128
      jaxadapt convert out/ lora.safetensors --to gemma:gemma3 --like base.safetensors --on-shared concat
    """
    (source, *more) = sources
    if more:
        from jaxadapt.export import conversion

        if from_keymap or to_keymap or dialect or like or sizes or on_shared or lora_alpha is not None:
            raise click.UsageError("several SOURCEs take only --format and --dtype; convert them one by one")
        done = conversion.convert_several(sources, target, format=form, dtype=dtype, progress=True)
        if as_json:
            output.print_json([each.to_dict() for each in done])
        else:
            for each in done:
                output.print_line(f"{each.path}: {each.tensors} tensors of {each.method}")
        return
    from jaxadapt.export.conversion import convert

    result = convert(
        source, target, from_keymap=from_keymap, to_keymap=to_keymap, dialect=dialect, lora_alpha=lora_alpha,
        like=like, sizes=sizes, on_shared=on_shared, progress=True, format=form, dtype=dtype,
    )  # fmt: skip
    if as_json:
        output.print_json(result.to_dict())
        return
    alpha = "" if result.lora_alpha is None else f", rank {result.rank}, alpha {result.lora_alpha:g}"
    output.print_line(f"{result.path}: {result.tensors} tensors{alpha}")
    if result.dialect is not None:
        output.print_line(f"a {result.dialect} tree; build its model with this rank and alpha")
