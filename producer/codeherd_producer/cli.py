"""The `codeherd` command: which verbs there are, and what happens around all of them.

Owns: the list of commands, loaded one at a time so that `codeherd submit` costs no more than it must;
the global options; the way from any error to an exit status. Does not know what a command does:
`codeherd_producer.commands` has one file per verb or noun.
"""

from __future__ import annotations

import gc
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NoReturn

import click
from click.shell_completion import shell_complete

from codeherd_producer.commands import failures
from codeherd_producer.commands.failures import ExitCode
from codeherd_producer.commands.help_text import Noun

#: Command, the module and name of it below `codeherd_producer.commands`, and its line in `--help`.
COMMANDS: dict[str, tuple[str, str]] = {
    "submit": ("submit:submit", "Queue jobs and print their ids"),
    "status": ("jobs:status", "Show where jobs are in their life"),
    "result": ("jobs:result", "Print what a finished job gave"),
    "wait": ("jobs:wait", "Wait until jobs have ended"),
    "ls": ("jobs:ls", "List jobs, newest first"),
    "cancel": ("jobs:cancel", "Withdraw jobs"),
    "retry": ("jobs:retry", "Queue ended jobs again"),
    "pause": ("pauses:pause", "Start no more jobs of a model, batch, run or tenant"),
    "resume": ("pauses:resume", "Let paused jobs start again"),
    "prune": ("prune:prune", "Delete what ended long ago"),
    "prompt": ("prompt:prompt", "Show the exact tokens that a model would get"),
    "backfill": ("backfill:backfill", "Write the docstrings that a repository lacks"),
    "models": ("models:models", "Show what can be served"),
    "up": ("stack:up", "Run the whole stack in this terminal"),
    "worker": ("stack:worker", "Run one model on this machine's devices"),
    "dispatcher": ("stack:dispatcher", "Publish waiting jobs and take back lost ones"),
    "flower": ("stack:flower", "Run the monitor for workers and tasks"),
    "db": ("database:db", "Create or upgrade the database schema"),
    "doctor": ("doctor:doctor", "Check every part that a job needs"),
    "health": ("health:health", "Tell whether a service here is alive or ready"),
    "inspect": ("inspection:inspect", "Show what workers do right now"),
    "config": ("configuration:config", "Show the settings in force"),
    "completion": ("completion:completion", "Print the script that completes commands in a shell"),
}

#: The shell sets this variable to ask for completions (click's protocol).
_COMPLETE_VARIABLE = "_CODEHERD_COMPLETE"
#: Objects between two collections; Python starts with 700.
_GC_THRESHOLD: Final = 200_000


class LazyGroup(Noun):
    """A group whose commands are imported when they are used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the commands in the order of their table."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one command."""
        if cmd_name not in COMMANDS:
            return None
        module, _, name = COMMANDS[cmd_name][0].partition(":")
        command: click.Command = getattr(
            importlib.import_module(f"codeherd_producer.commands.{module}"), name
        )
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands without importing any."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="`codeherd config show` lists the settings and where they come from.",
)
@click.option(
    "--data-dir",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of the embedded stack (CODEHERD_DATA_DIR).",
)
@click.option("-q", "--quiet", is_flag=True, help="No notes and no progress on stderr; errors only.")
@click.option("--no-color", is_flag=True, help="No colours; NO_COLOR does the same.")
@click.version_option(package_name="codeherd", message="%(prog)s %(version)s")
@click.pass_context
def codeherd(ctx: click.Context, data_dir: Path | None, quiet: bool, no_color: bool) -> None:
    """Background code generation with Code Llama.

    codeherd up                                       a whole stack, here
    codeherd submit generate "def fib(n):" --wait     continue a text
    codeherd submit infill @file_with_FILL_ME.py      fill a hole; prints the job's id
    codeherd result ID                                the text
    """
    ctx.obj = {"data_dir": data_dir, "quiet": quiet}
    if no_color or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        ctx.color = False


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit status. Every error ends here."""
    as_json = "--json" in arguments
    try:
        return _invoke(arguments)
    except click.exceptions.NoArgsIsHelpError as err:
        click.echo(err.format_message(), err=True)
        return ExitCode.USAGE
    except (KeyboardInterrupt, click.Abort):
        return ExitCode.INTERRUPTED
    except BrokenPipeError:
        # Whatever is still buffered has no reader; the interpreter must not try again at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.READER_GONE
    except Exception as err:
        return failures.report(err, as_json=as_json)


def _invoke(arguments: Sequence[str]) -> int:
    code = int(ExitCode.OK)
    try:
        with codeherd.make_context("codeherd", list(arguments)) as ctx:
            codeherd.invoke(ctx)
    except click.exceptions.Exit as err:
        code = err.exit_code
    # While a broken pipe can still be answered.
    sys.stdout.flush()
    return code


def main() -> NoReturn:
    """Run the process's own command line."""
    # Most of a short command is imports, which free nothing: looking for garbage was a tenth of its time.
    gc.set_threshold(_GC_THRESHOLD)
    instruction = os.environ.get(_COMPLETE_VARIABLE)
    if instruction:
        sys.exit(shell_complete(codeherd, {}, "codeherd", _COMPLETE_VARIABLE, instruction))
    status = run(sys.argv[1:])
    sys.stderr.flush()
    # Everything is closed and flushed. Taking the interpreter apart object by object would cost a short
    # command a fifth of its time.
    os._exit(status)


if __name__ == "__main__":
    main()
