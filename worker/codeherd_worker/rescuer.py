"""Take back what lost workers held, and end what is out of time, from inside every worker.

Owns: when to look. The looking is one conditional UPDATE in the store, so any number of rescuers
may run at once; with one in every worker no dispatcher is needed for a rescue.
"""

from __future__ import annotations

import logging
import random  # spreads the herd's looks over time
import threading

from codeherd_schema.errors import DatabaseUnavailable
from codeherd_schema.store import Store

logger = logging.getLogger(__name__)


class Rescuer:
    """A thread that reaps expired leases and expires overdue jobs."""

    def __init__(self, store: Store, *, interval_s: float, max_crashes: int) -> None:
        """Prepare; `start` begins to look."""
        self._store = store
        self._interval_s = interval_s
        self._max_crashes = max_crashes
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="rescuer", daemon=True)

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def close(self) -> None:
        """Stop looking."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join()

    def look(self) -> None:
        """Look once."""
        reaped = self._store.reap(max_crashes=self._max_crashes)
        for job_id in reaped.requeued:
            logger.warning("job_rescued job_id=%s", job_id)
        for job_id in reaped.buried:
            logger.error("job_buried job_id=%s", job_id)
        expired = self._store.expire_due()
        if expired:
            logger.info("jobs_expired count=%d", expired)

    def _loop(self) -> None:
        while not self._stop.wait(self._interval_s * random.uniform(0.5, 1.5)):  # noqa: S311
            try:
                self.look()
            except DatabaseUnavailable as err:
                logger.warning("rescue_postponed reason=%s", err)
            except Exception:
                logger.exception("rescue_broken")
