"""Commands that share an adapter: `export`, `push`, `pull`."""

from __future__ import annotations

import sys
from pathlib import Path

import click

import jaxadapt
from jaxadapt.cli import output
from jaxadapt.cli.adapter_reports import reader_rows
from jaxadapt.core.errors import escape_text
from jaxadapt.persistence import consumers
from jaxadapt.storage import location
from jaxadapt.storage.location import Location

# ---------------------------------------------------------------- export


@click.command("export", short_help="Write an adapter for vLLM, llama.cpp, MLX and others.")
@click.argument("source", type=click.Path())
@click.option("--for", "program", type=click.Choice(list(consumers.PROGRAMS)), default="plain", show_default=True,
              help="The program that reads the result.")  # fmt: skip
@click.option("--out", required=True, type=click.Path(), help="Folder to write, or FILE.gguf for gguf.")
@click.option("--base", type=click.Path(), help="Base model: its folder, config.json or (for gguf) its .gguf file.")
@click.option("--first", type=click.Path(), help="The initial adapter of PiSSA, OLoRA, CorDA or LoRA-GA.")
@click.option("--rank", type=click.IntRange(1), help="Approximate the adapter by the nearest LoRA of this rank.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]),
              help="Dtype of the result. Default: the adapter's; float32 for gguf.")  # fmt: skip
@output.as_json
def export_command(
    source: str, program: str, out: str, base: str | None, first: str | None, rank: int | None, dtype: str | None,
    as_json: bool,
) -> None:  # fmt: skip
    """Write the adapter SOURCE to a file with which another program computes the same as PEFT.

    plain (also vllm, sglang, tgi, tensorrt-llm, transformers): PEFT's folder with one rank, alpha equal to it, the
    scales in B, and no patterns, rsLoRA or variants. gguf: an adapter file for llama.cpp and Ollama; it needs --base.
    mlx: mlx-lm's folder, for LoRA and DoRA.

    An adapter that the program has no form for is refused. `jaxadapt merge` writes the merged model instead; --rank
    writes the nearest LoRA and prints what it loses.

    \b
    Example:
      jaxadapt export out/ --for vllm --out out-vllm/
      jaxadapt export out/ --for gguf --base SmolLM2-135M/ --out out.gguf
      jaxadapt export hf://org/name --for mlx --out out-mlx/
      jaxadapt export dora/ --rank 32 --base SmolLM2-135M/ --out lora/
    """
    result = jaxadapt.export.export_adapter(
        source, out, program, base=base, first=first, rank=rank, dtype=dtype, progress=True
    )
    if as_json:
        output.print_json(result.to_dict())
        return
    rows = [
        ("for", f"{result.program} ({result.version})"),
        ("written", result.path),
        ("size", f"rank {result.rank}, {result.tensors} tensors"),
    ]
    if result.error:
        module, worst = max(result.error.items(), key=lambda item: item[1])
        rows.append(("lost", f"at most {worst:.1%} of a change, at {module}"))
    output.print_pairs(rows)


# ---------------------------------------------------------------- push


