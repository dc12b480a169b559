"""`jaxadapt checkpoints`."""

from __future__ import annotations

import click

from jaxadapt.cli import output
from jaxadapt.core.errors import AdapterError, ConfigError

_MODES = {"minimize": "smallest", "maximize": "largest"}


@click.command("checkpoints", short_help="List the checkpoints of a training, or export one.")
@click.argument("folder", type=click.Path())
@click.option("--minimize", metavar="METRIC", help="Mark the step where it is smallest as the best.")
@click.option("--maximize", metavar="METRIC", help="Mark the step where it is largest as the best.")
@click.option("--export", "out", type=click.Path(), help="Folder to write a step's adapters into.")
@click.option("--step", help="Step to export: a number, latest (the default) or best.")
@output.as_json
def command(
    folder: str, minimize: str | None, maximize: str | None, out: str | None, step: str | None, as_json: bool
) -> None:
    """List the checkpoints in the FOLDER of a training run, with their metrics, or export one.

    FOLDER is what the run gave to jaxadapt.CheckpointManager. An exported step is an adapter's folder as PEFT reads it.
    The best step is the one by the metric that the run gave as minimize= or maximize=, unless the options name another.

    \b
    Example:
      jaxadapt checkpoints run/
      jaxadapt checkpoints run/ --step best --export out/
      jaxadapt checkpoints run/ --maximize accuracy --step best --export out/
    """
    from jaxadapt.persistence.run_folder import RunFolder

    run = RunFolder(folder, minimize=minimize, maximize=maximize)
    if step is not None and out is None:
        raise click.UsageError("--step says which step --export writes")
    steps = run.steps
    if not steps:
        raise AdapterError(f"{folder}: there is no checkpoint; expected step-….safetensors of a CheckpointManager")
    objective = run.objective
    best = run.best if objective else None
    rows = {s: run.metrics(s) for s in steps}
    names = list(dict.fromkeys(name for metrics in rows.values() for name in metrics))
    if (minimize or maximize) and best is None:
        raise ConfigError(f"{folder}: no step has the metric {minimize or maximize!r}; found {names or 'none'}")
    if out is not None:
        from jaxadapt.training.checkpoint.manager import CheckpointManager  # with JAX, which the lists do without

        chosen = _chosen(steps[-1], best, step)
        CheckpointManager(folder, progress=True).export(chosen, out)
        if as_json:
            output.print_json({"step": chosen, "folder": out})
        else:
            output.print_pairs([("step", str(chosen)), ("folder", out)])
        return
    if as_json:
        listed = [{"step": s, "metrics": metrics, "best": s == best} for s, metrics in rows.items()]
        output.print_json({"folder": folder, "objective": objective or None, "steps": listed})
        return
    told = minimize or maximize
    why = "" if told else "".join(f" ({_MODES[mode]} {metric})" for mode, metric in objective.items())
    output.print_table(
        ("step", *names, ""),
        [
            (str(s), *(f"{m[n]:.6g}" if n in m else "" for n in names), _note(s, best, steps[-1], why))
            for s, m in rows.items()
        ],
        numbers=("step", *names),
    )


def _chosen(latest: int, best: int | None, step: str | None) -> int:
    if step in (None, "latest"):
        return latest
    if step == "best":
        if best is None:
            raise click.UsageError("--step best needs --minimize or --maximize: no step says which metric is meant")
        return best
    if not step.isdecimal():
        raise click.BadParameter(f"expected a number, latest or best, found {step!r}", param_hint="--step")
    return int(step)


def _note(step: int, best: int | None, latest: int, why: str) -> str:
    return ", ".join(name for name, which in ((f"best{why}", best), ("latest", latest)) if which == step)
