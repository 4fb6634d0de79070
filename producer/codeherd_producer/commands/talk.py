"""What the command line says beside its data: on stderr, never on stdout.

Owns: which talk `--quiet` silences, and the progress of a wait. Does not know errors
(`codeherd_producer.commands.failures`).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, Protocol

import click

#: Seconds between two lines of progress where stderr is no terminal.
LINE_EVERY_S: Final = 10.0


def say(message: str) -> None:
    """Write a line that the user must see."""
    click.echo(message, err=True)


def note(message: str) -> None:
    """Write a line that `--quiet` leaves out."""
    if not is_quiet():
        say(message)


def is_quiet() -> bool:
    """Whether `--quiet` was given."""
    ctx = click.get_current_context(silent=True)
    return ctx is not None and bool(ctx.find_root().obj["quiet"])


def has_color() -> bool:
    """Whether colours are wanted: not with `--no-color`, NO_COLOR or a dumb terminal."""
    ctx = click.get_current_context(silent=True)
    return ctx is None or ctx.color is not False


class Meter(Protocol):
    """Is told how many jobs have ended."""

    def show(self, ended: int) -> None:
        """Take the new count; call often."""
        ...


@contextmanager
def progress(total: int) -> Iterator[Meter]:
    """Show the progress of a wait: a bar on a terminal, a line now and then elsewhere, or nothing."""
    if is_quiet():
        yield _Silence()
    elif sys.stderr.isatty():
        # rich is for terminals: a script that submits must not pay for it.
        from codeherd_producer.commands.terminal import draw_bar

        with draw_bar(total, in_color=has_color()) as bar:
            yield bar
    else:
        yield _Lines(total)


class _Silence:
    def show(self, ended: int) -> None:
        """Take the new count."""


class _Lines:
    def __init__(self, total: int) -> None:
        self._total = total
        self._due_at = time.monotonic() + LINE_EVERY_S

    def show(self, ended: int) -> None:
        """Take the new count."""
        if time.monotonic() >= self._due_at:
            self._due_at = time.monotonic() + LINE_EVERY_S
            say(f"waiting: {ended} of {self._total} jobs have ended")
