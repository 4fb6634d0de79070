"""Keep the queues in Redis filled from SQL, and take back what was lost.

Owns: when to look, how many hints to send, what to do while Redis or SQL is away. Does not decide
which job is next (`codeherd_schema.hints`) or what becomes of a lost one (`codeherd_schema.janitor`).
Several may run at once: each change in SQL is one conditional UPDATE, so two of them share the work.

A hint can be lost in two ways:

    never sent (broker away, producer died)          sent at the next tick, for it was never marked
    gone (Redis forgot; taken by a worker that died) more jobs wait for a claim than the queue has messages:
                                                     Redis is asked which it holds; those that are missing for
                                                     `republish_after_s`, and so are with no worker that is
                                                     about to claim them, are sent again

A hint too many costs a worker one failed claim.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from codeherd_schema.broker import PRIORITY_STEPS, Broker
from codeherd_schema.errors import BrokerUnavailable, CodeherdError
from codeherd_schema.hints import LEAST_URGENT, Hint
from codeherd_schema.janitor import PRUNE_LIMIT
from codeherd_schema.settings import SharedSettings
from codeherd_schema.store import Store

logger = logging.getLogger(__name__)

DAY_S = 86_400.0
#: Longest pause after the broker or the database failed, seconds.
LONGEST_REST_S = 5.0
#: Share of the window that workers took since the last look, from which on to look again soon.
STARVED_SHARE = 0.5
#: Pause before that look, seconds.
STARVED_PAUSE_S = 0.05
#: Deletions in one look, each of `PRUNE_LIMIT` jobs, so that jobs cannot grow old faster than they go.
PRUNES_PER_LOOK = 20


@dataclass(frozen=True, slots=True)
class Tick:
    """What one look did: numbers of hints and jobs."""

    published: int = 0
    reaped: int = 0
    buried: int = 0
    expired: int = 0
    pruned: int = 0
    #: A queue was nearly empty and got as many hints as it may: look again soon.
    is_starved: bool = False


class Dispatcher:
    """Publishes due jobs, reaps lost ones and deletes old ones."""

    def __init__(
        self,
        store: Store,
        broker: Broker,
        settings: SharedSettings,
        *,
        clock: Callable[[], float] = time.monotonic,
        chance: random.Random | None = None,
    ) -> None:
        """Work between `store` and `broker`; `clock` gives seconds, `chance` spreads reaps."""
        self._store = store
        self._broker = broker
        self._settings = settings
        self._clock = clock
        self._chance = chance or random.Random()  # noqa: S311 -- spreads load, guards nothing
        self._reap_at = float("-inf")
        # Queue -> job -> when its message was first missed in Redis.
        self._missed: dict[str, dict[str, float]] = {}
        self._broker_rest = Rest(settings.dispatch_interval_s)
        self._database_rest = Rest(settings.dispatch_interval_s)

    def run(self, stop: threading.Event) -> None:
        """Look again and again until `stop` is set; no failure ends it."""
        while not stop.is_set():
            stop.wait(self._step())

    def run_once(self) -> Tick:
        """Look once: reap if it is time, expire, prune, publish.

        A broker that is away is logged, and left alone for a while.

        Raises:
            DatabaseUnavailable: what was done before stands; look again later.
            SchemaOutdated: somebody must run `codeherd db upgrade`.
        """
        reaped, buried, expired, pruned = self._tidy()
        published, is_starved = self._publish_due()
        return Tick(published, reaped, buried, expired, pruned, is_starved)

    def _step(self) -> float:
        """Look once, whatever happens; return the seconds to pause."""
        try:
            tick = self.run_once()
        except CodeherdError as err:
            return self._database_failed(err)
        except Exception:
            logger.exception("dispatch_broken")
            return self._database_rest.longer(self._clock())
        if self._database_rest.end():
            logger.info("dispatch_resumed")
        interval_s = self._settings.dispatch_interval_s
        return min(interval_s, STARVED_PAUSE_S) if tick.is_starved else interval_s

    def _database_failed(self, err: CodeherdError) -> float:
        if not self._database_rest.is_on:
            logger.error("dispatch_interrupted code=%s reason=%s", err.code, err)
        return self._database_rest.longer(self._clock())

    def _tidy(self) -> tuple[int, int, int, int]:
        if self._clock() < self._reap_at:
            return 0, 0, 0, 0
        # Workers reap too; the spread keeps them all from looking at the same moment.
        self._reap_at = self._clock() + self._settings.reap_interval_s * self._chance.uniform(0.75, 1.25)
        reaped = self._store.reap(max_crashes=self._settings.max_crashes)
        for job_id in reaped.requeued:
            logger.warning("job_reaped job_id=%s", job_id)
        for job_id in reaped.buried:
            logger.error("job_buried job_id=%s", job_id)
        expired = self._store.expire_due()
        if expired:
            logger.info("jobs_expired count=%d", expired)
        return len(reaped.requeued), len(reaped.buried), expired + len(reaped.expired), self._prune()

    def _prune(self) -> int:
        if not self._settings.retention_days:
            return 0
        pruned = 0
        for _ in range(PRUNES_PER_LOOK):
            count = self._store.prune(keep_s=self._settings.retention_days * DAY_S)
            pruned += count
            if count < PRUNE_LIMIT:
                break
        if pruned:
            logger.info("jobs_pruned count=%d", pruned)
        return pruned

    def _publish_due(self) -> tuple[int, bool]:
        if not self._broker_rest.is_over(self._clock()):
            return 0, False
        queues = self._store.queues_with_work()
        sent: list[_Sent] = []
        try:
            for queue in queues:
                sent.append(self._fill(queue))
        except BrokerUnavailable as err:
            if not self._broker_rest.is_on:
                logger.warning("broker_away reason=%s", err)
            self._broker_rest.longer(self._clock())
        else:
            if self._broker_rest.end():
                logger.info("broker_back")
        return sum(s.count for s in sent), any(s.is_starved for s in sent)

    def _fill(self, queue: str) -> _Sent:
        waiting = self._broker.waiting_by_step(queue)
        self._find_lost(queue, sum(waiting))
        room, up_to = room_for(waiting, self._settings.publish_window)
        if not room:
            return _Sent(0)
        hints = self._store.due(queue, limit=room, up_to=up_to)
        self._send(hints)
        if hints:
            again = sum(hint.publish_no > 1 for hint in hints)
            logger.info("hints_published queue=%s count=%d again=%d", queue, len(hints), again)
        is_drained = len(hints) >= STARVED_SHARE * self._settings.publish_window
        return _Sent(len(hints), is_starved=is_drained and len(hints) == room)

    def _find_lost(self, queue: str, waiting: int) -> None:
        """Owe again what is neither in Redis nor claimed, and was neither a while ago."""
        unclaimed = self._store.unclaimed(queue)
        if len(unclaimed) <= waiting:
            self._missed.pop(queue, None)
            return
        now, before = self._clock(), self._missed.get(queue, {})
        missed = {job_id: before.get(job_id, now) for job_id in unclaimed - self._broker.hinted(queue)}
        lost = {job_id for job_id, at in missed.items() if now - at >= self._settings.republish_after_s}
        self._missed[queue] = {job_id: at for job_id, at in missed.items() if job_id not in lost}
        if lost:
            logger.warning("hints_lost queue=%s count=%d", queue, self._store.owe_again(lost))

    def _send(self, hints: Sequence[Hint]) -> None:
        try:
            self._broker.publish(hints)
        except BrokerUnavailable:
            # Some may have got there; the others must not wait until they are stale.
            self._store.unpublish(hints)
            raise


def room_for(waiting: Sequence[int], window: int) -> tuple[int, int]:
    """Return how many hints may be sent, and down to which priority.

    What fills the window must not hold up what is more urgent: for that only messages count that are at
    least as urgent, since workers take them first. So a queue holds up to four windows.

    Args:
        waiting: messages for each of `PRIORITY_STEPS`.
        window: most messages.
    """
    lasts = (*(step - 1 for step in PRIORITY_STEPS[1:]), LEAST_URGENT)
    for place in reversed(range(len(lasts))):
        room = window - sum(waiting[: place + 1])
        if room > 0:
            return room, lasts[place]
    return 0, 0


@dataclass(frozen=True, slots=True)
class _Sent:
    count: int
    is_starved: bool = False


class Rest:
    """A pause that doubles with each failure in a row."""

    def __init__(self, first_s: float) -> None:
        self._first_s = first_s
        self._length_s = 0.0
        self._until = float("-inf")

    @property
    def is_on(self) -> bool:
        """Whether the last try failed."""
        return self._length_s > 0

    def is_over(self, now: float) -> bool:
        """Whether it is time for another try."""
        return now >= self._until

    def longer(self, now: float) -> float:
        """Note a failure; return the seconds until the next try."""
        self._length_s = min(LONGEST_REST_S, 2 * self._length_s or self._first_s)
        self._until = now + self._length_s
        return self._length_s

    def end(self) -> bool:
        """Note a success; return whether the last try had failed."""
        was_on = self.is_on
        self._length_s = 0.0
        return was_on
