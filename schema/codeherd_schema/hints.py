"""Decide which jobs a hint is owed for, and remember which were sent.

Owns: `published_at` and `publish_no`. A hint is a message that says "this job is due"; it may be
lost, doubled or late, and the next call makes up for it. Does not know the broker that carries it
(`codeherd_schema.broker`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from sqlalchemy import ColumnElement, bindparam, func, or_, select, update

from codeherd_schema.database import Database, now
from codeherd_schema.requests import JobKind
from codeherd_schema.states import JobState
from codeherd_schema.tables import is_due, jobs, state_is


@dataclass(frozen=True, slots=True)
class Hint:
    """What a message needs to say about a due job."""

    job_id: str
    queue: str
    kind: JobKind
    #: 0 runs first, 9 last.
    priority: int
    #: Makes the message's own id: an id once revoked would be refused for ever.
    publish_no: int


class Hints:
    """Chooses hints and keeps count of them."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def due(self, queue: str, *, limit: int, stale_s: float) -> list[Hint]:
        """Mark and return the due jobs of `queue` that are owed a hint, the first to run first.

        Args:
            queue: whose jobs.
            limit: most hints.
            stale_s: a job that is still waiting this many seconds after its hint is owed another.
        """
        owed = (
            select(jobs.c.id)
            .where(
                jobs.c.queue == queue,
                is_due(),
                or_(jobs.c.published_at.is_(None), jobs.c.published_at <= now() - stale_s),
            )
            .order_by(jobs.c.priority, jobs.c.id)
            .limit(limit)
            .with_for_update(skip_locked=True)
            .cte("owed")
        )
        return self._mark(jobs.c.id.in_(select(owed.c.id)), is_due())

    def mark_published(self, job_ids: Collection[str]) -> list[Hint]:
        """Mark and return those of `job_ids` that are due and were never hinted at, the first first.

        Used right after a submit or a release; the others are nobody's to publish, or another's.
        """
        return self._mark(jobs.c.id.in_(job_ids), is_due(), jobs.c.published_at.is_(None))

    def _mark(self, *conditions: ColumnElement[bool]) -> list[Hint]:
        statement = (
            update(jobs)
            .where(*conditions)
            .values(published_at=now(), publish_no=jobs.c.publish_no + 1)
            .returning(jobs.c.id, jobs.c.queue, jobs.c.kind, jobs.c.priority, jobs.c.publish_no)
        )
        rows = self._database.write(lambda connection: connection.execute(statement).all())
        return [
            Hint(row.id, row.queue, JobKind(row.kind), row.priority, row.publish_no)
            for row in sorted(rows, key=lambda row: (row.priority, row.id))
        ]

    def unpublish(self, hints: Iterable[Hint]) -> None:
        """Owe these hints again at once: they could not be sent. A newer hint is left alone."""
        statement = (
            update(jobs)
            .where(
                jobs.c.id == bindparam("hinted_id"),
                jobs.c.publish_no == bindparam("hinted_no"),
                state_is(JobState.QUEUED),
            )
            .values(published_at=None)
        )
        rows = [{"hinted_id": hint.job_id, "hinted_no": hint.publish_no} for hint in hints]
        if rows:
            self._database.write(lambda connection: connection.execute(statement, rows))

    def queues_with_work(self) -> list[str]:
        """Return the queues that hold queued jobs, due or not."""
        # Step from queue to queue through the index: a plain DISTINCT reads every queued job.
        first = select(func.min(jobs.c.queue).label("queue")).where(state_is(JobState.QUEUED))
        steps = first.cte("steps", recursive=True)
        following = (
            select(func.min(jobs.c.queue))
            .where(state_is(JobState.QUEUED), jobs.c.queue > steps.c.queue)
            .scalar_subquery()
        )
        steps = steps.union_all(select(following).where(steps.c.queue.is_not(None)))
        with self._database.read() as connection:
            return list(connection.scalars(select(steps.c.queue).where(steps.c.queue.is_not(None))))
