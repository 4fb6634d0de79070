"""Celery's thread pool, made fit to own an engine: one thread per job, one engine per process.

Owns: what Celery's own pool gets wrong (5.7.0): an exception that is no `Exception` leaks the slot
for ever, terminate is not implemented, no timer fires while it drains. Does not know what a task
does. The process that it drains and closes is `app.codeherd`, opened before Celery starts.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from billiard.einfo import ExceptionInfo
from celery.concurrency.base import apply_target
from celery.concurrency.thread import TaskPool
from kombu.asynchronous import get_event_loop

from codeherd_schema.errors import EngineFailed

logger = logging.getLogger(__name__)

#: Seconds between two firings of the event loop's timers while draining, so that heartbeats go on.
TIMER_INTERVAL_S = 0.5


class Handle:
    """What Celery holds of a started task."""

    def __init__(self, future: Future[None]) -> None:
        """Wrap the pool thread's future."""
        self._future = future

    def terminate(self, signal: int | None = None) -> None:
        """Do nothing: `EnginePool.terminate_job` has told the thread already."""


class EnginePool(TaskPool):
    """Threads that wait for one engine. `limit` is the number of slots."""

    def on_apply(
        self,
        target: Callable[..., Any],
        args: tuple[Any, ...] | None = None,
        kwargs: dict[str, Any] | None = None,
        callback: Callable[..., Any] | None = None,
        accept_callback: Callable[..., Any] | None = None,
        **_: Any,
    ) -> Handle:
        """Run one task on a free thread; whatever it raises, the thread is free again after it."""
        running = self.app.codeherd.running

        def run() -> None:
            started = time.monotonic()
            running.enter()
            try:
                # The thread's id stands for the process id: it tells the slots apart for terminate.
                apply_target(target, args, kwargs, callback, accept_callback, getpid=threading.get_ident)
            except BaseException as err:
                logger.exception("task_escaped error=%s", type(err).__name__)
                if callback is not None:
                    callback((1, _contained(err), time.monotonic() - started))
            finally:
                running.leave()

        return Handle(self.executor.submit(run))

    def terminate_job(self, pid: int, signal: int | None = None) -> None:
        """Stop the task on thread `pid` at its next decode step; the engine and its weights stay."""
        self.app.codeherd.terminate(pid)

    def on_close(self) -> None:
        """Begin to drain: also reached by a remote shutdown, which sends no signal."""
        self.app.codeherd.drain()

    def on_stop(self) -> None:
        """Wait for the running tasks, with timers alive, then close the engine."""
        stopped = threading.Event()
        hub = get_event_loop()

        def fire_timers() -> None:
            while not stopped.wait(TIMER_INTERVAL_S):
                try:
                    hub.fire_timers()
                except Exception:
                    logger.debug("timer_failed", exc_info=True)

        timers = threading.Thread(target=fire_timers, name="timers", daemon=True)
        if hub is not None:
            timers.start()
        try:
            super().on_stop()
        finally:
            stopped.set()
            self.app.codeherd.close()


def _contained(err: BaseException) -> ExceptionInfo:
    # Celery raises SystemExit and MemoryError again in the pool's thread; as an EngineFailed they end
    # the task like any other failure.
    try:
        raise EngineFailed(f"the task raised {type(err).__name__}") from err
    except EngineFailed:
        return ExceptionInfo()
