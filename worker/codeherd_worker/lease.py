"""Keep the leases of running jobs alive, and stop a job whose lease is gone.

Owns: what a heartbeat asks and what its answers mean. Does not know when it is called, or how text is
made or stored; it only cancels tokens. Times are this process's monotonic clock and the database's own:
never both.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from codeherd_schema.errors import DatabaseUnavailable
from codeherd_schema.store import Store
from codeherd_worker.engine.stopping import CancelReason
from codeherd_worker.running import Running

logger = logging.getLogger(__name__)

#: Share of the lease after which an unconfirmed claim is given up: the reaper must never be first.
SAFE_SHARE = 0.8


class Heartbeat:
    """One statement per beat for all claims of the process."""

    def __init__(
        self,
        store: Store,
        running: Running,
        *,
        lease_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Keep the leases of what is `running` for another `lease_s` seconds with each beat."""
        self._store = store
        self._running = running
        self._lease_s = lease_s
        self._clock = clock

    def safe_until(self, asked_at: float) -> float:
        """Return until when a lease holds for sure that was asked for at `asked_at`."""
        return asked_at + self._lease_s * SAFE_SHARE

    def beat(self) -> None:
        """Renew every lease once, and act on the answers."""
        runs = {held.claim.lease_id: (run, held) for run, held in self._running.held()}
        if not runs:
            return
        asked_at = self._clock()
        try:
            beats = self._store.heartbeat([held.claim for _, held in runs.values()], lease_s=self._lease_s)
        except DatabaseUnavailable as err:
            logger.warning("heartbeat_failed claims=%d reason=%s", len(runs), err)
            return
        for lease_id, (run, held) in runs.items():
            beat = beats.get(lease_id)
            if beat is None:
                # One that is ending here learns from its commit, and the thread may go on to another claim.
                if not held.is_ending:
                    run.token.cancel(CancelReason.LEASE_LOST)
                continue
            held.safe_until = self.safe_until(asked_at)
            if beat.cancel_requested:
                logger.info("job_cancel_noticed job_id=%s", held.claim.job.id)
                run.token.cancel(CancelReason.USER)
            elif beat.deadline_passed:
                run.token.cancel(CancelReason.DEADLINE)

    def give_up_overdue(self) -> None:
        """Stop what holds a lease that may be another's by now; also while a beat waits for its answer."""
        now = self._clock()
        for run, held in self._running.held():
            if now >= held.safe_until and not held.is_ending:
                logger.error("lease_given_up job_id=%s", held.claim.job.id)
                run.token.cancel(CancelReason.LEASE_LOST)
