"""`codeherd completion`: the script that lets a shell complete our commands.

Owns: nothing but the choice of shell; click makes the script.
"""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from codeherd_producer.commands.help_text import Verb


@click.command(cls=Verb)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print the script that completes commands in a shell.

    eval "$(codeherd completion bash)"              # in ~/.bashrc
    eval "$(codeherd completion zsh)"               # in ~/.zshrc
    codeherd completion fish > ~/.config/fish/completions/codeherd.fish
    """
    shell_class = get_completion_class(shell)
    if shell_class is None:
        raise click.UsageError(f"no completion for `{shell}`", ctx)
    click.echo(shell_class(ctx.find_root().command, {}, "codeherd", "_CODEHERD_COMPLETE").source())
