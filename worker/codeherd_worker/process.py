"""Everything one worker process holds, opened and closed in order.

Owns: what is opened before the first job, what runs beside the jobs, how a stop proceeds. Does not
know Celery: `codeherd_worker.app` starts it, `codeherd_worker.pool` tells it when to drain and close.
Nor torch: what generates is handed in (`codeherd_worker.preparation` makes it).

    open:  store -> broker -> generator, ready -> heartbeat, lease guard, rescuer, watchdog, stop guard
    drain: take no more jobs -> let the running ones finish -> release what is left
    close: stop guard, watchdog, rescuer, lease guard, heartbeat -> generator -> broker, store

A stop ends in time whatever does not answer. Where Celery does not begin to drain, since it waits for Redis,
the stop guard does. A database that never answers would hold up each of the last steps for ever; then the
process ends as it is once its leases have run out, since from there on it has nothing to lose.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from random import uniform
from typing import Any

from codeherd_schema.broker import Broker, queue_name
from codeherd_schema.models import ModelTable, ServedModel
from codeherd_schema.redis_facts import check_start
from codeherd_schema.store import Store
from codeherd_schema.transport import refused
from codeherd_worker.device import Device
from codeherd_worker.engine.stopping import CancelReason
from codeherd_worker.generator import Prepare
from codeherd_worker.lease import Heartbeat
from codeherd_worker.periodic import Periodic
from codeherd_worker.rescuer import Rescuer
from codeherd_worker.runner import Runner
from codeherd_worker.running import Running
from codeherd_worker.settings import WorkerSettings
from codeherd_worker.watchdog import Watchdog

logger = logging.getLogger(__name__)

#: Seconds between two looks at whether the drain is over.
DRAIN_CHECK_S = 0.1
#: Seconds between two looks for leases that nobody could renew, at most; and the share of a lease.
GUARD_INTERVAL_S, GUARD_SHARE = 1.0, 0.05
#: Seconds between two looks of the watchdog.
WATCH_INTERVAL_S = 1.0
#: Seconds between two looks at whether a stop was asked for; and those that Celery has to begin with it.
STOP_INTERVAL_S, STOP_HEARD_S = 1.0, 10.0
#: Seconds that closing may take when every lease has run out, and Celery's part of the end after that.
CLOSE_TIMEOUT_S = 10.0
#: Exit status after the engine broke, or after a stop that would not end (EX_SOFTWARE of sysexits.h).
ENGINE_BROKEN_STATUS = STUCK_STATUS = 70


class WorkerProcess:
    """One process, one device group, one model."""

    def __init__(
        self,
        settings: WorkerSettings,
        *,
        name: str,
        device: Device,
        prepare: Prepare,
        open_store: Callable[..., Store] = Store.open,
    ) -> None:
        """Look up the model; load nothing yet.

        Args:
            settings: this worker's settings.
            name: the worker's name before the `@`.
            device: `cpu`, `cuda` or `cuda-group`; the process is pinned already.
            prepare: loads the model.
            open_store: called as `Store.open` is.

        Raises:
            UnknownModel: the model table has no such model.
        """
        self.settings = settings
        self.model: ServedModel = ModelTable.from_file(settings.models_file).find(settings.worker_model)
        self.queue = queue_name(self.model.name)
        self.worker_id = f"{name}@{socket.gethostname()}"
        self.running = Running()
        #: Set by the first stop signal.
        self.stop_asked = False
        #: Set by a second stop signal: do not wait for the drain.
        self.hurry = False
        #: What the process ends with when Celery has no other wish.
        self.exit_status = 0
        self._device = device
        self._prepare = prepare
        self._open_store = open_store
        self._drains = threading.Lock()
        self._closing, self._closed = threading.Event(), threading.Event()
        self._stack = contextlib.ExitStack()

    def open(self) -> None:
        """Load, check and warm up everything; the first job may come after this.

        Raises:
            SchemaOutdated, DatabaseUnavailable, BrokerUnavailable, and what `prepare` raises: the
                process must not take jobs.
        """
        settings = self.settings
        stack = self._stack
        store = self._open_store(
            settings.database, max_attempts=settings.max_attempts, **settings.database_options
        )
        stack.callback(store.close)
        store.check_schema()
        broker = Broker(settings)
        stack.callback(broker.close)
        _check_broker(broker, settings.broker.masked())
        prepared = self._prepare(settings, self.model, device=self._device, worker_id=self.worker_id)
        stack.callback(prepared.close)
        engine = prepared.generator.engine
        self._observer = prepared.observer
        self._runner = Runner(
            store=store,
            broker=broker,
            generator=prepared.generator,
            running=self.running,
            worker_id=self.worker_id,
            lease_s=settings.lease_s,
            max_crashes=settings.max_crashes,
        )
        heartbeat = Heartbeat(store, self.running, lease_s=settings.lease_s)
        rescuer = Rescuer(store, broker, max_crashes=settings.max_crashes)
        watchdog = Watchdog(
            engine, step_timeout_s=settings.worker_step_timeout_s, on_broken=self._engine_broke
        )
        for part in (
            Periodic("heartbeat", heartbeat.beat, pause_s=lambda: settings.heartbeat_s),
            # Apart from the heartbeat, which a frozen database holds up.
            Periodic(
                "lease guard",
                heartbeat.give_up_overdue,
                pause_s=lambda: min(GUARD_INTERVAL_S, GUARD_SHARE * settings.lease_s),
            ),
            Periodic("rescuer", rescuer.look, pause_s=lambda: _spread(settings.reap_interval_s)),
            Periodic("watchdog", self._watch(watchdog), pause_s=lambda: WATCH_INTERVAL_S),
            Periodic("stop guard", self._guard_stop(), pause_s=lambda: STOP_INTERVAL_S),
        ):
            part.start()
            stack.callback(part.close)

    def run(self, job_id: str) -> dict[str, Any]:
        """Run one job on the calling pool thread; see `Runner.run`."""
        return self._runner.run(job_id)

    def cancel(self, job_id: str) -> bool:
        """Stop one job if it runs here: SQL says already that somebody wants it stopped."""
        return self.running.cancel_job(job_id, CancelReason.USER)

    def terminate(self, ident: int) -> None:
        """Stop what runs on one pool thread, as an operator asked."""
        self.running.cancel_thread(ident, CancelReason.OPERATOR)

    def figures(self) -> dict[str, Any]:
        """Return what this process answers to `engine_stats`."""
        return self._observer.figures() | {
            "pid": os.getpid(),
            "draining": self.draining,
            "step_timeout_s": self.settings.worker_step_timeout_s,
            # Messages that were none, by what was wrong with them.
            "refused": dict(refused()),
        }

    @property
    def draining(self) -> bool:
        """Whether it takes no more jobs."""
        return self._runner.draining

    def drain(self) -> None:
        """Take no more jobs, and release what still runs when the drain's time is over.

        Every call but the first does nothing.
        """
        if not self._drains.acquire(blocking=False):
            return
        logger.info("draining running=%d", len(self.running.held()))
        self._runner.drain()
        threading.Thread(target=self._drain, name="drain", daemon=True).start()

    def close(self) -> None:
        """Close everything that is open, last opened first."""
        self._closing.set()
        self._stack.close()
        self._closed.set()

    def _watch(self, watchdog: Watchdog) -> Callable[[], None]:
        def look() -> None:
            watchdog.look()
            self._observer.sample()

        return look

    def _guard_stop(self) -> Callable[[], None]:
        asked_at: float | None = None

        def look() -> None:
            nonlocal asked_at
            if not self.stop_asked or self.draining:
                return
            asked_at = asked_at or time.monotonic()
            if time.monotonic() - asked_at >= STOP_HEARD_S:
                logger.warning("stop_unheard waited_s=%.0f", STOP_HEARD_S)
                self.drain()

        return look

    def _drain(self) -> None:
        end = time.monotonic() + self.settings.worker_drain_timeout_s
        while not self.hurry and time.monotonic() < end and self.running.held():
            if self._closing.wait(DRAIN_CHECK_S):
                break
        released = self.running.cancel_all(CancelReason.DRAIN)
        logger.info("drained released=%d", released)
        if not self._closed.wait(self.settings.lease_s + CLOSE_TIMEOUT_S):
            logger.critical("stop_stuck running=%d", len(self.running.held()))
            os._exit(STUCK_STATUS)
        # Jobs, model and database are closed; what Celery still has to say to Redis is of use to nobody.
        time.sleep(CLOSE_TIMEOUT_S)
        logger.warning("end_stuck waited_s=%.0f", CLOSE_TIMEOUT_S)
        os._exit(self.exit_status)

    def _engine_broke(self) -> None:
        self.exit_status = ENGINE_BROKEN_STATUS
        os.kill(os.getpid(), 15)


def _spread(interval_s: float) -> float:
    # A herd must not look all at once.
    return interval_s * uniform(0.5, 1.5)  # noqa: S311 -- no secret


def _check_broker(broker: Broker, place: str) -> None:
    for fault in check_start(broker.check(), place):
        logger.warning("redis_fault part=%s: %s; %s", fault.part, fault.message, fault.hint)
