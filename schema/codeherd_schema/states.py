"""The states of a job and the only moves between them.

Owns: the state words, the moves, which states are final. Does not know SQL: each move here is one
conditional UPDATE in `codeherd_schema.store`. `docs/states.md` is generated from this table.

    queued ── claim ──> running ── succeed ──> succeeded
      │                   ├─ fail ──────> failed      an error that another attempt cannot mend
      │                   ├─ retry ─────> queued      an error that another attempt may mend
      │                   ├─ release ───> queued      the worker stops or sets it apart; no attempt is burnt
      │                   ├─ reap ──────> queued      the lease ran out: the worker is lost
      │                   ├─ bury ──────> dead        too many attempts or crashes
      │                   ├─ cancel ────> cancelled
      │                   └─ expire ────> expired     the deadline passed
      ├─ cancel ──> cancelled
      └─ expire ──> expired                           not started in time
    failed, dead, cancelled, expired ── requeue ──> queued
"""

from __future__ import annotations

from enum import StrEnum


class JobState(StrEnum):
    """Where a job is in its life."""

    #: Committed and waiting. Set by submit, retry, release, reap and requeue.
    QUEUED = "queued"
    #: A worker holds a lease on it. Set by claim alone.
    RUNNING = "running"
    #: Exactly one result is stored. Never left.
    SUCCEEDED = "succeeded"
    #: An error that another attempt cannot mend; `error_code` says which.
    FAILED = "failed"
    #: A person or program withdrew it.
    CANCELLED = "cancelled"
    #: It was not started, or not finished, in the time its request allowed.
    EXPIRED = "expired"
    #: It used up its attempts, or killed too many workers; a person should look.
    DEAD = "dead"


class Move(StrEnum):
    """What can happen to a job."""

    CLAIM = "claim"
    SUCCEED = "succeed"
    FAIL = "fail"
    RETRY = "retry"
    RELEASE = "release"
    REAP = "reap"
    BURY = "bury"
    CANCEL = "cancel"
    EXPIRE = "expire"
    REQUEUE = "requeue"


#: Every legal move: (move, from) -> to. What is not here cannot happen.
MOVES: dict[tuple[Move, JobState], JobState] = {
    (Move.CLAIM, JobState.QUEUED): JobState.RUNNING,
    (Move.SUCCEED, JobState.RUNNING): JobState.SUCCEEDED,
    (Move.FAIL, JobState.RUNNING): JobState.FAILED,
    (Move.RETRY, JobState.RUNNING): JobState.QUEUED,
    (Move.RELEASE, JobState.RUNNING): JobState.QUEUED,
    (Move.REAP, JobState.RUNNING): JobState.QUEUED,
    (Move.BURY, JobState.RUNNING): JobState.DEAD,
    (Move.CANCEL, JobState.QUEUED): JobState.CANCELLED,
    (Move.CANCEL, JobState.RUNNING): JobState.CANCELLED,
    (Move.EXPIRE, JobState.QUEUED): JobState.EXPIRED,
    (Move.EXPIRE, JobState.RUNNING): JobState.EXPIRED,
    (Move.REQUEUE, JobState.FAILED): JobState.QUEUED,
    (Move.REQUEUE, JobState.DEAD): JobState.QUEUED,
    (Move.REQUEUE, JobState.CANCELLED): JobState.QUEUED,
    (Move.REQUEUE, JobState.EXPIRED): JobState.QUEUED,
}

#: A job in one of these is left alone unless somebody asks for a requeue.
FINAL_STATES: frozenset[JobState] = frozenset(
    {JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED, JobState.EXPIRED, JobState.DEAD}
)


def sources(move: Move) -> tuple[JobState, ...]:
    """Return the states from which `move` is legal."""
    return tuple(source for (name, source) in MOVES if name is move)


def target(move: Move) -> JobState:
    """Return the one state to which `move` leads."""
    return next(to for (name, _), to in MOVES.items() if name is move)


class PauseScope(StrEnum):
    """What can be paused: all jobs that have something in common."""

    #: All jobs of a model.
    QUEUE = "queue"
    #: All jobs of one submit of many.
    BATCH = "batch"
    #: All jobs of one run of a review or backfill.
    RUN = "run"
    #: All jobs of one owner.
    TENANT = "tenant"
