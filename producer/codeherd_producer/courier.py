"""What a client asks to be carried to workers and back, and the courier that carries nothing.

Owns: the errands. All of them may fail without harm: the rows in SQL say the same, and the
dispatcher, the heartbeats and the polls act on those. Does not know the broker
(`codeherd_producer.broker_courier`), so that a one-shot `codeherd submit` imports no Celery.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from codeherd_schema.hints import Hint


class Listener(Protocol):
    """Hears of ended jobs; may miss some."""

    def wait(self, timeout_s: float) -> frozenset[str]:
        """Return ids of jobs that ended, as soon as there is one; empty after `timeout_s` seconds.

        Raises:
            BrokerUnavailable: it will hear no more.
        """
        ...

    def close(self) -> None:
        """Stop listening."""
        ...


class Courier:
    """Stays at home: hints are left to the dispatcher, and waiting looks at SQL alone."""

    def room(self, queue: str) -> int:
        """Return how many hints for `queue` may be published now."""
        del queue
        return 0

    def publish(self, hints: Sequence[Hint]) -> bool:
        """Publish hints; return False if some may not have got there."""
        return not hints

    def request_cancel(self, job_id: str) -> None:
        """Tell the worker of a running job to stop now instead of at its next heartbeat."""

    def announce(self, job_id: str) -> None:
        """Tell whoever waits that a job has ended."""

    def listen(self) -> Listener | None:
        """Hear of ended jobs from now on; None if that is not possible now."""
        return None

    def close(self) -> None:
        """Close every connection."""
