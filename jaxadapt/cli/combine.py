"""`jaxadapt combine`."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import click

from jaxadapt.cli import output

_METHODS = (
    "svd, cat, linear, ties, dare_linear, dare_ties or magnitude_prune. For adapters of different ranks, append _svd to"
    " one of the last four."
)


@click.command("combine", short_help="Combine several adapters into one.")
@click.argument("adapters", nargs=-1, required=True, type=click.Path())
@click.option("--weights", required=True, metavar="W,W,…", help="One factor for each adapter, in order.")
@click.option("--out", required=True, type=click.Path(), help="Folder to write the combined adapter into.")
@click.option("--method", default="svd", show_default=True, help=_METHODS)
@click.option("--rank", type=click.IntRange(1), help="Rank of the result. Default: decided by the method.")
@click.option("--density", type=click.FloatRange(0, 1), help="Share of the values to keep (the last four methods).")
@click.option("--seed", default=0, show_default=True, help="Seed for the random choice of the dare_… methods.")
@click.option("--allow-nan", is_flag=True, help="Accept tensors with a NaN or an infinity.")
@output.dtype
@output.as_json
def command(
    adapters: tuple[str, ...], weights: str, out: str, method: str, rank: int | None, density: float | None, seed: int,
    allow_nan: bool, dtype: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Combine adapters of the same base model into one: LoRA, or IA3 with --method linear.

    ADAPTERS are folders or addresses, or image adapters in one file each (kohya-ss, diffusers), whose result is one
    file with the names of the first if --out ends in .safetensors. The methods are those of PEFT's
    add_weighted_adapter: "svd" approximates the weighted sum at the given rank; "cat" is exact, and its rank is the sum
    of all ranks.

    \b
    Example:
      jaxadapt combine french/ code/ --weights 0.7,0.5 --out both/
      jaxadapt combine a/ hf://org/b --weights 1,-1 --method cat --rank 16 --out both/
    """
    _refuse_split_weights(adapters, weights)
    try:
        numbers = [float(w) for w in weights.split(",")]
    except ValueError:
        numbers = []
    if not numbers or not all(map(math.isfinite, numbers)):
        raise click.BadParameter(f"expected numbers separated by commas, found {weights!r}", param_hint="--weights")
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
    combined = merge_files.combine_folders(
        adapters, numbers, out, resize=None if svd else rank, dtype=dtype, progress=True, **options
    )
    config = combined.config
    output.print_result(
        as_json,
        {"folder": out, "r": config.get("r"), "lora_alpha": config.get("lora_alpha")},
        [("folder", out), ("rank", str(config.get("r"))), ("tensors", str(len(combined.tensors)))],
    )


def _refuse_split_weights(adapters: tuple[str, ...], weights: str) -> None:
    """Raise `click.BadParameter` if numbers stand among the adapters, as in `--weights 0.7 0.3`."""
    numbers = [text for text in adapters if re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)", text) and not Path(text).exists()]
    if numbers:
        wanted = ",".join([weights, *numbers])
        raise click.BadParameter(f"separate the factors by commas: --weights {wanted}", param_hint="--weights")
