"""Which job runs on which pool thread, and how each is told to stop.

Owns: one cancel token per busy thread, from before its task starts until after it ends, so that a
stop can neither come too early nor hit the thread's next job. Knows neither Celery nor SQL moves.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from codeherd_schema.store import Claim
from codeherd_worker.engine.stopping import CancelReason, CancelToken


@dataclass(slots=True, eq=False)
class Held:
    """A claim while this process holds it."""

    claim: Claim
    #: `time.monotonic()` until which the lease surely holds.
    safe_until: float
    #: From before its end is stored: from then on a missing lease may be one that was given back here.
    is_ending: bool = False


@dataclass(slots=True, eq=False)
class Run:
    """One busy thread."""

    token: CancelToken
    #: None until the job is claimed, and for a message whose job could not be claimed.
    held: Held | None = None


class Running:
    """The busy threads of one worker process. Every method may be called from any thread."""

    def __init__(self) -> None:
        """Start with no thread busy."""
        self._lock = threading.Lock()
        self._runs: dict[int, Run] = {}

    def enter(self) -> None:
        """Mark the calling thread busy, before its task is announced as started."""
        with self._lock:
            self._runs[threading.get_ident()] = Run(CancelToken())

    def leave(self) -> None:
        """Mark the calling thread free."""
        with self._lock:
            self._runs.pop(threading.get_ident(), None)

    def current(self) -> Run:
        """Return the calling thread's run."""
        with self._lock:
            return self._runs[threading.get_ident()]

    def held(self) -> list[tuple[Run, Held]]:
        """Return the runs that hold a claim, each with what it holds."""
        with self._lock:
            return [(run, run.held) for run in self._runs.values() if run.held is not None]

    def cancel_thread(self, ident: int, reason: CancelReason) -> bool:
        """Stop what runs on one thread; False if that thread is free."""
        with self._lock:
            run = self._runs.get(ident)
        if run is not None:
            run.token.cancel(reason)
        return run is not None

    def cancel_job(self, job_id: str, reason: CancelReason) -> bool:
        """Stop one job; False if it does not run here."""
        return self._cancel(reason, lambda run: _holds(run, job_id)) > 0

    def cancel_all(self, reason: CancelReason) -> int:
        """Stop everything; returns how many were told."""
        return self._cancel(reason, lambda _: True)

    def _cancel(self, reason: CancelReason, chosen: Callable[[Run], bool]) -> int:
        with self._lock:
            runs = [run for run in self._runs.values() if chosen(run)]
        for run in runs:
            run.token.cancel(reason)
        return len(runs)


def _holds(run: Run, job_id: str) -> bool:
    held = run.held
    return held is not None and held.claim.job.id == job_id
