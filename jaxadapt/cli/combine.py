"""`jaxadapt combine`."""

from __future__ import annotations

import math
from typing import Any

import click

from jaxadapt.cli import output

_METHODS = (
    "svd, cat, linear, ties, dare_linear, dare_ties, magnitude_prune; the last four also with _svd at the end, for"
    " adapters of different ranks."
)


@click.command("combine", short_help="Make one adapter out of several.")
@click.argument("adapters", nargs=-1, required=True, type=click.Path())
@click.option("--weights", required=True, metavar="W,W,…", help="How much of each adapter, in their order.")
@click.option("--out", required=True, type=click.Path(), help="Folder for the result.")
@click.option("--method", default="svd", show_default=True, help=_METHODS)
@click.option("--rank", type=click.IntRange(1), help="Rank of the result; by default what the method gives.")
@click.option("--density", type=click.FloatRange(0, 1), help="Share of the values that survives, of the last four.")
@click.option("--seed", default=0, show_default=True, help="For the random choice of dare_….")
@click.option("--allow-nan", is_flag=True, help="Combine also tensors that hold a NaN or an infinity.")
@output.as_json
def command(
    adapters: tuple[str, ...], weights: str, out: str, method: str, rank: int | None, density: float | None, seed: int,
    allow_nan: bool, as_json: bool,
) -> None:  # fmt: skip
    """Make one LoRA adapter out of several of the same base model.

    ADAPTERS are folders or addresses. The methods are those of PEFT's add_weighted_adapter: "svd" finds the best sum of
    the given rank, "cat" the exact one with all ranks added up.

    \b
    Example:
      jaxadapt combine french/ code/ --weights 0.7,0.5 --out both/
      jaxadapt combine a/ hf://org/b --weights 1,-1 --method cat --rank 16 --out both/
    """
    try:
        numbers = [float(w) for w in weights.split(",")]
    except ValueError:
        numbers = []
    if not numbers or not all(map(math.isfinite, numbers)):
        raise click.BadParameter(f"expected numbers and commas, found {weights!r}", param_hint="--weights")
    import jax

    from jaxadapt.export import merge_files

    options: dict[str, Any] = {"method": method, "allow_nan": allow_nan}
    if density is not None:
        options["density"] = density
    if method.startswith("dare"):
        options["key"] = jax.random.key(seed)
    svd = method.endswith("svd")
    if svd and rank is not None:
        options["svd_rank"] = rank
    made = merge_files.combine_folders(adapters, numbers, out, resize=None if svd else rank, progress=True, **options)
    config = made.config
    if as_json:
        output.print_json({"folder": out, "r": config.get("r"), "lora_alpha": config.get("lora_alpha")})
    else:
        output.print_pairs([("folder", out), ("rank", str(config.get("r"))), ("tensors", str(len(made.tensors)))])
