"""The worker's Celery app: one task per job kind, and two control commands.

Owns: how Celery's words map to ours. Does not run anything itself: `codeherd_worker.runner` does.
"""

from __future__ import annotations

import logging
import os
import signal
import time
import warnings
from typing import Any

from celery import Celery, Task
from celery.apps.worker import Worker
from celery.exceptions import Ignore
from celery.platforms import SecurityWarning
from celery.worker import state
from celery.worker.consumer import Consumer
from celery.worker.control import control_command, inspect_command

from codeherd_schema.broker import make_app, task_name
from codeherd_schema.errors import CodeherdError
from codeherd_schema.requests import JobKind
from codeherd_worker.process import WorkerProcess
from codeherd_worker.runner import OperatorStopped

logger = logging.getLogger(__name__)

#: Seconds between two messages with task events. One costs as much as ten more events in it, and Celery sends
#: two for each job.
EVENTS_INTERVAL_S = 0.05


def worker_app(process: WorkerProcess) -> Celery:
    """Build the app of one worker process; `app.codeherd` is the process."""
    app = make_app(process.settings, [process.queue])
    app.conf.worker_pool = "codeherd_worker.pool:EnginePool"
    app.codeherd = process
    for kind in JobKind:
        # Listed in `throws`: ours are logged in one line without a trace, they are stored already.
        app.task(run_job, bind=True, name=task_name(kind), throws=(CodeherdError,), shared=False)
    app.set_current()
    return app


def run_job(task: Task, job_id: str) -> dict[str, Any]:
    """Run the job with this id, if it is still there to be run."""
    try:
        summary: dict[str, Any] = task.app.codeherd.run(job_id)
    except OperatorStopped as err:
        # Without Ignore the task would turn from REVOKED to SUCCESS in Flower.
        raise Ignore from err
    return summary


@control_command(args=[("job_id", str)], signature="<job_id>")
def cancel_job(panel: Any, job_id: str) -> dict[str, Any]:
    """Stop a job at its next decode step, if it runs here; SQL already says so."""
    return {"cancelled": panel.app.codeherd.cancel(job_id)}


@inspect_command()
def engine_stats(panel: Any) -> dict[str, Any]:
    """Tell what the engine does right now, in numbers, names and job ids: `codeherd inspect` draws it."""
    figures: dict[str, Any] = panel.app.codeherd.figures()
    return figures


class HerdConsumer(Consumer):
    """Celery's consumer, which sends task events some at a time while there are many.

    Each has the time at which it happened; the first after a pause is sent at once.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        """Start with nothing sent."""
        super().__init__(*args, **options)
        self._events_sent_at = self._events_due_at = float("-inf")

    def shutdown(self) -> None:
        """Send the last events before their connection is closed, but what could not be sent before."""
        if self.event_dispatcher:
            self.event_dispatcher.flush(errors=False)
        super().shutdown()

    def _flush_events(self) -> None:
        # The event loop calls this after each event, Celery to send it; and if nobody listens, to be awake.
        if not (self.event_dispatcher and self.event_dispatcher.has_some):
            return
        now = time.monotonic()
        free_at = self._events_sent_at + EVENTS_INTERVAL_S
        if now >= free_at:
            self._send_events()
        elif now >= self._events_due_at:
            self._events_due_at = free_at
            self.hub.call_later(free_at - now, self._send_events)

    def _send_events(self) -> None:
        self._events_sent_at = time.monotonic()
        super()._flush_events()


class HerdWorker(Worker):
    """Celery's worker with our signals: the first asks for a bounded drain, the second for none."""

    def on_consumer_ready(self, consumer: Any) -> None:
        """Say that jobs may come."""
        super().on_consumer_ready(consumer)
        logger.info("worker_ready worker=%s queue=%s", self.hostname, self.app.codeherd.queue)

    def setup_logging(self, colorize: bool | None = None) -> bool:
        """Leave logging as the entry point has configured it."""
        return True

    def install_platform_tweaks(self, worker: Any) -> None:
        """Install our handlers in place of Celery's warm and cold shutdown."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT):
            signal.signal(number, self._on_signal)
        # A closed terminal is no reason to stop a worker, nor to start it anew.
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    def _on_signal(self, number: int, _frame: Any) -> None:
        # Plain flags only: a lock taken here may be held by the code that the signal interrupted.
        process = self.app.codeherd
        process.stop_asked = True
        # A remote shutdown counts as the first one, but leaves no word in `state`.
        if state.should_stop is not None or process.draining or number == signal.SIGQUIT:
            process.hurry = True
        if state.should_stop is None:
            state.should_stop = 0


def run_worker(process: WorkerProcess) -> int:
    """Consume until asked to stop; return the exit status."""
    if os.geteuid() == 0:
        # Celery says the same in eight lines.
        warnings.filterwarnings("ignore", category=SecurityWarning)
        logger.warning("running_as_root worker=%s use=an_unprivileged_user", process.worker_id)
    worker = HerdWorker(
        app=worker_app(process),
        hostname=process.worker_id,
        concurrency=process.settings.worker_slots,
        consumer_cls=HerdConsumer,
        # Neither is needed by one queue per model, and both have kept workers from consuming again
        # after a reconnect (celery issues 8030, 8091).
        without_gossip=True,
        without_mingle=True,
        quiet=True,
    )
    worker.start()
    return int(worker.exitcode or process.exit_status)
