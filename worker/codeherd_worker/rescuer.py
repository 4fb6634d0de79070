"""Take back what lost workers held, and end what is out of time, from inside every worker.

Owns: what is looked for. The looking is one conditional UPDATE in the store, so any number of rescuers
may run at once; with one in every worker no dispatcher is needed for a rescue.
"""

from __future__ import annotations

import logging

from codeherd_schema.errors import DatabaseUnavailable
from codeherd_schema.store import Store

logger = logging.getLogger(__name__)


class Rescuer:
    """Reaps expired leases and expires overdue jobs."""

    def __init__(self, store: Store, *, max_crashes: int) -> None:
        """Bury a job that has lost `max_crashes` workers."""
        self._store = store
        self._max_crashes = max_crashes

    def look(self) -> None:
        """Look once; a database that is away is left for the next look."""
        try:
            reaped = self._store.reap(max_crashes=self._max_crashes)
            expired = self._store.expire_due()
        except DatabaseUnavailable as err:
            logger.warning("rescue_postponed reason=%s", err)
            return
        for job_id in reaped.requeued:
            logger.warning("job_rescued job_id=%s", job_id)
        for job_id in reaped.buried:
            logger.error("job_buried job_id=%s", job_id)
        if expired:
            logger.info("jobs_expired count=%d", expired)
