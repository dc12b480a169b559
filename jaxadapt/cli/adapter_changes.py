"""Commands that write a changed adapter: repaired, resized, renamed, converted, extracted, merged or combined."""

from __future__ import annotations

import contextlib
import math
import re
import sys
from pathlib import Path
from typing import Any

import click

import jaxadapt
from jaxadapt.cli import adapter_files, conversion, families, foreign, merge_files, output, reports
from jaxadapt.core.lazy import jax
from jaxadapt.persistence import FILES, FOLDERS

_families = output.completed(lambda: families.FAMILIES)

# ---------------------------------------------------------------- repair


@click.command("repair", short_help="Write a repaired copy of an adapter.")
@click.argument("path", type=click.Path())
@click.option("--out", type=click.Path(), help="Folder to write to. Default: PATH with -repaired added.")
@click.option("--in-place", is_flag=True, help="Replace the adapter in PATH instead.")
@output.as_json
def repair_command(path: str, out: str | None, in_place: bool, as_json: bool) -> None:
    """Repair the adapter in PATH where only one original is possible, and say what was done.

    \b
    The command
      - renames keys to PEFT's: removes _orig_mod., module. and .default., and writes base_model.model. once;
      - keeps one of two tensors with equal values under one name;
      - corrects what PEFT refuses in the configuration (a value, a trailing comma, a byte order mark), if it has only
        one meaning;
      - writes a lost adapter_config.json from the copy in the weights' header.

    The values of tensors never change. The files in PATH do not change either, unless --in-place is given.

    The command lists all other problems, as `jaxadapt verify` does. The exit status is 1 if one of them is an error.

    \b
    Example:
      jaxadapt repair out/                     writes out-repaired/
      jaxadapt repair out/ --out repaired/
      jaxadapt repair out/ --in-place
    """
    if in_place and out is not None:
        raise click.UsageError("--in-place replaces PATH, and --out names another folder; give one of them")
    result = jaxadapt.repair(path, path if in_place else out, progress=True)
    if as_json:
        output.print_json(result.to_dict())
    else:
        output.print_lines(*(f"repaired  {line}" for line in result.done))
        for found in result.remaining:
            reports.print_finding(found)
        output.print_lines("nothing to repair; no file written" if result.path is None else f"written to {result.path}")
    if any(found.severity == "error" for found in result.remaining):
        sys.exit(1)


# ---------------------------------------------------------------- resize


@click.command("resize", short_help="Change the rank of a LoRA adapter.")
@click.argument("adapter", type=click.Path())
@click.option("--rank", required=True, type=output.Integer(1), help="The new rank of every module.")
@click.option("--out", required=True, type=click.Path(), help="Folder to write, or a file for an image adapter.")
@output.dtype
@output.as_json
def resize_command(adapter: str, rank: int, out: str, dtype: str | None, as_json: bool) -> None:
    """Write the LoRA adapter ADAPTER with another rank.

    A smaller rank keeps the best approximation of each change ΔW, and the command prints the largest error: the norm of
    the lost part, divided by the norm of ΔW. A larger rank changes nothing. The scale is multiplied into B, so that
    lora_alpha equals the rank, without patterns and rsLoRA. ADAPTER is a folder or an address, or the one file of an
    image adapter, which keeps its names if --out ends in .safetensors. An adapter at --out is not replaced.

    \b
    Example:
      jaxadapt resize out/ --rank 8 --out small/
      jaxadapt resize style.safetensors --rank 16 --out style-16.safetensors --dtype float16
    """
    error = adapter_files.resize_files(adapter, rank, out, dtype=dtype, progress=True)
    worst = max(error, key=lambda name: error[name])
    output.print_result(
        as_json,
        {"path": out, "rank": rank, "error": error},
        [("written", out), ("rank", str(rank)), ("largest error", f"{error[worst]:.3g} in {worst}")],
    )


# ---------------------------------------------------------------- rename


