"""`jaxadapt convert`."""

from __future__ import annotations

import click

from jaxadapt.cli import shown


def _sizes(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> dict[str, int]:
    found: dict[str, int] = {}
    for text in values:
        name, equals, value = text.partition("=")
        if not equals or not name or not value.isdecimal() or int(value) < 1:
            raise click.BadParameter(f"expected NAME=SIZE, found {text!r}")
        found[name] = int(value)
    return found


@click.command("convert")
@click.argument("source", type=click.Path())
@click.argument("target", type=click.Path())
@click.option("--from", "from_keymap", metavar="FAMILY", help="Of a tree that is read; recognised if left out.")
@click.option("--to", "to_keymap", metavar="FAMILY", help="Of a tree that is written (see `jaxadapt families`).")
@click.option("--dialect", help="Of a tree that is written: qwix, qwix/flat, gemma, nnx.LoRA, maxtext, …")
@click.option("--lora-alpha", type=float, help="Of a tree that is read, where its file does not say it.")
@click.option("--like", type=click.Path(), help="A safetensors file with the target's shapes; its header is read.")
@click.option("--axis", "sizes", multiple=True, metavar="NAME=SIZE", callback=_sizes, help="Instead of --like.")
@click.option("--concat", is_flag=True, help="Differing As that share an array go side by side, at a larger rank.")
@shown.as_json
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
    as_json: bool,
) -> None:
    """Re-lay an adapter between families and libraries, from SOURCE to TARGET, files alone.

    Each is a PEFT folder, or (ending in .safetensors) a file of another library's tree: its leaves under their
    dotted paths, as `save_file({".".join(path): leaf, …})` writes them. No model is needed.

    \b
    Example:
      jaxadapt convert lora.safetensors out/ --from tunix:qwen3 --lora-alpha 16
      jaxadapt convert out/ lora.safetensors --to maxtext:qwen3
      jaxadapt convert out/ lora.safetensors --to tunix:qwen3 --axis h=128
      jaxadapt convert out/ lora.safetensors --to gemma:gemma3 --like base.safetensors --concat
    """
    from jaxadapt.converting import convert

    done = convert(
        source, target, from_keymap=from_keymap, to_keymap=to_keymap, dialect=dialect, lora_alpha=lora_alpha,
        like=like, sizes=sizes, on_shared="concat" if concat else None,
    )  # fmt: skip
    if as_json:
        shown.print_json(done.to_dict())
        return
    click.echo(f"{done.path}: {done.tensors} tensors, rank {done.rank}, alpha {done.lora_alpha:g}")
    if done.dialect is not None:
        click.echo(f"a tree of {done.dialect}; build its model with that rank and alpha")
