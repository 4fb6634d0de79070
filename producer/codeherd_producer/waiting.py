"""Find out which jobs have ended, by listening and by looking.

Owns: the one loop behind every wait. SQL is the truth and is looked at every `poll_interval_s`
whatever happens; news from the broker only makes it faster. Does not know what a job ended with.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection
from typing import Self

from codeherd_producer.courier import Courier, Listener
from codeherd_schema.errors import BrokerUnavailable
from codeherd_schema.store import Store

#: A look at very many jobs takes a while; the pause after it is at least this many times longer.
PAUSE_PER_LOOK = 10.0
#: Seconds for which more news is gathered after the first, where several jobs are watched: SQL is asked once
#: for all of it.
GATHER_S = 0.02


class Watch:
    """A set of jobs to wait for. One thread waits, any thread may add and drop."""

    def __init__(
        self,
        store: Store,
        courier: Courier,
        *,
        poll_interval_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Watch no job yet. `clock` gives seconds, from any start."""
        self._store = store
        self._courier = courier
        self._poll_interval_s = poll_interval_s
        self._clock = clock
        self._lock = threading.Lock()
        self._watched: set[str] = set()
        self._listener: Listener | None = None
        self._listen_at = float("-inf")
        self._look_at = float("-inf")
        self._pause = threading.Event()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        with self._lock:
            return len(self._watched)

    def add(self, job_ids: Collection[str]) -> None:
        """Wait for these too; one that ended before is found at the next look."""
        with self._lock:
            self._watched.update(job_ids)

    def drop(self, job_ids: Collection[str]) -> None:
        """Wait for these no longer."""
        with self._lock:
            self._watched.difference_update(job_ids)

    def wait(self, timeout_s: float) -> frozenset[str]:
        """Return watched jobs that have ended (or do not exist), and drop them from the watch.

        Looks at least once, returns as soon as there is one, and empty after `timeout_s` seconds.

        Raises:
            DatabaseUnavailable: the jobs go on; wait again.
        """
        until = self._clock() + timeout_s
        while True:
            if self._clock() >= self._look_at:
                ended = self._look()
            else:
                ended = self._settled(self._hear(min(until, self._look_at) - self._clock()))
            if ended or self._clock() >= until:
                return ended
            self._listen()

    def close(self) -> None:
        """Stop listening."""
        listener, self._listener = self._listener, None
        if listener is not None:
            listener.close()

    def _listen(self) -> None:
        if self._listener is None and self._clock() >= self._listen_at:
            self._listener = self._courier.listen()
            self._listen_at = self._clock() + self._poll_interval_s
            if self._listener is not None:
                # Look again: a job may have ended between the last look and the first news.
                self._look_at = float("-inf")

    def _look(self) -> frozenset[str]:
        began = self._clock()
        with self._lock:
            watched = frozenset(self._watched)
        ended = self._settled(watched)
        took = self._clock() - began
        self._look_at = began + took + max(self._poll_interval_s, PAUSE_PER_LOOK * took)
        return ended

    def _hear(self, timeout_s: float) -> frozenset[str]:
        if timeout_s <= 0:
            return frozenset()
        if self._listener is None:
            self._pause.wait(timeout_s)
            return frozenset()
        until = self._clock() + timeout_s
        try:
            news = self._listener.wait(timeout_s)
            if news and len(self) > 1:
                until = min(until, self._clock() + GATHER_S)
                while (left_s := until - self._clock()) > 0:
                    news |= self._listener.wait(left_s)
            return news
        except BrokerUnavailable:
            # The courier says so in the log when it cannot listen again.
            self.close()
            return frozenset()

    def _settled(self, job_ids: Collection[str]) -> frozenset[str]:
        with self._lock:
            asked = self._watched.intersection(job_ids)
        # Even news is checked: a requeued job's old ending may still be on its way.
        ended = asked - self._store.pending(asked) if asked else set()
        self.drop(ended)
        return frozenset(ended)
