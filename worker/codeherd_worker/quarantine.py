"""Who may run beside whom in one process.

Owns: the order in which threads may start a job here. Many jobs share a process, and one that kills it takes
the others along: which of them was to blame cannot be told. So a job is alone in the process when one more
lost worker would bury it: then it dies of nobody's fault but its own. Does not know which jobs those are
(`codeherd_worker.runner`) or what burying means (`codeherd_schema.janitor`).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Quarantine:
    """Many at a time, or one alone. Every method may be called from any thread."""

    def __init__(self) -> None:
        """Start with nobody inside."""
        self._turn = threading.Condition()
        self._inside = 0
        self._waiting_to_be_alone = 0
        self._is_one_alone = False
        self._closed = False

    @contextmanager
    def beside_others(self) -> Iterator[bool]:
        """Enter when nobody is alone inside, or waits to be: that one goes first.

        Returns:
            Whether the caller may go on; False once this is closed.
        """
        with self._turn:
            self._turn.wait_for(lambda: self._closed or not (self._is_one_alone or self._waiting_to_be_alone))
            may = not self._closed
            self._inside += may
        try:
            yield may
        finally:
            self._leave(may)

    @contextmanager
    def alone(self) -> Iterator[bool]:
        """Enter when everybody has left, and let nobody else in.

        Returns:
            As `beside_others`.
        """
        with self._turn:
            self._waiting_to_be_alone += 1
            self._turn.wait_for(lambda: self._closed or not self._inside)
            self._waiting_to_be_alone -= 1
            may = not self._closed
            self._inside += may
            self._is_one_alone = may
        try:
            yield may
        finally:
            self._leave(may)

    def close(self) -> None:
        """Send away everybody who waits and who will come; those inside stay."""
        with self._turn:
            self._closed = True
            self._turn.notify_all()

    def _leave(self, was_inside: bool) -> None:
        with self._turn:
            self._inside -= was_inside
            # Nobody but the one alone could have been inside.
            self._is_one_alone = self._is_one_alone and not was_inside
            self._turn.notify_all()
