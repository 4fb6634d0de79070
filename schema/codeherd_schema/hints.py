"""Decide which jobs a hint is owed for, and remember which were sent.

Owns: `published_at` and `publish_no`, and the order of hints: by priority, then fairly among lanes
(`codeherd_schema.lanes`), then by age. A hint is a message that says "this job is due"; it may be
lost, doubled or late, and the next call makes up for it. Does not know the broker that carries it
(`codeherd_schema.broker`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import (
    Column,
    ColumnElement,
    Connection,
    and_,
    bindparam,
    func,
    select,
    union_all,
    update,
)

from codeherd_schema.database import Database, now
from codeherd_schema.lanes import owners_of, shares
from codeherd_schema.row_locks import if_free
from codeherd_schema.states import JobState, PauseScope
from codeherd_schema.submissions import IN_LIST
from codeherd_schema.tables import is_due, is_due_by_id, jobs, pauses, state_is, unseen_state_is

_OWE_AGAIN: Final = (
    update(jobs)
    .where(
        if_free(
            jobs.c.id.in_(bindparam("these_jobs", expanding=True)),
            unseen_state_is(JobState.QUEUED),
            jobs.c.published_at.is_not(None),
        )
    )
    .values(published_at=None)
    .returning(jobs.c.id)
)
_OWE_NOT_SENT: Final = (
    update(jobs)
    .where(
        jobs.c.id == bindparam("hinted_id"),
        jobs.c.publish_no == bindparam("hinted_no"),
        unseen_state_is(JobState.QUEUED),
    )
    .values(published_at=None)
)
#: The last of the priorities.
LEAST_URGENT: Final = 9
_MARK: Final = (
    update(jobs)
    .values(published_at=now(), publish_no=jobs.c.publish_no + 1)
    .returning(jobs.c.id, jobs.c.queue, jobs.c.kind, jobs.c.priority, jobs.c.publish_no)
)


@dataclass(frozen=True, slots=True)
class Hint:
    """What a message needs to say about a due job."""

    job_id: str
    queue: str
    #: A `JobKind`, or one of a newer version.
    kind: str
    #: 0 runs first, 9 last.
    priority: int
    #: Makes the message's own id: an id once revoked would be refused for ever.
    publish_no: int


class Hints:
    """Chooses hints and keeps count of them."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def due(self, queue: str, *, limit: int, up_to: int = LEAST_URGENT) -> list[Hint]:
        """Mark and return the due jobs of `queue` that are owed a hint, the first to run first.

        The first priority first; within it every tenant, and every batch of a tenant, in turn.

        Args:
            queue: whose jobs.
            limit: most hints.
            up_to: the last priority that is looked at.
        """

        def work(connection: Connection) -> list[Hint]:
            chosen = self._choose(connection, queue, limit, up_to)
            # Locked by now, all of them.
            wanted = and_(jobs.c.id.in_(chosen), is_due_by_id())
            return _marked(connection, wanted, order=chosen) if chosen else []

        return self._database.write(work, fleeting=True)

    def _choose(self, connection: Connection, queue: str, limit: int, up_to: int) -> list[str]:
        """Return ids of jobs that are owed a hint, first those of the first priority, fairly by lane."""
        chosen: list[str] = []
        held: Counter[str] | None = None
        # No paused job is due; but who looked at each of a paused backfill would look for long.
        found = connection.execute(select(pauses.c.scope, pauses.c.name))
        paused = {(row.scope, row.name) for row in found}
        if (PauseScope.QUEUE, queue) in paused:
            return []
        for priority in _stepped(
            connection, jobs.c.priority, jobs.c.queue == queue, jobs.c.priority <= up_to
        ):
            is_level = and_(jobs.c.queue == queue, jobs.c.priority == priority)
            lanes = _stepped(connection, jobs.c.lane, is_level)
            waiting = [lane for lane in lanes if not paused & _scopes_of(lane)]
            after: dict[str, str] = {}
            while waiting and len(chosen) < limit:
                held = _held(connection, queue) if held is None else held
                for lane, places in shares(waiting, held, limit - len(chosen)).items():
                    owed = _owed(connection, is_level, lane, after.get(lane, ""), places)
                    chosen += owed
                    held[lane] += len(owed)
                    if owed:
                        after[lane] = owed[-1]
                    if len(owed) < places:
                        waiting.remove(lane)
        return chosen

    def mark_published(self, job_ids: Collection[str]) -> list[Hint]:
        """Mark and return those of `job_ids` that are due and were never hinted at, the first first.

        Used right after a submit or a release; the others are nobody's to publish, or another's.
        """
        wanted = if_free(jobs.c.id.in_(job_ids), is_due_by_id(), jobs.c.published_at.is_(None))
        return self._database.write(lambda connection: _marked(connection, wanted), fleeting=True)

    def unpublish(self, hints: Iterable[Hint]) -> None:
        """Owe these hints again at once: they could not be sent. A newer hint is left alone."""
        rows = [
            {"hinted_id": hint.job_id, "hinted_no": hint.publish_no}
            # One statement each: by id, as all that wait for several jobs (`row_locks`).
            for hint in sorted(hints, key=lambda hint: hint.job_id)
        ]
        if rows:
            self._database.write(lambda connection: connection.execute(_OWE_NOT_SENT, rows), fleeting=True)

    def unclaimed(self, queue: str) -> frozenset[str]:
        """Return the ids of the jobs of `queue` that wait although a hint was sent: a few windows at most."""
        statement = select(jobs.c.id).where(
            state_is(JobState.QUEUED), jobs.c.published_at.is_not(None), jobs.c.queue == queue
        )
        with self._database.read() as connection:
            return frozenset(connection.scalars(statement))

    def owe_again(self, job_ids: Collection[str]) -> int:
        """Owe another hint for those of the jobs that still wait for a claim; return how many.

        Their hints were lost. Of one that was not, a worker will find the job taken.
        """
        ids = sorted(job_ids)

        def work(connection: Connection) -> int:
            return sum(
                len(connection.execute(_OWE_AGAIN, {"these_jobs": ids[start : start + IN_LIST]}).all())
                for start in range(0, len(ids), IN_LIST)
            )

        return self._database.write(work, fleeting=True) if ids else 0

    def queues_with_work(self) -> list[str]:
        """Return the queues that hold queued jobs, due or not."""
        with self._database.read() as connection:
            return [str(queue) for queue in _stepped(connection, jobs.c.queue)]


