"""`jaxadapt push`."""

from __future__ import annotations

import click

from jaxadapt.cli import output


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
def command(
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
    from jaxadapt.cli.inspect import reader_rows
    from jaxadapt.persistence import consumers
    from jaxadapt.persistence.inspect_folder import inspect
    from jaxadapt.persistence.upload import push

    result = push(
        folder, repo, private=private or None, commit_message=message,
        create_pr=create_pr, tag=tag, license=license_, metrics=metrics, picture=picture, progress=True,
    )  # fmt: skip
    info = inspect(folder)
    if as_json:
        readers = [reader.to_dict() for reader in consumers.judge_readers(info.config, info.tensors)]
        output.print_json(result._asdict() | {"readers": readers})
    else:
        output.print_line(f"page     {result.url}")
        output.print_line(f"address  {result.address}")
        output.print_pairs(reader_rows(info.config, info.tensors))
