"""`jaxadapt completion`."""

from __future__ import annotations

import click


@click.command("completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def command(ctx: click.Context, shell: str) -> None:
    """Print the script that completes commands, options and paths in a SHELL.

    \b
    Example:
      jaxadapt completion bash >> ~/.bashrc
      jaxadapt completion zsh >> ~/.zshrc
      jaxadapt completion fish > ~/.config/fish/completions/jaxadapt.fish
    """
    from click.shell_completion import get_completion_class

    maker = get_completion_class(shell)
    assert maker is not None
    click.echo(maker(ctx.find_root().command, {}, "jaxadapt", "_JAXADAPT_COMPLETE").source())
