"""`jaxadapt checkpoints`."""

from __future__ import annotations

import click

from jaxadapt.cli import output
from jaxadapt.core.errors import AdapterError, ConfigError, FileError

_MODES = {"minimize": "smallest", "maximize": "largest"}


@click.command("checkpoints", short_help="List the checkpoints of a training run, or export one.")
@click.argument("folder", type=click.Path())
@click.option("--minimize", metavar="METRIC", help="Mark the step with the smallest METRIC as the best.")
@click.option("--maximize", metavar="METRIC", help="Mark the step with the largest METRIC as the best.")
@click.option("--export", "out", type=click.Path(), help="Folder to write the adapters of a step into.")
@click.option("--step", help="Step to export: a number, latest (the default) or best.")
@output.as_json
def command(
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
    steps = run.steps
    if not steps and not location.exists(run.folder):
        raise FileError(f"{folder}: no such folder; pass the folder of a jaxadapt.CheckpointManager")
    if not steps:
        raise AdapterError(
            f"{folder}: no checkpoint found; expected the step-….safetensors files of a CheckpointManager"
        )
    objective = run.objective
    best = run.best if objective else None
    rows = {s: run.metrics(s) for s in steps}
    names = list(dict.fromkeys(name for metrics in rows.values() for name in metrics))
    if (minimize or maximize) and best is None:
        raise ConfigError(f"{folder}: no step has the metric {minimize or maximize!r}; found {names or 'none'}")
    if out is not None:
        from jaxadapt.training.checkpoint.manager import CheckpointManager  # imports JAX, which the list does not need

        number = _resolve_step(steps[-1], best, step)
        CheckpointManager(folder, progress=True).export(number, out)
        output.print_result(as_json, {"step": number, "folder": out}, [("step", str(number)), ("folder", out)])
        return
    if as_json:
        listed = [{"step": s, "metrics": metrics, "best": s == best} for s, metrics in rows.items()]
        output.print_json({"folder": folder, "objective": objective or None, "steps": listed})
        return
    suffix = ""
    if not (minimize or maximize):  # the run chose the metric, so name it
        suffix = "".join(f" ({_MODES[mode]} {metric})" for mode, metric in objective.items())
    output.print_table(
        ("step", *names, ""),
        [
            (str(s), *(f"{m[n]:.6g}" if n in m else "" for n in names), _marks(s, best, steps[-1], suffix))
            for s, m in rows.items()
        ],
        numbers=("step", *names),
    )


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


def _marks(step: int, best: int | None, latest: int, suffix: str) -> str:
    return ", ".join(name for name, number in ((f"best{suffix}", best), ("latest", latest)) if number == step)
