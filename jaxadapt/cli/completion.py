"""`jaxadapt completion`."""

from __future__ import annotations

import click

from jaxadapt.cli import output


@click.command("completion", short_help="Print a shell completion script, for bash, zsh or fish.")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@output.as_json
@click.pass_context
def completion_command(ctx: click.Context, shell: str, as_json: bool) -> None:
    """Print the script that completes commands, options and paths in SHELL.

    Add the script to the startup file of your shell, as in the example, and open a new shell. zsh also needs the line
    `autoload -Uz compinit && compinit` above the script.

    \b
    Example:
      jaxadapt completion bash >> ~/.bashrc
      jaxadapt completion zsh >> ~/.zshrc
      jaxadapt completion fish > ~/.config/fish/completions/jaxadapt.fish
    """
    from click.shell_completion import get_completion_class

    completion_class = get_completion_class(shell)
    assert completion_class is not None
    script = completion_class(ctx.find_root().command, {}, "jaxadapt", "_JAXADAPT_COMPLETE").source()
    script = script.replace('string split ","', 'string split -m 1 ","')  # fish cuts a help text at its first comma
    if as_json:
        output.print_json({"shell": shell, "script": script})
    else:
        click.echo(script)
