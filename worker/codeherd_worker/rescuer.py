"""Take back what lost workers held, and end what is out of time, from inside every worker.

Owns: what is looked for, and that whoever waits hears of what has ended. The looking is one conditional
UPDATE in the store, so any number of rescuers may run at once; with one in every worker no dispatcher is
needed for a rescue.
"""

from __future__ import annotations

import contextlib
import logging

from codeherd_schema.broker import Broker
from codeherd_schema.errors import BrokerUnavailable, DatabaseUnavailable
from codeherd_schema.store import Store

logger = logging.getLogger(__name__)


class Rescuer:
    """Reaps expired leases and expires overdue jobs."""

    def __init__(self, store: Store, broker: Broker, *, max_crashes: int) -> None:
        """Bury a job that has lost `max_crashes` workers; `broker` hears of every end."""
        self._store = store
        self._broker = broker
        self._max_crashes = max_crashes

    def look(self) -> None:
        """Look once; a database that is away is left for the next look."""
        try:
            self._reap()
            self._expire()
        except DatabaseUnavailable as err:
            logger.warning("rescue_postponed reason=%s", err)

    def _reap(self) -> None:
        reaped = self._store.reap(max_crashes=self._max_crashes)
        for job_id in reaped.requeued:
            logger.warning("job_rescued job_id=%s", job_id)
        for job_id in reaped.buried:
            logger.error("job_buried job_id=%s", job_id)
        self._announce(reaped.ended)

    def _expire(self) -> None:
        expired = self._store.expire_due()
        if expired:
            logger.info("jobs_expired count=%d", len(expired))
        self._announce(expired)

    def _announce(self, job_ids: tuple[str, ...]) -> None:
        # Whoever waits looks at SQL as well.
        with contextlib.suppress(BrokerUnavailable):
            self._broker.announce(*job_ids)
