"""Notice an engine that hangs or broke, and end the process: a dead CUDA context cannot be mended.

Owns: when to give up. Jobs need no help here: their leases run out and other workers take them.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable

from codeherd_worker.generator import TextEngine

logger = logging.getLogger(__name__)

#: Exit status of a process whose engine hung (EX_SOFTWARE).
HUNG_STATUS = 70


class Watchdog:
    """Looks at the engine's last step."""

    def __init__(
        self,
        engine: TextEngine,
        *,
        step_timeout_s: float,
        on_broken: Callable[[], None],
        on_hung: Callable[[int], None] = os._exit,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Say what to look at, and whom to tell.

        Args:
            engine: what to look at.
            step_timeout_s: longest time that a step may take.
            on_broken: called once when the engine refuses further work: stop in good order.
            on_hung: called when no step ends; the engine's thread cannot be stopped, only the process.
            clock: monotonic seconds, the same clock as the engine's.
        """
        self._engine = engine
        self._step_timeout_s = step_timeout_s
        self._on_broken = on_broken
        self._on_hung = on_hung
        self._clock = clock
        self._told = False

    def look(self) -> None:
        """Look once."""
        stats = self._engine.stats()
        if self._engine.broken and not self._told:
            self._told = True
            logger.error("engine_broken steps=%d", stats.steps)
            self._on_broken()
        elif (stats.active or stats.waiting) and self._clock() - stats.last_step_at > self._step_timeout_s:
            logger.critical("engine_hung seconds=%.0f", self._clock() - stats.last_step_at)
            self._on_hung(HUNG_STATUS)
