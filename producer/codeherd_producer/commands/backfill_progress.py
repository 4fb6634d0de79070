"""How far a backfill is, while it runs.

Owns: the line on stderr: rewritten on a terminal, a new one now and then elsewhere. Does not know runs.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from codeherd_producer.commands.output import age
from codeherd_producer.commands.talk import LINE_EVERY_S, is_quiet, say
from codeherd_schema.backfills import Progress, TargetState

#: Erases the line of a terminal and goes to its beginning (ECMA-48).
_AFRESH = "\r\x1b[K"


class Meter:
    """Is told how far a run is, and says so."""

    def __init__(self, *, is_terminal: bool, clock: Callable[[], float] = time.monotonic) -> None:
        """Say nothing yet; `clock` gives seconds."""
        self._is_terminal = is_terminal
        self._clock = clock
        self._due_at = clock() if is_terminal else clock() + LINE_EVERY_S
        self._first: tuple[float, int, int] | None = None

    def planned(self, files: int) -> None:
        """Take how many files were planned by now."""
        self._say(f"planned {files} files")

    def show(self, progress: Progress) -> None:
        """Take how far the run is."""
        self._say(self._line(progress))

    def tell(self, line: str) -> None:
        """Say something else, on a line that stays."""
        if self._is_terminal:
            sys.stderr.write(f"{_AFRESH}{line}\n")
            sys.stderr.flush()
        else:
            say(line)

    def close(self) -> None:
        """Leave an empty line."""
        if self._is_terminal:
            sys.stderr.write(_AFRESH)
            sys.stderr.flush()

    def _line(self, progress: Progress) -> str:
        counts = progress.targets
        total, still_open = sum(counts.values()), counts[TargetState.OPEN]
        done, now = total - still_open, self._clock()
        if self._first is None:
            # A run may be taken up in the middle: its speed is that from here on.
            self._first = (now, done, progress.tokens)
        began, done_before, tokens_before = self._first
        seconds = max(now - began, 1e-9)
        parts = [
            f"{done} of {total} symbols",
            f"{counts[TargetState.ACCEPTED]} docstrings",
            f"{progress.asked - progress.ended} jobs under way",
            f"{(progress.tokens - tokens_before) / seconds:.0f} tokens/s",
        ]
        if done > done_before and still_open:
            parts.append(f"{age(still_open * seconds / (done - done_before))} left")
        return ", ".join(parts)

    def _say(self, line: str) -> None:
        if self._is_terminal:
            sys.stderr.write(_AFRESH + line)
            sys.stderr.flush()
        elif self._clock() >= self._due_at:
            self._due_at = self._clock() + LINE_EVERY_S
            say(line)


class _Silence(Meter):
    def tell(self, line: str) -> None:
        """Say nothing."""

    def _say(self, line: str) -> None:
        """Say nothing."""


@contextmanager
def watched() -> Iterator[Meter]:
    """Lend what shows a run's progress; nothing with `--quiet`."""
    is_terminal = sys.stderr.isatty()
    meter = _Silence(is_terminal=False) if is_quiet() else Meter(is_terminal=is_terminal)
    try:
        yield meter
    finally:
        meter.close()
