"""What is drawn only on a terminal: tables and progress bars.

Owns: their look. Imported when a terminal is there and not before: rich costs a script 0.1 s.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table


def draw_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, in_color: bool) -> None:
    """Draw a table on stdout."""
    table = Table(*header, box=None, pad_edge=False, header_style="bold")
    for row in rows:
        table.add_row(*row)
    Console(no_color=not in_color, highlight=False).print(table)


class Bar:
    """A progress bar for a wait."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress = progress
        self._task = progress.add_task("waiting", total=total)

    def show(self, ended: int) -> None:
        """Take the new count of jobs that have ended."""
        self._progress.update(self._task, completed=ended)


@contextmanager
def draw_bar(total: int, *, in_color: bool) -> Iterator[Bar]:
    """Draw a progress bar on stderr until the block ends, then remove it."""
    columns = (
        SpinnerColumn(),
        TextColumn("waiting"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    console = Console(stderr=True, no_color=not in_color)
    with Progress(*columns, console=console, transient=True) as progress:
        yield Bar(progress, total)
