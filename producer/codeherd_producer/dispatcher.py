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

A hint too many costs a worker one failed claim, or a thread that waits: a worker that wants to be empty for
one job (`codeherd_worker.quarantine`) takes hints and claims nothing meanwhile. So a job whose hint is lost
again, with no job of its queue claimed in between, waits twice as long for the next one, up to
`MOST_PATIENCE` times.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

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
#: Shortest pause between two looks, seconds.
SHORTEST_PAUSE_S = 0.05
#: Deletions in one look, each of `PRUNE_LIMIT` jobs, so that jobs cannot grow old faster than they go.
PRUNES_PER_LOOK = 20
#: Most times `republish_after_s` before a hint that was lost again and again is sent again.
MOST_PATIENCE = 8


@dataclass(frozen=True, slots=True)
class Tick:
    """What one look did: numbers of hints and jobs."""

    published: int = 0
    reaped: int = 0
    buried: int = 0
    expired: int = 0
    pruned: int = 0
    #: Seconds until a queue may be half empty; None if none gets empty soon.
    half_empty_in_s: float | None = None


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
        # Of each queue with work.
        self._trails: dict[str, _Trail] = {}
        self._broker_rest = Rest(settings.dispatch_interval_s)
        self._database_rest = Rest(settings.dispatch_interval_s)

    def run(self, stop: threading.Event) -> None:
        """Look again and again until `stop` is set; no failure ends it."""
        while not stop.is_set():
            stop.wait(self._step())

    def run_once(self) -> Tick:
        """Look once: reap if it is time, expire, prune, publish, and tell whoever waits for what has ended.

        A broker that is away is logged, and left alone for a while.

        Raises:
            DatabaseUnavailable: what was done before stands; look again later.
            SchemaOutdated: somebody must run `codeherd db upgrade`.
        """
        tick, ended = self._tidy()
        published, half_empty_in_s = self._speak(ended)
        return replace(tick, published=published, half_empty_in_s=half_empty_in_s)

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
        if tick.half_empty_in_s is None:
            return interval_s
        return min(interval_s, max(SHORTEST_PAUSE_S, tick.half_empty_in_s))

    def _database_failed(self, err: CodeherdError) -> float:
        if not self._database_rest.is_on:
            logger.error("dispatch_interrupted code=%s reason=%s", err.code, err)
        return self._database_rest.longer(self._clock())

    def _tidy(self) -> tuple[Tick, Sequence[str]]:
        """Reap, expire and prune if it is time; return the ids of the jobs that have ended by it."""
        if self._clock() < self._reap_at:
            return Tick(), ()
        # Workers reap too; the spread keeps them all from looking at the same moment.
        self._reap_at = self._clock() + self._settings.reap_interval_s * self._chance.uniform(0.75, 1.25)
        reaped = self._store.reap(max_crashes=self._settings.max_crashes)
        for job_id in reaped.requeued:
            logger.warning("job_reaped job_id=%s", job_id)
        for job_id in reaped.buried:
            logger.error("job_buried job_id=%s", job_id)
        expired = self._store.expire_due()
        if expired:
            logger.info("jobs_expired count=%d", len(expired))
        tick = Tick(
            reaped=len(reaped.requeued),
            buried=len(reaped.buried),
            expired=len(expired) + len(reaped.expired),
            pruned=self._prune(),
        )
        return tick, (*reaped.ended, *expired)

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

    def _speak(self, ended: Sequence[str]) -> tuple[int, float | None]:
        """Say which jobs have ended, and publish due ones; return how many, and `half_empty_in_s`."""
        if not self._broker_rest.is_over(self._clock()):
            # Whoever waits for what has ended looks at SQL as well.
            return 0, None
        sent: list[_Sent] = []
        try:
            self._broker.announce(*ended)
            queues = self._store.queues_with_work()
            self._trails = {queue: self._trails.get(queue) or _Trail() for queue in queues}
            for queue in queues:
                sent.append(self._fill(queue))
        except BrokerUnavailable as err:
            if not self._broker_rest.is_on:
                logger.warning("broker_away reason=%s", err)
            self._broker_rest.longer(self._clock())
        else:
            if self._broker_rest.end():
                logger.info("broker_back")
        soon = [s.half_empty_in_s for s in sent if s.half_empty_in_s is not None]
        return sum(s.count for s in sent), min(soon, default=None)

    def _fill(self, queue: str) -> _Sent:
        now, trail = self._clock(), self._trails[queue]
        # How fast a queue empties that gets its first hints now will be known in a moment.
        since_s = 0.0 if trail.filled_at is None else now - trail.filled_at
        trail.filled_at = now
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
        trail.unclaimed.update(hint.job_id for hint in hints)
        if len(hints) < room:
            # There is no more.
            return _Sent(len(hints))
        return _Sent(len(hints), half_empty_in_s(len(hints), since_s, self._settings.publish_window))

    def _find_lost(self, queue: str, waiting: int) -> None:
        """Owe again what is neither in Redis nor claimed, and was neither a while ago."""
        trail = self._trails[queue]
        unclaimed = self._store.unclaimed(queue)
        are_all_there = len(unclaimed) <= waiting
        if are_all_there or trail.unclaimed - unclaimed:
            # Nobody takes them, or somebody who claims: for the next hint there may be a free worker.
            trail.losses.clear()
        trail.unclaimed = set(unclaimed)
        if are_all_there:
            trail.missed.clear()
            return
        now = self._clock()
        missed = {job_id: trail.missed.get(job_id, now) for job_id in unclaimed - self._broker.hinted(queue)}
        lost = {
            job_id
            for job_id, at in missed.items()
            if now - at >= self._settings.republish_after_s * patience(trail.losses[job_id])
        }
        trail.missed = {job_id: at for job_id, at in missed.items() if job_id not in lost}
        if lost:
            trail.losses.update(lost)
            # They leave those that wait, and nobody has claimed them.
            trail.unclaimed -= lost
            logger.warning("hints_lost queue=%s count=%d", queue, self._store.owe_again(lost))

    def _send(self, hints: Sequence[Hint]) -> None:
        try:
            self._broker.publish(hints)
        except BrokerUnavailable:
            # Some may have got there; the others must not wait until they are stale.
            self._store.unpublish(hints)
            raise


def patience(losses: int) -> int:
    """Return how many times `republish_after_s` to wait for a claim, after so many lost hints in a row."""
    return min(MOST_PATIENCE, 1 << min(losses, MOST_PATIENCE))


def half_empty_in_s(taken: int, since_s: float, window: int) -> float:
    """Return how long it takes until half of a full window is taken, if it goes on like this.

    Args:
        taken: hints since the last look, as many as were sent now to have the window full again.
        since_s: seconds since then.
        window: most hints.
    """
    return since_s * window / (2 * taken)


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
    half_empty_in_s: float | None = None


@dataclass(slots=True)
class _Trail:
    """What is remembered of one queue's hints from look to look."""

    #: When it was last filled up, by the dispatcher's clock.
    filled_at: float | None = None
    #: Jobs that waited for a claim.
    unclaimed: set[str] = field(default_factory=set)
    #: Job -> when its message was first missed in Redis.
    missed: dict[str, float] = field(default_factory=dict)
    #: Job -> lost hints since any job of the queue was claimed.
    losses: Counter[str] = field(default_factory=Counter)


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
