"""What a worker does to the jobs it holds: claim, keep, and let go.

Owns: leases, and the end of an attempt with its history row. Every move is one conditional UPDATE,
fenced by lease id, attempt and state: a worker that lost its lease changes nothing. Does not know
what a job does between claim and end, or who takes expired leases back (`codeherd_schema.janitor`).
"""

from __future__ import annotations

import functools
import uuid
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any, Final

from sqlalchemy import (
    ColumnElement,
    Connection,
    Double,
    Row,
    bindparam,
    false,
    insert,
    or_,
    select,
    update,
)
from sqlalchemy.sql.dml import ReturningUpdate

from codeherd_schema.at_once import SUCCEED, success_values
from codeherd_schema.database import Database, now
from codeherd_schema.group_commit import GroupCommit
from codeherd_schema.jobs import Job, instant, job_of, storable
from codeherd_schema.requests import SCHEMA_VERSION, JobKind
from codeherd_schema.results import Result
from codeherd_schema.row_locks import in_turn
from codeherd_schema.states import FINAL_STATES, JobState, Move, target
from codeherd_schema.tables import attempts, is_due_by_id, jobs, results

#: Characters of an error message that are kept.
MAX_MESSAGE: Final = 2_000


# Built once: to build these for each job costs as much again as to run them.
_CLAIM: Final = (
    update(jobs)
    # What a newer version submitted waits for a newer worker. Each kind by itself: the values of a list are
    # put into the text of the statement anew at each execution.
    .where(jobs.c.schema_version <= SCHEMA_VERSION, or_(*(jobs.c.kind == kind.value for kind in JobKind)))
    .where(jobs.c.id == bindparam("this_job"), is_due_by_id())
    .values(
        state=target(Move.CLAIM).value,
        attempt=jobs.c.attempt + 1,
        lease_id=bindparam("new_lease"),
        lease_until=now() + bindparam("lease_s", type_=Double),
        worker_id=bindparam("this_worker"),
        started_at=now(),
    )
    .returning(*jobs.c)
)
_HEARTBEAT: Final = (
    update(jobs)
    .where(
        in_turn(
            # A lease id is never given twice, so the pairs need not be compared as pairs.
            jobs.c.id.in_(bindparam("these_jobs", expanding=True)),
            # And only a running job has one (`ck_jobs_lease`): were the state named here, PostgreSQL with old
            # statistics would read all running jobs instead of these.
            jobs.c.lease_id.in_(bindparam("these_leases", expanding=True)),
        )
    )
    .values(lease_until=now() + bindparam("lease_s", type_=Double))
    .returning(
        # The bare column: in RETURNING, SQLite 3.40 says that a NULL `IS NOT NULL`.
        jobs.c.lease_id,
        jobs.c.cancel_requested_at,
        jobs.c.deadline,
        now().label("now"),
    )
)
# As in the heartbeat; the attempts are compared afterwards.
_SUCCEED_ALL: Final = (
    update(jobs)
    .where(
        in_turn(
            jobs.c.id.in_(bindparam("these_jobs", expanding=True)),
            jobs.c.lease_id.in_(bindparam("these_leases", expanding=True)),
        )
    )
    .values(state=target(Move.SUCCEED).value, lease_id=None, lease_until=None, finished_at=now())
    .returning(jobs.c.id, jobs.c.attempt, jobs.c.worker_id, jobs.c.started_at, now().label("now"))
)
_INSERT_RESULT: Final = insert(results).values(created_at=now())
# Inline: nobody asks for the number that the row got.
_INSERT_ATTEMPT: Final = insert(attempts).inline()


@dataclass(frozen=True, slots=True)
class Claim:
    """One attempt at a job, owned by one worker until its lease ends."""

    job: Job
    lease_id: str
    attempt: int
    #: By the database's clock.
    claimed_at: datetime
    #: Seconds from being due until the claim.
    queue_s: float
    #: Seconds left by the database's clock at the claim; None without a deadline.
    deadline_in_s: float | None


@dataclass(frozen=True, slots=True)
class Beat:
    """What the worker learns while it keeps a lease."""

    cancel_requested: bool
    deadline_passed: bool


class Commit(StrEnum):
    """How the end of an attempt was received."""

    STORED = "stored"
    #: This attempt ended this way before: the answer to the first call got lost.
    ALREADY = "already"
    #: The lease is gone. Nothing was changed: drop what the attempt made.
    LOST = "lost"