@click.command("rename", short_help="Change the names of an adapter's modules.")
@click.argument("adapter", type=click.Path())
@click.option("--out", required=True, type=click.Path(), help="Folder to write.")
@click.option("--from", "old", metavar="TEXT", help="Beginning of the names to replace.")
@click.option("--to", "new", metavar="TEXT", help="Beginning to put in its place.")
@click.option("--base", metavar="BASE", help="Take the names of this base model instead; as in `jaxadapt verify`.")
@output.as_json
def rename_command(adapter: str, out: str, old: str | None, new: str | None, base: str | None, as_json: bool) -> None:
    """Write ADAPTER with other module names, in its tensors and in its configuration.

    With --base, the modules get the names that they have in the base model: transformers renamed modules between
    versions, and a model's head adds a beginning. With --from and --to, one beginning of the names replaces another.

    \b
    Example:
      jaxadapt rename out/ --out new/ --base Qwen2.5-VL-3B/
      jaxadapt rename out/ --out new/ --from language_model.model. --to model.language_model.
      jaxadapt rename out/ --out new/ --from "" --to model.
    """
    if (base is None) == (old is None and new is None):
        raise click.UsageError("give --base, or --from and --to")
    changed = conversion.rename_files(adapter, out, old=old or "", new=new or "", base=base, progress=True)
    shown = output.shorten([f"{name} -> {to}" for name, to in changed.items()])
    lines = [f"{out}: {len(changed)} modules renamed", *(f"  {line}" for line in shown)]
    output.print_result(as_json, {"path": out, "renamed": changed}, lambda: output.print_lines(*lines))


# ---------------------------------------------------------------- undo start


@click.command("undo-start", short_help="Undo the change of the base by PiSSA, OLoRA and others.")
@click.argument("adapter", type=click.Path())
@click.option("--first", required=True, type=click.Path(), help="The adapter as it was before the training.")
@click.option("--out", required=True, type=click.Path(), help="Folder to write.")
@output.as_json
def undo_start_command(adapter: str, first: str, out: str, as_json: bool) -> None:
    """Write the trained ADAPTER as a plain LoRA for the original base.

    PiSSA, OLoRA, CorDA and others move a part of each base weight into the adapter, and train it beside the changed
    base. Programs that serve adapters know only the original base. The result is exact and has twice the rank: its
    product B·A is the trained product minus the initial one. `jaxadapt resize` reduces the rank.

    \b
    Example:
      jaxadapt undo-start out/ --first before-training/ --out plain/
    """
    result = adapter_files.undo_start(adapter, first, out, progress=True)
    rank = result.config.get("r")
    output.print_result(
        as_json,
        {"path": out, "rank": rank, "lora_alpha": result.config.get("lora_alpha")},
        [("written", out), ("rank", str(rank))],
    )


# ---------------------------------------------------------------- convert


@click.command("convert", short_help="Change the file format, dtype or library of an adapter.")
@click.argument("sources", metavar="SOURCE…", nargs=-1, required=True, type=click.Path())
@click.argument("target", type=click.Path())
@click.option("--from", "from_keymap", metavar="FAMILY", shell_complete=_families,
              help="Family (keymap) of a SOURCE tree. Default: recognized.")  # fmt: skip
@click.option("--to", "to_keymap", metavar="FAMILY", shell_complete=_families,
              help="Family (keymap) of a TARGET tree; see `jaxadapt families`.")  # fmt: skip
@click.option(
    "--dialect",
    shell_complete=output.completed(lambda: foreign.DIALECTS),
    help="LoRA layout of a TARGET tree: qwix, qwix/flat, gemma, nnx.LoRA, … Default: that of the family's library.",
)
@click.option("--lora-alpha", type=float, help="Alpha that a SOURCE tree was trained with.")
@click.option("--like", type=click.Path(), help="A .safetensors file to read the model's shapes from.")
@click.option("--axis", "sizes", multiple=True, metavar="NAME=SIZE",
              callback=output.named_values("NAME=SIZE, such as h=128", int, r"[1-9]\d{0,17}"),
              help="Size of one axis of the model, instead of --like.")  # fmt: skip