def _parse_metrics(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> dict[str, float | str]:
    metrics: dict[str, float | str] = {}
    for text in values:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise click.BadParameter(f"expected NAME=VALUE, found {text!r}")
        try:
            metrics[name] = float(value)
        except ValueError:
            metrics[name] = value
    return metrics


@click.command("push", short_help="Upload an adapter to the Hugging Face Hub.")
@click.argument("folder", type=click.Path())
@click.argument("repo")
@click.option("--private", is_flag=True, help="Make the repository private if it is new.")
@click.option("-m", "--message", help="Commit message.")
@click.option("--create-pr", is_flag=True, help="Open a pull request instead of committing to the branch.")
@click.option("--tag", help="Tag to give to the commit.")
@click.option("--license", "license_", help="License for the model card, such as apache-2.0.")
@click.option(
    "--metric",
    "metrics",
    multiple=True,
    metavar="NAME=VALUE",
    callback=_parse_metrics,
    help="Result to show on the model card.",
)
@click.option(
    "--picture/--no-picture",
    default=None,
    help="Show a heat map of the weight changes on the card. Default: yes, if matplotlib is installed.",
)
@output.as_json
def push_command(
    folder: str,
    repo: str,
    private: bool,
    message: str | None,
    create_pr: bool,
    tag: str | None,
    license_: str | None,
    metrics: dict[str, float | str],
    picture: bool | None,
    as_json: bool,
) -> None:
    """Upload the adapter in FOLDER to the Hugging Face Hub as REPO (org/name[@branch][/subfolder]), in one commit.

    The upload consists of the configuration, the weights and the model card; other files in FOLDER stay local. The
    repository and the branch are created if they do not exist. A card that you edited is not overwritten. The access
    token is HF_TOKEN, or the token stored by `hf auth login`. The output lists the programs that read the adapter.

    \b
    Example:
      jaxadapt push out/ org/name --private --metric loss=3.187
      jaxadapt push out/ org/name@step-400 --tag best
    """
    result = jaxadapt.push(
        folder, repo, private=private or None, commit_message=message,
        create_pr=create_pr, tag=tag, card=jaxadapt.Card(license_, metrics, picture), progress=True,
    )  # fmt: skip
    info = jaxadapt.inspect(folder)
    if as_json:
        readers = [reader.to_dict() for reader in consumers.judge_readers(info.config, info.tensors)]
        output.print_json(result._asdict() | {"readers": readers})
    else:
        output.print_line(f"page     {result.url}")
        output.print_line(f"address  {result.address}")
        output.print_pairs(reader_rows(info.config, info.tensors))


# ---------------------------------------------------------------- pull


@click.command("pull", short_help="Download an adapter from the Hugging Face Hub.")
@click.argument("repo")
@click.option("--out", type=click.Path(), help="Folder to copy the adapter into.")
@output.as_json
def pull_command(repo: str, out: str | None, as_json: bool) -> None:
    """Download the adapter REPO (org/name[@revision][/subfolder]) from the Hugging Face Hub, without the other files of
    its repository.

    The command prints the adapter's folder: one in the Hub's cache, or the one given with --out. Files in the cache are
    not downloaded again; with HF_HUB_OFFLINE=1 they are used without a connection. A private repository needs a token,
    as for `jaxadapt push`.

    \b
    Example:
      jaxadapt pull org/name
      jaxadapt pull org/name@v1/fr --out fr/
      vllm serve BASE --enable-lora --lora-modules fr=$(jaxadapt pull org/name/fr)
    """
    pulled = jaxadapt.pull(repo, progress=True)
    folder: Location = pulled if out is None else _copy_adapter(pulled, out)
    if as_json:
        output.print_json({"folder": str(folder)})
    else:
        # A program that reads the output needs the exact name of the folder.
        click.echo(escape_text(str(folder)) if sys.stdout.isatty() else folder)


def _copy_adapter(source: Path, target: str) -> Location:
    """Copy the adapter's files from `source` to `target`, all or none."""
    from jaxadapt.storage import atomic
    from jaxadapt.storage.hub import CARD, CONFIG, WEIGHTS

    out = location.to_location(target)
    weights = next(name for name in WEIGHTS if location.exists(source / name))
    stale = [name for name in WEIGHTS if name != weights and location.exists(out / name)]
    if stale:
        raise jaxadapt.FileError(
            f"{out}: cannot write {weights} here, because the folder already contains {stale[0]} and a reader could "
            "load that file instead; choose another folder"
        )
    atomic.make_folder(out)
    # Replace the configuration right after the weights, as `folder.write` does.
    names = [name for name in (weights, CONFIG, CARD) if location.exists(source / name)]
    with atomic.lock_directory(out), atomic.replacing_all([out / name for name in names]) as writers:
        for name, writer in zip(names, writers, strict=True):
            writer.write(memoryview((source / name).read_bytes()))
    return out
