"""Call something again and again on a thread of its own, until closed.

Owns: the thread, the pauses, and that one failure does not end all later calls. Does not know what
it calls.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

logger = logging.getLogger(__name__)


class Periodic:
    """A thread that waits, acts, waits, acts."""

    def __init__(self, name: str, act: Callable[[], None], *, pause_s: Callable[[], float]) -> None:
        """Prepare; `start` begins with a pause.

        Args:
            name: of the thread, for logs.
            act: called after each pause.
            pause_s: seconds until the next call, asked anew each time.
        """
        self._name = name
        self._act = act
        self._pause_s = pause_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, name=name, daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def close(self) -> None:
        """Stop, and wait for a call that is under way."""
        self._stop.set()
        self._thread.join()

    def _loop(self) -> None:
        while not self._stop.wait(self._pause_s()):
            try:
                self._act()
            except Exception:
                # What fails for a new reason must not end all later calls.
                logger.exception("periodic_call_failed name=%s", self._name)