class Leases:
    """A worker's view of the jobs."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def claim(
        self, job_id: str, *, worker_id: str, lease_s: float, queues: Collection[str] | None = None
    ) -> Claim | None:
        """Start an attempt at this job, or return None when it is not there to be had.

        None is no error: taken, ended, cancelled, early, late, or of another queue; drop the hint.

        Args:
            job_id: from the hint.
            worker_id: shown to people, kept in the history.
            lease_s: the job is another's after this many seconds without a heartbeat.
            queues: the queues this worker serves; None is all.
        """
        lease_id = str(uuid.uuid4())
        values: dict[str, Any] = {
            "this_job": job_id,
            "new_lease": lease_id,
            "lease_s": lease_s,
            "this_worker": storable(worker_id, most=255),
        }
        statement = _claim_of(None if queues is None else tuple(queues))
        rows = self._database.change(statement, values, fleeting=True)
        if not rows:
            return None
        [row] = rows
        return Claim(
            job=job_of(row),
            lease_id=lease_id,
            attempt=row.attempt,
            claimed_at=instant(row.started_at),
            queue_s=max(0.0, row.started_at - row.run_at),
            deadline_in_s=None if row.deadline is None else row.deadline - row.started_at,
        )

    def heartbeat(self, claims: Collection[Claim], *, lease_s: float) -> dict[str, Beat]:
        """Prolong the leases of all `claims` in one statement.

        Returns:
            What was learned, by lease id. A lease that is missing is lost: stop that attempt at
            once and commit nothing of it.
        """
        if not claims:
            return {}
        values = {
            "these_jobs": [claim.job.id for claim in claims],
            "these_leases": [claim.lease_id for claim in claims],
            "lease_s": lease_s,
        }
        rows = self._database.change(_HEARTBEAT, values, fleeting=True)
        return {
            row.lease_id: Beat(
                cancel_requested=row.cancel_requested_at is not None,
                deadline_passed=row.deadline is not None and row.deadline <= row.now,
            )
            for row in rows
        }

    def succeed(self, claim: Claim, result: Result) -> Commit:
        """Store the one result of the job and end it, in one transaction.

        Threads that meet here share the transaction. May be repeated after a `DatabaseUnavailable` until the
        answer is known.
        """
        if (result.job_id, result.attempt) != (claim.job.id, claim.attempt):
            raise ValueError("the result belongs to another attempt")
        return self._successes.do((claim, _result_row(result)))

    def fail(self, claim: Claim, *, code: str, message: str) -> Commit:
        """End the job with an error that another attempt cannot mend."""
        error = _error(code, message)
        return self._database.write(lambda connection: self._end(connection, claim, Move.FAIL, error))

    def retry(self, claim: Claim, *, code: str, message: str, delay_s: float) -> Commit:
        """Give the job back with an error that another attempt may mend, or bury it.

        It is due again after `delay_s`; dead if this was its last attempt; cancelled if that was
        asked for meanwhile.
        """
        error = _error(code, message)
        is_last = claim.attempt >= claim.job.max_attempts
        again: dict[str, Any] = {} if is_last else {"run_at": now() + delay_s, "published_at": None}
        move = Move.BURY if is_last else Move.RETRY
        return self._database.write(
            lambda connection: self._end_unless_cancelled(connection, claim, move, {**error, **again})
        )

    def release(self, claim: Claim) -> Commit:
        """Give the job back unfinished, since the worker stops: no attempt is burnt, due at once."""
        again = {"run_at": now(), "published_at": None, "attempt": jobs.c.attempt - 1}
        return self._database.write(
            lambda connection: self._end_unless_cancelled(connection, claim, Move.RELEASE, again)
        )

    def cancel_running(self, claim: Claim) -> Commit:
        """End the job as cancelled, whether the heartbeat or an operator said so."""
        return self._database.write(lambda connection: self._end(connection, claim, Move.CANCEL))

    def expire_running(self, claim: Claim) -> Commit:
        """End the job because its deadline passed."""
        return self._database.write(lambda connection: self._end(connection, claim, Move.EXPIRE))

    @functools.cached_property
    def _successes(self) -> GroupCommit[tuple[Claim, dict[str, Any]], Commit]:
        return GroupCommit(self._succeed_together)

    def _succeed_together(self, ends: Sequence[tuple[Claim, dict[str, Any]]]) -> list[Commit]:
        if self._database.dialect != "postgresql":
            return self._succeed_in_steps(ends)
        # By lease: one that comes twice, after an answer that got lost, would be written down twice.
        each = {claim.lease_id: row for claim, row in ends}
        rows = self._database.change(SUCCEED, success_values(each))
        stored = {row.lease_id for row in rows}
        others = [(claim, row) for claim, row in ends if claim.lease_id not in stored]
        commits = iter(self._succeed_in_steps(others) if others else ())
        return [Commit.STORED if claim.lease_id in stored else next(commits) for claim, _ in ends]

    def _succeed_in_steps(self, ends: Sequence[tuple[Claim, dict[str, Any]]]) -> list[Commit]:
        def work(connection: Connection) -> list[Commit]:
            # Two leases of one job can meet, and one of them is lost: its row could not tell which.
            firsts = {claim.job.id: claim for claim, _ in reversed(ends)}
            stored = _succeed_all(connection, firsts.values()) if len(ends) > 1 else set()
            commits = [
                Commit.STORED if claim.lease_id in stored else self._end(connection, claim, Move.SUCCEED)
                for claim, _ in ends
            ]
            rows = {
                claim.lease_id: row
                for (claim, row), commit in zip(ends, commits, strict=True)
                if commit is Commit.STORED
            }
            if rows:
                connection.execute(_INSERT_RESULT, [*rows.values()])
            return commits

        return self._database.write(work)

    def _end_unless_cancelled(
        self, connection: Connection, claim: Claim, move: Move, values: dict[str, Any]
    ) -> Commit:
        # A job that went back to the queue with a cancel request on it would never be claimed again.
        lease = (claim.job.id, claim.lease_id, claim.attempt)
        if end_attempt(connection, *lease, move, values, jobs.c.cancel_requested_at.is_(None)):
            return Commit.STORED
        if end_attempt(connection, *lease, Move.CANCEL, {}, jobs.c.cancel_requested_at.is_not(None)):
            return Commit.STORED
        return _commit_of_ended(connection, claim, {move, Move.CANCEL})

    def _end(
        self, connection: Connection, claim: Claim, move: Move, values: dict[str, Any] | None = None
    ) -> Commit:
        if end_attempt(connection, claim.job.id, claim.lease_id, claim.attempt, move, values or {}):
            return Commit.STORED
        return _commit_of_ended(connection, claim, {move})


def end_attempt(
    connection: Connection,
    job_id: str,
    lease_id: str,
    attempt: int,
    move: Move,
    values: dict[str, Any],
    *conditions: ColumnElement[bool],
) -> bool:
    """Make a `move` out of running and write the history row, or change nothing.

    Args:
        connection: in a transaction.
        job_id: with `lease_id` and `attempt`: the lease; it must be the job's at this moment.
        lease_id: see `job_id`.
        attempt: see `job_id`.
        move: where to.
        values: further columns of the job.
        conditions: what else must be true of the job.

    Returns:
        Whether the job was in that lease, and `conditions` were true.
    """
    statement = _ending(target(move))
    if values or conditions:
        statement = statement.where(*conditions).values(**values)
    lease = {"this_job": job_id, "this_lease": lease_id, "this_attempt": attempt}
    row = connection.execute(statement, lease).one_or_none()
    if row is None:
        return False
    connection.execute(_INSERT_ATTEMPT, _attempt_row(job_id, lease_id, attempt, move, values, row))
    return True


def _succeed_all(connection: Connection, claims: Collection[Claim]) -> set[str]:
    """End these attempts, each of another job, and return the leases of those that were the jobs' own.

    Raises:
        ValueError: nobody can have such a claim; the transaction must be rolled back.
    """
    leases = {
        "these_jobs": [claim.job.id for claim in claims],
        "these_leases": [claim.lease_id for claim in claims],
    }
    rows = {row.id: row for row in connection.execute(_SUCCEED_ALL, leases)}
    if any(rows[claim.job.id].attempt != claim.attempt for claim in claims if claim.job.id in rows):
        raise ValueError("a lease belongs to another attempt")
    ended = [
        _attempt_row(claim.job.id, claim.lease_id, claim.attempt, Move.SUCCEED, {}, rows[claim.job.id])
        for claim in claims
        if claim.job.id in rows
    ]
    if ended:
        connection.execute(_INSERT_ATTEMPT, ended)
    return {row["lease_id"] for row in ended}


def _attempt_row(
    job_id: str, lease_id: str, attempt: int, move: Move, values: Mapping[str, Any], ended: Row[Any]
) -> dict[str, Any]:
    return {
        "job_id": job_id,
        "attempt": attempt,
        "lease_id": lease_id,
        "worker_id": ended.worker_id,
        "started_at": ended.started_at,
        "ended_at": ended.now,
        "outcome": move.value,
        "error_code": values.get("error_code"),
        "error_message": values.get("error_message"),
    }


@functools.cache
def _ending(state: JobState) -> ReturningUpdate[Any]:
    return (
        update(jobs)
        .where(
            jobs.c.id == bindparam("this_job"),
            # Only a running job has a lease.
            jobs.c.lease_id == bindparam("this_lease"),
            jobs.c.attempt == bindparam("this_attempt"),
        )
        .values(
            state=state.value,
            lease_id=None,
            lease_until=None,
            finished_at=now() if state in FINAL_STATES else None,
        )
        .returning(jobs.c.worker_id, jobs.c.started_at, now().label("now"))
    )


@functools.lru_cache(maxsize=16)
def _claim_of(queues: tuple[str, ...] | None) -> ReturningUpdate[Any]:
    return _CLAIM if queues is None else _CLAIM.where(or_(false(), *(jobs.c.queue == q for q in queues)))


def _commit_of_ended(connection: Connection, claim: Claim, moves: Collection[Move]) -> Commit:
    outcome = connection.scalar(select(attempts.c.outcome).where(attempts.c.lease_id == claim.lease_id))
    return Commit.ALREADY if outcome in moves else Commit.LOST


def _error(code: str, message: str) -> dict[str, str]:
    return {"error_code": storable(code, most=64), "error_message": storable(message, most=MAX_MESSAGE)}


def _result_row(result: Result) -> dict[str, Any]:
    return {
        "job_id": result.job_id,
        "attempt": result.attempt,
        "payload": result.model_dump_json(ensure_ascii=True),
        "model": result.model,
        "prompt_tokens": result.prompt_tokens,
        "completion_tokens": result.completion_tokens,
        "finish_reason": result.candidates[0].finish_reason.value,
    }
