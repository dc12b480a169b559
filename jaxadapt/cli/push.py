"""`jaxadapt push`."""

from __future__ import annotations

import click

from jaxadapt.cli import output


def _metric(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> dict[str, float | str]:
    found: dict[str, float | str] = {}
    for text in values:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise click.BadParameter(f"expected NAME=VALUE, found {text!r}")
        try:
            found[name] = float(value)
        except ValueError:
            found[name] = value
    return found


@click.command("push", short_help="Upload an adapter to the Hugging Face Hub.")
@click.argument("folder", type=click.Path())
@click.argument("repo")
@click.option("--private", is_flag=True, help="Make a new repository private.")
@click.option("--revision", metavar="BRANCH", help="Branch to commit to; made if it is not there.")
@click.option("--subfolder", help="Folder in the repository, where several adapters share one.")
@click.option("-m", "--message", help="Commit message.")
@click.option("--create-pr", is_flag=True, help="Open a pull request instead of committing to the branch.")
@click.option("--tag", help="Tag the commit with this name.")
@click.option("--license", "license_", help="License for the model card, such as apache-2.0.")
@click.option("--metric", "metrics", multiple=True, metavar="NAME=VALUE", callback=_metric, help="Result for the card.")
@click.option(
    "--picture/--no-picture",
    default=None,
    help="Whether the card shows a heat map of the changes; by default if matplotlib is there.",
)
@output.as_json
def command(
    folder: str,
    repo: str,
    private: bool,
    revision: str | None,
    subfolder: str | None,
    message: str | None,
    create_pr: bool,
    tag: str | None,
    license_: str | None,
    metrics: dict[str, float | str],
    picture: bool | None,
    as_json: bool,
) -> None:
    """Upload an adapter FOLDER to the Hugging Face Hub as REPO (org/name), in one commit.

    Configuration, weights and model card go, and nothing else that is in FOLDER. The repository is made if it is not
    there. A card that a person edited stays as it is. The token is HF_TOKEN, or the one that `hf auth login` stored.

    \b
    Example:
      jaxadapt push out/ org/name --private --metric loss=3.187
      jaxadapt push out/ org/name --revision step-400 --tag best
    """
    from jaxadapt.persistence.upload import push

    made = push(
        folder, repo, private=private or None, revision=revision, subfolder=subfolder, commit_message=message,
        create_pr=create_pr, tag=tag, license=license_, metrics=metrics, picture=picture, progress=True,
    )  # fmt: skip
    if as_json:
        output.print_json(made._asdict())
    else:
        output.print_line(f"page     {made.url}")
        output.print_line(f"address  {made.address}")
