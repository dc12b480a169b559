"""`jaxadapt rename`."""

from __future__ import annotations

import click

from jaxadapt.cli import output

_MAX_NAMES = 6


@click.command("rename", short_help="Change the names of an adapter's modules.")
@click.argument("adapter", type=click.Path())
@click.option("--out", required=True, type=click.Path(), help="Folder to write.")
@click.option("--from", "old", metavar="TEXT", help="Beginning of the names to replace.")
@click.option("--to", "new", metavar="TEXT", help="Beginning to put in its place.")
@click.option("--base", metavar="BASE", help="Take the names of this base model instead; as in `jaxadapt verify`.")
@output.as_json
def command(adapter: str, out: str, old: str | None, new: str | None, base: str | None, as_json: bool) -> None:
    """Write ADAPTER with other module names, in its tensors and in its configuration.

    With --base, the modules get the names that they have in the base model: transformers renamed modules between
    versions, and a model's head adds a beginning. With --from and --to, one beginning of the names replaces another.

    \b
    Example:
      jaxadapt rename out/ --out new/ --base Qwen2.5-VL-3B/
      jaxadapt rename out/ --out new/ --from language_model.model. --to model.language_model.
      jaxadapt rename out/ --out new/ --from "" --to model.
    """
    from jaxadapt.export import adapter_files

    if (base is None) == (old is None and new is None):
        raise click.UsageError("give --base, or --from and --to")
    changed = adapter_files.rename_files(adapter, out, old=old, new=new or "", base=base, progress=True)
    if as_json:
        output.print_json({"path": out, "renamed": changed})
        return
    output.print_line(f"{out}: {len(changed)} modules renamed")
    for name, to in list(changed.items())[:_MAX_NAMES]:
        output.print_line(f"  {name} -> {to}")
    if len(changed) > _MAX_NAMES:
        output.print_line(f"  … and {len(changed) - _MAX_NAMES} more (--json lists all)")
