"""Keep one process per device group alive unless it was told to stop, and stop them all in good order.

Owns: spawning, restarting with back-off, passing on signals. Does not load models and never imports
torch: a launcher that touches CUDA would take memory on every GPU.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from codeherd_worker.device import DeviceGroup
from codeherd_worker.serve import CONFIGURATION_STATUS

logger = logging.getLogger(__name__)

#: First and longest wait before a restart, in seconds; doubled by each death soon after a start.
FIRST_BACKOFF_S, LONGEST_BACKOFF_S = 1.0, 60.0
#: Seconds of life after which the next death waits only `FIRST_BACKOFF_S` again.
HEALTHY_S = 60.0
#: What a worker process runs.
WORKER_MODULE = "codeherd_worker.serve"
#: Signals that ask for a stop.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)


@dataclass(slots=True)
class _Child:
    group: DeviceGroup
    process: subprocess.Popen[bytes] | None = None
    started_at: float = 0.0
    backoff_s: float = FIRST_BACKOFF_S
    restart_at: float = field(default=0.0)
    #: It was told to stop and did, and so stays down.
    is_done: bool = False


class Supervisor:
    """Runs the worker processes until told to stop, until all of them were, or until one can never start."""

    def __init__(
        self, groups: Sequence[DeviceGroup], *, environment: Mapping[str, str], module: str = WORKER_MODULE
    ) -> None:
        """Remember what to run.

        Args:
            groups: one process each.
            environment: handed to every process, with the group's pinning added.
            module: run by every process, with the arguments of `codeherd_worker.serve`.
        """
        self._module = module
        self._children = [_Child(group) for group in groups]
        self._environment = dict(environment)
        self._stops: list[int] = []

    def run(self) -> int:
        """Run until stopped; return the exit status: 0 after a stop, else the hopeless child's.

        A worker may be told to stop past the launcher, by a signal of its own or by Celery's remote control
        (a button in Flower): it stays down, and with the last one the launcher ends.
        """
        wakeup = self._listen()
        status = 0
        while not self._stops and status == 0 and not all(child.is_done for child in self._children):
            now = time.monotonic()
            for child in self._children:
                if child.process is None and not child.is_done and now >= child.restart_at:
                    self._spawn(child)
            self._wait(wakeup, self._next_restart(now))
            status = self._reap()
        self._stop_all(wakeup)
        return status

    def _listen(self) -> int:
        reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        for number in STOP_SIGNALS:
            signal.signal(number, lambda number, _frame: self._stops.append(number))
        return reader

    def _spawn(self, child: _Child) -> None:
        group = child.group
        command = [sys.executable, "-m", self._module]
        command += ["--name", group.name, "--device", group.device, "--parent", str(os.getpid())]
        child.process = subprocess.Popen(  # noqa: S603 -- our own module
            command,
            env=self._environment | group.environment(),
            # Ctrl-C in a terminal reaches the launcher alone, which passes it on once.
            start_new_session=True,
        )
        child.started_at = time.monotonic()
        logger.info("worker_spawned name=%s pid=%d", group.name, child.process.pid)

    def _reap(self) -> int:
        for child in self._children:
            if child.process is None or (status := child.process.poll()) is None:
                continue
            lived_s = time.monotonic() - child.started_at
            child.process = None
            if status == CONFIGURATION_STATUS:
                return status
            if status == 0:
                # A worker ends well only when it was told to, whoever told it.
                child.is_done = True
                logger.info("worker_stopped name=%s lived_s=%.1f", child.group.name, lived_s)
                continue
            if lived_s >= HEALTHY_S:
                child.backoff_s = FIRST_BACKOFF_S
            if self._stops:
                continue
            logger.error(
                "worker_died name=%s status=%d lived_s=%.1f restart_in_s=%.0f",
                child.group.name, status, lived_s, child.backoff_s,
            )  # fmt: skip
            child.restart_at = time.monotonic() + child.backoff_s
            child.backoff_s = min(child.backoff_s * 2, LONGEST_BACKOFF_S)
        return 0

    def _stop_all(self, wakeup: int) -> None:
        told = 0
        self._stops = self._stops or [signal.SIGTERM]
        while any(child.process is not None for child in self._children):
            # Each further signal from outside is one more for the children: the second hurries them.
            for number in self._stops[told:]:
                for child in self._children:
                    if child.process is not None and child.process.poll() is None:
                        child.process.send_signal(number if number == signal.SIGQUIT else signal.SIGTERM)
            told = len(self._stops)
            self._reap()
            if any(child.process is not None for child in self._children):
                self._wait(wakeup, None)

    def _next_restart(self, now: float) -> float | None:
        waits = [c.restart_at - now for c in self._children if c.process is None and not c.is_done]
        return max(0.0, min(waits)) if waits else None

    @staticmethod
    def _wait(wakeup: int, timeout_s: float | None) -> None:
        ready, _, _ = select.select([wakeup], [], [], timeout_s)
        if ready:
            os.read(wakeup, 4096)
