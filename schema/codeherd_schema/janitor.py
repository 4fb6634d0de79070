"""Put right what nobody else will: leases of lost workers, and jobs that are too late.

Owns: who is given back, buried, cancelled or expired when a lease ran out, and what is deleted when it is
old. Any process may run it at any time, several at once too. Does not know how often
(`codeherd_producer.dispatcher`, workers).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import ColumnElement, Connection, Row, and_, delete, func, or_, select, update

from codeherd_schema.database import Database, now
from codeherd_schema.leases import end_attempt
from codeherd_schema.row_locks import if_free
from codeherd_schema.states import JobState, Move, target
from codeherd_schema.tables import jobs, state_is

#: Lost leases that one call takes back; the next call takes the rest.
REAP_LIMIT: Final = 500
#: Ended jobs that one call deletes: so few that nobody waits long for the lock.
PRUNE_LIMIT: Final = 500
#: What the history says about an attempt whose lease ran out.
WORKER_LOST: Final = {
    "error_code": "worker_lost",
    "error_message": "the worker stopped sending heartbeats and its lease ran out",
}


@dataclass(frozen=True, slots=True)
class Reaped:
    """Ids of the jobs whose worker was lost, by what became of them."""

    #: Due again at once; hints are owed.
    requeued: tuple[str, ...] = ()
    #: Dead: the attempts are used up, or too many workers died over it.
    buried: tuple[str, ...] = ()
    cancelled: tuple[str, ...] = ()
    expired: tuple[str, ...] = ()

    @property
    def ended(self) -> tuple[str, ...]:
        """Those that came to a final state."""
        return (*self.buried, *self.cancelled, *self.expired)


class Janitor:
    """Takes back what was lost."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def reap(self, *, max_crashes: int) -> Reaped:
        """End every attempt whose lease ran out.

        Args:
            max_crashes: a job that lost this many workers is dead, however many attempts are left.
        """

        def work(connection: Connection) -> Reaped:
            lost = connection.execute(
                select(
                    jobs.c.id,
                    jobs.c.lease_id,
                    jobs.c.attempt,
                    jobs.c.max_attempts,
                    jobs.c.crash_count,
                    jobs.c.cancel_requested_at,
                    jobs.c.deadline,
                    now().label("now"),
                )
                .where(state_is(JobState.RUNNING), jobs.c.lease_until < now())
                .order_by(jobs.c.lease_until)
                .limit(REAP_LIMIT)
                .with_for_update(skip_locked=True)
            ).all()
            moved: dict[Move, list[str]] = {}
            for row in lost:
                move = fate(row, max_crashes=max_crashes)
                if _take_back(connection, row, move):
                    moved.setdefault(move, []).append(row.id)
            return Reaped(
                requeued=tuple(moved.get(Move.REAP, ())),
                buried=tuple(moved.get(Move.BURY, ())),
                cancelled=tuple(moved.get(Move.CANCEL, ())),
                expired=tuple(moved.get(Move.EXPIRE, ())),
            )

        return self._database.write(work)

    def expire_due(self) -> tuple[str, ...]:
        """End every queued job that can no longer start or finish in its time; return their ids, in order."""
        # The state in both halves: else SQLite does not find the two partial indexes.
        is_late = or_(
            and_(state_is(JobState.QUEUED), jobs.c.expires_at <= now()),
            and_(state_is(JobState.QUEUED), jobs.c.deadline <= now()),
        )
        statement = (
            update(jobs)
            # Who is passed over is being claimed, cancelled or hinted at: the next call looks again.
            .where(if_free(is_late))
            .values(state=target(Move.EXPIRE).value, finished_at=now())
            .returning(jobs.c.id)
        )
        return self._database.write(lambda connection: tuple(sorted(connection.scalars(statement))))

    def count_old(self, *, keep_s: float) -> int:
        """Return how many jobs `prune` would delete."""
        statement = select(func.count()).select_from(jobs).where(_is_old(keep_s))
        with self._database.read() as connection:
            return connection.execute(statement).scalar_one()

    def prune(self, *, keep_s: float) -> int:
        """Delete jobs that ended more than `keep_s` seconds ago, with results and history; the oldest first.

        Their idempotency keys are free again: a submit that is repeated later than this is a new job.

        Returns:
            How many: `PRUNE_LIMIT` at most, so call again until there are fewer.
        """
        old = (
            select(jobs.c.id)
            .where(_is_old(keep_s))
            .order_by(jobs.c.finished_at)
            .limit(PRUNE_LIMIT)
            .with_for_update(skip_locked=True)
            .cte("old")
        )
        # The condition again: a requeue may have come between.
        statement = delete(jobs).where(jobs.c.id.in_(select(old.c.id)), _is_old(keep_s)).returning(jobs.c.id)
        return self._database.write(lambda connection: len(connection.execute(statement).all()))


def _is_old(keep_s: float) -> ColumnElement[bool]:
    return and_(jobs.c.finished_at.is_not(None), jobs.c.finished_at < now() - keep_s)


def fate(row: Row[Any], *, max_crashes: int) -> Move:
    """Decide what becomes of a running job whose worker was lost."""
    if row.cancel_requested_at is not None:
        return Move.CANCEL
    if row.deadline is not None and row.deadline <= row.now:
        return Move.EXPIRE
    if row.attempt >= row.max_attempts or row.crash_count + 1 >= max_crashes:
        return Move.BURY
    return Move.REAP


def _take_back(connection: Connection, row: Row[Any], move: Move) -> bool:
    values: dict[str, Any] = {**WORKER_LOST, "crash_count": jobs.c.crash_count + 1}
    if move is Move.REAP:
        values |= {"run_at": now(), "published_at": None}
    return end_attempt(connection, row.id, row.lease_id, row.attempt, move, values)
