"""`jaxadapt completion`."""

from __future__ import annotations

import click

from jaxadapt.cli import output


@click.command("completion", short_help="Print what makes a shell complete these commands.")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@output.as_json
@click.pass_context
def command(ctx: click.Context, shell: str, as_json: bool) -> None:
    """Print the script that completes commands, options and paths in a SHELL.

    New shells of that kind have it once the script is in the shell's own file, as in the example. In zsh a line above
    it must say `autoload -Uz compinit && compinit`, if none does.

    \b
    Example:
      jaxadapt completion bash >> ~/.bashrc
      jaxadapt completion zsh >> ~/.zshrc
      jaxadapt completion fish > ~/.config/fish/completions/jaxadapt.fish
    """
    from click.shell_completion import get_completion_class

    maker = get_completion_class(shell)
    assert maker is not None
    script = maker(ctx.find_root().command, {}, "jaxadapt", "_JAXADAPT_COMPLETE").source()
    script = script.replace('string split ","', 'string split -m 1 ","')  # fish: else a help ends at its first comma
    if as_json:
        output.print_json({"shell": shell, "script": script})
    else:
        click.echo(script)
