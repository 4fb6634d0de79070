"""The rows: one job, its result, its attempts; one run of a backfill, its files, their targets.

Owns: tables, columns, indexes and constraints, and the revision of the schema that they describe.
Does not know statements (`codeherd_schema.store`, `codeherd_schema.backfills`) or how a database gets there
(`migrations`).

Every time is in seconds since 1970 by the database's clock, and only SQL written with
`codeherd_schema.database.now` sets it. JSON is kept as ASCII text: generated text may hold a NUL
character, which PostgreSQL's own text and JSON types refuse. Paths are kept as bytes: a name may be no
UTF-8, and bytes have one order on both databases, whatever the collation.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Final

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    ColumnElement,
    Double,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    SmallInteger,
    String,
    Table,
    Text,
    UniqueConstraint,
    and_,
    exists,
    literal_column,
    or_,
    text,
)

from codeherd_schema.backfill_states import FileState, RunState, TargetState
from codeherd_schema.database import now
from codeherd_schema.states import FINAL_STATES, JobState, PauseScope

#: The migration whose tables these are.
REVISION: Final = "0001"

metadata = MetaData()


def _words(states: frozenset[JobState]) -> str:
    return _list(state for state in JobState if state in states)


def _list(words: Iterable[str]) -> str:
    return ", ".join(f"'{word}'" for word in words)


jobs = Table(
    "jobs",
    metadata,
    # UUID version 7: ids sort by the time of submission.
    Column("id", String(36), primary_key=True),
    Column("tenant", String(64), nullable=False, server_default="default"),
    Column("kind", String(16), nullable=False),
    Column("model", String(64), nullable=False),
    Column("queue", String(128), nullable=False),
    Column("state", String(16), nullable=False),
    Column("priority", SmallInteger, nullable=False),
    # The request as `dump_request` gives it, and the version of that form.
    Column("schema_version", Integer, nullable=False),
    Column("payload", Text, nullable=False),
    # Of jobs with an idempotency key.
    Column("content_sha256", String(64)),
    # Number of the current or last attempt; claim counts it up, release takes it back.
    Column("attempt", Integer, nullable=False, server_default="0"),
    # Attempts that ended because their worker was lost.
    Column("crash_count", Integer, nullable=False, server_default="0"),
    Column("max_attempts", Integer, nullable=False),
    # Both are set while running and only then.
    Column("lease_id", String(36)),
    Column("lease_until", Double),
    # Of the current or last attempt.
    Column("worker_id", String(255)),
    # Due from here on.
    Column("run_at", Double, nullable=False),
    # Not to be started, not to be running after these.
    Column("expires_at", Double),
    Column("deadline", Double),
    Column("cancel_requested_at", Double),
    # When and how often a hint was sent; no time means that one is owed.
    Column("published_at", Double),
    Column("publish_no", Integer, nullable=False, server_default="0"),
    Column("idempotency_key", String(255)),
    # What a job belongs to: one submit of many, one run of a review or backfill, one line of a file.
    Column("batch_id", String(64)),
    Column("run_id", String(64)),
    Column("custom_id", String(512)),
    # Who shares places with whom: `codeherd_schema.lanes`.
    Column("lane", Text, nullable=False),
    # A newer generation of the same run supersedes the older ones.
    Column("generation", Integer, nullable=False, server_default="0"),
    # Sorted JSON object of strings.
    Column("labels", Text, nullable=False, server_default="{}"),
    # Of the last attempt that ended with an error.
    Column("error_code", String(64)),
    Column("error_message", Text),
    Column("created_at", Double, nullable=False),
    # When the current or last attempt was claimed; when the job came to a final state.
    Column("started_at", Double),
    Column("finished_at", Double),
    UniqueConstraint("tenant", "idempotency_key", name="uq_jobs_tenant_idempotency_key"),
    CheckConstraint(f"state IN ({_words(frozenset(JobState))})", name="ck_jobs_state"),
    CheckConstraint("priority BETWEEN 0 AND 9", name="ck_jobs_priority"),
    CheckConstraint("attempt >= 0 AND attempt <= max_attempts", name="ck_jobs_attempt"),
    CheckConstraint(
        "(state = 'running') = (lease_id IS NOT NULL AND lease_until IS NOT NULL)", name="ck_jobs_lease"
    ),
    CheckConstraint(
        f"(state IN ({_words(FINAL_STATES)})) = (finished_at IS NOT NULL)", name="ck_jobs_finished"
    ),
)

_QUEUED = text("state = 'queued'")
_HINTED = text("state = 'queued' AND published_at IS NOT NULL")
_RUNNING = text("state = 'running'")
_FINISHED = text("finished_at IS NOT NULL")
_BATCHED = text("batch_id IS NOT NULL")
# No index starts with the state alone: SQLite would take it for everything and never look at these.
# due: the lanes of a priority, and the oldest job of a lane. queues_with_work, queue_depths.
Index(
    "ix_jobs_lanes",
    jobs.c.queue,
    jobs.c.priority,
    jobs.c.lane,
    jobs.c.id,
    jobs.c.run_at,
    sqlite_where=_QUEUED,
    postgresql_where=_QUEUED,
)
# due and unclaimed: what was hinted at.
Index(
    "ix_jobs_hinted",
    jobs.c.queue,
    jobs.c.published_at,
    jobs.c.lane,
    sqlite_where=_HINTED,
    postgresql_where=_HINTED,
)
# expire_due.
Index("ix_jobs_queued_expires", jobs.c.expires_at, sqlite_where=_QUEUED, postgresql_where=_QUEUED)
Index("ix_jobs_queued_deadline", jobs.c.deadline, sqlite_where=_QUEUED, postgresql_where=_QUEUED)
# reap.
Index("ix_jobs_running_lease", jobs.c.lease_until, sqlite_where=_RUNNING, postgresql_where=_RUNNING)
# list and count_by_state.
Index("ix_jobs_finished", jobs.c.state, jobs.c.id, sqlite_where=_FINISHED, postgresql_where=_FINISHED)
# prune.
Index("ix_jobs_finished_at", jobs.c.finished_at, sqlite_where=_FINISHED, postgresql_where=_FINISHED)
Index("ix_jobs_batch", jobs.c.batch_id, jobs.c.id, sqlite_where=_BATCHED, postgresql_where=_BATCHED)

results = Table(
    "results",
    metadata,
    Column("job_id", String(36), ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    Column("attempt", Integer, nullable=False),
    # The whole `Result`.
    Column("payload", Text, nullable=False),
    # Copies of some of its fields, for reports. Of the first candidate: `finish_reason`.
    Column("model", String(64), nullable=False),
    Column("prompt_tokens", Integer, nullable=False),
    Column("completion_tokens", Integer, nullable=False),
    Column("finish_reason", String(16), nullable=False),
    Column("created_at", Double, nullable=False),
)

attempts = Table(
    "attempts",
    metadata,
    # (job_id, attempt) is no key: release and requeue give numbers out again.
    Column("id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True),
    Column("job_id", String(36), ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False),
    Column("attempt", Integer, nullable=False),
    # One lease is one attempt: a second ending of the same one is refused by the database.
    Column("lease_id", String(36), nullable=False),
    Column("worker_id", String(255), nullable=False),
    Column("started_at", Double, nullable=False),
    Column("ended_at", Double, nullable=False),
    # The move that ended it.
    Column("outcome", String(16), nullable=False),
    Column("error_code", String(64)),
    Column("error_message", Text),
    UniqueConstraint("lease_id", name="uq_attempts_lease_id"),
    Index("ix_attempts_job", "job_id", "id"),
)

pauses = Table(
    "pauses",
    metadata,
    Column("scope", String(16), primary_key=True),
    Column("name", String(128), primary_key=True),
    Column("reason", Text, nullable=False),
    Column("since", Double, nullable=False),
    CheckConstraint(f"scope IN ({_list(PauseScope)})", name="ck_pauses_scope"),
)

backfill_runs = Table(
    "backfill_runs",
    metadata,
    # UUID version 7.
    Column("id", String(36), primary_key=True),
    Column("root", LargeBinary, nullable=False),
    Column("model", String(64), nullable=False),
    # JSON object.
    Column("options", Text, nullable=False),
    Column("state", String(16), nullable=False),
    Column("created_at", Double, nullable=False),
    Column("finished_at", Double),
    CheckConstraint(f"state IN ({_list(RunState)})", name="ck_backfill_runs_state"),
    # A run that was done may be taken up again: if nothing is left to do, it ended when it did.
    CheckConstraint(
        "state = 'running' OR (state IN ('done', 'stopped')) = (finished_at IS NOT NULL)",
        name="ck_backfill_runs_finished",
    ),
)

backfill_files = Table(
    "backfill_files",
    metadata,
    Column("id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True),
    Column("run_id", String(36), ForeignKey("backfill_runs.id", ondelete="CASCADE"), nullable=False),
    # From the root, with `/`.
    Column("path", LargeBinary, nullable=False),
    # Of the planned bytes; empty if they were not read.
    Column("sha256", String(64), nullable=False),
    # As the file spells it.
    Column("encoding", Text),
    Column("state", String(16), nullable=False),
    Column("reason", Text),
    # Number of the exchange that was asked last; -1 before the first.
    Column("exchange", Integer, nullable=False),
    # Symbols that have a docstring, and JSON: how many others are no targets, by reason.
    Column("documented", Integer, nullable=False),
    Column("passed_over", Text, nullable=False),
    # Counts of the rows below this one, so that nobody counts a million of them to show a progress.
    Column("targets", Integer, nullable=False),
    Column("accepted", Integer, nullable=False, server_default="0"),
    Column("rejected", Integer, nullable=False, server_default="0"),
    Column("questions", Integer, nullable=False, server_default="0"),
    Column("tokens", BigInteger, nullable=False, server_default="0"),
    UniqueConstraint("run_id", "path", name="uq_backfill_files_path"),
    # files, ready, progress.
    Index("ix_backfill_files_state", "run_id", "state", "path"),
    CheckConstraint(f"state IN ({_list(FileState)})", name="ck_backfill_files_state"),
    # Whoever still holds the id of a deleted run's file must not meet another one under it.
    sqlite_autoincrement=True,
)

backfill_targets = Table(
    "backfill_targets",
    metadata,
    Column("id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True),
    Column(
        "file_id",
        BigInteger().with_variant(Integer, "sqlite"),
        ForeignKey("backfill_files.id", ondelete="CASCADE"),
        nullable=False,
    ),
    # Number of the symbol in the scan of its file.
    Column("place", Integer, nullable=False),
    Column("name", Text, nullable=False),
    Column("twin", Integer, nullable=False),
    Column("line", Integer, nullable=False),
    Column("kind", String(16), nullable=False),
    # Of its own code: by it a symbol is known again in another version of the file.
    Column("code_sha256", String(64), nullable=False),
    Column("state", String(16), nullable=False),
    # The accepted text as a JSON string.
    Column("text", Text),
    # Of the last rejection.
    Column("reason", Text),
    Column("score", Double),
    # In which it was judged last; -1 before.
    Column("exchange", Integer, nullable=False, server_default="-1"),
    UniqueConstraint("file_id", "place", name="uq_backfill_targets_place"),
    CheckConstraint(f"state IN ({_list(TargetState)})", name="ck_backfill_targets_state"),
    CheckConstraint("(state = 'accepted') = (text IS NOT NULL)", name="ck_backfill_targets_text"),
    sqlite_autoincrement=True,
)

backfill_questions = Table(
    "backfill_questions",
    metadata,
    # The key begins as `ready` asks: the jobs of one exchange of one file.
    Column(
        "file_id",
        BigInteger().with_variant(Integer, "sqlite"),
        ForeignKey("backfill_files.id", ondelete="CASCADE"),
        primary_key=True,
    ),
    Column("exchange", Integer, primary_key=True),
    Column("target_id", BigInteger, primary_key=True),
    Column("number", Integer, primary_key=True),
    # No foreign key: jobs are pruned on their own.
    Column("job_id", String(36), nullable=False),
)

backfill_candidates = Table(
    "backfill_candidates",
    metadata,
    Column(
        "target_id",
        BigInteger().with_variant(Integer, "sqlite"),
        ForeignKey("backfill_targets.id", ondelete="CASCADE"),
        primary_key=True,
    ),
    Column("exchange", Integer, primary_key=True),
    Column("number", Integer, primary_key=True),
    # Among the candidates of one job.
    Column("place", Integer, primary_key=True),
    # JSON string.
    Column("text", Text, nullable=False),
    Column("seed", BigInteger, nullable=False),
    Column("tokens", Integer, nullable=False),
    # Mean of its tokens, natural logarithm.
    Column("logprob", Double),
    # Why it was not taken.
    Column("reason", Text),
    # JSON object of numbers.
    Column("score_parts", Text, nullable=False),
)

#: Written by the migrations.
revisions = Table("alembic_version", MetaData(), Column("version_num", String(32), primary_key=True))


def state_is(*states: JobState) -> ColumnElement[bool]:
    """Return the condition that a job is in one of `states`, in words that the partial indexes know."""
    return or_(*(_state_is(state) for state in states))


def _state_is(state: JobState) -> ColumnElement[bool]:
    # Not a parameter: no planner could tell that a partial index covers the query.
    is_it = jobs.c.state == literal_column(f"'{state}'")
    return and_(is_it, jobs.c.finished_at.is_not(None)) if state in FINAL_STATES else is_it


def unseen_state_is(*states: JobState) -> ColumnElement[bool]:
    """Return the same condition for jobs that are named by their ids, in words that no index knows.

    PostgreSQL with old statistics takes an index of all queued jobs for smaller than one look at the key.
    """
    unseen = jobs.c.state.concat(literal_column("''"))
    return or_(*(unseen == literal_column(f"'{state}'") for state in states))


# Built once: it is a part of every look for hints.
@functools.cache
def is_due() -> ColumnElement[bool]:
    """Return the condition that a job may be started now, by the database's clock."""
    return and_(state_is(JobState.QUEUED), _may_start())