@click.option("--on-shared", type=click.Choice(["concat"]),
              help="If modules share one A in TARGET, concatenate their As.")  # fmt: skip
@click.option("--format", "form", type=click.Choice([*FOLDERS, *FILES]),
              help="Format of TARGET: a folder of PEFT's safetensors (the default), PyTorch's .bin or Orbax; or the one"
              " file of an image adapter.")  # fmt: skip
@output.dtype
@output.as_json
def convert_command(
    sources: tuple[str, ...],
    target: str,
    form: str | None,
    dtype: str | None,
    as_json: bool,
    **tree: Any,
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
        if any(value not in (None, {}) for value in tree.values()):
            raise click.UsageError("several SOURCEs take only --format and --dtype; convert them one by one")
        done = conversion.convert_several(sources, target, format=form, dtype=dtype, progress=True)
        values = [{k: x for k, x in each._asdict().items() if k != "dialect"} for each in done]
        texts = [f"{each.path}: {each.tensors} tensors of {each.method}" for each in done]
        output.print_result(as_json, values, lambda: output.print_lines(*texts))
        return
    result = conversion.convert(source, target, conversion.TreeOptions(**tree), format=form, dtype=dtype, progress=True)
    alpha = "" if result.lora_alpha is None else f", rank {result.rank}, alpha {result.lora_alpha:g}"
    lines = [f"{result.path}: {result.tensors} tensors{alpha}"]
    if result.dialect is not None:
        lines.append(f"a {result.dialect} tree; build its model with this rank and alpha")
    value = {name: value for name, value in result._asdict().items() if name != "method"}
    output.print_result(as_json, value, lambda: output.print_lines(*lines))


# ---------------------------------------------------------------- extract


@click.command("extract", short_help="Take one adapter out of a checkpoint.")
@click.argument("checkpoint", type=click.Path())
@click.option("--out", required=True, type=click.Path(), help="Folder to write.")
@click.option("--name", default="default", show_default=True, help="The adapter's name in the checkpoint.")
@click.option("--config", type=click.Path(), help="An adapter_config.json, or the folder of one.")
@click.option("--keymap", metavar="FAMILY", shell_complete=_families,
              help="Family of an Orbax checkpoint's model. Default: recognized.")  # fmt: skip
@click.option("--lora-alpha", type=float, help="Alpha of another library's LoRA, instead of --config.")
@output.as_json
def extract_command(
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
    result = adapter_files.extract_files(
        checkpoint, out, name=name, config=config, keymap=keymap, lora_alpha=lora_alpha, progress=True
    )
    method, tensors = result.config.peft_type, len(result.tensors)
    output.print_result(
        as_json,
        {"path": out, "method": method, "tensors": tensors},
        [("written", out), ("method", method), ("tensors", str(tensors))],
    )


# ---------------------------------------------------------------- merge


def _on_device(text: str | None) -> contextlib.AbstractContextManager[object]:
    """Return a context in which JAX computes on the device "gpu" or "gpu:1"."""
    if text is None:
        return contextlib.nullcontext()
    kind, _, number = text.partition(":")
    try:
        return jax.default_device(jax.devices(kind)[int(number or 0)])
    except (RuntimeError, ValueError, IndexError) as error:
        have = ", ".join(f"{device.platform}:{device.id}" for device in jax.devices())
        raise click.BadParameter(f"no device {text!r} ({error}); JAX has {have}", param_hint="--device") from error


@click.command("merge", short_help="Merge an adapter into its base model.")
@click.argument("base", type=click.Path())
@click.argument("adapter", type=click.Path())
@click.option("--out", required=True, type=click.Path(), help="Folder to write the merged model into, or FILE.gguf.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16", "q8_0"]),
    help="Dtype of the result (q8_0: only of a .gguf file). Default: the base model's.",
)
@click.option(
    "--device", metavar="KIND[:N]", help="Device to compute on: cpu, gpu or tpu, and its number. Default: JAX's."
)
@click.option("--allow-nan", is_flag=True, help="Accept tensors with a NaN or an infinity.")
@output.as_json
def merge_command(
    base: str, adapter: str, out: str, dtype: str | None, device: str | None, allow_nan: bool, as_json: bool
) -> None:
    """Merge ADAPTER into the weights of the model BASE and write the result.

    BASE is the folder of a Hugging Face model (config.json, model.safetensors, …). ADAPTER is the folder or address of
    an adapter for it. The result is a folder like BASE, tokenizer included, for programs that do not read adapters.
    One tensor is in memory at a time. If the output head and the token embedding share one tensor and ADAPTER changes
    only one of them, each gets its own tensor.

    BASE may also be the .gguf file of a model. The result is then a .gguf file, for llama.cpp and Ollama. Any method
    that can be merged is allowed.

    \b
    Example:
      jaxadapt merge SmolLM2-135M/ out/ --out merged/
      jaxadapt merge SmolLM2-135M/ hf://org/name --out merged/ --dtype bfloat16 --device gpu:1
      jaxadapt merge SmolLM2-135M.gguf out/ --out merged.gguf --dtype q8_0
    """
    is_gguf = base.endswith(".gguf")
    if dtype == "q8_0" and not is_gguf:
        raise click.BadParameter("q8_0 is a type of GGUF files: expected a BASE ending in .gguf", param_hint="--dtype")
    merge = merge_files.merge_gguf if is_gguf else merge_files.merge_folder
    with _on_device(device):
        count = merge(base, adapter, out, dtype=dtype, allow_nan=allow_nan, progress=True)
    output.print_result(as_json, {"folder": out, "changed": count}, [("folder", out), ("changed", f"{count} weights")])


