"""`jaxadapt checkpoints`."""

from __future__ import annotations

import click

from jaxadapt.cli import shown
from jaxadapt.errors import AdapterError


@click.command("checkpoints", short_help="List the checkpoints of a training, or export one.")
@click.argument("folder", type=click.Path())
@click.option("--minimize", metavar="METRIC", help="Mark the step where it is smallest as the best.")
@click.option("--maximize", metavar="METRIC", help="Mark the step where it is largest as the best.")
@click.option("--export", "out", type=click.Path(), help="Folder to write a step's adapters into.")
@click.option("--step", help="Step to export: a number, latest (the default) or best.")
@shown.as_json
def command(
    folder: str, minimize: str | None, maximize: str | None, out: str | None, step: str | None, as_json: bool
) -> None:
    """List the checkpoints in the FOLDER of a training run, with their metrics, or export one.

    FOLDER is what the run gave to jaxadapt.CheckpointManager. An exported step is an adapter's folder as PEFT reads it.

    \b
    Example:
      jaxadapt checkpoints run/
      jaxadapt checkpoints run/ --minimize loss --step best --export out/
    """
    from jaxadapt.checkpoint import CheckpointManager

    manager = CheckpointManager(folder, minimize=minimize, maximize=maximize)
    best = manager.best if minimize or maximize else None
    if step is not None and out is None:
        raise click.UsageError("--step says which step --export writes")
    if out is not None:
        chosen = _chosen(manager.latest, best, step)
        manager.export(chosen, out, progress=True)
        chosen = manager.latest if chosen is None else chosen
        shown.print_json({"step": chosen, "folder": out}) if as_json else shown.print_pairs(
            [("step", str(chosen)), ("folder", out)]
        )
        return
    steps = manager.steps
    if not steps:
        raise AdapterError(f"{folder}: there is no checkpoint")
    if as_json:
        listed = [{"step": s, "metrics": manager.metrics(s), "best": s == best} for s in steps]
        shown.print_json({"folder": folder, "steps": listed})
        return
    rows = {s: manager.metrics(s) for s in steps}
    names = list(dict.fromkeys(name for metrics in rows.values() for name in metrics))
    shown.print_table(
        ("step", *names, ""),
        [
            (str(s), *(f"{m[n]:.6g}" if n in m else "" for n in names), _note(s, best, manager.latest))
            for s, m in rows.items()
        ],
        numbers=("step", *names),
    )


def _chosen(latest: int | None, best: int | None, step: str | None) -> int | None:
    if step in (None, "latest"):
        return latest
    if step == "best":
        if best is None:
            raise click.UsageError("--step best needs --minimize or --maximize, and a step that has the metric")
        return best
    if not step.isdecimal():
        raise click.BadParameter(f"expected a number, latest or best, found {step!r}", param_hint="--step")
    return int(step)


def _note(step: int, best: int | None, latest: int | None) -> str:
    return ", ".join(name for name, which in (("best", best), ("latest", latest)) if which == step)