# Built once: it is a part of every claim.
@functools.cache
def is_due_by_id() -> ColumnElement[bool]:
    """Return the same condition for jobs that are named by their ids; see `unseen_state_is`."""
    return and_(unseen_state_is(JobState.QUEUED), _may_start())


def _may_start() -> ColumnElement[bool]:
    return and_(
        jobs.c.run_at <= now(),
        jobs.c.cancel_requested_at.is_(None),
        jobs.c.attempt < jobs.c.max_attempts,
        or_(jobs.c.expires_at.is_(None), jobs.c.expires_at > now()),
        or_(jobs.c.deadline.is_(None), jobs.c.deadline > now()),
        ~_is_paused(),
    )


def paused_column(scope: PauseScope) -> Column[str]:
    """Return the column that a pause of this scope names a value of."""
    return {
        PauseScope.QUEUE: jobs.c.queue,
        PauseScope.BATCH: jobs.c.batch_id,
        PauseScope.RUN: jobs.c.run_id,
        PauseScope.TENANT: jobs.c.tenant,
    }[scope]


def _is_paused() -> ColumnElement[bool]:
    # One look at a table of few rows by its key, for each scope.
    named = (
        and_(pauses.c.scope == literal_column(f"'{scope}'"), pauses.c.name == paused_column(scope))
        for scope in PauseScope
    )
    return exists().where(or_(*named))
