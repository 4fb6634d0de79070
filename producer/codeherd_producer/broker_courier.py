"""Carry errands to the broker while it answers.

Owns: giving up fast, and staying off a broker that has just failed. Nothing here raises because the
broker is away. Does not know jobs or SQL.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from codeherd_producer.courier import Courier, Listener
from codeherd_schema.broker import Broker
from codeherd_schema.errors import BrokerUnavailable
from codeherd_schema.hints import Hint
from codeherd_schema.settings import SharedSettings

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: Seconds to go without a broker after it failed: a hung one costs `connect_timeout_s` once in this
#: time, and not at every submit.
REST_S = 5.0


class BrokerCourier(Courier):
    """Goes to the broker; threads may share it."""

    def __init__(self, settings: SharedSettings, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Remember where the broker is; the first errand connects."""
        self._broker = Broker(settings)
        self._window = settings.publish_window
        self._clock = clock
        self._rests_until = float("-inf")

    def room(self, queue: str) -> int:
        """Return how many hints for `queue` may be published now; 0 while the broker is away."""
        waiting = self._carry("room", lambda: self._broker.waiting(queue))
        return 0 if waiting is None else max(0, self._window - waiting)

    def publish(self, hints: Sequence[Hint]) -> bool:
        """Publish hints; return False if some may not have got there."""

        def errand() -> bool:
            self._broker.publish(hints)
            return True

        return self._carry("publish", errand) or False

    def request_cancel(self, job_id: str) -> None:
        """Tell the worker of a running job to stop now instead of at its next heartbeat."""
        self._carry("request_cancel", lambda: self._broker.request_cancel(job_id))

    def announce(self, job_id: str) -> None:
        """Tell whoever waits that a job has ended."""
        self._carry("announce", lambda: self._broker.announce(job_id))

    def listen(self) -> Listener | None:
        """Hear of ended jobs from now on; None while the broker is away."""
        return self._carry("listen", self._broker.endings)

    def close(self) -> None:
        """Close every connection."""
        self._broker.close()

    def _carry(self, errand: str, action: Callable[[], T]) -> T | None:
        if self._clock() < self._rests_until:
            return None
        try:
            return action()
        except BrokerUnavailable as err:
            self._rests_until = self._clock() + REST_S
            logger.warning("broker_away errand=%s rest_s=%g reason=%s", errand, REST_S, err)
            return None