# ---------------------------------------------------------------- combine


_METHODS = "svd", "cat", "linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"


@click.command("combine", short_help="Combine several adapters into one.")
@click.argument("adapters", nargs=-1, required=True, type=click.Path())
@click.option("--weights", required=True, metavar="W,W,…", help="One factor for each adapter, in order.")
@click.option("--out", required=True, type=click.Path(), help="Folder to write the combined adapter into.")
@click.option(
    "--method",
    default="svd",
    show_default=True,
    help=f"{', '.join(_METHODS[:-1])} or {_METHODS[-1]}. For adapters of different ranks, append _svd to one of the"
    " last four.",
    shell_complete=output.completed(lambda: [*_METHODS, *(f"{method}_svd" for method in _METHODS[3:])]),
)
@click.option("--rank", type=output.Integer(1), help="Rank of the result. Default: decided by the method.")
@click.option("--density", type=float, help="Share of the values to keep, 0 to 1 (the last four methods).")
@click.option("--seed", default=0, show_default=True, help="Seed for the random choice of the dare_… methods.")
@click.option("--allow-nan", is_flag=True, help="Accept tensors with a NaN or an infinity.")
@output.dtype
@output.as_json
def combine_command(
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
    # Numbers among the adapters, as in `--weights 0.7 0.3`.
    loose = [text for text in adapters if re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)", text) and not Path(text).exists()]
    if loose:
        wanted = ",".join([weights, *loose])
        raise click.BadParameter(f"separate the factors by commas: --weights {wanted}", param_hint="--weights")
    try:
        numbers = [float(w) for w in weights.split(",")]
    except ValueError:
        numbers = []
    if not numbers or not all(map(math.isfinite, numbers)):
        raise click.BadParameter(f"expected numbers separated by commas, found {weights!r}", param_hint="--weights")
    is_svd, key = method.endswith("svd"), jax.random.key(seed) if method.startswith("dare") else None
    options = {"method": method, "density": density, "svd_rank": rank if is_svd else None, "key": key}
    combined = adapter_files.combine_folders(
        adapters, numbers, out, resize=None if is_svd else rank, dtype=dtype, allow_nan=allow_nan, progress=True,
        **options,
    )  # fmt: skip
    r, alpha = combined.config.get("r"), combined.config.get("lora_alpha")
    output.print_result(
        as_json,
        {"folder": out, "r": r, "lora_alpha": alpha},
        [("folder", out), ("rank", str(r)), ("tensors", str(len(combined.tensors)))],
    )