def _scopes_of(lane: str) -> set[tuple[str, str]]:
    tenant, batch = owners_of(lane)
    own = {(PauseScope.TENANT.value, tenant)}
    return own if batch is None else own | {(PauseScope.BATCH.value, batch)}


def _owed(
    connection: Connection, is_level: ColumnElement[bool], lane: str, after: str, limit: int
) -> list[str]:
    """Return ids of a lane's oldest jobs that are owed a hint, newer than the job `after`."""
    statement = (
        select(jobs.c.id)
        .where(
            is_level,
            jobs.c.lane == lane,
            jobs.c.id > after,
            is_due(),
            jobs.c.published_at.is_(None),
        )
        .order_by(jobs.c.id)
        .limit(limit)
        .with_for_update(skip_locked=True)
    )
    return list(connection.scalars(statement))


def _held(connection: Connection, queue: str) -> Counter[str]:
    """Return how many jobs of each lane run, or are hinted at and about to."""
    running = select(jobs.c.lane).where(state_is(JobState.RUNNING), jobs.c.queue == queue)
    hinted = select(jobs.c.lane).where(
        state_is(JobState.QUEUED), jobs.c.queue == queue, jobs.c.published_at.is_not(None)
    )
    return Counter(connection.scalars(union_all(running, hinted)))


def _stepped(connection: Connection, column: Column[Any], *conditions: ColumnElement[bool]) -> list[Any]:
    """Return the values of a column among queued jobs, ascending.

    Steps from value to value through an index: a plain DISTINCT reads every queued job.
    """
    is_wanted = and_(state_is(JobState.QUEUED), *conditions)
    steps = select(func.min(column).label("value")).where(is_wanted).cte("steps", recursive=True)
    following = select(func.min(column)).where(is_wanted, column > steps.c.value).scalar_subquery()
    steps = steps.union_all(select(following).where(steps.c.value.is_not(None)))
    return list(connection.scalars(select(steps.c.value).where(steps.c.value.is_not(None))))


def _marked(connection: Connection, wanted: ColumnElement[bool], order: Sequence[str] = ()) -> list[Hint]:
    """Mark the wanted jobs and return their hints in this order, else the first to run first."""
    places = {job_id: place for place, job_id in enumerate(order)}
    rows = connection.execute(_MARK.where(wanted)).all()
    return [
        Hint(row.id, row.queue, row.kind, row.priority, row.publish_no)
        for row in sorted(rows, key=lambda row: (places.get(row.id, 0), row.priority, row.id))
    ]
